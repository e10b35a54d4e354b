"""An embedding model that is ready: texts in, vectors out, nothing cut off and nothing broken passed on."""

import json
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np

from cuepoint import atomic, devices
from cuepoint.embedding.engines import Engine, OpenVinoEngine, TorchEngine, batches
from cuepoint.embedding.exported import Backend, Exported, damaged, export, fits_openvino
from cuepoint.embedding.location import ModelFiles, locate
from cuepoint.embedding.quality import SAMPLE, Quality, compare, spread
from cuepoint.errors import ConfigError, DataError
from cuepoint.layout import Layout
from cuepoint.settings import EmbeddingModel, EmbeddingSettings, Settings
from cuepoint.settings.embedding import INT8_NEEDS

log = logging.getLogger(__name__)

Device = Literal["cpu", "cuda"]

VERSION = 1
"""Of what becomes of a text: raise it when the same text gets another vector."""

UNIT_TOLERANCE = 1e-3  # of a vector's length


class Embedder:
    """One model on `device` (`cpu` or `cuda`). The weights are loaded with the first text, or by `load`."""

    def __init__(
        self, model: EmbeddingModel, files: ModelFiles, exported: Exported, device: Device, threads: int
    ) -> None:
        os.environ.setdefault("RAYON_NUM_THREADS", str(threads))  # of the tokenizer, which takes all cores otherwise
        from tokenizers import Tokenizer

        self.revision = files.revision
        self.device = device
        self._model, self._files, self._exported = model, files, exported
        self._threads = threads
        self._engine: Engine | None = None
        try:
            self._tokenizer = Tokenizer.from_file(str(exported.path / "tokenizer.json"))
        except Exception as error:  # the only kind that tokenizers raises
            raise damaged(exported.path, error) from error
        if (model.max_tokens or 0) > exported.max_tokens:
            raise ConfigError(
                f"max_tokens of embedding model {model.model!r} is {model.max_tokens}, but it reads "
                f"{exported.max_tokens}"
            )
        if (model.truncate_dim or 0) > exported.dimension:
            raise ConfigError(
                f"truncate_dim of embedding model {model.model!r} is {model.truncate_dim}, but its vectors have "
                f"{exported.dimension} dimensions"
            )

    @property
    def dimension(self) -> int:
        """Numbers in a vector."""
        return self._model.truncate_dim or self._exported.dimension

    @property
    def max_tokens(self) -> int:
        """Tokens that the model reads, special tokens and prompt counted."""
        return self._model.max_tokens or self._exported.max_tokens

    def count_tokens(self, passages: Sequence[str]) -> list[int]:
        """Tokens of each passage as the model reads it: prompt and special tokens counted."""
        return [len(ids) for ids in self.tokenize(passages)]

    def tokenize(self, passages: Sequence[str]) -> list[list[int]]:
        """Token IDs of each passage, with prompt and special tokens."""
        return self._ids(self._model.passage_prompt, passages)

    def encode_passages(self, passages: Sequence[str]) -> np.ndarray:
        """Vectors of passages, (n, d) float32. Raises DataError for one that the model would cut or spoil."""
        return self.encode_tokens(self.tokenize(passages), [f"passage {i}" for i in range(len(passages))])

    def encode_query(self, query: str) -> np.ndarray:
        """Vector of a query, (d,) float32. A query longer than the model reads is cut, and that is logged."""
        ids = self._ids(self._model.query_prompt, [query])[0]
        if len(ids) > self.max_tokens:
            log.warning("the query has %d tokens and the model reads %d: its end is ignored", len(ids), self.max_tokens)
            ids = [*ids[: self.max_tokens - 1], ids[-1]]  # the last one is the model's end token
        return self.encode_tokens([ids], ["the query"])[0]

    def encode_tokens(self, texts: Sequence[Sequence[int]], names: Sequence[str]) -> np.ndarray:
        """Vectors of texts given as token IDs, (n, d) float32; `names` say in errors which text it was."""
        for ids, name in zip(texts, names, strict=True):
            if len(ids) > self.max_tokens:
                raise DataError(
                    f"{name} has {len(ids)} tokens and {self._model.model} reads {self.max_tokens}: its end would be "
                    "ignored; this is a fault of the chunking, please report it"
                )
        return finished(self._run(self.load(), texts), names, self._model)

    @property
    def quality(self) -> Quality | None:
        """How near the model's int8 form comes to float32, once `check_quality` has measured it; else None."""
        with suppress(OSError, ValueError, TypeError):  # not measured yet, or damaged: it will be measured
            return Quality(**json.loads(self._measured("quality.json").read_text(encoding="utf-8")))
        return None

    def check_quality(self, texts: Sequence[Sequence[int]], most: int = SAMPLE) -> Quality | None:
        """The quality of the int8 form on some of the texts (token IDs), None for a model that is not in int8.

        Measured by torch in float32 on `most` of the texts, evenly spread; kept, and measured again only on more.
        """
        if self._model.dtype != "int8":
            return None
        known = self.quality
        sample = [texts[i] for i in spread(len(texts), most)]
        if len(sample) > (known.passages if known else 0):
            reference = self._run(TorchEngine(self._model, self._files, "cpu", self._threads), sample)
            names = ["a passage"] * len(sample)
            known = compare(self.encode_tokens(sample, names), finished(reference, names, self._model))
            atomic.write_json(self._measured("quality.json"), asdict(known))
        return known

    def load(self, gpu: int = 0) -> Engine:
        """The engine with its weights loaded: on the GPU with CUDA's number `gpu`, if the device is one."""
        if self._engine is None:
            graph = self._exported.path / "model.xml"
            if graph.is_file():
                self._engine = OpenVinoEngine(graph, self._threads)
            else:
                device = f"cuda:{gpu}" if self.device == "cuda" else self.device
                self._engine = TorchEngine(self._model, self._files, device, self._threads)
                if self.device == "cuda":
                    name = devices.gpus()[gpu].name.replace("/", "-")
                    self._engine.choose_attention(self._measured(f"attention on {name}.txt"))
        return self._engine

    def _measured(self, name: str) -> Path:
        """The file beside the exported model that keeps what was measured of it."""
        return self._exported.path.with_name(f"{self._exported.path.name}.{name}")

    def _run(self, engine: Engine, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """The vectors that an engine gives, (n, d) float32."""
        vectors = np.empty((len(texts), self._exported.dimension), np.float32)
        for batch, found in engine.run(batches(texts, engine.batch_tokens, engine.one_length)):
            vectors[batch.numbers] = found
        return vectors

    def _ids(self, prompt: str, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch([prompt + text for text in texts])
        return [encoding.ids + self._exported.suffix for encoding in encodings]


def open_embedder(name: str, settings: Settings, *, device: Device = "cpu", threads: int = 1) -> Embedder:
    """The configured model `name` on `device`. One query is answered soonest by the CPU.

    Raises ConfigError for a model that cannot be used, EnvironmentFault for what is missing on this machine.
    """
    model = settings.embedding.models[name]
    return open_model(model, settings.embedding, Layout(settings.results), device=device, threads=threads)


def open_model(
    model: EmbeddingModel,
    settings: EmbeddingSettings,
    layout: Layout,
    *,
    device: Device = "cpu",
    threads: int = 1,
    files: ModelFiles | None = None,
) -> Embedder:
    """`model` on `device`; `files` when they have been located already."""
    if model.dtype == "int8" and (device != "cpu" or settings.backend == "torch"):
        raise ConfigError(f"embedding model {model.model!r}: {INT8_NEEDS}")
    files = files or locate(model)
    backend: Backend = "torch"
    if model.dtype == "int8":
        backend = "openvino-int8"
    elif device == "cpu" and settings.backend != "torch":
        backend = "openvino"
        if settings.backend == "auto" and not fits_openvino(files):
            log.warning("%s is too large for OpenVINO in this machine's memory: torch, which is slower", model.model)
            backend = "torch"
    return Embedder(model, files, export(model, files, backend, layout), device, threads)


def finished(vectors: np.ndarray, names: Sequence[str], model: EmbeddingModel) -> np.ndarray:
    """The model's vectors as they are stored: cut to `truncate_dim`, unit length. Raises DataError for a broken one."""
    vectors = vectors[:, : model.truncate_dim]
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    usable = np.isfinite(lengths[:, 0]) & (lengths[:, 0] > 0)
    if not usable.all():
        name = names[int(np.flatnonzero(~usable)[0])]
        raise DataError(
            f"{model.model} gave {name} a vector of zeros or not-a-number: set `dtype: float32` for the model if this "
            "was a GPU in half precision, else its weights are damaged"
        )
    return np.ascontiguousarray(vectors / lengths if model.normalize else vectors, dtype=np.float32)


def check_vectors(vectors: np.ndarray, names: Sequence[str], unit: bool) -> None:
    """Raise DataError, naming the chunk, for a vector that is not finite, is zero or, if `unit`, not of length 1."""
    lengths = np.linalg.norm(vectors, axis=1)
    good = np.isfinite(lengths) & (lengths > 0)
    if unit:
        good &= np.abs(lengths - 1) <= UNIT_TOLERANCE
    if not good.all():
        worst = int(np.flatnonzero(~good)[0])
        raise DataError(f"the vector of {names[worst]} is broken: its length is {lengths[worst]}")
