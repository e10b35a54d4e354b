"""The seam to the recogniser: clips in, segments out. Only this module decodes with faster-whisper and CTranslate2.

Another engine would be another module with `load` and `is_out_of_memory`, and a class with `prepare`, `transcribe` and
`redecode` (beside it, `speech` takes the VAD from faster-whisper, and `model` its names of models).

Batches are put together here from the public parts of faster-whisper and CTranslate2 (encode, detect_language,
generate, align) and not with its `BatchedInferencePipeline`: features are computed by the callers' threads, clips of
several videos and languages share a batch, the language of a video is the mean over its first clips without encoding
them twice, nothing flows from one clip into the next, and text after the last stamp of a window is not dropped.
"""

import copy
import logging
import threading
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ctranslate2
import numpy as np
from faster_whisper import WhisperModel
from faster_whisper.audio import pad_or_trim
from faster_whisper.tokenizer import Tokenizer
from faster_whisper.transcribe import get_suppressed_tokens

from cuepoint import devices, faults
from cuepoint.asr.model import ModelFiles
from cuepoint.devices import Gpu
from cuepoint.errors import ConfigError, EnvironmentFault
from cuepoint.settings import TranscribeSettings

log = logging.getLogger(__name__)

# openai/whisper, DecodingOptions and transcribe(): the ladder of temperatures, without 0, which the batch has tried.
TEMPERATURES = (0.2, 0.4, 0.6, 0.8, 1.0)
MAX_FIRST_STAMP = 50  # steps of 0.02 s: speech starts in a clip's first second (openai/whisper's max_initial_timestamp)
_STAMP = 0.02  # seconds of one step of Whisper's stamps
_SEED = 0  # of the sampling in `redecode`
# A rest without text that is longer than this is decoded again: shorter ones are the padding of the VAD.
_LONG_REST = 1.0
# Words are aligned with clips put this many seconds apart: faster-whisper trims a clip's first word by how long ago the
# last word of the clip before it ended, which must not depend on what else is in the batch.
_APART = 1000
# Punctuation that belongs to the word after it, and to the one before it (faster-whisper's defaults).
_OPENING = "\"'“¿([{-"
_CLOSING = "\"'.。,，!！?？:：”)]}、"  # noqa: RUF001


@dataclass(frozen=True)
class Word:
    """One word with its times in the clip, in seconds."""

    start: float
    end: float
    text: str
    probability: float


@dataclass(frozen=True)
class Segment:
    """What was said between two times of the clip, in seconds."""

    start: float
    end: float
    text: str
    words: tuple[Word, ...] | None = None


@dataclass(frozen=True)
class Decoded:
    """What the model wrote for one clip; the numbers are of the clip as a whole, as in Whisper's own code."""

    language: str
    language_probability: float | None  # None: the language was given
    segments: tuple[Segment, ...]
    avg_logprob: float
    no_speech_prob: float
    compression_ratio: float
    rest_from: float | None = None  # seconds: the model stopped here, the rest of the clip has no text yet

    @property
    def text(self) -> str:
        """The text of all segments."""
        return " ".join(segment.text for segment in self.segments)


@dataclass(frozen=True)
class Group:
    """Clips that are decoded together: features of each, (mels, 3000) float32, and its length in seconds.

    `language` None: detected from all the clips of the group together.
    """

    features: Sequence[np.ndarray]
    seconds: Sequence[float]
    language: str | None


