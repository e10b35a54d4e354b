"""Recordings of held-out sentences with pauses between them, and the truth about what is said when."""

import random
from dataclasses import dataclass

import numpy as np

from demo.train.grammar import is_held_out, sentence
from demo.train.speech import SAMPLE_RATE, held_out_voice, synthesizer


@dataclass(frozen=True)
class Word:
    """A word as the text writes it, and its seconds in the recording."""

    start: float
    end: float
    word: str


@dataclass(frozen=True)
class Sentence:
    """A sentence and its seconds in the recording."""

    start: float
    end: float
    text: str
    words: list[Word]


@dataclass(frozen=True)
class Recording:
    """Audio (16 kHz float32) and its sentences."""

    audio: np.ndarray
    sentences: list[Sentence]

    @property
    def text(self) -> str:
        """Everything said."""
        return " ".join(said.text for said in self.sentences)


def silence(seconds: float) -> np.ndarray:
    """Digital silence."""
    return np.zeros(round(seconds * SAMPLE_RATE), np.float32)


def with_noise(audio: np.ndarray, level: float, seed: int) -> np.ndarray:
    """Audio with white noise of this standard deviation (full scale is 1)."""
    return audio + np.random.default_rng(seed).normal(0, level, len(audio)).astype(np.float32)


def record(
    seed: int,
    sentences: int,
    *,
    topic: str | None = None,
    voice: str | None = None,
    pauses: tuple[float, float] = (0.3, 2.0),
    noise: float = 0.0,
) -> Recording:
    """Different held-out sentences, one speaker (any trained voice if None), pauses in seconds; same for a seed."""
    rng = random.Random(seed)
    speaker = held_out_voice(rng, voice)
    pieces, said = [silence(rng.uniform(0.2, 1.0))], []
    time = len(pieces[0]) / SAMPLE_RATE
    while len(said) < sentences:
        text = sentence(rng, topic)
        if not is_held_out(text) or any(text == earlier.text for earlier in said):
            continue
        utterance = synthesizer().say(text, speaker)
        words = [
            Word(round(time + a, 3), round(time + b, 3), word)
            for word, (a, b) in zip(text.split(), utterance.words, strict=True)
        ]
        said.append(Sentence(round(time, 3), round(time + utterance.duration, 3), text, words))
        pause = silence(rng.uniform(*pauses))
        pieces += [utterance.audio, pause]
        time += utterance.duration + len(pause) / SAMPLE_RATE
    audio = np.concatenate(pieces)
    return Recording(with_noise(audio, noise, seed) if noise else audio, said)
