"""A shard's videos as two tables. What the cache lacks goes through the pipeline, and into the cache video by video."""

import hashlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from cuepoint import devices, failures
from cuepoint.asr import VERSION
from cuepoint.asr.engine import Engine, Word, load
from cuepoint.asr.model import ModelFiles, find_model
from cuepoint.asr.pipeline import GROUP, Part, Pipeline, Video, count_flagged
from cuepoint.asr.speech import PAUSE, RATE, VAD, Timeline
from cuepoint.errors import DataError
from cuepoint.failures import Attempt
from cuepoint.fingerprint import fingerprint
from cuepoint.layout import Layout
from cuepoint.receipts import Receipt
from cuepoint.settings import TranscribeSettings
from cuepoint.states import Status
from cuepoint.tables import TRANSCRIPTS, VIDEOS, package_versions, read_metadata, read_table, write_table
from cuepoint.telemetry import Telemetry

log = logging.getLogger(__name__)

_FOUND = {"duration", "speech_duration", "problem", "language", "language_probability", "computed"}
PREPARERS = 8  # at most: decoding and VAD of 8 threads keep ahead of any one GPU


def transcribe_shard(
    receipts: Sequence[Receipt],
    layout: Layout,
    settings: TranscribeSettings,
    *,
    transcripts: Path,
    videos: Path,
    threads: int,
    telemetry: Telemetry | None = None,
    keep_audio: bool = True,
) -> None:
    """Transcribe what the cache lacks and write both tables of a shard.

    `videos` gets a row for every receipt, also of a video without audio. Raises DataError, after all other videos are
    in the cache, when audio is missing or not what its receipt says: each such video is noted in the failure log, so
    that the next run downloads it again. With `keep_audio` False the audio goes when the tables are there.
    """
    receipts = sorted(receipts, key=lambda receipt: receipt.video_id)
    files = find_model(settings)
    caches = {
        receipt.video_id: layout.cache("transcribe", receipt.video_id, _key(receipt, settings, files), ".parquet")
        for receipt in receipts
        if receipt.status is Status.OK
    }
    todo = [receipt for receipt in receipts if receipt.video_id in caches and not _is_sound(caches[receipt.video_id])]
    log.info("%d of %d videos are in the cache", len(caches) - len(todo), len(caches))
    lost = [receipt for receipt in todo if not _has_its_audio(receipt, layout.audio(receipt.video_id))]
    videos_to_do = [
        Video(receipt.video_id, layout.audio(receipt.video_id), receipt.duration or 0.0)
        for receipt in todo
        if receipt not in lost
    ]
    if videos_to_do:
        _transcribe(videos_to_do, caches, settings, files=files, threads=threads, telemetry=telemetry)
    if lost:
        _ask_again(lost, layout)
    _write_tables(receipts, caches, settings, files, transcripts=transcripts, videos=videos)
    if not keep_audio:
        for video_id in caches:
            layout.audio(video_id).unlink(missing_ok=True)


def _key(receipt: Receipt, settings: TranscribeSettings, files: ModelFiles) -> str:
    """Fingerprint of all that a video's transcript depends on."""
    wanted = settings.result_settings()
    # The same model is the same, whatever it is called and wherever it is.
    del wanted["model"], wanted["revision"]
    return fingerprint(
        audio=receipt.audio_hash or receipt.sha256, model=files.revision, settings=wanted, version=VERSION
    )


def _is_sound(cache: Path) -> bool:
    """Whether a cache entry is there and whole."""
    if not cache.exists():
        return False
    try:
        read_table(cache, TRANSCRIPTS)
        _found_in(cache)
    except DataError as error:
        log.warning("%s: it is computed again", error)
        return False
    return True


def _found_in(cache: Path) -> dict[str, Any]:
    """What a cache entry tells about its video as a whole. Raises DataError when it does not."""
    found = read_metadata(cache).get("video")
    if not isinstance(found, dict) or not _FOUND.issubset(found):
        raise DataError(f"{cache} does not tell of its video: delete it and run snakemake again")
    return found