class Engine:
    """A loaded model. All methods may be called from several threads."""

    def __init__(self, model: WhisperModel, settings: TranscribeSettings, *, workers: int, replica: Any) -> None:
        self._model = model
        self._settings = settings
        self._replica = replica
        self._replicas = threading.Semaphore(max(1, workers // 4))  # each holds the weights once more
        self.device: str = model.model.device
        self.compute_type: str = model.model.compute_type
        self._in_numpy = self.device == "cpu" and "bfloat16" not in self.compute_type  # which NumPy lacks
        self.language: str | None = self._fixed_language()
        self._suppressed = list(get_suppressed_tokens(self._tokenizer(self.language or "en"), [-1]))

    def prepare(self, samples: np.ndarray) -> np.ndarray:
        """Features of a clip: (n,) int16 to (mels, 3000) float32, log-mel, padded with 0 as faster-whisper pads."""
        return pad_or_trim(self._model.feature_extractor(_as_float(samples))[..., :-1])

    def transcribe(self, groups: Sequence[Group]) -> list[list[Decoded]]:
        """Decode the clips of all groups in one batch: for each group, what each of its clips says.

        Raises RuntimeError of CTranslate2, for example when the GPU's memory is full (see `is_out_of_memory`).
        """
        features = [features for group in groups for features in group.features]
        seconds = [seconds for group in groups for seconds in group.seconds]
        encoded = self._encode(features)
        languages = self._languages(groups, encoded)
        decoded: list[Decoded | None] = [None] * len(features)
        # Words are aligned under one prompt, so under one language; without words all languages share the batch.
        for rows in _by_language(languages) if self._settings.word_timestamps else [range(len(features))]:
            part = encoded if len(rows) == len(features) else self._rows(encoded, features, rows)
            for row, value in zip(
                rows, self._decode(part, [languages[row] for row in rows], [seconds[row] for row in rows]), strict=True
            ):
                decoded[row] = value
        results = iter(decoded)
        return [[next(results) for _ in group.features] for group in groups]

    def redecode(self, samples: np.ndarray, language: str) -> Decoded | None:
        """Decode one clip alone with the full temperature fallback; None where Whisper hears no speech.

        On a CPU the result depends only on the clip: CTranslate2 draws from one generator a worker thread, so a worker
        of its own is started for each clip, from the same seed.
        """
        with self._replicas:
            model = self._replica() if self._replica else self._model
            found, _ = model.transcribe(
                _as_float(samples),
                language=language,
                beam_size=self._settings.beam_size,
                temperature=TEMPERATURES,
                compression_ratio_threshold=self._settings.compression_ratio_threshold,
                log_prob_threshold=self._settings.log_prob_threshold,
                no_speech_threshold=self._settings.no_speech_threshold,
                condition_on_previous_text=False,
                word_timestamps=self._settings.word_timestamps,
            )
            segments = list(found)
        if not segments:
            return None
        return Decoded(
            language=language,
            language_probability=None,
            segments=tuple(
                _segment(
                    segment.start,
                    segment.end,
                    segment.text,
                    segment.words and [Word(w.start, w.end, w.word, float(w.probability)) for w in segment.words],
                )
                for segment in segments
            ),
            # A clip that took several windows is judged by its worst.
            avg_logprob=min(segment.avg_logprob for segment in segments),
            no_speech_prob=max(segment.no_speech_prob for segment in segments),
            compression_ratio=max(segment.compression_ratio for segment in segments),
        )

    def _fixed_language(self) -> str | None:
        wanted = self._settings.language
        if not self._model.model.is_multilingual:
            if wanted not in {"auto", "each", "en"}:
                raise ConfigError(f"transcribe.language = {wanted!r}, but the model knows English only")
            return "en"
        if wanted in {"auto", "each"}:
            return None
        if wanted not in self._model.supported_languages:
            raise ConfigError(f"transcribe.language = {wanted!r} is none of the model's languages")
        return wanted

    def _tokenizer(self, language: str) -> Tokenizer:
        return Tokenizer(
            self._model.hf_tokenizer, self._model.model.is_multilingual, task="transcribe", language=language
        )

    def _encode(self, features: Sequence[np.ndarray]) -> ctranslate2.StorageView:
        if not self._in_numpy:
            return self._model.encode(np.stack(features))
        # One clip at a time stays in the processor's cache (measured: a fifth faster than four); the arithmetic and
        # its results are the same.
        return _storage(np.concatenate([np.asarray(self._model.encode(clip)) for clip in features]))

    def _rows(
        self, encoded: ctranslate2.StorageView, features: Sequence[np.ndarray], rows: Sequence[int]
    ) -> ctranslate2.StorageView:
        """Some rows of what is encoded: taken from it where NumPy can read it, else encoded again."""
        if self._in_numpy:
            return _storage(np.asarray(encoded)[list(rows)])
        return self._encode([features[row] for row in rows])

    def _languages(self, groups: Sequence[Group], encoded: ctranslate2.StorageView) -> list[tuple[str, float | None]]:
        """Language and its probability for each clip of the batch."""
        detected = []
        if any(group.language is None for group in groups):
            detected = [
                {token[2:-2]: probability for token, probability in clip}
                for clip in self._model.model.detect_language(encoded)
            ]
        languages: list[tuple[str, float | None]] = []
        for group in groups:
            clips = range(len(languages), len(languages) + len(group.features))
            if group.language is not None:
                languages += [(group.language, None)] * len(clips)
            elif self._settings.language == "each":
                languages += [_most_likely([detected[clip]]) for clip in clips]
            else:
                languages += [_most_likely([detected[clip] for clip in clips])] * len(clips)
        return languages

    def _decode(
        self, encoded: ctranslate2.StorageView, languages: Sequence[tuple[str, float | None]], seconds: Sequence[float]
    ) -> list[Decoded]:
        tokenizers = {language: self._tokenizer(language) for language, _ in languages}
        results = self._model.model.generate(
            encoded,
            [self._model.get_prompt(tokenizers[language], []) for language, _ in languages],
            beam_size=self._settings.beam_size,
            max_length=self._model.max_length,
            max_initial_timestamp_index=MAX_FIRST_STAMP,
            suppress_tokens=self._suppressed,
            return_scores=True,
            return_no_speech_prob=True,
        )
        clips = [
            split_at_stamps(result.sequences_ids[0], tokenizers[language].timestamp_begin, length)
            for result, (language, _), length in zip(results, languages, seconds, strict=True)
        ]
        if self._settings.word_timestamps:
            self._align(clips, encoded, tokenizers[languages[0][0]], seconds)
        decoded = []
        for result, (language, probability), (pieces, rest), length in zip(
            results, languages, clips, seconds, strict=True
        ):
            segments = tuple(_spoken(pieces, tokenizers[language], length))
            decoded.append(
                Decoded(
                    language=language,
                    language_probability=probability,
                    segments=segments,
                    # The score is a mean already (length_penalty 1); Whisper counts the end token, too.
                    avg_logprob=result.scores[0] * len(result.sequences_ids[0]) / (len(result.sequences_ids[0]) + 1),
                    no_speech_prob=result.no_speech_prob,
                    compression_ratio=compression_ratio(" ".join(segment.text for segment in segments)),
                    rest_from=rest,
                )
            )
        return decoded

    def _align(
        self,
        clips: Sequence[tuple[list[dict[str, Any]], float | None]],
        encoded: ctranslate2.StorageView,
        tokenizer: Tokenizer,
        seconds: Sequence[float],
    ) -> None:
        """Give the pieces of all clips their `words`, and starts and ends to match them."""
        for place, (pieces, _) in enumerate(clips, 1):
            if not pieces:
                pieces.append({"start": 0.0, "end": 0.0, "tokens": []})
            for piece in pieces:
                piece["stamp"] = piece["start"]
                piece["seek"] = place * _APART * self._model.frames_per_second
                piece["start"] += place * _APART
                piece["end"] += place * _APART
        self._model.add_word_timestamps(
            [pieces for pieces, _ in clips],
            tokenizer,
            encoded,
            [int(np.ceil(length)) * self._model.frames_per_second for length in seconds],
            _OPENING,
            _CLOSING,
            last_speech_timestamp=0.0,
        )
        for place, (pieces, _) in enumerate(clips, 1):
            for piece in pieces:
                for times in [piece, *piece["words"]]:
                    times["start"] = max(0.0, float(times["start"]) - place * _APART)
                    times["end"] = max(0.0, float(times["end"]) - place * _APART)
                # The alignment gives the pause before a sentence to its first word; the model's stamp knows better.
                if piece["words"] and piece["words"][0]["start"] < piece["stamp"] < piece["words"][0]["end"]:
                    piece["words"][0]["start"] = piece["stamp"]


def load(files: ModelFiles, settings: TranscribeSettings, gpu: Gpu | None, workers: int) -> Engine:
    """Load the model onto `gpu`, or for `workers` single-threaded workers of a CPU.

    One thread a worker: cores then scale with the number of clips and not with the size of a matrix.
    """
    device, index = ("cpu", 0) if gpu is None else ("cuda", gpu.index)
    if gpu is not None:
        devices.load_cuda_libraries()
    compute_type = choose_compute_type(
        settings,
        ctranslate2.get_supported_compute_types(device, index),
        device,
        roomy=gpu is None or gpu.memory > 2 * (files.folder / "model.bin").stat().st_size,
    )
    ctranslate2.set_random_seed(_SEED)
    logging.getLogger("faster_whisper").setLevel(logging.WARNING)  # it tells each call's steps
    where = {"device": device, "device_index": index, "compute_type": compute_type}
    try:
        model = WhisperModel(str(files.folder), **where, cpu_threads=1, num_workers=1 if gpu else workers)
    except Exception as error:  # of CTranslate2 (no room, damaged files, a broken driver), tokenizers or json
        if faults.explain(error):
            raise
        mend = (
            "end what else uses this GPU, or take a smaller model or compute_type int8_float16"
            if is_out_of_memory(error)
            else "if its files are damaged, delete the directory and fetch the model again"
        )
        raise EnvironmentFault(
            f"the model {files.name} ({files.folder}) cannot be loaded on {device} ({error}): {mend}"
        ) from error

    def replica() -> WhisperModel:
        """The same model with a worker of its own."""
        other = copy.copy(model)
        other.model = ctranslate2.models.Whisper(str(files.folder), **where, intra_threads=1, inter_threads=1)
        return other

    engine = Engine(model, settings, workers=workers, replica=replica if gpu is None else None)
    log.info("%s (%s) on %s in %s", files.name, files.revision, device, engine.compute_type)
    return engine


def choose_compute_type(settings: TranscribeSettings, supported: set[str], device: str, *, roomy: bool = True) -> str:
    """The arithmetic for a `compute_type` setting on a device that supports these types.

    `roomy`: the model's file (which holds float16, as they are published) fills less than half of the device's memory.
    """
    if settings.compute_type == "auto":
        on_gpu = ("float16", "int8_float16") if roomy else ("int8_float16",)
        wanted = ("int8", "float32") if device == "cpu" else (*on_gpu, "int8", "float32")
        return next(kind for kind in wanted if kind in supported)
    if settings.compute_type not in supported:
        raise ConfigError(
            f"transcribe.compute_type = {settings.compute_type!r} does not run on this {device}; what does: "
            f"{', '.join(sorted(supported))}"
        )
    return settings.compute_type


def is_out_of_memory(error: Exception) -> bool:
    """Whether CTranslate2 says that the device's memory is full."""
    return "out of memory" in str(error).lower() or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)


def split_at_stamps(
    tokens: Sequence[int], first_stamp: int, seconds: float
) -> tuple[list[dict[str, Any]], float | None]:
    """Pieces of text (`start`, `end` in seconds, `tokens`) between stamps, and where a rest without text starts.

    Text without an end stamp reaches to the end of the clip. The rest is None when the text reaches there.
    """
    pieces: list[dict[str, Any]] = []
    start, text = 0.0, []
    open_start = False  # a start stamp without text after it: the model saw a sentence that goes on past its window
    for token in tokens:
        if token < first_stamp:
            text.append(token)
            continue
        stamp = min((token - first_stamp) * _STAMP, seconds)
        if text:
            pieces.append({"start": start, "end": max(stamp, start), "tokens": text})
            open_start = False
        else:
            open_start = True
        start, text = stamp, []
    if text:
        pieces.append({"start": start, "end": max(seconds, start), "tokens": text})
        return pieces, None
    rest = start if open_start and pieces and min(start, seconds - start) > _LONG_REST else None
    return pieces, rest


def compression_ratio(text: str) -> float:
    """Bytes of the text per byte of its zlib compression: high for text that repeats itself (openai/whisper)."""
    raw = text.encode()
    return len(raw) / len(zlib.compress(raw))


def _spoken(pieces: Sequence[dict[str, Any]], tokenizer: Tokenizer, seconds: float) -> Iterator[Segment]:
    """The pieces that hold text, as segments that end with the clip at the latest."""
    for piece in pieces:
        words = piece.get("words")
        made = words and [Word(word["start"], word["end"], word["word"], float(word["probability"])) for word in words]
        segment = _segment(piece["start"], piece["end"], tokenizer.decode(piece["tokens"]), made)
        if segment.text:
            yield replace(segment, start=min(segment.start, seconds), end=min(segment.end, seconds))


def _segment(start: float, end: float, text: str, words: Sequence[Word] | None) -> Segment:
    """A segment reaches from its first to its last word, where those are known: they are the more exact."""
    if words:
        start, end = words[0].start, words[-1].end
    return Segment(start, end, text.strip(), None if words is None else tuple(words))


def _most_likely(clips: Sequence[dict[str, float]]) -> tuple[str, float]:
    """The language with the highest mean probability over clips."""
    mean = {language: sum(clip[language] for clip in clips) / len(clips) for language in sorted(clips[0])}
    return max(mean.items(), key=lambda item: item[1])


def _by_language(languages: Sequence[tuple[str, float | None]]) -> list[list[int]]:
    """Row numbers, one list a language."""
    rows: dict[str, list[int]] = {}
    for row, (language, _) in enumerate(languages):
        rows.setdefault(language, []).append(row)
    return list(rows.values())


def _as_float(samples: np.ndarray) -> np.ndarray:
    return samples.astype(np.float32) / 32768


def _storage(array: np.ndarray) -> ctranslate2.StorageView:
    return ctranslate2.StorageView.from_array(np.ascontiguousarray(array))
