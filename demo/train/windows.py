"""Training windows: utterances laid out in time, with tokens, attention spans and frame labels as targets.

Windows are put together from log-mel spectra, which is much cheaper than from audio. Frames are 10 ms, encoder
positions are 20 ms.
"""

import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from demo.train.grammar import (
    END,
    FIRST_STAMP,
    FULL_STOP,
    NO_SPEECH,
    NO_TIMESTAMPS,
    STAMPS,
    START,
    encode,
    is_held_out,
    sentence,
    word_salad,
)
from demo.train.model import MELS, SOURCE_POSITIONS, TARGET_POSITIONS
from demo.train.speech import FRAME_RATE, Utterance, log_mel, synthesizer, through_opus, training_voice

FULL_FRAMES = 2 * SOURCE_POSITIONS
IGNORED = -100  # cross-entropy's label for "no target here"
NO_SPAN = (-1, -1)
SALAD_SHARE = 0.25
OPUS_SHARE = 0.15
SILENT_SHARE = 0.04
STAMPS_SHARE = 0.75
LATEST_FIRST_STAMP = 50  # decoding caps the first stamp at 1.0 s


@dataclass(frozen=True)
class Spoken:
    """One utterance of the pool: its log10 mel power (80, frames) float16, token ids, and word spans in frames."""

    mel: np.ndarray
    ids: list[int]
    spans: list[tuple[float, float]]


def spoken(utterance: Utterance, coded: bool = False) -> Spoken:
    """The utterance as the pool keeps it; ``coded`` sends it through Opus first."""
    audio = through_opus(utterance.audio) if coded else utterance.audio
    spans = [(a * FRAME_RATE, b * FRAME_RATE) for a, b in utterance.words]
    return Spoken(log_mel(audio).astype(np.float16), encode(utterance.text), spans)


def make_pool(size: int, seed: int) -> list[Spoken]:
    """The training set: utterances of sentences that are not held out, and of word salad."""
    rng = random.Random(seed)
    pool = []
    while len(pool) < size:
        text = word_salad(rng) if rng.random() < SALAD_SHARE else sentence(rng)
        if not is_held_out(text):
            pool.append(spoken(synthesizer().say(text, training_voice(rng)), coded=rng.random() < OPUS_SHARE))
    return pool


@dataclass(frozen=True)
class Window:
    """Features (80, frames), the position they start at, decoder input and targets with their spans, frame labels."""

    features: np.ndarray
    offset: int
    inputs: list[int]
    targets: list[int]
    spans: list[tuple[int, int]]  # positions; NO_SPAN where attention is free
    labels: np.ndarray  # (positions,) token id of the word spoken there, 0 for none


@dataclass(frozen=True)
class Batch:
    """Windows padded to one length."""

    features: Tensor  # (batch, 80, frames)
    offsets: Tensor  # (batch,)
    inputs: Tensor  # (batch, n)
    targets: Tensor  # (batch, n)
    spans: Tensor  # (batch, n, 2)
    labels: Tensor  # (batch, positions)


@dataclass(frozen=True)
class Placed:
    """The audible part of an utterance in a window: first and last frame, and its (token, first, last) in frames."""

    start: int
    end: int
    tokens: list[tuple[int, float, float]]


