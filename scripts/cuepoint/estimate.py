"""What the whole list will take on this machine: each model is timed on the corpus' own passages and audio."""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

from cuepoint import devices
from cuepoint.bottleneck import SIZES
from cuepoint.chunks import Segment, chunk_video
from cuepoint.errors import DataError
from cuepoint.layout import Layout
from cuepoint.receipts import Receipt, read_receipt
from cuepoint.settings import Settings, TranscribeSettings
from cuepoint.settings.embedding import READY_MADE
from cuepoint.sources import Entry, read_list
from cuepoint.states import Status
from cuepoint.tables import TRANSCRIPTS, VIDEOS, read_table

if TYPE_CHECKING:
    from cuepoint.embedding.quality import Quality

# Assumed where the corpus does not say yet.
MINUTES = 15.0  # of a video
WORDS_PER_SECOND = 2.5  # of speech
TOKENS_PER_WORD = 1.3
AUDIO_BYTES = 48_000 / 8  # a second: what `download.format_sort` asks for
TEXT_BYTES = 600  # of a passage with its identifiers and times, compressed

COPIES = 3  # of each vector on the disk: the cache, the table, the embedded collection
_QUALITY_SAMPLE = 32  # passages that tell how near an int8 model comes to float32
_SAMPLE_SHARDS = 4  # transcripts are read from so many shards at most
_SENTENCES = (
    "Well, this is what we set out to do a couple of years ago, and nobody thought that it would work.",
    "You take the first part, turn it around, and then you can see where the light comes in.",
    "So what happens if we change the temperature while everything else stays the same?",
    "I remember that my grandmother had a garden behind the house, with apples, pears and a lot of beans.",
    "The second number is much larger than the first one, and that tells us something about the market.",
    "Let us go back to the beginning for a moment.",
)


@dataclass(frozen=True)
class Corpus:
    """What is known of the list: sizes in seconds and bytes, and where they come from."""

    videos: int
    seconds: float  # of audio, of the whole list
    seconds_from: str
    audio_bytes: float  # of a second
    transcripts: list[list[Segment]]  # of some videos
    transcribed: float  # seconds of audio of these
    transcripts_from: str
    audio: list[Path]  # of some videos


@dataclass(frozen=True)
class EmbeddingEstimate:
    """One embedding model on this machine."""

    dimension: int
    texts: float  # passages of the whole list
    texts_per_second: float
    tokens_per_second: float
    of_peak: float  # share of the measured matrix-product rate
    quality: "Quality | None"  # of a model in int8

    @property
    def seconds(self) -> float:
        """For the whole list."""
        return self.texts / self.texts_per_second

    @property
    def bytes(self) -> float:
        """On the disk, for the whole list."""
        return COPIES * self.texts * (4 * self.dimension + TEXT_BYTES)


def read_corpus(settings: Settings, layout: Layout, hours: float | None = None) -> Corpus:
    """What the list, the receipts and the transcripts say; `hours` of audio, if given, are believed."""
    entries = read_list(settings.videos)
    receipts = _receipts(entries, layout)
    durations = [receipt.duration or 0.0 for receipt in receipts]
    if hours is not None:
        seconds, seconds_from = hours * 3600, "as given"
    elif any(durations):
        seconds, seconds_from = len(entries) * sum(durations) / len(durations), f"from {len(durations)} downloads"
    else:
        seconds, seconds_from = len(entries) * MINUTES * 60, f"assuming {MINUTES:.0f} minutes a video: see --hours"
    sizes = [(receipt.bytes, receipt.duration) for receipt in receipts if receipt.bytes and receipt.duration]
    transcripts, transcribed = _transcripts(layout)
    return Corpus(
        videos=len(entries),
        seconds=seconds,
        seconds_from=seconds_from,
        audio_bytes=sum(size for size, _ in sizes) / sum(time for _, time in sizes) if sizes else AUDIO_BYTES,
        transcripts=transcripts or [_assumed_transcript()],
        transcribed=transcribed if transcripts else 3600.0,
        transcripts_from=f"from {len(transcripts)} transcripts"
        if transcripts
        else "assumed: nothing is transcribed yet",
        audio=_audio(entries, receipts, layout),
    )


def estimate_embedding(
    name: str, corpus: Corpus, settings: Settings, *, threads: int, seconds: float, peak: float
) -> EmbeddingEstimate:
    """Time the configured model `name` for about `seconds`; `peak` in operations a second.

    Raises the errors of the embed stage: a model that cannot be had or used.
    """
    from cuepoint.embedding import open_embedder
    from cuepoint.embedding.location import locate
    from cuepoint.embedding.speed import arithmetic, measure

    device = devices.choose(settings.embedding.device)
    embedder = open_embedder(name, settings, device=device, threads=threads)
    chunks = [
        chunk
        for segments in corpus.transcripts
        for chunk in chunk_video(segments, settings.chunking, embedder.count_tokens, embedder.max_tokens)
    ]
    if not chunks:
        raise DataError("the transcripts hold no text")
    with devices.lease() if device == "cuda" else nullcontext() as gpu:
        embedder.load(gpu.index if gpu else 0)
        speed = measure(
            embedder.encode_passages,
            [chunk.text for chunk in chunks],
            [chunk.tokens for chunk in chunks],
            arithmetic(locate(settings.embedding.models[name])),
            seconds=seconds,
        )
        quality = embedder.check_quality(embedder.tokenize([chunk.text for chunk in chunks]), most=_QUALITY_SAMPLE)
    return EmbeddingEstimate(
        dimension=embedder.dimension,
        texts=len(chunks) * corpus.seconds / corpus.transcribed,
        texts_per_second=speed.texts_per_second,
        tokens_per_second=speed.tokens_per_second,
        of_peak=speed.operations_per_second / peak,
        quality=quality,
    )


