"""One video's whole story, in lines: where it came from, each attempt, and what became of it in every stage."""

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow.compute as pc

from cuepoint import failures, ledger
from cuepoint.durations import duration
from cuepoint.errors import ConfigError, DataError
from cuepoint.layout import Layout
from cuepoint.plan import Run
from cuepoint.receipts import read_receipt
from cuepoint.settings import Settings
from cuepoint.tables import read_table
from cuepoint.work import read_job, telemetry_files

SHOWN = 5  # flagged segments that are quoted


def tell(video_id: str, layout: Layout, settings: Settings, run: Run) -> Iterator[str]:
    """The story of a listed video, line by line. Raises ConfigError for a video that is not in the list."""
    if video_id in run.waiting:
        yield f"{video_id}: listed as {run.waiting[video_id]}; waits for a later run (limit_unprocessed)"
        return
    if video_id not in run.members:
        raise ConfigError(f"{video_id} is not in {settings.videos} as the last run read it: check the ID")
    shard = run.members[video_id]
    yield f"{video_id}: listed as {run.sources[video_id]}, in shard {shard}"
    yield from _attempts(layout, video_id)
    yield from _download(layout, video_id)
    yield from _transcript(layout, shard, video_id)
    for model in settings.embedding.use:
        yield from _chunks(layout, model, shard, video_id)
        loaded = ledger.is_loaded(layout, f"{settings.qdrant.collection}-{model}", run)
        yield f"load: {'in the collection of' if loaded else 'not yet in the collection of'} {model}"
    yield from _timings(layout, shard)


def _attempts(layout: Layout, video_id: str) -> Iterator[str]:
    for attempt in failures.read(layout.failures(video_id)):
        later = f"; not before {_moment(attempt.retry_after)}" if attempt.retry_after else ""
        error = f": {attempt.error}" if attempt.error else ""
        yield f"attempt {attempt.number}: {attempt.status}, {_moment(attempt.time)}{error}{later}"


def _download(layout: Layout, video_id: str) -> Iterator[str]:
    path = layout.receipt(video_id)
    try:
        receipt = read_receipt(path)
    except DataError as problem:
        yield f"download: {problem if path.exists() else 'not done yet'}"
        return
    about = " · ".join(filter(None, (receipt.title, receipt.channel, receipt.upload_date)))
    if about:
        yield f"about: {about}"
    waited = f", {duration(receipt.waited)} of them waiting for its turn" if receipt.waited else ""
    took = f" in {duration(receipt.seconds)}{waited}" if receipt.seconds is not None else ""
    error = f": {receipt.error}" if receipt.error else ""
    yield f"download: {receipt.status}, {_moment(path.stat().st_mtime)}{took}{error}"
    if receipt.codec:
        advertised = f" of {duration(receipt.advertised_duration)} advertised" if receipt.advertised_duration else ""
        size = f"{receipt.bit_rate or 0:.0f} kbit/s, {receipt.bytes or 0:,} bytes"
        kept = "kept" if layout.audio(video_id).exists() else "no longer there"
        yield f"audio: {duration(receipt.duration or 0)}{advertised}, {receipt.codec}, {size}, {kept}"


def _transcript(layout: Layout, shard: str, video_id: str) -> Iterator[str]:
    video = next(iter(_rows(layout.videos(shard), video_id)), None)
    if video is None:
        yield "transcript: not done yet"
        return
    segments = _rows(layout.transcripts(shard), video_id)
    spoken = f", {duration(video['speech_duration'])} of speech" if video["speech_duration"] is not None else ""
    error = f": {video['error']}" if video["error"] else ""
    language = f", language {video['language']} ({video['language_probability'] or 0:.0%})" if video["language"] else ""
    yield f"transcript: {video['status']}, {len(segments)} segments{spoken}{language}{error}"
    flags = Counter(flag for segment in segments for flag in segment["flags"])
    if flags:
        yield f"flags: {', '.join(f'{number} {flag}' for flag, number in flags.most_common())}"
    for segment in [segment for segment in segments if segment["flags"]][:SHOWN]:
        yield f"  {_clock(segment['start'])} {', '.join(segment['flags'])}: {segment['text'].strip()[:100]}"


def _chunks(layout: Layout, model: str, shard: str, video_id: str) -> Iterator[str]:
    path = layout.embeddings(model, shard)
    if not path.exists():
        yield f"chunks for {model}: not done yet"
        return
    chunks = _rows(path, video_id, ["video_id", "chunk", "start", "end", "tokens", "point_id"])
    if not chunks:
        yield f"chunks for {model}: none"
        return
    tokens = [chunk["tokens"] for chunk in chunks]
    yield (
        f"chunks for {model}: {len(chunks)} of {min(tokens)}-{max(tokens)} tokens, points {chunks[0]['point_id']} to "
        f"{chunks[-1]['point_id']}"
    )


def _timings(layout: Layout, shard: str) -> Iterator[str]:
    for path in telemetry_files(layout):
        if path.stem != shard or (job := read_job(path)) is None:
            continue
        ended = "goes on" if job.running else job.error or "ended well"
        model = f" with {job.model}" if job.model else ""
        yield f"{job.stage} of shard {shard}{model}: {_moment(job.start)}, {duration(job.end - job.start)}, {ended}"


def _rows(path: Any, video_id: str, columns: list[str] | None = None) -> list[dict[str, Any]]:
    """A video's rows of a shard's table; none while there is no table."""
    if not path.exists():
        return []
    return read_table(path, columns=columns).filter(pc.field("video_id") == video_id).to_pylist()


def _moment(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"
