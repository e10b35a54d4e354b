"""Whisper models of the true architecture with random weights, in the form that faster-whisper loads.

They transcribe nothing, but cost what the real ones cost: arithmetic, memory traffic and files are the same. Each clip
gets the same number of tokens, so that all sides of a comparison have the same work. Multilingual ones go through
language detection, too. Tests use a very small one.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ctranslate2.specs import whisper_spec
from faster_whisper.tokenizer import _LANGUAGE_CODES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

STAMPS = 1501  # 0.00 s to 30.00 s in steps of 0.02 s
_WORDS = [f"Ġw{number}" for number in range(1, 50_256)]
LANGUAGES = 99  # of the multilingual models before large-v3; with these the vocabulary has 51,865 entries


@dataclass(frozen=True)
class Size:
    """Width, layers and heads, as in openai/whisper's model dimensions."""

    width: int
    heads: int
    encoder_layers: int
    decoder_layers: int
    mels: int = 80


SIZES = {
    "micro": Size(64, 2, 1, 1),  # of no real model: for tests
    "tiny": Size(384, 6, 4, 4),
    "base": Size(512, 8, 6, 6),
    "small": Size(768, 12, 12, 12),
    "large-v3-turbo": Size(1280, 20, 32, 4, 128),
}


def write_model(
    folder: Path, size: Size, *, tokens: int = 100, english: bool = False, quantization: str = "int8", seed: int = 0
) -> None:
    """Write a random model of `size` that gives every clip `tokens` tokens (`english`: one that knows English only)."""
    draw = np.random.default_rng(seed)
    spec = whisper_spec.WhisperSpec(size.encoder_layers, size.heads, size.decoder_layers, size.heads)
    vocabulary = _vocabulary(english)
    encoder, decoder = spec.encoder, spec.decoder
    _fill(encoder.conv1, draw, (size.width, size.mels, 3))
    _fill(encoder.conv2, draw, (size.width, size.width, 3))
    encoder.position_encodings.encodings = _noise(draw, (1500, size.width), 0.1)
    decoder.embeddings.weight = decoder.projection.weight = _noise(draw, (len(vocabulary), size.width), 0.3)
    # Each position prefers words of its own (no loops), and stamps are unlikely: nothing is decoded twice.
    decoder.position_encodings.encodings = _noise(draw, (448, size.width), 4.0)
    decoder.embeddings.weight[-STAMPS:] *= 0.05
    _end_after(tokens + (0 if english else 2), decoder, vocabulary.index("<|endoftext|>"))
    for layer in encoder.layer:
        _fill_layer(layer, draw, size.width, cross=False)
    for layer in decoder.layer:
        _fill_layer(layer, draw, size.width, cross=True)
    _normal(encoder.layer_norm, size.width)
    _normal(decoder.layer_norm, size.width)
    spec.config.suppress_ids = spec.config.suppress_ids_begin = []
    spec.config.lang_ids = [vocabulary.index(f"<|{code}|>") for code in _languages(english)]
    spec.config.alignment_heads = [[size.decoder_layers - 1, 0]]
    spec.register_vocabulary(vocabulary)
    spec.validate()
    spec.optimize(quantization=quantization)
    folder.mkdir(parents=True, exist_ok=True)
    spec.save(str(folder))
    _tokenizer(vocabulary).save(str(folder / "tokenizer.json"))
    (folder / "preprocessor_config.json").write_text(json.dumps({"feature_size": size.mels}) + "\n")


def _vocabulary(english: bool) -> list[str]:
    """Tokens in the order that faster-whisper relies on: text, end, the other specials, then the stamps."""
    languages = [f"<|{code}|>" for code in _languages(english)]
    # CTranslate2 tells multilingual models by their empty token.
    words = ["<unk>", *(f"Ġw{number}" for number in range(1, 500))] if english else ["<unk>", *_WORDS, ""]
    specials = ["translate", "transcribe", "startoflm", "startofprev", "nospeech", "notimestamps"]
    return [
        *words,
        "<|endoftext|>",
        "<|startoftranscript|>",
        *languages,
        *(f"<|{special}|>" for special in specials),
        *(f"<|{0.02 * step:.2f}|>" for step in range(STAMPS)),
    ]


def _languages(english: bool) -> tuple[str, ...]:
    return ("en",) if english else _LANGUAGE_CODES[:LANGUAGES]


def _end_after(position: int, decoder, end: int) -> None:
    """Make the end token certain from a position on, and unlikely before it.

    A direction of the hidden state is kept for that: no other token looks at it, and the positions' encodings set it.
    """
    width = decoder.embeddings.weight.shape[1]
    direction = np.resize(np.array([1, -1], np.float32), width) / np.float32(width) ** 0.5  # mean 0: LayerNorm keeps it
    embeddings = decoder.embeddings.weight
    embeddings -= np.outer(embeddings @ direction, direction)
    embeddings[end] = direction
    decoder.position_encodings.encodings[position:] += 1000 * direction


def _tokenizer(tokens: list[str]) -> Tokenizer:
    ids = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _noise(draw: np.random.Generator, shape: tuple[int, ...], scale: float) -> np.ndarray:
    return (scale * draw.standard_normal(shape)).astype(np.float32)


def _fill(layer, draw: np.random.Generator, shape: tuple[int, ...]) -> None:
    layer.weight = _noise(draw, shape, float(np.prod(shape[1:])) ** -0.5)
    layer.bias = np.zeros(shape[0], np.float32)


def _normal(norm, width: int) -> None:
    norm.gamma, norm.beta = np.ones(width, np.float32), np.zeros(width, np.float32)


def _fill_layer(layer, draw: np.random.Generator, width: int, *, cross: bool) -> None:
    _normal(layer.self_attention.layer_norm, width)
    _fill(layer.self_attention.linear[0], draw, (3 * width, width))
    _fill(layer.self_attention.linear[1], draw, (width, width))
    if cross:
        _normal(layer.attention.layer_norm, width)
        for linear, rows in zip(layer.attention.linear, (width, 2 * width, width), strict=True):
            _fill(linear, draw, (rows, width))
    _normal(layer.ffn.layer_norm, width)
    _fill(layer.ffn.linear_0, draw, (4 * width, width))
    _fill(layer.ffn.linear_1, draw, (width, 4 * width))
