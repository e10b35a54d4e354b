"""A shard's videos through the recogniser: preparation and model at work at the same time, results kept as they come.

Preparers (threads) decode, find speech and compute features of the next videos, longest first; lanes (threads) take
what is ready, in batches that mix videos on a GPU, and feed the model. What is ready and waits is bounded, so memory
does not grow with the length of a video. Each video's result goes into the cache as it is complete.

What a video's result depends on is the video alone: clips are grouped within a video, and on a CPU in int8 neither the
batch nor the number of threads changes a bit of what CTranslate2 computes.
"""

import hashlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cuepoint import devices, failures
from cuepoint.asr import VERSION
from cuepoint.asr.engine import Decoded, Engine, Group, Word, is_out_of_memory, load
from cuepoint.asr.model import ModelFiles, find_model
from cuepoint.asr.safety import Flag, suspicions
from cuepoint.asr.speech import VAD, Clip, Speech
from cuepoint.errors import DataError, EnvironmentFault
from cuepoint.failures import Attempt
from cuepoint.fingerprint import fingerprint
from cuepoint.layout import Layout
from cuepoint.receipts import Receipt
from cuepoint.settings import TranscribeSettings
from cuepoint.states import Status
from cuepoint.tables import TRANSCRIPTS, VIDEOS, package_versions, read_metadata, read_table, write_table
from cuepoint.telemetry import Telemetry

log = logging.getLogger(__name__)

# Clips of a video that are decoded together; its language is detected from the first group. More do not pay on a CPU
# (measured with `base`), and a GPU joins groups of several videos to its batch size.
GROUP = 4
# Clips that may be ready and wait, for each clip that the model takes at a time: 2.5 MB each.
READY = 4
PREPARERS = 8  # at most: decoding and VAD of 8 threads keep ahead of any one GPU


@dataclass
class _Video:
    """A video on its way through the pipeline."""

    receipt: Receipt
    cache: Path
    language: str | None = None  # once it is known
    parts: dict[int, list["_Part"]] = field(default_factory=dict)  # of finished groups
    groups: int = 0  # offered so far
    speech: Speech | None = None  # set when all groups are offered


@dataclass(frozen=True)
class _Part:
    """A clip, or the rest of one, with what it says and the flags of each segment."""

    clip: Clip
    decoded: Decoded
    flags: list[set[Flag]]


@dataclass(frozen=True)
class _Ready:
    """A group of a video's clips with their features, ready for the model."""

    video: _Video
    number: int
    clips: list[Clip]
    features: list[np.ndarray]


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
    lost = []
    missing = []
    for receipt in receipts:
        cache = caches.get(receipt.video_id)
        if cache is None or _is_sound(cache):
            continue
        problem = _problem_of_audio(receipt, layout.audio(receipt.video_id))
        if problem is None:
            missing.append(_Video(receipt, cache))
        else:
            lost.append(receipt)
            log.error("%s: %s", receipt.video_id, problem)
    log.info("%d of %d videos are in the cache, %d to do", len(caches) - len(missing), len(caches), len(missing))
    if missing:
        _transcribe(missing, layout, settings, files=files, threads=threads, telemetry=telemetry)
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
    except DataError as error:
        log.warning("%s: it is computed again", error)
        return False
    return True


