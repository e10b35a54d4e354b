"""Results as a run of known speed leaves them: real files of every kind, with times that tests choose."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cuepoint import atomic, ledger
from cuepoint.layout import Layout
from cuepoint.plan import Run
from cuepoint.receipts import Receipt
from cuepoint.settings import Settings, load_settings
from cuepoint.states import Status
from cuepoint.tables import TRANSCRIPTS, VIDEOS, embeddings_schema, write_table

START = 1_790_000_000.0  # Unix time at which a made run begins
MODEL = "all-MiniLM-L6-v2"
AUDIO = 600.0  # seconds of each video
SEGMENTS = 6  # of each video, the last one flagged


def make_run(layout: Layout, videos: int, shard_size: int) -> Run:
    members = {f"video{i:07d}": f"{i // shard_size:05d}" for i in range(videos)}
    run = Run(members, {id_: f"https://example.org/watch?v={id_}" for id_ in members}, attempts={})
    atomic.write_text(layout.run, json.dumps(asdict(run)))
    return run


def make_receipt(layout: Layout, video_id: str, end: float, status: Status = Status.OK, **fields) -> None:
    known = (
        {"duration": AUDIO, "sha256": "0" * 64, "codec": "opus", "title": f"Title of {video_id}"}
        if status is Status.OK
        else {}
    )
    receipt = Receipt(video_id=video_id, url=f"https://example.org/{video_id}", status=status, **known | fields)
    path = layout.receipt(video_id)
    receipt.write(path)
    os.utime(path, (end, end))


def make_telemetry(
    path: Path, stage: str, start: float, end: float, error: str | None = None, **columns: float
) -> None:
    """One row each ten seconds; `columns` are final values, reached evenly, but for `gpu_busy` and `cpu`."""
    times = np.unique(np.append(np.arange(start + 10, end, 10.0), end))
    done = (times - start) / (end - start)
    constant = {"gpu_busy", "cpu", "rss"}
    rows = {"time": times, "cpu": np.ones(len(times)), "rss": np.full(len(times), 1e9)}
    rows |= {name: np.full(len(times), value) if name in constant else value * done for name, value in columns.items()}
    job = {"stage": stage, "name": path.stem, "pid": 1, "host": "test", "started": start, "ended": end, "error": error}
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(rows).replace_schema_metadata({b"cuepoint.job": json.dumps(job).encode()})
    pq.write_table(table, path)


def make_tables(layout: Layout, shard: str, videos: list[str], statuses: dict[str, Status], model: str = MODEL) -> None:
    ok = [video_id for video_id in videos if statuses.get(video_id, Status.OK) is Status.OK]
    rows = [
        {
            "video_id": video_id,
            "segment": i,
            "start": 10.0 * i,
            "end": 10.0 * i + 8,
            "text": f" Sentence {i} of {video_id}.",
            "language": "en",
            "flags": ["repetition"] if i == 5 else [],
        }
        for video_id in ok
        for i in range(SEGMENTS)
    ]
    write_table(layout.transcripts(shard), pa.Table.from_pylist(rows, schema=TRANSCRIPTS), TRANSCRIPTS, settings={})
    about = [
        {
            "video_id": video_id,
            "url": f"https://example.org/{video_id}",
            "title": f"Title of {video_id}",
            "status": statuses.get(video_id, Status.OK),
            "duration": AUDIO,
            "segments": SEGMENTS * (video_id in ok),
            "flagged": int(video_id in ok),
            "language": "en",
        }
        for video_id in videos
    ]
    write_table(layout.videos(shard), pa.Table.from_pylist(about, schema=VIDEOS), VIDEOS, settings={})
    schema = embeddings_schema(2)
    chunks = [
        {
            "point_id": f"point-{video_id}-{i}",
            "video_id": video_id,
            "chunk": i,
            "start": 30.0 * i,
            "end": 30.0 * i + 28,
            "text": "…",
            "tokens": 100 + i,
            "embedding": [1.0, 0.0],
        }
        for video_id in ok
        for i in range(2)
    ]
    table = pa.Table.from_pylist(chunks, schema=schema)
    write_table(layout.embeddings(model, shard), table, schema, settings={}, max_tokens=256)


def make_results(
    folder: Path, videos: int = 12, shard_size: int = 4, model: str = MODEL
) -> tuple[Layout, Settings, Run]:
    """A whole run on one GPU: a download each 20 s, a minute a shard of ASR, ten minutes a shard of embedding."""
    settings = load_settings({"results": str(folder), "embedding": {"use": [model]}})
    layout = Layout(folder)
    run = make_run(layout, videos, shard_size)
    ids = list(run.members)
    statuses = {ids[1]: Status.UNAVAILABLE, ids[2]: Status.EMPTY}
    for i, video_id in enumerate(ids):
        error = "This video is private" if statuses.get(video_id) is Status.UNAVAILABLE else None
        end = START + 20 * (i + 1)
        make_receipt(layout, video_id, end, statuses.get(video_id, Status.OK), seconds=18.0, waited=2.0, error=error)
    free = START
    for shard, members in run.shards().items():
        make_tables(layout, shard, members, statuses, model)
        begin = max(free, START + 20 * (1 + ids.index(members[-1])))
        path = layout.telemetry / "transcribe" / f"{shard}.parquet"
        make_telemetry(path, "transcribe", begin, begin + 60, gpu_busy=0.93, phase_model=54.0)
        path = layout.telemetry / f"embed-{model}" / f"{shard}.parquet"
        free = begin + 660
        make_telemetry(path, "embed", begin + 60, free, gpu_busy=0.12, chunks=512, phase_encode=592.0)
    path = layout.telemetry / "load" / f"{model}.parquet"
    make_telemetry(path, "load", free, free + 30)
    ledger.write_ledger(layout, settings, run)
    return layout, settings, run
