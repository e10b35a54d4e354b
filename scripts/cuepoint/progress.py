"""How far each stage is, how fast it goes and when it will be done: one line a stage, made from the run's files.

The same lines appear while a run goes on, in its log, and in `cuepoint status` from another terminal or afterwards.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cuepoint import ledger
from cuepoint.bottleneck import Share, StageMeasure, Verdict, name_bottleneck
from cuepoint.durations import duration
from cuepoint.layout import Layout
from cuepoint.locks import holder_lives
from cuepoint.plan import Run
from cuepoint.settings import Settings
from cuepoint.states import Status
from cuepoint.work import (
    STAGES,
    Download,
    Job,
    finished_share,
    is_live,
    last_stretch,
    measure,
    read_download,
    read_job,
    telemetry_files,
    working_time,
)

_WELL = {Status.OK, Status.EMPTY}
_SETTLED = 2.0  # seconds after which a folder's time tells of every change in it (file systems count in ticks)


@dataclass(frozen=True)
class StageProgress:
    """One stage: counts of videos, and rates over the current (or last) stretch of work."""

    stage: str
    done: float
    total: int
    failed: int
    videos_per_hour: float | None = None
    audio_per_hour: float | None = None  # hours of audio an hour
    eta: float | None = None  # seconds until it is done
    gpu: Share | None = None

    def line(self, running: int = 0) -> str:
        """The stage in one readable line; what is not known is left out."""
        share = self.done / self.total if self.total else 1.0
        # A download is one video; a job of another stage is a whole shard, so there the videos that wait are not known.
        waiting = round(self.total - self.done) - running if self.stage == "download" else 0
        parts = [
            f"{self.stage:<10} {self.done:>6.0f}/{self.total:<6} {share:>4.0%}",
            f"{self.videos_per_hour:,.0f} videos/h" if self.videos_per_hour else "",
            f"{self.audio_per_hour:,.1f} h audio/h" if self.audio_per_hour else "",
            f"ETA {duration(self.eta)}" if self.eta else "",
            f"{running} running" if running else "",
            f"{waiting} waiting" if waiting > 0 else "",
            f"{self.failed} failed" if self.failed else "",
            f"GPU {self.gpu} busy" if self.gpu else "",
        ]
        return "   ".join(part for part in parts if part)


@dataclass(frozen=True)
class Progress:
    """All stages at one moment, and what holds them back."""

    stages: list[StageProgress]
    stretch: tuple[float, float] | None  # of the work that the rates are of
    verdict: Verdict
    running: bool

    def lines(self, running: Mapping[str, int] | None = None) -> list[str]:
        """One line a stage, with the number of its jobs that run if that is known, then the bottleneck."""
        running = running or {}
        return [*(stage.line(running.get(stage.stage, 0)) for stage in self.stages), self.verdict.sentence]


class Observer:
    """Reads a run's progress again and again; what has not changed is not read again."""

    def __init__(self, layout: Layout, settings: Settings, run: Run) -> None:
        self._layout, self._settings, self._run = layout, settings, run
        self._shards = run.shards()
        self._folders: dict[Path, list[str]] = {}  # folder of receipts -> its videos
        for video_id in run.members:
            self._folders.setdefault(layout.receipt(video_id).parent, []).append(video_id)
        self._seen: dict[Path, int] = {}  # modification time at the last look
        self._downloads: dict[str, Download] = {}
        self._jobs: dict[Path, Job] = {}

    def look(self, now: float | None = None) -> Progress:
        """The progress at this moment."""
        now = time.time() if now is None else now
        self._look_at_receipts(now)
        self._look_at_jobs(now)
        works: list[Download | Job] = [*self._downloads.values(), *self._jobs.values()]
        stretch = last_stretch((work.start, work.end) for work in works)
        start = stretch[0] if stretch else now
        downloads = {id_: download for id_, download in self._downloads.items() if download.end >= start}
        jobs = [job for job in self._jobs.values() if job.end >= start]
        measures = measure(self._run, downloads, jobs)
        stages = [self._stage(stage, downloads, jobs, measures) for stage in STAGES]
        running = self._is_running(jobs)
        stages = _in_order(stages) if running else [replace(stage, eta=None) for stage in stages]
        return Progress(stages, stretch, name_bottleneck(measures), running)

    def _is_running(self, jobs: list[Job]) -> bool:
        """Whether the run goes on; seen from another host that is known by its jobs only."""
        return any(job.running for job in jobs) or bool(holder_lives(self._layout.lock("run", "run")))

    def _look_at_receipts(self, now: float) -> None:
        """Renaming a receipt into its folder changes the folder's time, so folders that kept theirs are passed over."""
        for folder, videos in self._folders.items():
            if not self._has_changed(folder, now):
                continue
            for video_id in videos:
                download = read_download(self._layout, video_id)
                if download is None:
                    self._downloads.pop(video_id, None)
                else:
                    self._downloads[video_id] = download

    def _look_at_jobs(self, now: float) -> None:
        for path in telemetry_files(self._layout):
            if is_live(path) or self._has_changed(path, now):
                job = read_job(path, now)
                if job is not None:
                    self._jobs[path] = job

    def _has_changed(self, path: Path, now: float) -> bool:
        try:
            changed = path.stat().st_mtime_ns
        except OSError:
            return False
        if self._seen.get(path) == changed:
            return False
        if now - changed / 1e9 > _SETTLED:
            self._seen[path] = changed
        return True

    def _stage(
        self, stage: str, downloads: Mapping[str, Download], jobs: list[Job], measures: list[StageMeasure]
    ) -> StageProgress:
        measured = next((measure for measure in measures if measure.stage == stage), None)
        of_stage = [job for job in jobs if job.stage == stage]
        span = working_time(stage, [*downloads.values(), *jobs])
        progress = StageProgress(
            stage,
            done=self._downloaded() if stage == "download" else self._finished(stage, of_stage),
            total=len(self._run.members),
            failed=self._failed(stage, of_stage),
            gpu=measured.gpu if measured else None,
        )
        if not measured or span <= 0:
            return progress
        rate = measured.videos / span
        return replace(
            progress,
            videos_per_hour=3600 * rate,
            audio_per_hour=measured.audio / span,
            eta=(progress.total - progress.done) / rate if rate else None,
        )

    def _downloaded(self) -> int:
        return sum(
            video_id in self._downloads and self._downloads[video_id].attempt >= self._run.attempts.get(video_id, 0)
            for video_id in self._run.members
        )

    def _finished(self, stage: str, jobs: list[Job]) -> float:
        """Videos of the shards that are done, and those that running jobs have finished."""
        if stage == "load":
            models = self._settings.embedding.use
            return len(self._run.members) * sum(map(self._is_loaded, models)) / len(models)
        done = 0.0
        models = [None] if stage == "transcribe" else self._settings.embedding.use
        for model in models:
            made = self._tables(model)
            of_model = [job for job in jobs if job.running and job.model == model]
            running = {job.name: finished_share(job, self._shards) for job in of_model}
            for shard, videos in self._shards.items():
                done += len(videos) * (1.0 if shard in made else running.get(shard, 0.0))
        return done / len(models)

    def _tables(self, model: str | None) -> set[str]:
        """Shards that have a table of embeddings of this model, or of transcripts without one."""
        path = self._layout.transcripts("0") if model is None else self._layout.embeddings(model, "0")
        return {table.stem for table in path.parent.glob("*.parquet")}

    def _is_loaded(self, model: str) -> bool:
        return ledger.is_loaded(self._layout, f"{self._settings.qdrant.collection}-{model}", self._run)

    def _failed(self, stage: str, jobs: list[Job]) -> int:
        """Videos that ended without audio; for the other stages those of failed shards."""
        if stage == "download":
            return sum(download.status not in _WELL for download in self._downloads.values())
        return sum(len(self._shards.get(job.name, ())) for job in jobs if job.error)


def _in_order(stages: list[StageProgress]) -> list[StageProgress]:
    """A stage is not done before the stage that feeds it."""
    ordered: list[StageProgress] = []
    before = 0.0
    for stage in stages:
        if stage.eta is not None:
            before = max(before, stage.eta)
        ordered.append(stage if stage.eta is None else replace(stage, eta=before))
    return ordered
