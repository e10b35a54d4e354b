"""What was worked on when: downloads as their receipts tell, jobs as their telemetry tells.

Only files are read, so it is the same from the process that runs, from another terminal and a year later. Times are
Unix times; a receipt's end is its file's modification time, since the receipt itself must not change from run to run.
"""

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from cuepoint.bottleneck import Share, StageMeasure
from cuepoint.errors import DataError
from cuepoint.layout import Layout
from cuepoint.plan import Run
from cuepoint.receipts import read_receipt
from cuepoint.states import Status
from cuepoint.telemetry import read_telemetry

STAGES = ("download", "transcribe", "embed", "load")
_STAGE = {stage: stage for stage in STAGES}

PAUSE = 900.0
"""Seconds without any work that separate two stretches: a resumed run goes on with the stretch, tomorrow's does not."""

_COMPUTING = {"transcribe": "phase_model", "embed": "phase_encode"}  # the telemetry's phase of each stage's model
_BREATH = 60.0  # seconds between two jobs that are part of the work
_SILENT = 30.0  # seconds without a new row after which a job that left no end was killed


@dataclass(frozen=True)
class Download:
    """One video's download, as its receipt tells."""

    stage: ClassVar[str] = "download"
    video_id: str
    start: float
    end: float
    status: Status
    audio: float  # seconds
    attempt: int
    waited: float  # seconds of it spent waiting for the limiter
    cooled: float  # seconds of that in cool-downs that the host asked for


@dataclass(frozen=True)
class Job:
    """One job of a stage that works on shards or collections, as its telemetry tells."""

    path: Path  # of the telemetry
    stage: str
    name: str  # shard, or model for a load
    start: float
    end: float  # so far, while it runs
    running: bool
    error: str | None
    totals: Mapping[str, float] = field(default_factory=dict)  # last value of each telemetry column
    gpu: Counter[int] = field(default_factory=Counter)  # seconds at each per cent of GPU use
    cpu: float = 0.0  # seconds of CPU

    @property
    def model(self) -> str | None:
        """The embedding model of an embed job: its telemetry is in a folder of the model's name."""
        return self.path.parent.name.removeprefix("embed-") if self.stage == "embed" else None


def read_download(layout: Layout, video_id: str) -> Download | None:
    """How a video's last download went; None before there is a whole receipt."""
    path = layout.receipt(video_id)
    try:
        receipt, end = read_receipt(path), path.stat().st_mtime
    except (DataError, OSError):
        return None
    seconds = receipt.seconds or 0.0
    waited = min(receipt.waited or 0.0, seconds)
    given_up = receipt.status is Status.THROTTLED  # all the time of such a video was lost to the host's limit
    return Download(
        video_id,
        start=end - seconds,
        end=end,
        status=receipt.status,
        audio=receipt.duration or 0.0,
        attempt=receipt.attempt,
        waited=seconds if given_up else waited,
        cooled=seconds if given_up else min(receipt.cooled or 0.0, waited),
    )


def telemetry_files(layout: Layout) -> list[Path]:
    """The telemetry of all jobs, by the name that it has when the job has ended."""
    found = (path for path in layout.telemetry.glob("*/*") if path.suffix in {".parquet", ".jsonl"})
    return sorted({path.with_suffix(".parquet") for path in found})


def read_job(path: Path, now: float | None = None) -> Job | None:
    """One job's telemetry, reduced to its totals; None when it is damaged or has no line yet."""
    try:
        job, rows = read_telemetry(path)
        return _job(path, job, rows, time.time() if now is None else now)
    except (DataError, pa.ArrowException, ValueError, TypeError, KeyError, OverflowError):
        return None


def _job(path: Path, job: dict[str, Any], rows: pa.Table, now: float) -> Job:
    latest = rows["time"][-1].as_py() if len(rows) else job["started"]
    end = job.get("ended", latest)
    running = "ended" not in job and abs(now - latest) < _SILENT
    return Job(
        path,
        stage=_STAGE[job["stage"]],
        name=path.stem,
        start=job["started"],
        end=max(end, job["started"]),  # a clock that was put back meanwhile
        running=running,
        error=job.get("error") or (None if running or "ended" in job else "killed"),
        totals=_last_row(rows),
        gpu=_seconds_by_use(rows),
        cpu=_cpu_seconds(rows, job["started"]),
    )


