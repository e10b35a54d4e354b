"""SLURM: what a job asks for, and the jobs that a killed run left behind.

Snakemake's executor plugin names all jobs of one run with the run's ID. The main process notes that name before the
first job is submitted. A later start over the same results finds the jobs that bear a noted name and still go on:
without that the plugin would submit them a second time, to the same paths.
"""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from cuepoint import atomic
from cuepoint.errors import ConfigError, DataError, EnvironmentFault, LockedError
from cuepoint.layout import Layout
from cuepoint.locks import hold
from cuepoint.receipts import read_receipt
from cuepoint.settings import TranscribeSettings

log = logging.getLogger("snakemake.logging")

# Hours of audio that a job transcribes in an hour, at the least: what old GPUs do, so that a time limit that is derived
# from it holds on any. `slurm.audio_speed` replaces it by what the site's GPUs were measured to do.
_GPU_SPEED = {"tiny": 60.0, "base": 50.0, "small": 30.0, "distil": 25.0, "turbo": 25.0, "medium": 15.0, "large": 10.0}
_CPU_SLOWDOWN = 20.0
_SMALLEST_SPEED = 0.5
# Host memory while a model is loaded, in MB.
_WEIGHTS = {"tiny": 200, "base": 300, "small": 1000, "distil": 3000, "turbo": 3300, "medium": 3100, "large": 6200}

_START_MINUTES = 15  # imports, model from a cold shared file system, waiting for a lock
_BASE_MB = 4000  # CUDA's host memory, libraries, and the two Snakemakes of about 130 MB each around every job
_MB_PER_HOUR = 230  # one hour of decoded audio: 16,000 float32 a second
_DECODED_AT_ONCE = 4  # videos that wait decoded while one is transcribed, each taken to be as long as the longest

_SQUEUE_SECONDS = 60.0


@dataclass(frozen=True)
class QueuedJob:
    """A job as `squeue` shows it."""

    id: str
    state: str  # PENDING, RUNNING, COMPLETING, …
    comment: str  # the plugin's: rule_transcribe_wildcards_00000


def audio_lengths(receipts: Iterable[str | Path]) -> list[float]:
    """Seconds of audio behind each receipt, 0 for a video without.

    Raises FileNotFoundError while a receipt is missing: in a resource function that tells Snakemake "not known yet".
    """
    lengths = []
    for path in map(Path, receipts):
        path.stat()
        try:
            lengths.append(read_receipt(path).duration or 0.0)
        except DataError:
            lengths.append(0.0)  # the job itself says what is wrong; an estimate must not stop the whole run
    return lengths


def transcribe_minutes(
    lengths: Iterable[float], settings: TranscribeSettings, attempt: int = 1, speed: float | None = None
) -> int:
    """Run time in minutes to ask for, for audio of `lengths` seconds; more for each further `attempt`."""
    speed = speed or _guessed_speed(settings)
    return attempt * (_START_MINUTES + round(sum(lengths) / 60 / speed))


def transcribe_memory(lengths: Iterable[float], settings: TranscribeSettings, attempt: int = 1) -> int:
    """Host memory in MB to ask for, for audio of `lengths` seconds; more for each further `attempt`."""
    longest_hours = max(lengths, default=0.0) / 3600
    decoded = (1 + _DECODED_AT_ONCE) * longest_hours * _MB_PER_HOUR
    return attempt * (_BASE_MB + _weights(settings.model) + round(decoded))


def remember_run(layout: Layout, name: str) -> None:
    """Note the name that all SLURM jobs of the run that starts now will bear."""
    atomic.write_text(layout.slurm_runs, "".join(f"{known}\n" for known in [*_noted_runs(layout), name]))


def prepare_executor(executor: Any, layout: Layout) -> None:
    """Before the first job of a run: note its job name, and collect SLURM's logs with the others.

    `executor` is Snakemake's; nothing is done unless it is the SLURM plugin's. Raises ConfigError when the way in which
    it asks how jobs ended cannot work here.
    """
    if type(executor).__module__ != "snakemake_executor_plugin_slurm":
        return
    _check_status_command(executor.get_status_command())
    _outlive_outages(sys.modules[type(executor).__module__])
    remember_run(layout, executor.run_uuid)
    if not executor.workflow.executor_settings.logdir:
        executor.slurm_logdir = layout.logs.resolve() / "slurm"


def settle_orphans(layout: Layout, policy: Literal["wait", "cancel"], poll_seconds: float = 20.0) -> None:
    """Return when no SLURM job of an earlier, killed run works on these results any more.

    Costs one `stat` where no run ever used SLURM. While another run holds the results nothing is done: its jobs are no
    orphans. Raises EnvironmentFault when SLURM cannot be asked.
    """
    names = _noted_runs(layout)
    if not names:
        return
    try:
        with hold(layout.lock("run", "run"), f"another run over {layout.results}", wait=False):
            _settle(names, policy, poll_seconds)
            layout.slurm_runs.unlink(missing_ok=True)
    except LockedError:
        log.info(f"another run over {layout.results} goes on: its SLURM jobs are left alone")