def _has_its_audio(receipt: Receipt, path: Path) -> bool:
    """Whether the audio is there and is what the receipt says."""
    problem = None
    try:
        with path.open("rb") as file:
            if receipt.bytes is not None and os.fstat(file.fileno()).st_size != receipt.bytes:
                problem = "has another size than its receipt says"
            elif receipt.sha256 is not None and hashlib.file_digest(file, "sha256").hexdigest() != receipt.sha256:
                problem = "has another hash than its receipt says"
    except FileNotFoundError:
        problem = "is missing"
    if problem:
        log.error("%s %s", path, problem)
    return problem is None


def _ask_again(lost: Sequence[Receipt], layout: Layout) -> None:
    """Have the next run download the audio of these videos again. Raises DataError."""
    for receipt in lost:
        attempt = Attempt(
            number=receipt.attempt, status=Status.PENDING, time=time.time(), error="audio is needed again"
        )
        failures.record(layout, receipt.video_id, attempt)
    names = ", ".join(receipt.video_id for receipt in lost)
    raise DataError(
        f"the audio of {len(lost)} videos is missing or changed ({names}): run snakemake again, it is downloaded again"
    )


def _transcribe(
    videos: Sequence[Video],
    caches: dict[str, Path],
    settings: TranscribeSettings,
    *,
    files: ModelFiles,
    threads: int,
    telemetry: Telemetry | None,
) -> None:
    """Transcribe videos into their cache entries, on a GPU of their own or on `threads` cores."""
    with ExitStack() as held:
        gpu = None
        if devices.choose(settings.device) == "cuda":
            gpu = held.enter_context(devices.lease())
            if telemetry:
                telemetry.watch_gpu(gpu.uuid)
        with telemetry.phase("load_model") if telemetry else nullcontext():
            engine = load(files, settings, gpu, workers=threads)

        def finish(video: Video, parts: list[Part]) -> None:
            _write_cache(caches[video.video_id], video, parts, settings, engine)

        pipeline = Pipeline(engine, settings, finish, telemetry)
        if gpu is None:
            exact = "int8" in engine.compute_type  # then the batch changes no bit, else a group stays by itself
            # More than a large model needs: who has prepared enough waits, and takes no core from a lane.
            preparers, batch = min(PREPARERS, max(1, threads // 2)), GROUP if exact else 1
            pipeline.run(videos, lanes=threads, preparers=preparers, batch=batch, share=exact)
        else:
            # Two lanes: one prepares its batch and reads its result while the model works for the other.
            pipeline.run(videos, lanes=2, preparers=min(PREPARERS, threads), batch=settings.batch_size)


def _write_cache(
    cache: Path, video: Video, parts: Sequence[Part], settings: TranscribeSettings, engine: Engine
) -> None:
    """A video's cache entry: its rows of the transcripts table, and in the metadata what the videos table needs."""
    assert video.speech is not None
    language, probability = _language_of(parts)
    rows = [row for part in parts for row in _rows_of(part)]
    table = pa.Table.from_pylist(
        [{"video_id": video.video_id, "segment": number, **row} for number, row in enumerate(rows)], TRANSCRIPTS
    )
    write_table(
        cache,
        table,
        TRANSCRIPTS,
        settings=settings.result_settings(),
        video={
            "duration": video.speech.duration,
            "speech_duration": video.speech.speech_duration,
            "problem": video.speech.problem,
            "language": language,
            "language_probability": probability,
            "computed": f"{engine.compute_type} on {engine.device}",
        },
    )
    log.info("%s: %.0f s, of it %.0f s speech", video.video_id, video.speech.duration, video.speech.speech_duration)


def _rows_of(part: Part) -> Iterator[dict[str, Any]]:
    """A part's segments as rows of the transcripts table, with times in the file."""
    decoded = part.decoded
    for segment, flags in zip(decoded.segments, part.flags, strict=True):
        start = part.timeline.time(segment.start)
        yield {
            "start": start,
            "end": max(start, part.timeline.time(segment.end, end=True)),
            "text": segment.text,
            "language": decoded.language,
            "avg_logprob": decoded.avg_logprob,
            "no_speech_prob": decoded.no_speech_prob,
            "compression_ratio": decoded.compression_ratio,
            "words": None if segment.words is None else [_word_row(word, part.timeline) for word in segment.words],
            "flags": sorted(flags),
        }


def _word_row(word: Word, timeline: Timeline) -> dict[str, Any]:
    start = timeline.time(word.start)
    return {
        "start": start,
        "end": max(start, timeline.time(word.end, end=True)),
        "word": word.text,
        "probability": word.probability,
    }


def _language_of(parts: Sequence[Part]) -> tuple[str | None, float | None]:
    """The language most of a video's speech is in, and the mean probability with which it was detected."""
    seconds: dict[str, float] = {}
    for part in parts:
        seconds[part.decoded.language] = seconds.get(part.decoded.language, 0.0) + part.timeline.seconds
    if not seconds:
        return None, None
    language = max(sorted(seconds), key=seconds.__getitem__)
    detected = [
        part.decoded.language_probability
        for part in parts
        if part.decoded.language == language and part.decoded.language_probability is not None
    ]
    return language, sum(detected) / len(detected) if detected else None


def _write_tables(
    receipts: Sequence[Receipt],
    caches: dict[str, Path],
    settings: TranscribeSettings,
    files: ModelFiles,
    *,
    transcripts: Path,
    videos: Path,
) -> None:
    """Both tables of the shard from the receipts and the cache entries, in the order of the receipts."""
    tables, rows, computed = [TRANSCRIPTS.empty_table()], [], set()
    for receipt in receipts:
        if receipt.status is not Status.OK:
            rows.append(_video_row(receipt) | {"segments": 0, "flagged": 0})
            continue
        cache = caches[receipt.video_id]
        table, found = read_table(cache, TRANSCRIPTS), _found_in(cache)
        tables.append(table.replace_schema_metadata(None))
        computed.add(found["computed"])
        rows.append(
            _video_row(receipt)
            | {
                "duration": found["duration"],
                "speech_duration": found["speech_duration"],
                "language": found["language"],
                "language_probability": found["language_probability"],
                "status": Status.OK if len(table) else Status.EMPTY,
                "error": found["problem"],
                "segments": len(table),
                "flagged": count_flagged(table["flags"].to_pylist()),
            }
        )
    provenance = {
        "model": {"name": files.name, "revision": files.revision, "computed": sorted(computed)},
        "vad": VAD | {"pause_s": PAUSE / RATE},
        "packages": package_versions("faster-whisper", "ctranslate2", "onnxruntime", "av"),
    }
    write_table(transcripts, pa.concat_tables(tables), TRANSCRIPTS, settings=settings.result_settings(), **provenance)
    table = pa.Table.from_pylist(rows, VIDEOS)
    write_table(videos, table, VIDEOS, settings=settings.result_settings(), **provenance)


def _video_row(receipt: Receipt) -> dict[str, Any]:
    """What the receipt says about a video."""
    return {
        "video_id": receipt.video_id,
        "url": receipt.url,
        "title": receipt.title,
        "channel": receipt.channel,
        "channel_id": receipt.channel_id,
        "upload_date": _date(receipt.upload_date),
        "duration": receipt.duration,
        "status": receipt.status,
        "error": receipt.error,
        "audio_hash": receipt.audio_hash,
    }


def _date(text: str | None) -> date | None:
    """A date that yt-dlp spells YYYYMMDD; None for anything else."""
    try:
        return datetime.strptime(text or "", "%Y%m%d").date()
    except ValueError:
        return None