def is_live(path: Path) -> bool:
    """Whether the job of this telemetry has not ended (or was killed): its rows are still in the JSONL."""
    return path.with_suffix(".jsonl").exists()


def read_downloads(layout: Layout, run: Run) -> dict[str, Download]:
    """The downloads of all of a run's videos that have ended."""
    found = ((video_id, read_download(layout, video_id)) for video_id in run.members)
    return {video_id: download for video_id, download in found if download is not None}


def read_jobs(layout: Layout) -> list[Job]:
    """All jobs that have left telemetry."""
    return [job for path in telemetry_files(layout) if (job := read_job(path)) is not None]


def computing(job: Job) -> float:
    """Seconds in which the job's model computed; of a job without a model all its seconds."""
    phase = _COMPUTING.get(job.stage)
    return job.totals.get(phase, 0.0) if phase else job.end - job.start


def _loading(job: Job) -> float:
    """Seconds that opening and loading the model took."""
    return job.totals.get("phase_open_model", 0.0) + job.totals.get("phase_load_model", 0.0)


def last_stretch(spans: Iterable[tuple[float, float]]) -> tuple[float, float] | None:
    """Start and end of the last stretch of work: spans that no pause longer than `PAUSE` separates."""
    stretch: tuple[float, float] | None = None
    for start, end in sorted(spans):
        goes_on = stretch and start <= stretch[1] + PAUSE
        stretch = (stretch[0], max(stretch[1], end)) if stretch and goes_on else (start, end)
    return stretch


