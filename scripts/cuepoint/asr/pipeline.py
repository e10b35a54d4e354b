"""Preparation and model at work at the same time: videos in, what their clips say out.

Preparers (threads) decode, find speech and compute features of the next videos, longest first; lanes (threads) take
what is ready, in batches that mix videos on a GPU, and feed the model. What is ready and waits is bounded, so memory
does not grow with the length of a video.

What comes out for a video depends on that video alone: its clips are grouped within it, and on a CPU a batch is one
group. (In int8 not even the batch or the number of threads changes a bit of what CTranslate2 computes: a test mixes.)
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np

from cuepoint.asr.engine import Decoded, Engine, Group, is_out_of_memory
from cuepoint.asr.safety import Flag, suspicions
from cuepoint.asr.speech import Clip, Speech, Timeline
from cuepoint.errors import EnvironmentFault
from cuepoint.settings import TranscribeSettings
from cuepoint.telemetry import Telemetry

log = logging.getLogger(__name__)

# Clips of a video that are decoded together; its language is detected from the first group. More do not pay on a CPU
# (benchmarks/asr.md), and a GPU joins groups of several videos to its batch size.
GROUP = 4
# Clips that may be ready and wait, for each clip that the model takes at a time: 2.5 MB each.
READY = 4


@dataclass
class Video:
    """A video on its way through the pipeline."""

    video_id: str
    audio: Path
    duration: float  # seconds, 0 if not known: only for the order
    language: str | None = None  # once it is known
    parts: dict[int, list["Part"]] = field(default_factory=dict)  # of finished groups
    groups: int = 0  # offered so far
    speech: Speech | None = None  # set when all groups are offered

    @property
    def complete(self) -> bool:
        """Whether all groups are finished."""
        return self.speech is not None and len(self.parts) == self.groups


@dataclass(frozen=True)
class Part:
    """What a clip, or the rest of one, says, with the flags of each segment. The samples are gone by now.

    A video's parts are kept until the last one is there, so what they hold grows with its length.
    """

    timeline: Timeline
    decoded: Decoded
    flags: list[set[Flag]]


@dataclass(frozen=True)
class _Ready:
    """A group of a video's clips with their features, ready for the model."""

    video: Video
    number: int
    clips: list[Clip]
    features: list[np.ndarray]


class _Stopped(Exception):
    """Another thread has failed: end without a word."""


class Pipeline:
    """Preparers and lanes around one engine.

    `finish` is called for each video as it is complete, with its parts in order, from any of the threads.
    """

    def __init__(
        self,
        engine: Engine,
        settings: TranscribeSettings,
        finish: Callable[[Video, list[Part]], None],
        telemetry: Telemetry | None = None,
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._finish = finish
        self._telemetry = telemetry
        self._changed = threading.Condition()  # guards everything below
        self._videos: deque[Video] = deque()
        self._ready: deque[_Ready] = deque()
        self._room = 0  # clips that may still become ready
        self._preparing = 0
        self._batch = 1
        self._broken = False
        self._in_model = 0
        self._model_phase = ExitStack()

    def run(self, videos: Sequence[Video], *, lanes: int, preparers: int, batch: int) -> None:
        """Transcribe the videos; `batch` is the number of clips that a lane takes at most, but always a whole group.

        The first error of any thread ends all of them and is raised.
        """
        # The longest first: no lane is left alone with a long video at the end.
        self._videos.extend(sorted(videos, key=lambda video: -video.duration))
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

    def _next_video(self) -> Video | None:
        with self._changed:
            return self._videos.popleft() if self._videos and not self._broken else None

    def _prepare(self, video: Video) -> None:
        """Read a video's audio and offer its speech to the lanes, group by group."""
        speech = Speech(video.audio)
        video.language = self._engine.language
        clips_of_speech = iter(speech)
        while clips := list(islice(clips_of_speech, GROUP)):
            features = [self._engine.prepare(clip.samples) for clip in clips]
            self._offer(_Ready(video, video.groups, clips, features))
            video.groups += 1
        with self._changed:
            video.speech = speech
            complete = video.complete
        if complete:
            self._end(video)

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

    def _judged(self, clip: Clip, decoded: Decoded) -> Iterator[Part]:
        """What a clip says with its flags, and what its rest says where the model stopped early."""
        yield self._trusted(clip, decoded)
        while decoded.rest_from is not None:
            clip = clip.after(decoded.rest_from)
            group = Group([self._engine.prepare(clip.samples)], [clip.seconds], decoded.language)
            decoded = self._recognise([group])[0][0]
            yield self._trusted(clip, decoded)

    def _trusted(self, clip: Clip, decoded: Decoded) -> Part:
        """Flag what looks wrong; decode such a clip again, alone, and take that if it looks better."""
        flags = suspicions(decoded, self._settings)
        if not any(flags):
            return Part(clip.timeline, decoded, flags)
        self._count(redecoded_clips=1)
        again = self._engine.redecode(clip.samples, decoded.language)
        if again is None:  # Whisper hears no speech there: the text is kept and says so
            return Part(clip.timeline, decoded, [found | {Flag.NO_SPEECH, Flag.REDECODED} for found in flags])
        flags_again = suspicions(again, self._settings)
        if (count_flagged(flags_again), -again.avg_logprob) < (count_flagged(flags), -decoded.avg_logprob):
            # The language stays as it was detected. The sequential decoder has read the clip to its end.
            decoded = replace(again, language_probability=decoded.language_probability)
            flags = flags_again
        return Part(clip.timeline, decoded, [found | {Flag.REDECODED} if found else found for found in flags])

    def _store(self, ready: _Ready, parts: list[Part]) -> None:
        video = ready.video
        with self._changed:
            video.parts[ready.number] = parts
            if ready.number == 0 and self._settings.language != "each":
                video.language = parts[0].decoded.language
            complete = video.complete
            self._changed.notify_all()
        self._count(speech_seconds=sum(clip.seconds for clip in ready.clips), clips=len(ready.clips))
        if complete:
            self._end(video)

    def _end(self, video: Video) -> None:
        """Hand a complete video over."""
        self._finish(video, [part for number in sorted(video.parts) for part in video.parts[number]])
        if video.speech:
            self._count(videos=1, audio_seconds=video.speech.duration)
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


def count_flagged(flags: Sequence[Collection[str]]) -> int:
    """How many segments have a flag."""
    return sum(bool(found) for found in flags)
