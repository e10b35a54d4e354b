"""Preparation and model at work at the same time: videos in, what their clips say out.

Preparers (threads) decode, find speech and compute features of the next videos, longest first; lanes (threads) take
what is ready, in batches that mix videos on a GPU, and feed the model. What is ready and waits is bounded, so memory
does not grow with the length of a video.

What comes out for a video depends on that video alone. In int8 neither the batch nor the number of threads changes a
bit of what CTranslate2 computes on a CPU, so clips are dealt out as suits the cores; in other arithmetic a CPU decodes
the clips of a video in groups that depend on nothing else. On a GPU the batch may change the last digits of the scores.
"""

import logging
import math
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
from cuepoint.asr.speech import MAX_CLIP, Clip, Speech, Timeline
from cuepoint.errors import EnvironmentFault
from cuepoint.settings import TranscribeSettings
from cuepoint.telemetry import Telemetry

log = logging.getLogger(__name__)

# Clips of a video that are made ready together; its language is detected from the first group. A CPU decodes as many in
# a batch, more did not pay (`benchmarks.asr --split`); a GPU joins groups of several videos to its batch size.
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
    parts: dict[int, list["Part"]] = field(default_factory=dict)  # of decoded clips, by the clip's number
    clips: int = 0  # offered so far
    speech: Speech | None = None  # set when all clips are offered

    @property
    def complete(self) -> bool:
        """Whether all clips are decoded."""
        return self.speech is not None and len(self.parts) == self.clips


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
    """A group of a video's clips with their features, ready for the model; `first` is the number of its first clip."""

    video: Video
    first: int
    clips: list[Clip]
    features: list[np.ndarray]

    def split(self, clips: int) -> tuple["_Ready", "_Ready"]:
        """The first so many clips, and the rest."""
        return (
            _Ready(self.video, self.first, self.clips[:clips], self.features[:clips]),
            _Ready(self.video, self.first + clips, self.clips[clips:], self.features[clips:]),
        )


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
        self._unread = 0.0  # seconds of audio that nobody has offered yet, as far as lengths are known
        self._lanes = self._batch = 1
        self._share = False
        self._broken = False
        self._in_model = 0
        self._model_phase = ExitStack()

    def run(self, videos: Sequence[Video], *, lanes: int, preparers: int, batch: int, share: bool = False) -> None:
        """Transcribe the videos; `batch` is the number of clips that a lane takes at most, but always a whole group.

        With `share` groups are split to fill batches, and batches become smaller towards the end, so that all lanes end
        together. The first error of any thread ends all of them and is raised.
        """
        # The longest first: no lane is left alone with a long video at the end.
        self._videos.extend(sorted(videos, key=lambda video: -video.duration))
        self._room = READY * lanes * max(batch, GROUP)
        self._preparing, self._lanes, self._batch, self._share = preparers, lanes, batch, share
        self._unread = sum(video.duration for video in videos)
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
        read = 0.0
        while clips := list(islice(clips_of_speech, GROUP)):
            features = [self._engine.prepare(clip.samples) for clip in clips]
            newly_read = min(speech.duration, video.duration) - read
            self._offer(_Ready(video, video.clips, clips, features), newly_read)
            video.clips += len(clips)
            read += newly_read
        with self._changed:
            video.speech = speech
            self._unread -= video.duration - read
            complete = video.complete
        if complete:
            self._end(video)

    def _offer(self, ready: _Ready, seconds: float) -> None:
        """Give clips to the lanes when there is room; so many seconds of audio were read for them."""
        with self._changed:
            # A group larger than the room that is left passes when it is the only one.
            while self._room < len(ready.clips) and self._ready and not self._broken:
                self._changed.wait()
            if self._broken:
                raise _Stopped
            self._room -= len(ready.clips)
            self._unread -= seconds
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
                    [list(self._judged(clip, first)) for clip, first in zip(ready.clips, clips, strict=True)]
                    for ready, clips in zip(taken, decoded, strict=True)
                ]
            for ready, done in zip(taken, parts, strict=True):
                self._store(ready, done)

    def _take(self) -> list[_Ready]:
        """Groups for one batch; waits for the first one, not for a full batch: a full queue fills it by itself."""
        with self._changed:
            while not self._broken:
                taken: list[_Ready] = []
                left: deque[_Ready] = deque()
                room = self._clips_for_a_batch()
                for ready in self._ready:
                    fitting = self._fitting(ready, room, alone=not taken)
                    now, later = ready.split(fitting)
                    if now.clips:
                        taken.append(now)
                        room -= fitting
                    if later.clips:
                        left.append(later)
                if taken:
                    self._ready = left
                    self._room += sum(len(ready.clips) for ready in taken)
                    self._changed.notify_all()
                    self._report()
                    return taken
                if not self._ready and not self._preparing:
                    return []
                self._changed.wait()
            return []

    def _clips_for_a_batch(self) -> int:
        """As many as there may be, but no more than this lane's part of all that is left."""
        if not self._share:
            return self._batch
        left = sum(len(ready.clips) for ready in self._ready) + self._unread / MAX_CLIP
        return max(1, min(self._batch, math.ceil(left / self._lanes)))

    def _fitting(self, ready: _Ready, room: int, *, alone: bool) -> int:
        """How many clips of a group may join a batch with so much room."""
        language_is_known = ready.video.language is not None or self._settings.language == "each"
        if not language_is_known and ready.first > 0:
            return 0  # the first group tells the language
        clips = len(ready.clips)
        if self._share and language_is_known:
            return min(clips, max(room, 0))
        return clips if clips <= room or alone else 0

    def _recognise(self, groups: Sequence[Group]) -> list[list[Decoded]]:
        """Decode groups in one batch; when the GPU's memory is full in two halves, and later batches are smaller."""
        clips = sum(len(group.features) for group in groups)
        try:
            return self._engine.transcribe(groups)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if clips == 1:
                raise _too_small(error) from error
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
        part = self._trusted(clip, decoded)
        yield part
        while part.decoded.rest_from is not None:
            clip = clip.after(part.decoded.rest_from)
            group = Group([self._engine.prepare(clip.samples)], [clip.seconds], decoded.language)
            part = self._trusted(clip, self._recognise([group])[0][0])
            yield part

    def _trusted(self, clip: Clip, decoded: Decoded) -> Part:
        """Flag what looks wrong; decode such a clip again, alone, and take that if it looks better."""
        flags = suspicions(decoded, self._settings)
        if not any(flags):
            return Part(clip.timeline, decoded, flags)
        self._count(redecoded_clips=1)
        try:
            again = self._engine.redecode(clip.samples, decoded.language)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise _too_small(error) from error
            raise
        if again is None:  # Whisper hears no speech there: the text is kept and says so
            return Part(clip.timeline, decoded, [found | {Flag.NO_SPEECH, Flag.REDECODED} for found in flags])
        flags_again = suspicions(again, self._settings)
        if (count_flagged(flags_again), -again.avg_logprob) < (count_flagged(flags), -decoded.avg_logprob):
            # The language stays as it was detected. The sequential decoder has read the clip to its end.
            decoded = replace(again, language_probability=decoded.language_probability)
            flags = flags_again
        return Part(clip.timeline, decoded, [found | {Flag.REDECODED} if found else found for found in flags])

    def _store(self, ready: _Ready, parts: list[list[Part]]) -> None:
        """Keep the parts of each clip."""
        video = ready.video
        with self._changed:
            video.parts |= dict(enumerate(parts, ready.first))
            if ready.first == 0 and self._settings.language != "each":
                video.language = parts[0][0].decoded.language
            complete = video.complete
            self._changed.notify_all()
        self._count(speech_seconds=sum(clip.seconds for clip in ready.clips), clips=len(ready.clips))
        if complete:
            self._end(video)

    def _end(self, video: Video) -> None:
        """Hand a complete video over."""
        self._finish(video, [part for clip in sorted(video.parts) for part in video.parts[clip]])
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


def _too_small(error: RuntimeError) -> EnvironmentFault:
    return EnvironmentFault(
        f"the GPU's memory is too small for a single clip ({error}): take a smaller model, compute_type int8_float16, "
        "or end what else uses this GPU"
    )


def count_flagged(flags: Sequence[Collection[str]]) -> int:
    """How many segments have a flag."""
    return sum(bool(found) for found in flags)