class Composer:
    """Makes windows from a pool, the same ones for the same seed."""

    def __init__(self, pool: list[Spoken], seed: int) -> None:
        self._pool, self._rng, self._noise = pool, random.Random(seed), np.random.default_rng(seed)

    def batch(self, count: int, frames: int) -> Batch:
        """``count`` windows of ``frames``; with 3000 frames whole 30 s windows, with fewer crops from within one."""
        windows = [self.window(frames) for _ in range(count)]
        longest = max(len(window.inputs) for window in windows)
        inputs = torch.full((count, longest), END)
        targets = torch.full((count, longest), IGNORED)
        spans = torch.full((count, longest, 2), -1)
        for i, window in enumerate(windows):
            inputs[i, : len(window.inputs)] = torch.tensor(window.inputs)
            targets[i, : len(window.targets)] = torch.tensor(window.targets)
            spans[i, : len(window.spans)] = torch.tensor(window.spans)
        return Batch(
            torch.from_numpy(np.stack([window.features for window in windows])),
            torch.tensor([window.offset for window in windows]),
            inputs,
            targets,
            spans,
            torch.from_numpy(np.stack([window.labels for window in windows])),
        )

    def window(self, frames: int) -> Window:
        """One window."""
        rng = self._rng
        full = frames == FULL_FRAMES
        offset = 0 if full else rng.randint(0, SOURCE_POSITIONS - frames // 2)
        stamps = rng.random() < STAMPS_SHARE
        end = self._end_of_speech(frames)
        mel = np.full((MELS, frames), -10, np.float32)
        placed = [] if rng.random() < SILENT_SHARE else self._lay_out(mel, end)
        self._finish(mel, placed, end)
        labels = np.zeros(frames // 2, np.int64)
        for part in placed:
            for token, a, b in part.tokens:
                if token != FULL_STOP:
                    labels[round(a / 2) : round(b / 2)] = token
        # Sequential decoding goes on from the start stamp of a sentence that the window's end cuts.
        cut = placed.pop() if full and stamps and placed and placed[-1].end == frames else None
        placed = [part for part in placed if part.tokens]
        inputs, targets, spans = self._tokens(placed, cut, stamps, offset, frames // 2)
        room = slice(TARGET_POSITIONS)
        return Window(mel, offset, inputs[room], targets[room], spans[room], labels)

    def _end_of_speech(self, frames: int) -> int:
        """The frame after which nothing is spoken; speech that would go on is cut there in half of the windows."""
        kind = self._rng.random()
        if kind < 0.4:
            return frames
        if kind < 0.6 and frames == FULL_FRAMES:
            return self._rng.randint(150, 800)
        return int(frames * self._rng.uniform(0.3, 1))

    def _lay_out(self, mel: np.ndarray, end: int) -> list[Placed]:
        """Writes utterances into ``mel`` (80, frames) with pauses between, none after frame ``end``."""
        rng = self._rng
        placed: list[Placed] = []
        level = rng.uniform(-1.2, 0.4)
        pause = rng.choice([15, 30, 60, 100, 160])
        cut_at_end = end == mel.shape[1] or rng.random() < 0.5
        lead = rng.random()
        begins_inside = lead < 0.15
        time = 0 if begins_inside else rng.randint(0, 60) if lead < 0.75 else rng.randint(60, 220)
        while time < end - 10:
            item = rng.choice(self._pool)
            skip = round(rng.choice(item.spans)[0]) if begins_inside and not placed else 0
            sound = item.mel[:, skip:]
            stop = min(time + sound.shape[1], end)
            if stop == end and not cut_at_end and placed:
                break
            mel[:, time:stop] = sound[:, : stop - time] + (level + rng.uniform(-0.2, 0.2))
            placed.append(Placed(time, stop, _audible_tokens(item, time - skip, time, stop)))
            time = stop + int(pause * rng.uniform(0.4, 1.6))
            if rng.random() < 0.06:
                time += rng.randint(50, 250)
        return placed

    def _finish(self, mel: np.ndarray, placed: list[Placed], end: int) -> None:
        """Adds noise, scales as faster-whisper does, blanks a band, and pads with zeros after the clip; in place."""
        rng = self._rng
        frames = mel.shape[1]
        if not placed or rng.random() < 0.55:
            slope = np.linspace(0, rng.uniform(-1.5, 0.5), MELS)[:, None]
            power = 10 ** (rng.uniform(-7, -2.5) + slope) * self._noise.standard_exponential(mel.shape, np.float32)
            mel[:] = np.log10(np.power(10, mel) + power + 1e-10)
        loudest = float(mel.max())
        if not placed:
            loudest = rng.choice([loudest, rng.uniform(-1, 1.5)])  # the rest of the file may be louder
        elif rng.random() < 0.4:
            loudest += rng.uniform(0, 0.5)
        mel[:] = (np.maximum(mel, loudest - 8) + 4) / 4
        if rng.random() < 0.3:
            band = rng.randint(0, MELS - 8)
            mel[band : band + rng.randint(1, 8)] = mel.min()
        if end < frames:
            last = placed[-1].end if placed else rng.randint(0, frames)
            mel[:, last + 1 + int(rng.choice([0, 10, 40, 200, 3000]) * rng.random()) :] = 0.0

    def _tokens(
        self, placed: list[Placed], cut: Placed | None, stamps: bool, offset: int, positions: int
    ) -> tuple[list[int], list[int], list[tuple[int, int]]]:
        """Decoder inputs, targets and attention spans; ``cut`` is a sentence that only gets its start stamp."""
        if not placed and cut is None:
            return [START, FIRST_STAMP if stamps else NO_TIMESTAMPS], [NO_SPEECH, END], [NO_SPAN, NO_SPAN]
        targets: list[int] = []
        spans: list[tuple[int, int]] = []

        def put(token: int, first: float, last: float) -> None:
            first = min(max(0, round(first)), positions - 1)
            targets.append(token)
            spans.append((first, min(max(first + 1, round(last)), positions)))

        def put_stamp(position: float, before: int, after: int) -> None:
            if stamps:
                put(FIRST_STAMP + min(STAMPS - 1, round(position) + offset), position - before, position + after)

        for part in placed:
            put_stamp(part.start / 2, 2, 6)
            for token, a, b in part.tokens:
                put(token, a / 2, b / 2)
            put_stamp(part.end / 2, 5, 4)
        if cut is not None:
            put_stamp(cut.start / 2, 2, 6)
        targets.append(END)
        spans.append(NO_SPAN)
        inputs = [START] if stamps else [START, NO_TIMESTAMPS]
        ignored = len(inputs) - 1
        return (
            inputs + (self._as_decoded(targets[:-1]) if stamps and positions == SOURCE_POSITIONS else targets[:-1]),
            [IGNORED] * ignored + targets,
            [NO_SPAN] * ignored + spans,
        )

    def _as_decoded(self, tokens: list[int]) -> list[int]:
        """Decoding may force the first stamp to another value than it should have; the rest must not suffer."""
        chance = self._rng.random()
        if chance < 0.1:
            return [FIRST_STAMP, *tokens[1:]]
        if chance < 0.8:
            return [min(tokens[0], FIRST_STAMP + LATEST_FIRST_STAMP), *tokens[1:]]
        return tokens


def _audible_tokens(item: Spoken, origin: int, first: int, last: int) -> list[tuple[int, float, float]]:
    """(token, first, last frame) of the words mostly within the frames; ``origin`` is the utterance's start."""
    spans = iter(item.spans)
    tokens = []
    for token in item.ids:
        if token == FULL_STOP:
            if origin + item.mel.shape[1] <= last:
                tokens.append((token, last - 6, last + 12))
            continue
        a, b = (origin + frame for frame in next(spans))
        heard = min(b, last) - max(a, first)
        if heard > 0.6 * (b - a):
            tokens.append((token, max(a, first), min(b, last)))
    return tokens