def covered(spans: Iterable[tuple[float, float]], bridge: float = 0.0) -> float:
    """Seconds in which at least one of the spans was open; gaps of up to `bridge` seconds count too."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        begin = until if start <= until + bridge else start
        total += max(0.0, end - begin)
        until = max(until, end)
    return total


def working_time(stage: str, works: Iterable[Download | Job]) -> float:
    """Seconds from a stage's first work to its last, without the time in which no stage worked at all.

    What separates a resumed run from its crash, or a run from the one after it, does not make a stage slower.
    """
    listed = list(works)
    of_stage = [work for work in listed if work.stage == stage]
    if not of_stage:
        return 0.0
    first, last = min(work.start for work in of_stage), max(work.end for work in of_stage)
    meanwhile = [work for work in listed if work.start <= last and work.end >= first]
    return covered(((max(work.start, first), min(work.end, last)) for work in meanwhile), bridge=_BREATH)


def measure(run: Run, downloads: Mapping[str, Download], jobs: Iterable[Job]) -> list[StageMeasure]:
    """What each stage did in the given downloads and jobs (those of one stretch of work)."""
    shards = run.shards()
    by_stage: dict[str, list[Job]] = {stage: [] for stage in STAGES}
    for job in jobs:
        by_stage[job.stage].append(job)
    works: list[Download | Job] = [*downloads.values(), *(job for of_stage in by_stage.values() for job in of_stage)]
    if not works:
        return []
    start, end = min(work.start for work in works), max(work.end for work in works)
    measures = [_measure_downloads(downloads.values())] if downloads else []
    for stage in STAGES[1:]:
        if by_stage[stage]:
            waits = _waits(stage, by_stage, shards, downloads, end)
            queue = waits / (end - start) if end > start else 0.0
            measures.append(_measure_jobs(stage, by_stage[stage], shards, downloads, queue))
    return measures


def videos_of(job: Job, shards: Mapping[str, list[str]]) -> list[str]:
    """The videos of the run that a job works on: those of its shard, or all for a load."""
    if job.stage == "load":
        return [video_id for videos in shards.values() for video_id in videos]
    return shards.get(job.name, [])


def finished_share(job: Job, shards: Mapping[str, list[str]]) -> float:
    """Which part of its videos a job has finished: all, or what its counter says while it runs."""
    if not job.running:
        return 0.0 if job.error else 1.0
    return min(1.0, job.totals.get("videos", 0.0) / max(1, len(videos_of(job, shards))))


def _measure_downloads(downloads: Iterable[Download]) -> StageMeasure:
    listed = list(downloads)
    seconds = sum(download.end - download.start for download in listed) or 1.0
    return StageMeasure(
        stage="download",
        active=covered((download.start, download.end) for download in listed),
        videos=len(listed),
        audio=sum(download.audio for download in listed),
        paced=sum(download.waited - download.cooled for download in listed) / seconds,
        throttled=sum(download.cooled for download in listed) / seconds,
    )


def _measure_jobs(
    stage: str,
    jobs: list[Job],
    shards: Mapping[str, list[str]],
    downloads: Mapping[str, Download],
    queue: float,
) -> StageMeasure:
    shares = [(job, finished_share(job, shards), videos_of(job, shards)) for job in jobs]
    models = Counter[str]()
    for job in jobs:
        if job.model:
            models[job.model] += job.end - job.start
    model = models.most_common(1)[0][0] if models else None
    of_model = [job for job in jobs if job.model == model]
    spent = sum(job.end - job.start for job in jobs) or 1.0
    return StageMeasure(
        stage=stage,
        active=covered((job.start, job.end) for job in jobs),
        # A shard counts once, also when several models embed it: cost is what a video needs in all of them.
        videos=sum(share * len(videos) for _, share, videos in shares) / max(1, len(models)),
        audio=sum(share * downloads[id_].audio for _, share, videos in shares for id_ in videos if id_ in downloads),
        queue=queue,
        gpu=share_of(sum((job.gpu for job in jobs), Counter())),
        loading=sum(map(_loading, jobs)) / spent,
        starved=sum(max(0.0, job.end - job.start - computing(job) - _loading(job)) for job in jobs) / spent,
        model=model,
        texts=sum(job.totals.get("chunks", 0.0) for job in of_model) if model else 0.0,
        encoding=sum(map(computing, of_model)) if model else 0.0,
    )


def _waits(
    stage: str,
    jobs: Mapping[str, list[Job]],
    shards: Mapping[str, list[str]],
    downloads: Mapping[str, Download],
    latest: float,
) -> float:
    """Video-seconds that stood before a stage. A load waits for all by design, so its queue says nothing."""
    starts = {job.name: job.start for job in jobs[stage]}
    if stage == "transcribe":
        return sum(
            max(0.0, starts.get(shard, latest) - downloads[video_id].end)
            for shard, videos in shards.items()
            for video_id in videos
            if video_id in downloads
        )
    if stage == "embed":
        return sum(
            max(0.0, starts.get(job.name, latest) - job.end) * len(shards.get(job.name, ()))
            for job in jobs["transcribe"]
            if not job.running and not job.error
        )
    return 0.0


def share_of(seconds: Counter[int]) -> Share | None:
    """Mean and 5th to 95th percentile of a use that was `per cent` for `seconds`; None without any."""
    if not seconds:
        return None
    use = np.array(sorted(seconds))
    weights = np.array([seconds[value] for value in use], float)
    cumulated = np.cumsum(weights) / weights.sum()
    low, high = use[np.searchsorted(cumulated, [0.05, 0.95])]
    return Share(low / 100, float(use @ weights / weights.sum()) / 100, high / 100)


def _last_row(rows: pa.Table) -> dict[str, float]:
    if not len(rows):
        return {}
    return {name: value for name, value in rows.slice(len(rows) - 1).to_pylist()[0].items() if value is not None}


def _seconds_by_use(rows: pa.Table) -> Counter[int]:
    if "gpu_busy" not in rows.column_names:
        return Counter()
    return Counter(round(100 * busy) for busy in rows["gpu_busy"].to_pylist() if busy is not None)


def _cpu_seconds(rows: pa.Table, started: float) -> float:
    if not len(rows):
        return 0.0
    return float(rows["cpu"].to_numpy() @ np.diff(rows["time"].to_numpy(), prepend=started))
