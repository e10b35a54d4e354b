"""Writes the model as faster-whisper loads it: CTranslate2 weights in int8, vocabulary, tokenizer, preprocessor."""

import json
import tempfile
from pathlib import Path

import numpy as np
from ctranslate2.specs import whisper_spec
from torch import Tensor

from demo.train.grammar import ID, VOCABULARY, tokenizer
from demo.train.model import MELS, Whisper

PREPROCESSOR = {
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": MELS,
    "sampling_rate": 16_000,
    "hop_length": 160,
    "chunk_length": 30,
    "n_fft": 400,
}


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().contiguous().numpy()


def _linear(spec, layer) -> None:
    spec.weight, spec.bias = _array(layer.weight), _array(layer.bias)


def _norm(spec, layer) -> None:
    spec.gamma, spec.beta = _array(layer.weight), _array(layer.bias)


def _layer(spec, layer) -> None:
    """An encoder or decoder layer."""
    _norm(spec.self_attention.layer_norm, layer.attention_norm)
    _linear(spec.self_attention.linear[0], layer.attention.qkv)
    _linear(spec.self_attention.linear[1], layer.attention.out)
    if hasattr(layer, "cross"):
        _norm(spec.attention.layer_norm, layer.cross_norm)
        for target, source in zip(spec.attention.linear, (layer.cross.q, layer.cross.kv, layer.cross.out), strict=True):
            _linear(target, source)
    _norm(spec.ffn.layer_norm, layer.forward_norm)
    _linear(spec.ffn.linear_0, layer.feed_forward.inner)
    _linear(spec.ffn.linear_1, layer.feed_forward.outer)


def export(model: Whisper, folder: Path, quantization: str | None = "int8") -> None:
    """Writes the model's files into ``folder``, over those of an earlier export."""
    size = model.size
    spec = whisper_spec.WhisperSpec(size.encoder_layers, size.heads, size.decoder_layers, size.heads)
    encoder, decoder = spec.encoder, spec.decoder
    _linear(encoder.conv1, model.conv1)
    _linear(encoder.conv2, model.conv2)
    encoder.position_encodings.encodings = _array(model.encoder_positions)
    for target, source in zip(encoder.layer, model.encoder_layers, strict=True):
        _layer(target, source)
    _norm(encoder.layer_norm, model.encoder_norm)
    decoder.embeddings.weight = decoder.projection.weight = _array(model.embedding())
    decoder.position_encodings.encodings = _array(model.decoder_positions)
    for target, source in zip(decoder.layer, model.decoder_layers, strict=True):
        _layer(target, source)
    _norm(decoder.layer_norm, model.decoder_norm)
    spec.config.suppress_ids, spec.config.suppress_ids_begin = [], []
    spec.config.lang_ids = [ID["<|en|>"]]
    # Training guides the first head of each of the last two layers to the words' places.
    spec.config.alignment_heads = [[size.decoder_layers - 2, 0], [size.decoder_layers - 1, 0]]
    spec.register_vocabulary(VOCABULARY)
    spec.validate()
    spec.optimize(quantization=quantization)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        spec.save(made)
        tokenizer().save(str(Path(made, "tokenizer.json")))
        Path(made, "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=1) + "\n")
        for file in sorted(Path(made).iterdir()):
            file.replace(folder / file.name)
