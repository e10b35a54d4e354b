"""Snakemake's scheduler, made affordable with very many ready jobs.

After each job that ends, Snakemake weighs all jobs that could start, so that a job costs the more the longer the list
is (benchmarks/workflow.md). And its default rate limit (100 jobs a second, which no stage here comes near) makes it
look again a second after each look, for ever. What it chooses in the end are the jobs of highest priority that the
resources allow, so it is enough to show it of each rule the few that could run at once. (`--scheduler-subsample` also
shortens its list, but draws at random: early shards would not come first, and a GPU job would wait to be drawn.)
"""

import heapq
import logging
from importlib.metadata import version
from itertools import count
from typing import Any

log = logging.getLogger("snakemake.logging")

_TRIED = "9.27.1"  # what follows changes parts of Snakemake that are not public: another version schedules as it does
_DEFAULT_RATE = (100, 1)  # jobs, seconds: what Snakemake sets when nobody has asked for a limit


def show_few(scheduler: Any) -> None:
    """From now on the run's `scheduler` (Snakemake's) weighs only those ready jobs that could be chosen.

    A rate limit that somebody asked for stays. To be called before the first job, in `onstart`.
    """
    if version("snakemake") != _TRIED:
        log.warning("Cuepoint's shorter scheduling is for Snakemake %s: very long lists take more time now", _TRIED)
        return
    limit = scheduler.job_rate_limiter
    if limit and (limit.max_jobs, limit.timespan) == _DEFAULT_RATE:
        scheduler.job_rate_limiter = None
    window = Window(scheduler.global_resources)
    kind = type(scheduler)
    is_greedy = type(scheduler._scheduler).__module__ == "snakemake.scheduling.greedy"

    def open_jobs(self: Any) -> list[Any]:
        return window.of(self.workflow.dag.ready_jobs)

    def remaining_jobs(self: Any) -> list[Any]:
        # Collected for each look, and read only by the other schedulers and when no job is left.
        return [] if is_greedy and self.workflow.dag.ready_jobs else kind.remaining_jobs.fget(self)

    few = {"open_jobs": property(open_jobs), "remaining_jobs": property(remaining_jobs)}
    scheduler.__class__ = type(kind.__name__, (kind,), few)


class Window:
    """Of each rule (or group) as many ready jobs as `limits` (resource -> amount) let run at once, the urgent first."""

    def __init__(self, limits: dict[str, int]) -> None:
        self._limits = limits
        self._known: set[Any] = set()  # ready jobs that stand in one of the heaps
        self._heaps: dict[str, list[tuple[float, int, Any]]] = {}  # rule -> (-priority, order of arrival, job)
        self._arrivals = count()

    def of(self, ready: set[Any]) -> list[Any]:
        """The jobs of the window, given all that are ready now. Costs no more Python than there are changes."""
        fresh = ready - self._known
        self._known |= fresh
        for job in fresh:
            heap = self._heaps.setdefault(_kind_of(job), [])
            heapq.heappush(heap, (-job.priority, next(self._arrivals), job))
        return [job for heap in self._heaps.values() for job in self._first(heap, ready)]

    def _first(self, heap: list[tuple[float, int, Any]], ready: set[Any]) -> list[Any]:
        taken: list[tuple[float, int, Any]] = []
        room = 1
        while heap and len(taken) < room:
            entry = heapq.heappop(heap)
            if entry[2] in ready:
                taken.append(entry)
                room = max(room, self._at_once(entry[2]))
            else:
                self._known.discard(entry[2])  # it was started; if it is tried again it comes as a new one
        for entry in taken:
            heapq.heappush(heap, entry)
        return [job for _, _, job in taken]

    def _at_once(self, job: Any) -> int:
        """How many jobs like this one could run at once."""
        job.reset_params_and_resources()  # as the scheduler does: estimates were made before the inputs were there
        needs = job.scheduler_resources
        # `_job_count`, which every job asks for, has a limit too. What is no number is for Snakemake to complain about.
        limited = ((limit, needs.get(name)) for name, limit in self._limits.items())
        return min(limit // need for limit, need in limited if need and isinstance(need, int))


def _kind_of(job: Any) -> str:
    return str(job.groupid if job.is_group() else job.name)