def _problem_of_audio(receipt: Receipt, path: Path) -> str | None:
    """Why the audio cannot be used, None if it is what the receipt says."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if receipt.bytes is not None and size != receipt.bytes:
                return f"{path} has {size} bytes, its receipt says {receipt.bytes}"
            if receipt.sha256 is not None and hashlib.file_digest(file, "sha256").hexdigest() != receipt.sha256:
                return f"{path} is not the file that was downloaded (other sha256)"
    except FileNotFoundError:
        return f"{path} is missing"
    return None


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
    missing: list[_Video],
    layout: Layout,
    settings: TranscribeSettings,
    *,
    files: ModelFiles,
    threads: int,
    telemetry: Telemetry | None,
) -> None:
    """Compute what is missing, on a GPU of its own or on `threads` cores."""
    with ExitStack() as held:
        gpu = None
        if devices.choose(settings.device) == "cuda":
            gpu = held.enter_context(devices.lease(layout))
            if telemetry:
                telemetry.watch_gpu(gpu.uuid)
        with telemetry.phase("load_model") if telemetry else nullcontext():
            engine = load(files, settings, gpu, workers=threads)
        pipeline = _Pipeline(engine, settings, layout, telemetry)
        if gpu is None:
            pipeline.run(missing, lanes=threads, preparers=max(1, threads // 4), batch=1)
        else:
            # Two lanes: one prepares its batch and reads its result while the model works for the other.
            pipeline.run(missing, lanes=2, preparers=min(PREPARERS, threads), batch=settings.batch_size)


class _Stopped(Exception):
    """Another thread has failed: end without a word."""


class _Pipeline:
    """Preparers and lanes around one engine, for the videos of one shard."""

    def __init__(
        self, engine: Engine, settings: TranscribeSettings, layout: Layout, telemetry: Telemetry | None
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._layout = layout
        self._telemetry = telemetry
        self._changed = threading.Condition()  # guards everything below
        self._videos: deque[_Video] = deque()
        self._ready: deque[_Ready] = deque()
        self._room = 0  # clips that may still become ready
        self._preparing = 0
        self._batch = 1
        self._broken = False
        self._in_model = 0
        self._model_phase = ExitStack()

    def run(self, videos: Sequence[_Video], *, lanes: int, preparers: int, batch: int) -> None:
        """Transcribe the videos into their caches; `batch` is the number of clips that a lane takes at most."""
        # The longest first: no lane is left alone with a long video at the end.
        self._videos.extend(sorted(videos, key=lambda video: -(video.receipt.duration or 0)))
        self._room = READY * lanes * max(batch, GROUP)
        self._preparing, self._batch = preparers, batch
        with ThreadPoolExecutor(preparers + lanes) as pool:
            running = [pool.submit(self._prepare_all) for _ in range(preparers)]
            running += [pool.submit(self._decode_all) for _ in range(lanes)]
            try:
                for thread in as_completed(running):
                    thread.result()
            finally:
                with self._changed:
                    self._broken = True
                    self._changed.notify_all()

    def _prepare_all(self) -> None:
        try:
            while video := self._next_video():
                self._prepare(video)
        except _Stopped:
            return
        finally:
            with self._changed:
                self._preparing -= 1
                self._changed.notify_all()

    def _next_video(self) -> _Video | None:
        with self._changed:
            return self._videos.popleft() if self._videos and not self._broken else None

    def _prepare(self, video: _Video) -> None:
        """Read a video's audio and offer its speech to the lanes, group by group."""
        speech = Speech(self._layout.audio(video.receipt.video_id))
        video.language = self._engine.language
        clips_of_speech = iter(speech)
        while clips := list(islice(clips_of_speech, GROUP)):
            features = [self._engine.prepare(clip.samples) for clip in clips]
            self._offer(_Ready(video, video.groups, clips, features))
            video.groups += 1
        with self._changed:
            video.speech = speech
            complete = len(video.parts) == video.groups
        if complete:
            self._finish(video)

    def _offer(self, ready: _Ready) -> None:
        with self._changed:
            # A group larger than the room that is left passes when it is the only one.
            while self._room < len(ready.clips) and self._ready and not self._broken:
                self._changed.wait()
            if self._broken:
                raise _Stopped
            self._room -= len(ready.clips)
            self._ready.append(ready)
            self._changed.notify_all()
            self._report()

    def _decode_all(self) -> None:
        while taken := self._take():
            with self._computing():
                groups = [
                    Group(ready.features, [clip.seconds for clip in ready.clips], ready.video.language)
                    for ready in taken
                ]
                decoded = self._recognise(groups)
                parts = [
                    [part for clip, first in zip(ready.clips, clips, strict=True) for part in self._judged(clip, first)]
                    for ready, clips in zip(taken, decoded, strict=True)
                ]
            for ready, done in zip(taken, parts, strict=True):
                self._store(ready, done)

    def _take(self) -> list[_Ready]:
        """Groups for one batch; waits for the first one, not for a full batch: a full queue fills it by itself."""
        with self._changed:
            while not self._broken:
                taken: list[_Ready] = []
                size = 0
                for ready in self._ready:
                    if self._can_be_decoded(ready) and (not taken or size + len(ready.clips) <= self._batch):
                        taken.append(ready)
                        size += len(ready.clips)
                if taken:
                    chosen = set(map(id, taken))
                    self._ready = deque(ready for ready in self._ready if id(ready) not in chosen)
                    self._room += size
                    self._changed.notify_all()
                    self._report()
                    return taken
                if not self._ready and not self._preparing:
                    return []
                self._changed.wait()
            return []

    def _can_be_decoded(self, ready: _Ready) -> bool:
        """The first group of a video tells its language; the others wait for that."""
        return ready.number == 0 or ready.video.language is not None or self._settings.language == "each"

    def _recognise(self, groups: Sequence[Group]) -> list[list[Decoded]]:
        """Decode groups in one batch; when the GPU's memory is full in two halves, and later batches are smaller."""
        clips = sum(len(group.features) for group in groups)
        try:
            return self._engine.transcribe(groups)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if clips == 1:
                raise EnvironmentFault(
                    f"the GPU's memory is too small for a single clip ({error}): take a smaller model, "
                    "compute_type int8_float16, or end what else uses this GPU"
                ) from error
        with self._changed:
            self._batch = min(self._batch, max(1, clips // 2))
        log.warning("the GPU's memory was full with %d clips: going on with at most %d at a time", clips, self._batch)
        if len(groups) > 1:
            middle = len(groups) // 2
            return self._recognise(groups[:middle]) + self._recognise(groups[middle:])
        (group,) = groups
        middle = clips // 2
        first = self._recognise([Group(group.features[:middle], group.seconds[:middle], group.language)])[0]
        language = group.language if self._settings.language == "each" else first[0].language
        second = self._recognise([Group(group.features[middle:], group.seconds[middle:], language)])[0]
        return [first + second]

    def _judged(self, clip: Clip, decoded: Decoded) -> Iterator[_Part]:
        """What a clip says with its flags, and what its rest says where the model stopped early."""
        yield self._trusted(clip, decoded)
        while decoded.rest_from is not None:
            clip = clip.after(decoded.rest_from)
            group = Group([self._engine.prepare(clip.samples)], [clip.seconds], decoded.language)
            decoded = self._recognise([group])[0][0]
            yield self._trusted(clip, decoded)

    def _trusted(self, clip: Clip, decoded: Decoded) -> _Part:
        """Flag what looks wrong; decode such a clip again, alone, and take that if it looks better."""
        flags = suspicions(decoded, self._settings)
        if not any(flags):
            return _Part(clip, decoded, flags)
        self._count(redecoded_clips=1)
        again = self._engine.redecode(clip.samples, decoded.language)
        if again is None:  # Whisper hears no speech there: the text is kept and says so
            return _Part(clip, decoded, [found | {Flag.NO_SPEECH, Flag.REDECODED} for found in flags])
        flags_again = suspicions(again, self._settings)
        if (_count_flagged(flags_again), -again.avg_logprob) < (_count_flagged(flags), -decoded.avg_logprob):
            # The language stays as it was detected. The sequential decoder has read the clip to its end.
            decoded = replace(again, language_probability=decoded.language_probability)
            flags = flags_again
        return _Part(clip, decoded, [found | {Flag.REDECODED} if found else found for found in flags])

    def _store(self, ready: _Ready, parts: list[_Part]) -> None:
        video = ready.video
        with self._changed:
            video.parts[ready.number] = parts
            if ready.number == 0 and self._settings.language != "each":
                video.language = parts[0].decoded.language
            complete = video.speech is not None and len(video.parts) == video.groups
            self._changed.notify_all()
        self._count(speech_seconds=sum(clip.seconds for clip in ready.clips), clips=len(ready.clips))
        if complete:
            self._finish(video)

    def _finish(self, video: _Video) -> None:
        """Put a complete video into the cache."""
        assert video.speech is not None
        parts = [part for number in sorted(video.parts) for part in video.parts[number]]
        _write_cache(video, parts, self._settings, self._engine)
        self._count(videos=1, audio_seconds=video.speech.duration)
        log.info(
            "%s: %.0f s, of it %.0f s speech",
            video.receipt.video_id,
            video.speech.duration,
            video.speech.speech_duration,
        )
        video.parts.clear()

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Telemetry's phase `model`: the time in which at least one lane is in the model."""
        with self._changed:
            self._in_model += 1
            if self._in_model == 1 and self._telemetry:
                self._model_phase.enter_context(self._telemetry.phase("model"))
        try:
            yield
        finally:
            with self._changed:
                self._in_model -= 1
                if self._in_model == 0:
                    self._model_phase.close()

    def _report(self) -> None:
        if self._telemetry:
            self._telemetry.gauge(
                queue_clips=sum(len(ready.clips) for ready in self._ready), queue_videos=len(self._videos)
            )

    def _count(self, **amounts: float) -> None:
        if self._telemetry:
            self._telemetry.add(**amounts)


def _write_cache(video: _Video, parts: Sequence[_Part], settings: TranscribeSettings, engine: Engine) -> None:
    """A video's cache entry: its rows of the transcripts table, and in the metadata what the videos table needs."""
    assert video.speech is not None
    language, probability = _language_of(parts)
    rows = [row for part in parts for row in _rows_of(part)]
    table = pa.Table.from_pylist(
        [{"video_id": video.receipt.video_id, "segment": number, **row} for number, row in enumerate(rows)], TRANSCRIPTS
    )
    write_table(
        video.cache,
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


def _rows_of(part: _Part) -> Iterator[dict[str, Any]]:
    """A part's segments as rows of the transcripts table, with times in the file."""
    decoded = part.decoded
    for segment, flags in zip(decoded.segments, part.flags, strict=True):
        start = part.clip.time(segment.start)
        yield {
            "start": start,
            "end": max(start, part.clip.time(segment.end, end=True)),
            "text": segment.text,
            "language": decoded.language,
            "avg_logprob": decoded.avg_logprob,
            "no_speech_prob": decoded.no_speech_prob,
            "compression_ratio": decoded.compression_ratio,
            "words": None if segment.words is None else [_word_row(word, part.clip) for word in segment.words],
            "flags": sorted(flags),
        }


def _word_row(word: Word, clip: Clip) -> dict[str, Any]:
    start = clip.time(word.start)
    return {
        "start": start,
        "end": max(start, clip.time(word.end, end=True)),
        "word": word.text,
        "probability": word.probability,
    }


def _language_of(parts: Sequence[_Part]) -> tuple[str | None, float | None]:
    """The language most of a video's speech is in, and the mean probability with which it was detected."""
    seconds: dict[str, float] = {}
    for part in parts:
        seconds[part.decoded.language] = seconds.get(part.decoded.language, 0.0) + part.clip.seconds
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
        table, found = read_table(cache, TRANSCRIPTS), read_metadata(cache)["video"]
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
                "flagged": _count_flagged(table["flags"].to_pylist()),
            }
        )
    provenance = {
        "model": {"name": files.name, "revision": files.revision, "computed": sorted(computed)},
        "vad": VAD,
        "packages": package_versions("faster-whisper", "ctranslate2", "onnxruntime", "av"),
    }
    write_table(transcripts, pa.concat_tables(tables), TRANSCRIPTS, settings=settings.result_settings(), **provenance)
    table = pa.Table.from_pylist(rows, VIDEOS)
    write_table(videos, table, VIDEOS, settings=settings.result_settings(), **provenance)


def _count_flagged(flags: Sequence[Collection[str]]) -> int:
    """How many segments have a flag."""
    return sum(bool(found) for found in flags)


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
