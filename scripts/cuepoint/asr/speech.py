"""Audio in, stretches of speech out, in bounded memory: a file of any length is read in blocks.

Decoding is PyAV's; what is speech is judged by the Silero VAD that faster-whisper ships.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from faster_whisper.vad import VadOptions, get_speech_timestamps

log = logging.getLogger(__name__)

RATE = 16_000  # samples per second, mono: what Whisper and the VAD read
# Whisper's window is 30 s. A second of it is left free: speech that reaches the window's end makes the model write
# only the start stamp of the last sentence, and its text is lost.
MAX_CLIP = 29.0
# faster-whisper's defaults for its batched mode, but for the length; `sections` in the table's metadata.
VAD: dict[str, Any] = {
    "threshold": 0.5,
    "min_speech_duration_ms": 0,
    "min_silence_duration_ms": 160,
    "speech_pad_ms": 400,
    "max_speech_duration_s": MAX_CLIP,
}
# Shorter pauses stay in a clip, as in faster-whisper's sequential mode (its VAD joins speech across 2 s): without them
# sentences run into one another, and more words are wrong (benchmarks/asr.md).
PAUSE = 2 * RATE
_NOTHING = np.empty(0, np.int16)
BLOCK = 100 * RATE  # samples that the VAD sees at a time: about 90 MB inside it (300 s: 200 MB)
# Speech that ends this close to the end of what is read may go on in the next block: longer than the VAD's own
# silence and padding together.
_UNSURE = 2 * RATE


@dataclass(frozen=True)
class Timeline:
    """Stretches of a file joined to one, what is between them cut out: `sections` are (start, end) in samples."""

    sections: tuple[tuple[int, int], ...]

    @property
    def samples(self) -> int:
        """Length of all sections together."""
        return sum(end - start for start, end in self.sections)

    @property
    def seconds(self) -> float:
        """Length of all sections together."""
        return self.samples / RATE

    def time(self, seconds: float, *, end: bool = False) -> float:
        """Time in the file of a time in the joined sections, in seconds.

        A time where two sections meet belongs to the later one, or to the earlier one if it is an `end`.
        """
        left = min(max(round(seconds * RATE), 0), self.samples)
        for start, stop in self.sections:
            length = stop - start
            if left < length or (end and left == length):
                return round((start + left) / RATE, 2)
            left -= length
        return round(self.sections[-1][1] / RATE, 2)

    def after(self, samples: int) -> "Timeline":
        """What is left when so many samples are cut off at the front."""
        sections = []
        for start, stop in self.sections:
            if samples < stop - start:
                sections.append((start + samples, stop))
            samples = max(0, samples - (stop - start))
        return Timeline(tuple(sections))


@dataclass(frozen=True)
class Clip:
    """Speech for one window of the model: (n,) int16, and where in the file it was said."""

    samples: np.ndarray
    timeline: Timeline

    @property
    def seconds(self) -> float:
        """Length of the clip."""
        return len(self.samples) / RATE

    def after(self, seconds: float) -> "Clip":
        """The rest of the clip from a time on."""
        skip = round(seconds * RATE)
        return Clip(self.samples[skip:], self.timeline.after(skip))


@dataclass(frozen=True)
class Stretch:
    """Speech of a file: the sample that it starts at, (n,) int16, and the pause before it, if that is a short one."""

    start: int
    samples: np.ndarray
    pause: np.ndarray


class Speech:
    """The speech of one audio file, as clips; to be iterated once. The counts are complete when it has ended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problem: str | None = None  # why there is no or less audio than there could be
        self._samples = 0
        self._speech = 0

    @property
    def duration(self) -> float:
        """Seconds of audio decoded so far."""
        return round(self._samples / RATE, 3)

    @property
    def speech_duration(self) -> float:
        """Seconds of it that are speech."""
        return round(self._speech / RATE, 3)

    def __iter__(self) -> Iterator[Clip]:
        yield from pack(self._stretches())

    def _stretches(self) -> Iterator[Stretch]:
        for stretch in find_speech(self._blocks()):
            self._speech += len(stretch.samples)
            yield stretch

    def _blocks(self) -> Iterator[np.ndarray]:
        """Blocks of BLOCK samples, (n,) int16; the last may be shorter."""
        waiting: list[np.ndarray] = []
        size = 0
        for piece in self._decode():
            waiting.append(piece)
            size += len(piece)
            if size >= BLOCK:
                self._samples += size
                yield np.concatenate(waiting)
                waiting, size = [], 0
        self._samples += size
        if size:
            yield np.concatenate(waiting)

    def _decode(self) -> Iterator[np.ndarray]:
        """Decoded audio, (n,) int16; packets that cannot be decoded are left out and noted in `problem`."""
        bad = 0
        try:
            with av.open(self.path, metadata_errors="ignore") as container:
                if not container.streams.audio:
                    self.problem = "no audio track"
                    return
                resampler = av.AudioResampler(format="s16", layout="mono", rate=RATE)
                for packet in container.demux(container.streams.audio[0]):
                    try:
                        frames = packet.decode()
                    except av.error.InvalidDataError:
                        bad += 1
                        continue
                    for frame in frames:
                        frame.pts = None  # gaps in the stamps are no silence: the resampler must not fill them
                        for resampled in resampler.resample(frame):
                            yield resampled.to_ndarray()[0]
                for resampled in resampler.resample(None):
                    yield resampled.to_ndarray()[0]
        except av.error.FFmpegError as error:
            self.problem = f"the audio cannot be decoded after {self.duration:.0f} s: {error.strerror}"
        if bad:
            self.problem = f"{bad} packets of the audio cannot be decoded"


