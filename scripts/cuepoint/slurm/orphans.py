"""The SLURM jobs that a killed run left behind.

Snakemake's executor plugin names all jobs of one run with the run's ID. The main process notes that name before the
first job is submitted. A later start over the same results finds the jobs that bear a noted name and still go on:
without that the plugin would submit them a second time, to the same paths.
"""

import logging
import time
from typing import Literal

from cuepoint import atomic
from cuepoint.errors import LockedError
from cuepoint.layout import Layout
from cuepoint.locks import hold
from cuepoint.slurm.client import QueuedJob, ask, queued

log = logging.getLogger("snakemake.logging")


def remember_run(layout: Layout, name: str) -> None:
    """Note the name that all SLURM jobs of the run that starts now will bear."""
    atomic.write_text(layout.slurm_runs, "".join(f"{known}\n" for known in [*_noted_runs(layout), name]))


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


def _settle(names: list[str], policy: str, poll_seconds: float) -> None:
    known: list[QueuedJob] = []
    while jobs := queued(names):
        if not known:
            log.warning(_announcement(jobs, policy))
            if policy == "cancel":
                ask("scancel", *(job.id for job in jobs))
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