def least_seconds(name: str, corpus: Corpus, settings: Settings, peak: float) -> float | None:
    """Seconds for the whole list at the device's `peak` of operations a second: a bound for a model that is not here.

    Known of the ready-made models only; None for others.
    """
    if name not in SIZES or settings.embedding.models[name].model != READY_MADE[name]["model"]:
        return None
    weights, _ = SIZES[name]
    words = sum(len(segment.text.split()) for segments in corpus.transcripts for segment in segments)
    return 2 * weights * TOKENS_PER_WORD * words * corpus.seconds / corpus.transcribed / peak


def transcription_rate(settings: TranscribeSettings, audio: Sequence[Path], *, threads: int, seconds: float) -> float:
    """Seconds of audio that are transcribed in a second, measured for about `seconds` on the files in `audio`.

    Raises DataError when there is no speech in them, and the errors of the transcribe stage.
    """
    from cuepoint.asr.engine import Engine, Group, load
    from cuepoint.asr.model import find_model
    from cuepoint.asr.pipeline import GROUP
    from cuepoint.asr.speech import RATE, Clip, Speech

    on_gpu = devices.choose(settings.device) == "cuda"
    size = settings.batch_size if on_gpu else GROUP

    def groups() -> Iterator[list[Clip]]:
        for number, path in enumerate(cycle(audio)):
            clips = iter(Speech(path))
            while group := list(islice(clips, size)):
                yield group
            if number + 1 == len(audio) and not done:
                raise DataError("no speech was found in the audio that is here")

    def work(engine: Engine) -> None:
        while time.perf_counter() < deadline:
            with turn:
                clips = next(waiting)
                done.append((clips[-1].timeline.sections[-1][1] - clips[0].timeline.sections[0][0]) / RATE)
            features = [engine.prepare(clip.samples) for clip in clips]
            engine.transcribe([Group(features, [clip.seconds for clip in clips], engine.language)])

    done: list[float] = []
    turn = threading.Lock()
    waiting = groups()
    with devices.lease() if on_gpu else nullcontext() as gpu:
        engine = load(find_model(settings), settings, gpu, workers=threads)
        begin = time.perf_counter()
        deadline = begin + seconds
        lanes = 2 if on_gpu else threads
        with ThreadPoolExecutor(lanes) as pool:
            for lane in [pool.submit(work, engine) for _ in range(lanes)]:
                lane.result()
        return sum(done) / (time.perf_counter() - begin)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _receipts(entries: Sequence[Entry], layout: Layout) -> list[Receipt]:
    paths = [layout.receipt(entry.video_id) for entry in entries]
    return [read_receipt(path) for path in paths if path.exists()]


def _audio(entries: Sequence[Entry], receipts: Sequence[Receipt], layout: Layout) -> list[Path]:
    """Audio files that are here: downloaded ones, else local files of the list."""
    downloaded = [layout.audio(receipt.video_id) for receipt in receipts if receipt.status is Status.OK]
    local = [Path(entry.source) for entry in entries if entry.is_local]
    return [path for path in downloaded if path.is_file()] or [path for path in local if path.is_file()]


def _transcripts(layout: Layout) -> tuple[list[list[Segment]], float]:
    """Segments of the videos of a few shards, and the seconds of their audio."""
    transcripts: list[list[Segment]] = []
    seconds = 0.0
    for path in sorted((layout.transcripts("x").parent).glob("*.parquet"))[:_SAMPLE_SHARDS]:
        of_video: dict[str, list[Segment]] = {}
        for row in read_table(path, TRANSCRIPTS).to_pylist():
            segment = Segment(row["start"], row["end"], row["text"], row["words"], row["flags"])
            of_video.setdefault(row["video_id"], []).append(segment)
        transcripts += of_video.values()
        durations = read_table(layout.videos(path.stem), VIDEOS, ["duration", "segments"]).to_pylist()
        seconds += sum(row["duration"] or 0.0 for row in durations)
    return transcripts, seconds


def _assumed_transcript() -> list[Segment]:
    """An hour of talk."""
    segments, now = [], 0.0
    for sentence in cycle(_SENTENCES):
        seconds = len(sentence.split()) / WORDS_PER_SECOND
        if now + seconds > 3600:
            return segments
        segments.append(Segment(now, now + seconds, f" {sentence}"))
        now += seconds
    return segments