def queued(names: Iterable[str]) -> list[QueuedJob]:
    """The jobs of these names that wait, run or end. Raises EnvironmentFault when SLURM cannot be asked."""
    text = _slurm("squeue", "--me", "--noheader", "--format=%i|%T|%k", f"--name={','.join(names)}")
    return [QueuedJob(*line.split("|", 2)) for line in text.splitlines()]


def _check_status_command(status_command: str | None) -> None:
    """Raise ConfigError when the plugin would ask an accounting database that this cluster does not keep, for ever."""
    if status_command == "sacct" and "accounting_storage/none" in _slurm("scontrol", "show", "config"):
        raise ConfigError(
            "this cluster keeps no accounting (AccountingStorageType is accounting_storage/none), so sacct cannot say "
            "how jobs ended: add --slurm-status-command squeue, or set slurm-status-command: squeue in the profile"
        )


def allocation(environment: Mapping[str, str] = os.environ) -> str | None:
    """Which SLURM job this process runs in, where and with which GPUs, for its log; None outside of one."""
    if "SLURM_JOB_ID" not in environment:
        return None
    return (
        f"SLURM job {environment['SLURM_JOB_ID']} on {environment.get('SLURMD_NODENAME', 'an unknown node')}, "
        f"CUDA_VISIBLE_DEVICES={environment.get('CUDA_VISIBLE_DEVICES', '')}"
    )


def _outlive_outages(plugin: ModuleType) -> None:
    """Let the plugin know MinJobAge from now on.

    It asks for it at each poll, and when the controller does not answer it turns from squeue to sacct. Where there is
    no accounting database it then waits for ever, outage over or not (snakemake-executor-plugin-slurm 2.8.0, tried).
    """
    age = plugin.get_min_job_age()
    plugin.get_min_job_age = lambda: age  # type: ignore[attr-defined]


def _settle(names: list[str], policy: str, poll_seconds: float) -> None:
    known: list[QueuedJob] = []
    while jobs := queued(names):
        if not known:
            log.warning(_announcement(jobs, policy))
            if policy == "cancel":
                _slurm("scancel", *(job.id for job in jobs))
                poll_seconds = min(poll_seconds, 2.0)
        elif len(jobs) != len(known):
            log.warning(f"{len(jobs)} SLURM jobs of the earlier run still go on")
        known = jobs
        time.sleep(poll_seconds)
    if known:
        log.warning("the SLURM jobs of the earlier run have ended: going on from what they left")


def _announcement(jobs: list[QueuedJob], policy: str) -> str:
    shown = ", ".join(f"{job.id} ({job.comment.removeprefix('rule_')}, {job.state.lower()})" for job in jobs[:10])
    more = f" and {len(jobs) - 10} more" if len(jobs) > 10 else ""
    what = (
        "cancelling them"
        if policy == "cancel"
        else "waiting for them to end, so that nothing is computed twice (to cancel them instead: "
        "--config slurm='{orphans: cancel}')"
    )
    return f"{len(jobs)} SLURM jobs of an earlier run that was killed still go on: {shown}{more}: {what}"


def _noted_runs(layout: Layout) -> list[str]:
    try:
        return layout.slurm_runs.read_text(encoding="utf-8").split()
    except FileNotFoundError:
        return []


def _guessed_speed(settings: TranscribeSettings) -> float:
    speed = _of_model(_GPU_SPEED, settings.model)
    return max(speed / _CPU_SLOWDOWN, _SMALLEST_SPEED) if settings.device == "cpu" else speed


def _weights(model: str) -> int:
    """MB of host memory for the model's weights: of a local directory what its files hold."""
    files = [path for path in Path(model).glob("*") if path.is_file()] if Path(model).is_dir() else []
    return round(sum(path.stat().st_size for path in files) / 1e6) if files else _of_model(_WEIGHTS, model)


def _of_model(table: Mapping[str, Any], model: str) -> Any:
    """The value of the first size that the model's name contains (`turbo` before `large`); the largest's otherwise."""
    return next((value for size, value in table.items() if size in model.lower()), table["large"])


def _slurm(*command: str) -> str:
    """What a SLURM command prints."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SQUEUE_SECONDS, check=False)
    except FileNotFoundError:
        raise EnvironmentFault(
            f"an earlier run over these results used SLURM, and {command[0]} is not on the PATH here: start the "
            "workflow on the cluster, or, if its jobs have surely ended, delete .state/slurm-runs in the results"
        ) from None
    except subprocess.TimeoutExpired:
        raise EnvironmentFault(f"SLURM does not answer ({command[0]} took over {_SQUEUE_SECONDS:.0f} s)") from None
    if done.returncode:
        raise EnvironmentFault(f"{command[0]} failed: {done.stderr.strip() or 'no message'}: try again later")
    return done.stdout
