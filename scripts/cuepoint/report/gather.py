"""What the report tells, gathered from the run's files: shard by shard, so memory does not grow with the list."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cuepoint.bottleneck import StageMeasure, Verdict, name_bottleneck
from cuepoint.errors import DataError
from cuepoint.layout import Layout
from cuepoint.ledger import LEDGER
from cuepoint.plan import Run
from cuepoint.report.series import Series, queue_depths, use_over_time
from cuepoint.settings import Settings
from cuepoint.states import Status
from cuepoint.tables import read_metadata, read_table
from cuepoint.work import Download, Job, computing, last_stretch, measure, read_downloads, read_jobs, working_time


@dataclass(frozen=True)
class StageRow:
    """One stage's line in the table of stages; all times in seconds."""

    measure: StageMeasure
    compute: float  # summed over jobs: transfers, and time in the model
    waiting: float  # the rest of the jobs' time: for a turn, for input, for the model to be loaded
    cores: float | None  # busy on average, None where it is not measured
    videos_per_hour: float
    audio_per_hour: float  # hours an hour

    @property
    def stage(self) -> str:
        """The stage's name."""
        return self.measure.stage


@dataclass
class ModelRow:
    """What one embedding model did, over all shards."""

    model: str
    chunks: int = 0
    tokens: int = 0
    longest: int = 0  # tokens of the longest chunk
    limit: int | None = None  # tokens that the model reads, None before anything was embedded
    truncated: int = 0  # tokens beyond it
    texts_per_second: float | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Speed by the mean length of a chunk."""
        return self.texts_per_second and self.texts_per_second * self.tokens / max(self.chunks, 1)


@dataclass(frozen=True)
class Costs:
    """What 1,000 hours of audio take at the measured speed."""

    gpu_hours: float | None
    core_hours: float
    price: float | None


@dataclass(frozen=True)
class Report:
    """All that the report shows."""

    made: float
    stretch: tuple[float, float] | None  # of the work that speeds and plots are of
    statuses: Counter[str]
    audio: float  # seconds of audio in videos that ended well
    segments: int
    flags: Counter[str]
    stages: list[StageRow]
    models: list[ModelRow]
    verdict: Verdict
    use: list[Series]
    queues: list[Series]
    throttled_seconds: float  # of downloads in cool-downs, summed
    costs: Costs | None
    ledger: list[dict[str, Any]] = field(default_factory=list)
    ledger_total: int = 0


def gather(layout: Layout, settings: Settings, run: Run) -> Report:
    """Read the ledger, the receipts, the telemetry and the tables of `run`."""
    downloads = read_downloads(layout, run)
    jobs = read_jobs(layout)
    stretch = last_stretch((work.start, work.end) for work in [*downloads.values(), *jobs])
    start = stretch[0] if stretch else 0.0
    recent = {id_: download for id_, download in downloads.items() if download.end >= start}
    recent_jobs = [job for job in jobs if job.end >= start]
    measures = measure(run, recent, recent_jobs)
    statuses, audio = _count_ledger(layout)
    segments, flags = _count_flags(layout, run)
    return Report(
        made=time.time(),
        stretch=stretch,
        statuses=statuses,
        audio=audio,
        segments=segments,
        flags=flags,
        stages=[_stage_row(measure, recent.values(), recent_jobs) for measure in measures],
        models=[_model_row(layout, run, model, recent_jobs) for model in settings.embedding.use],
        verdict=name_bottleneck(measures),
        use=use_over_time(layout, recent_jobs, stretch) if stretch else [],
        queues=queue_depths(run, downloads, jobs, stretch) if stretch else [],
        throttled_seconds=sum(download.cooled for download in recent.values()),
        costs=_costs(settings, recent, recent_jobs, measures),
        ledger=list(islice(_problems_first(layout), settings.report.ledger_rows)),
        ledger_total=sum(statuses.values()),
    )


def _count_ledger(layout: Layout) -> tuple[Counter[str], float]:
    """Videos by status, and seconds of audio in those that ended well."""
    statuses: Counter[str] = Counter()
    audio = 0.0
    for batch in _ledger_batches(layout):
        statuses.update(batch["status"].to_pylist())
        audio += pc.sum(batch.filter(pc.equal(batch["status"], Status.OK))["duration"]).as_py() or 0.0
    return statuses, audio


def _problems_first(layout: Layout) -> Iterator[dict[str, Any]]:
    """The ledger's rows: first those that did not end well, then those with flagged segments, then the others."""

    def rank(batch: pa.RecordBatch) -> pa.Array:
        failed = pc.invert(pc.is_in(batch["status"], pa.array([Status.OK, Status.EMPTY])))
        flagged = pc.greater(pc.fill_null(batch["flagged"], 0), 0)
        return pc.if_else(failed, 0, pc.if_else(flagged, 1, 2))

    for wanted in range(3):
        for batch in _ledger_batches(layout):
            yield from batch.filter(pc.equal(rank(batch), wanted)).to_pylist()