def find_speech(blocks: Iterable[np.ndarray]) -> Iterator[Stretch]:
    """Stretches of speech, none longer than a clip, in blocks of (n,) int16."""
    options = VadOptions(**VAD)
    offset, pending = 0, _NOTHING
    quiet = _NOTHING  # what came after the last stretch and is not pending any more
    for block, last in _mark_last(blocks):
        pending = np.concatenate([pending, block])
        found = get_speech_timestamps(pending.astype(np.float32) / 32768, options)
        sure = len(pending) if last else len(pending) - _UNSURE
        done = [stretch for stretch in found if stretch["end"] <= sure]
        heard = 0
        for stretch in done:
            start, end = stretch["start"], stretch["end"]
            pause = np.concatenate([quiet, pending[heard:start]])
            quiet, heard = _NOTHING, end
            yield Stretch(offset + start, pending[start:end].copy(), pause if len(pause) <= PAUSE else _NOTHING)
        rest = found[len(done)]["start"] if len(done) < len(found) else max(sure, 0)
        quiet = np.concatenate([quiet, pending[heard:rest]])[: PAUSE + 1]
        offset, pending = offset + rest, pending[rest:]


def pack(stretches: Iterable[Stretch]) -> Iterator[Clip]:
    """Join stretches, with the short pauses between them, to clips as long as a window allows."""
    samples: list[np.ndarray] = []
    sections: list[tuple[int, int]] = []
    size = 0
    for stretch in stretches:
        if size and size + len(stretch.pause) + len(stretch.samples) > MAX_CLIP * RATE:
            yield Clip(np.concatenate(samples), Timeline(tuple(sections)))
            samples, sections, size = [], [], 0
        start, end = stretch.start, stretch.start + len(stretch.samples)
        if size and len(stretch.pause):
            samples.append(stretch.pause)
            start, _ = sections.pop()
        samples.append(stretch.samples)
        sections.append((start, end))
        size = sum(map(len, samples))
    if size:
        yield Clip(np.concatenate(samples), Timeline(tuple(sections)))


def _mark_last(blocks: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, bool]]:
    """Each block with whether it is the last one."""
    iterator = iter(blocks)
    block = next(iterator, None)
    while block is not None:
        following = next(iterator, None)
        yield block, following is None
        block = following
