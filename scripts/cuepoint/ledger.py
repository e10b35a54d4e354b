"""The ledger: every listed video exactly once, with how it ended and what happens to it next.

Written at the end of every run, also of one that failed, shard by shard, so that memory does not grow with the list.
"""

import csv
import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cuepoint import failures
from cuepoint.atomic import atomic_path
from cuepoint.errors import DataError
from cuepoint.layout import Layout
from cuepoint.plan import Run, members_hash
from cuepoint.receipts import read_receipt
from cuepoint.settings import Settings
from cuepoint.states import Status
from cuepoint.tables import VIDEOS, read_table

WAITING = "waiting"
"""Status of a video that `limit_unprocessed` left for a later run."""

_WAITING_AT_ONCE = 1000  # rows that are in memory together; of the others it is a shard's

LEDGER = pa.schema(
    [
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),  # how far it has come: listed … loaded
        pa.field("next", pa.string(), nullable=False),  # what happens to it, in words
        pa.field("error", pa.string()),
        pa.field("shard", pa.string()),
        *(
            VIDEOS.field(name)
            for name in ("title", "channel", "upload_date", "duration", "speech_duration", "language")
        ),
        pa.field("segments", pa.int32()),
        pa.field("flagged", pa.int32()),
    ]
)


@dataclass
class Tally:
    """How many of the listed videos ended how."""

    statuses: Counter[str] = field(default_factory=Counter)
    loaded: int = 0  # of those that are ok
    given_up: int = 0  # of those that could be tried again

    @property
    def total(self) -> int:
        """All listed videos."""
        return self.statuses.total()

    @property
    def failed(self) -> int:
        """Videos that were tried, or are still to be tried, and have no result."""
        return self.total - sum(self.statuses[status] for status in (Status.OK, Status.EMPTY, WAITING))

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Count rows of the ledger."""
        self.statuses.update(row["status"] for row in rows)
        self.loaded += sum(row["stage"] == _LOADED for row in rows)
        self.given_up += sum(row["next"] == _GIVEN_UP for row in rows)


def write_ledger(layout: Layout, settings: Settings, run: Run) -> Tally:
    """Write `ledger.parquet` and `ledger.csv` below the report directory, and count the videos."""
    tally = Tally()
    with ExitStack() as files:
        # Parquet last: where the ledger.parquet is new, the CSV beside it is too.
        parquet = files.enter_context(atomic_path(layout.report / "ledger.parquet"))
        text = files.enter_context(atomic_path(layout.report / "ledger.csv"))
        sheet = files.enter_context(text.open("w", encoding="utf-8", newline=""))
        table = files.enter_context(pq.ParquetWriter(parquet, LEDGER, compression="zstd"))
        lines = csv.DictWriter(sheet, LEDGER.names)
        lines.writeheader()
        for rows in _rows_by_shard(layout, settings, run):
            tally.add(rows)
            lines.writerows(rows)
            table.write_table(pa.Table.from_pylist(rows, schema=LEDGER))
    return tally


def summary(tally: Tally, layout: Layout) -> str:
    """One sentence on how many videos ended how, for the last lines of a run."""
    statuses = tally.statuses
    final = sum(statuses[status] for status in (Status.UNAVAILABLE, Status.NEEDS_AUTH, Status.GEO_BLOCKED))
    unfinished = sum(statuses[status] for status in Status if status.retryable)
    parts = {
        "loaded": tally.loaded,
        "ok and not loaded yet": statuses[Status.OK] - tally.loaded,
        "empty (no speech)": statuses[Status.EMPTY],
        "finally unavailable": final,
        "to be retried by the next run": unfinished - tally.given_up,
        "given up": tally.given_up,
        "left for a later run": statuses[WAITING],
    }
    told = ", ".join(f"{number} {name}" for name, number in parts.items() if number)
    return f"{tally.total} videos: {told}. Ledger: {layout.report / 'ledger.csv'}"


def _rows_by_shard(layout: Layout, settings: Settings, run: Run) -> Iterator[list[dict[str, Any]]]:
    loaded = all(is_loaded(layout, f"{settings.qdrant.collection}-{model}", run) for model in settings.embedding.use)
    for shard, video_ids in run.shards().items():
        known = _transcribed(layout.videos(shard))
        embedded = all(layout.embeddings(model, shard).exists() for model in settings.embedding.use)
        stage = _LOADED if loaded and embedded else "embedded" if embedded else "transcribed"
        rows = []
        for video_id in sorted(video_ids):
            if (row := known.get(video_id)) is not None:
                row = row | {"stage": stage if row["status"] == Status.OK else "downloaded"}
            else:
                row = _downloaded(layout, video_id)
            row |= {"video_id": video_id, "source": run.sources[video_id], "shard": shard}
            rows.append(_row(row | {"next": _next(layout, settings, row["status"], row["stage"], video_id)}))
        yield rows
    words = "waits for a later run (limit_unprocessed)"
    waiting = iter(run.waiting.items())
    while some := list(islice(waiting, _WAITING_AT_ONCE)):
        yield [
            _row({"video_id": video_id, "source": source, "status": WAITING, "stage": "listed", "next": words})
            for video_id, source in some
        ]


def _transcribed(path: Path) -> dict[str, dict[str, Any]]:
    """Rows of a shard's table of videos by ID; none when it is not there yet or cannot be read."""
    try:
        return {row["video_id"]: row for row in read_table(path, VIDEOS).to_pylist()}
    except DataError:
        return {}


def _downloaded(layout: Layout, video_id: str) -> dict[str, Any]:
    """What the receipt says of a video that is not transcribed yet."""
    try:
        receipt = read_receipt(layout.receipt(video_id))
    except DataError:
        return {"status": Status.PENDING, "stage": "listed"}
    status = Status.PENDING if receipt.status is Status.OK else receipt.status
    fields = receipt.model_dump(include={"error", "title", "channel", "duration"})
    return fields | {"status": status, "stage": "downloaded"}


_LOADED = "loaded"
_GIVEN_UP = "given up after download.max_failed_runs runs (download.retry_final: true tries again)"
_NEXT = {
    Status.EMPTY: "done: nothing is said in it",
    Status.PENDING: "goes on with the next run",
    Status.NEEDS_AUTH: "final until the cookies change",
    Status.UNAVAILABLE: "final (download.retry_final: true tries again)",
    Status.GEO_BLOCKED: "final (download.retry_final: true tries again)",
}


def _next(layout: Layout, settings: Settings, status: str, stage: str, video_id: str) -> str:
    if status == Status.OK:
        return "done" if stage == _LOADED else "goes on with the next run"
    if (words := _NEXT.get(Status(status))) is not None:
        return words
    attempts = failures.read(layout.failures(video_id))
    if status == Status.NOT_YET and attempts and attempts[-1].retry_after:
        due = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(attempts[-1].retry_after))
        return f"tried again after {due}"
    later = failures.attempt_due(attempts, max_failed_runs=settings.download.max_failed_runs)
    if attempts and later == attempts[-1].number:
        return _GIVEN_UP
    return "tried again by the next run"


def is_loaded(layout: Layout, collection: str, run: Run) -> bool:
    """Whether the last load of a collection was of just these videos."""
    try:
        receipt = json.loads(layout.load_receipt(collection).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(receipt, dict) and receipt.get("members") == members_hash(run)


def _row(values: dict[str, Any]) -> dict[str, Any]:
    return {name: values.get(name) for name in LEDGER.names}
