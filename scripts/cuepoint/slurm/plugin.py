"""What lets Snakemake's SLURM plugin hold out what happens on clusters: outages, preemption, jobs that are forgotten.

All of it was seen with snakemake-executor-plugin-slurm 2.8.0, and the tests see it again on a real cluster. The
plugin's own functions are wrapped, not replaced: each does as before until the case arises that it does not know.
"""

import logging
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

from cuepoint.errors import ConfigError, EnvironmentFault
from cuepoint.layout import Layout
from cuepoint.models import fetch_models
from cuepoint.settings import Settings
from cuepoint.slurm.client import keeps_accounting, queued
from cuepoint.slurm.orphans import remember_run

log = logging.getLogger("snakemake.logging")

_UNREACHABLE = "Unable to contact slurm controller"  # sbatch's words; the job was surely not accepted
_UNVERIFIED = "Unable to test the validity"  # the plugin's words when no database answers about an account
_TRY_AGAIN = 10.0  # seconds

# States after which a job may come back by itself or not; the controller knows which.
_IN_DOUBT = frozenset({"PREEMPTED", "NODE_FAIL"})
_OVER = "CANCELLED"  # a state that the plugin takes as a failure, so that Snakemake submits the job again


def prepare_executor(executor: Any, layout: Layout, settings: Settings) -> None:
    """Before the first job of a run: fetch its models, note its job name, collect SLURM's logs, and mend the plugin.

    `executor` is Snakemake's; nothing is done unless it is the SLURM plugin's. Raises ConfigError when the way in which
    it asks how jobs ended cannot work here.
    """
    if type(executor).__module__ != "snakemake_executor_plugin_slurm":
        return
    plugin = sys.modules[type(executor).__module__]
    if executor.get_status_command() == "sacct" and not keeps_accounting():
        raise ConfigError(
            "this cluster keeps no accounting (AccountingStorageType is accounting_storage/none), so sacct cannot say "
            "how jobs ended: add --slurm-status-command squeue, or set slurm-status-command: squeue in the profile"
        )
    fetch_models(settings, layout)
    _know_min_job_age(plugin)
    _verify_accounts_once(plugin)
    stopping = _stopping(executor)
    _submit_until_reached(executor, stopping)
    _watch(executor, plugin, stopping)
    remember_run(layout, executor.run_uuid)
    if not executor.workflow.executor_settings.logdir:
        executor.slurm_logdir = layout.logs.resolve() / "slurm"


def _know_min_job_age(plugin: ModuleType) -> None:
    """Let the plugin know MinJobAge from now on.

    It asks for it at each poll, and when the controller does not answer it turns from squeue to sacct. Where there is
    no accounting database it then waits for ever, outage over or not.
    """
    age = plugin.get_min_job_age()
    plugin.get_min_job_age = lambda: age  # type: ignore[attr-defined]


def _verify_accounts_once(plugin: ModuleType) -> None:
    """Ask the accounting database once about an account and not for each job, and let sbatch judge when it is away.

    Else each job that becomes ready during an outage of the database would fail, retries and all.
    """
    verify, verified = plugin.validate_account, set[str]()

    def validate_account(account: str, logger: Any) -> str:
        if account not in verified:
            try:
                verify(account, logger)
            except plugin.WorkflowError as error:
                if _UNVERIFIED not in str(error):
                    raise
                return account
            verified.add(account)
        return account

    plugin.validate_account = validate_account  # type: ignore[attr-defined]


def _stopping(executor: Any) -> threading.Event:
    """An event that is set when the executor is told to end, whatever the reason."""
    event = threading.Event()
    for name in ("shutdown", "cancel"):
        setattr(executor, name, _after(event.set, getattr(executor, name)))
    return event


def _after(first: Callable[[], None], then: Callable[[], None]) -> Callable[[], None]:
    def both() -> None:
        first()
        then()

    return both


def _submit_until_reached(executor: Any, stopping: threading.Event) -> None:
    """Submit a job when the controller is back, instead of failing it: an outage of minutes must cost no retries."""
    submit, report = executor.run_job, executor._report_job_error_threadsafe
    unreached: set[Any] = set()

    def report_unless_unreached(info: Any, msg: str) -> None:
        if _UNREACHABLE in msg:
            unreached.add(info.job)
        else:
            report(info, msg)

    def run_job(job: Any) -> None:  # in a thread of its own
        told = False
        while not stopping.is_set():
            submit(job)
            if job not in unreached:
                return
            unreached.discard(job)
            if not told:
                log.warning("SLURM's controller does not answer: jobs are submitted when it is back")
                told = True
            stopping.wait(_TRY_AGAIN)

    executor._report_job_error_threadsafe = report_unless_unreached
    executor.run_job = run_job


def _watch(executor: Any, plugin: ModuleType, stopping: threading.Event) -> None:
    """Correct what the plugin hears about its jobs, and say when nobody answers it.

    It takes for running, for ever: what sacct calls `CANCELLED by 1000`, a preempted job in a partition that cancels
    what it preempts, and a job that neither sacct nor squeue remembers, as after an outage longer than MinJobAge.
    """
    check, query = executor.check_active_jobs, plugin.query_job_status
    watched: set[str] = set()
    missed: set[str] = set()
    silent = False

    async def check_active_jobs(active_jobs: list[Any]) -> AsyncIterator[Any]:
        nonlocal watched
        watched = {job.external_jobid for job in active_jobs}
        async for job in check(active_jobs):
            yield job

    async def query_job_status(command: str, logger: Any) -> tuple[dict[str, str] | None, float | None]:
        nonlocal missed, silent
        states, seconds = await query(command, logger)
        if states is None and stopping.is_set():
            return {}, 0.0  # nothing is known of any job, and nobody waits for it any more
        if silent != (states is None):
            silent = states is None
            asked = command.split(maxsplit=1)[0]
            log.warning(
                f"{asked} gets no answer: jobs go on, it is asked again" if silent else f"{asked} answers again"
            )
        if states is None:
            return None, seconds
        states = {job: state.split(" ", 1)[0] for job, state in states.items()}
        # Just submitted jobs are missing too, from a database that is behind: twice in a row is asked about.
        missing = watched - states.keys() if not executor._submitted_job_clusters else set()
        doubtful = (missing & missed) | {job for job in watched if states.get(job) in _IN_DOUBT}
        missed = missing
        return states | judge(doubtful, executor.run_uuid), seconds

    executor.check_active_jobs = check_active_jobs
    plugin.query_job_status = query_job_status  # type: ignore[attr-defined]


def judge(doubtful: Iterable[str], run: str) -> Mapping[str, str]:
    """States of the jobs of a run that are in doubt: what the controller says, or that they are over.

    A job that will come back waits in the queue. Nothing is said while the controller does not answer.
    """
    if not (jobs := sorted(doubtful)):
        return {}
    try:
        known = {job.id: job.state for job in queued([run], ended=True)}
    except EnvironmentFault:
        return {}
    judged = {}
    for job in jobs:
        state = known.get(job)
        if state is None or state in _IN_DOUBT:
            why = "is not known any more" if state is None else f"has ended as {state}"
            log.warning(f"SLURM job {job} {why} and does not come back: it counts as cancelled")
            state = _OVER
        judged[job] = state
    return judged