def _ledger_batches(layout: Layout) -> Iterator[pa.RecordBatch]:
    """The ledger in pieces; nothing when there is none yet (a report asked for in the middle of the first run)."""
    try:
        with pq.ParquetFile(layout.report / "ledger.parquet") as file:
            yield from file.iter_batches(batch_size=1000, columns=LEDGER.names)
    except FileNotFoundError:
        return


def _count_flags(layout: Layout, run: Run) -> tuple[int, Counter[str]]:
    """Segments in all, and by flag."""
    segments, flags = 0, Counter[str]()
    for shard, videos in run.shards().items():
        table = _listed(layout.transcripts(shard), ["video_id", "flags"], videos)
        segments += len(table)
        flags.update(flag for flag in pc.list_flatten(table["flags"]).to_pylist())
    return segments, flags


def _model_row(layout: Layout, run: Run, model: str, jobs: Iterable[Job]) -> ModelRow:
    row = ModelRow(model)
    for shard, videos in run.shards().items():
        path = layout.embeddings(model, shard)
        tokens = _listed(path, ["video_id", "tokens"], videos)["tokens"]
        row.chunks += len(tokens)
        row.tokens += pc.sum(tokens).as_py() or 0
        row.longest = max(row.longest, pc.max(tokens).as_py() or 0)
        if len(tokens) and (limit := read_metadata(path).get("max_tokens")) is not None:
            row.limit = limit
            row.truncated += pc.sum(pc.max_element_wise(pc.subtract(tokens, limit), 0)).as_py()
    totals = [job.totals for job in jobs if job.model == model]
    encoding = sum(computing(job) for job in jobs if job.model == model)
    row.texts_per_second = sum(total.get("chunks", 0.0) for total in totals) / encoding if encoding else None
    return row


def _listed(path: Path, columns: list[str], videos: list[str]) -> pa.Table:
    """Columns of a shard's table, of the videos that are still listed; no rows when the table is not there (yet)."""
    try:
        table = read_table(path, columns=columns)
    except DataError:
        types = {"video_id": pa.string(), "flags": pa.list_(pa.string()), "tokens": pa.int32()}
        return pa.table({name: pa.array([], types[name]) for name in columns})
    return table.filter(pc.is_in(table["video_id"], pa.array(videos, pa.string())))


def _stage_row(measured: StageMeasure, downloads: Iterable[Download], jobs: Iterable[Job]) -> StageRow:
    works: list[Download | Job] = [*downloads, *jobs]
    span = working_time(measured.stage, works)
    of_stage = [job for job in jobs if job.stage == measured.stage]
    compute = sum(map(computing, of_stage))
    if measured.stage == "download":
        compute = sum(download.end - download.start - download.waited for download in downloads)
    return StageRow(
        measured,
        compute=compute,
        waiting=max(0.0, sum(work.end - work.start for work in works if work.stage == measured.stage) - compute),
        cores=sum(job.cpu for job in of_stage) / span if of_stage and span else None,
        videos_per_hour=3600 * measured.videos / span if span else 0.0,
        audio_per_hour=measured.audio / span if span else 0.0,
    )


def _costs(
    settings: Settings, downloads: Mapping[str, Download], jobs: Iterable[Job], measures: list[StageMeasure]
) -> Costs | None:
    """GPU and core time of 1,000 hours of audio, each stage at its own speed; None before anything was transcribed."""
    prices = settings.report
    gpu, cores, has_gpu = 0.0, 0.0, False
    for measured in measures:
        if measured.stage == "download" or not measured.audio:
            continue
        of_stage = [job for job in jobs if job.stage == measured.stage]
        per_hour = 3600 / measured.audio
        cores += per_hour * sum(job.cpu for job in of_stage) / 3600
        if measured.gpu:
            has_gpu = True
            gpu += per_hour * sum(job.end - job.start for job in of_stage) / 3600
    if not cores:
        return None
    price = None
    if prices.gpu_hour_price is not None or prices.core_hour_price is not None:
        price = 1000 * (gpu * (prices.gpu_hour_price or 0) + cores * (prices.core_hour_price or 0))
    return Costs(1000 * gpu if has_gpu else None, 1000 * cores, price)
