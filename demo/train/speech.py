"""Synthetic speech with the time of every word: espeak-ng, called in process through its C interface.

Times are seconds from the start of the returned audio; audio is mono float32 at 16 kHz.
"""

import ctypes
import io
import random
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import av
import espeakng_loader
import numpy as np
from faster_whisper.audio import decode_audio
from faster_whisper.feature_extractor import FeatureExtractor
from scipy.signal import resample_poly

SAMPLE_RATE = 16_000
FRAME_RATE = 100  # mel frames a second
ESPEAK_RATE = 22_050

# From espeak-ng's speak_lib.h.
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_EVENT_LIST_TERMINATED = 0
_EVENT_WORD = 1
_CHARS_UTF8 = 1
_POS_CHARACTER = 1
_RATE, _VOLUME, _PITCH, _PITCH_RANGE = 1, 2, 3, 4
_QUIET = 0.004  # below this amplitude, the start and end of an utterance are trimmed


class _EventId(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    ]


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


@dataclass(frozen=True)
class Voice:
    """An espeak-ng voice: its name, words a minute, pitch and pitch range (both 0 to 100)."""

    name: str
    rate: int
    pitch: int
    pitch_range: int


VOICE_NAMES = ["en-us", "en-us+f2", "en-us+m3", "en-us+f4", "en", "en+f3"]


def training_voice(rng: random.Random) -> Voice:
    """A voice with a rate and pitch of the training set."""
    return Voice(
        rng.choice(VOICE_NAMES),
        rng.choice([140, 150, 160, 175, 190]),
        rng.choice([35, 45, 55, 65]),
        rng.choice([40, 50, 60]),
    )


def held_out_voice(rng: random.Random, name: str | None = None) -> Voice:
    """A trained voice at a rate and pitch that training never used."""
    return Voice(
        name or rng.choice(VOICE_NAMES),
        rng.choice([145, 155, 168, 183]),
        rng.choice([40, 50, 60]),
        rng.choice([45, 55]),
    )


@dataclass(frozen=True)
class Utterance:
    """Spoken text: its audio, trimmed to the speech, and the (start, end) of each of its words in seconds."""

    text: str
    audio: np.ndarray
    words: list[tuple[float, float]]

    @property
    def duration(self) -> float:
        """Seconds."""
        return len(self.audio) / SAMPLE_RATE


class Synthesizer:
    """espeak-ng's library; it keeps global state, so a process makes one (see :func:`synthesizer`)."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = str(Path(espeakng_loader.get_data_path()).parent).encode()
        rate = self._library.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, data, 0)
        if rate != ESPEAK_RATE:
            raise RuntimeError(f"espeak-ng answered {rate} instead of a sample rate of {ESPEAK_RATE} Hz")
        # Breath and flutter are random; with the seed, the same calls in the same order give the same samples.
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        self._blocks: list[np.ndarray] = []
        self._word_times: dict[int, float] = {}  # character position -> seconds
        self._callback = _Callback(self._collect)  # kept, or it would be freed while the library calls it
        self._library.espeak_SetSynthCallback(self._callback)

    def _collect(self, samples, count: int, events) -> int:
        if samples and count > 0:
            self._blocks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        i = 0
        while events[i].type != _EVENT_LIST_TERMINATED:
            if events[i].type == _EVENT_WORD:
                self._word_times[events[i].text_position - 1] = events[i].audio_position / 1000
            i += 1
        return 0

    def say(self, text: str, voice: Voice) -> Utterance:
        """Speaks one sentence."""
        if self._library.espeak_SetVoiceByName(voice.name.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice.name!r}")
        settings = {_RATE: voice.rate, _VOLUME: 100, _PITCH: voice.pitch, _PITCH_RANGE: voice.pitch_range}
        for parameter, value in settings.items():
            self._library.espeak_SetParameter(parameter, value, 0)
        self._blocks, self._word_times = [], {}
        raw = text.encode() + b"\0"
        self._library.espeak_Synth(raw, len(raw), 0, _POS_CHARACTER, 0, _CHARS_UTF8, None, None)
        self._library.espeak_Synchronize()
        audio = np.concatenate(self._blocks).astype(np.float32) / 32768
        audio = resample_poly(audio, 320, 441).astype(np.float32)  # 22.05 kHz -> 16 kHz
        loud = np.flatnonzero(np.abs(audio) > _QUIET)
        first, last = max(loud[0] - 160, 0), min(loud[-1] + 160, len(audio))
        audio = audio[first:last]
        starts, position = [], 0
        for word in text.split():
            time = self._word_times.get(position)
            starts.append(None if time is None else min(max(time - first / SAMPLE_RATE, 0.0), len(audio) / SAMPLE_RATE))
            position += len(word) + 1
        return Utterance(text, audio, _word_spans(starts, len(audio) / SAMPLE_RATE))


def _word_spans(starts: list[float | None], duration: float) -> list[tuple[float, float]]:
    """Spans from start times; words that espeak-ng fuses with the one before ("in the") share its span evenly."""
    known = [0] + [i for i in range(1, len(starts)) if starts[i] is not None] + [len(starts)]
    times = [starts[0] or 0.0] + [starts[i] for i in known[1:-1]] + [duration]
    edges = np.interp(np.arange(len(starts) + 1), known, times)
    return [(float(a), float(b)) for a, b in pairwise(edges)]


@cache
def synthesizer() -> Synthesizer:
    """The process's one synthesizer."""
    return Synthesizer()


def write_opus(target: str | io.BytesIO, audio: np.ndarray, bit_rate: int = 24_000) -> None:
    """Writes audio (16 kHz float32) as an Ogg Opus file."""
    with av.open(target, "w", format="ogg", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(
            "libopus", rate=SAMPLE_RATE, layout="mono", bit_rate=bit_rate, options={"compression_level": "5"}
        )
        samples = (np.clip(audio, -1, 1) * 32767).astype(np.int16)[None]
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate = SAMPLE_RATE
        frame.pts = 0
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)


def through_opus(audio: np.ndarray) -> np.ndarray:
    """Audio as it sounds after Opus coding; same length."""
    file = io.BytesIO()
    write_opus(file, audio)
    file.seek(0)
    decoded = decode_audio(file, SAMPLE_RATE)[: len(audio)]
    return np.pad(decoded, (0, len(audio) - len(decoded)))


_extractor = cache(FeatureExtractor)


def log_mel(audio: np.ndarray) -> np.ndarray:
    """faster-whisper's log10 mel power before its clamp and scaling, (80, frames) float32; 100 frames a second."""
    extractor = _extractor()
    audio = np.pad(audio, (0, -len(audio) % extractor.hop_length))
    window = np.hanning(extractor.n_fft + 1)[:-1].astype(np.float32)
    spectrum = extractor.stft(audio, extractor.n_fft, extractor.hop_length, window=window, return_complex=True)
    power = np.abs(spectrum[..., :-1]) ** 2
    return np.log10(np.maximum(extractor.mel_filters @ power, 1e-10)).astype(np.float32)
