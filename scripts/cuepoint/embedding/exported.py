"""What is kept of a model beside its own files: its tokenizer, its measures and, for the CPU, its OpenVINO form.

Made once for each revision and kept in the run's cache. Chunking, a shard without any chunk and `cuepoint search` then
need neither torch nor transformers: a query is embedded about a second after the command starts.
"""

import json
import logging
import math
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from cuepoint import faults
from cuepoint.embedding.location import ModelFiles
from cuepoint.errors import ConfigError, DataError, EnvironmentFault
from cuepoint.fingerprint import fingerprint
from cuepoint.layout import Layout
from cuepoint.locks import hold
from cuepoint.settings import EmbeddingModel
from cuepoint.tables import package_versions

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

log = logging.getLogger(__name__)

Backend = Literal["torch", "openvino", "openvino-int8"]
_VERSION = 2  # of the folder's contents
_PACKAGES = ("sentence-transformers", "transformers", "tokenizers")


@dataclass(frozen=True)
class Exported:
    """A folder with `tokenizer.json`, `model.json` (the numbers below) and, for OpenVINO, `model.xml` and `.bin`."""

    path: Path
    dimension: int  # of the vectors that the model itself gives
    max_tokens: int  # that the model reads, special tokens counted
    suffix: list[int]  # token IDs that end every text, beside those that the tokenizer puts


def export(model: EmbeddingModel, files: ModelFiles, backend: Backend, layout: Layout) -> Exported:
    """The exported form of a model, made now if it is not in the cache."""
    key = fingerprint(
        version=_VERSION,
        revision=files.revision,
        trust_remote_code=model.trust_remote_code,
        append_eos=model.append_eos,
        backend=backend,
        packages=package_versions(*_PACKAGES, *(() if backend == "torch" else ("torch", "openvino"))),
    )
    path = layout.exported_model(key)
    if (exported := _read(path)) is None:
        with hold(layout.lock("model", key), f"the export of {model.model}"):
            if (exported := _read(path)) is None:
                log.info("exporting %s for %s, once", model.model, backend)
                with _whole_directory(path) as folder:
                    _export(model, files, backend, folder)
                exported = _read(path)
    if exported is None:
        raise DataError(f"{path} is changed as soon as it is written: see what else writes there")
    return exported


def _read(path: Path) -> Exported | None:
    """What was exported to `path`; None when it is not there, or not as it was written."""
    try:
        noted = json.loads((path / "model.json").read_text(encoding="utf-8"))
        if noted["sizes"] != _sizes(path):
            raise ValueError("a file has another size than when it was written")
        measures = {"dimension": int(noted["dimension"]), "max_tokens": int(noted["max_tokens"])}
        return Exported(path, **measures, suffix=[int(token) for token in noted["suffix"]])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        log.warning("%s is damaged (%s): exporting the model again", path, error)
        return None


def damaged(folder: Path, error: Exception) -> DataError:
    """The error for an exported model that cannot be loaded."""
    what = str(error).strip().splitlines()[-1:] or [type(error).__name__]
    return DataError(f"the exported model in {folder} cannot be loaded ({what[0]}): delete it and run snakemake again")


def _sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.name != "model.json"}


def fits_openvino(files: ModelFiles) -> bool:
    """Whether this machine's memory holds the float32 weights twice: as they are, and as OpenVINO orders them."""
    import psutil
    from safetensors import SafetensorError, safe_open

    numbers = 0
    try:
        for file in files.path.glob("*.safetensors"):
            with safe_open(file, framework="numpy") as tensors:
                shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
            numbers += sum(map(math.prod, shapes))
    except SafetensorError:
        return True  # a damaged file is told by what loads it
    return 2 * 4 * numbers < psutil.virtual_memory().total


def load_sentence_transformer(model: EmbeddingModel, files: ModelFiles, **options: Any) -> "SentenceTransformer":
    """The model as sentence-transformers loads it, in evaluation mode. Never asks the network."""
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        return SentenceTransformer(
            str(files.path),
            local_files_only=True,
            trust_remote_code=model.trust_remote_code,
            model_kwargs={"use_safetensors": True, **options.pop("model_kwargs", {})},
            **options,
        ).eval()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers, safetensors, tokenizers and json each have their own
        if faults.explain(error):
            raise
        raise ConfigError(
            f"embedding model {model.model!r} cannot be loaded from {files.path} ({error}): if its files are damaged, "
            "delete the directory and fetch the model again"
        ) from error


def import_openvino() -> ModuleType:
    """OpenVINO without its telemetry: importing it would send an event to a web service."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # an import of it fails: its stub is used
    try:
        import openvino
    except ImportError as error:
        raise EnvironmentFault(
            f"OpenVINO cannot be imported ({error}): pip install openvino, or set embedding.backend to torch"
        ) from error
    return openvino


def _export(model: EmbeddingModel, files: ModelFiles, backend: Backend, folder: Path) -> None:
    transformer = load_sentence_transformer(model, files, device="cpu", model_kwargs={"dtype": "float32"})
    tokenizer = _plain_tokenizer(transformer, model)
    tokenizer.save(str(folder / "tokenizer.json"))
    if backend != "torch":
        graph = _to_openvino(transformer, model)
        if backend == "openvino-int8":
            _weights_to_int8(graph)
        _save(graph, folder / "model.xml")
    dimension, max_tokens = transformer.get_embedding_dimension(), transformer.max_seq_length
    if not dimension or not max_tokens:
        raise ConfigError(f"embedding model {model.model!r} does not say its dimension and length: set max_tokens")
    suffix = _suffix(tokenizer, transformer.tokenizer.eos_token_id, model)
    measures = {"dimension": dimension, "max_tokens": max_tokens, "suffix": suffix, "sizes": _sizes(folder)}
    (folder / "model.json").write_text(json.dumps(measures) + "\n")


def _save(graph: Any, target: Path) -> None:
    try:
        import_openvino().save_model(graph, target, compress_to_fp16=False)
    except RuntimeError as error:  # "iostream error", for a full disk and anything else
        free = shutil.disk_usage(target.parent).free >> 20
        raise EnvironmentFault(
            f"{target} cannot be written ({error}); {free} MiB are free there: free some space and run again"
        ) from error


def _plain_tokenizer(transformer: "SentenceTransformer", model: EmbeddingModel) -> Any:
    """The model's own fast tokenizer, set to cut nothing off and to pad nothing."""
    from tokenizers import Tokenizer

    own = transformer.tokenizer
    if not getattr(own, "is_fast", False):
        raise ConfigError(f"embedding model {model.model!r} has no fast tokenizer (tokenizer.json)")
    tokenizer = Tokenizer.from_str(own.backend_tokenizer.to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _suffix(tokenizer: Any, eos: int | None, model: EmbeddingModel) -> list[int]:
    """The end-of-text token, where the model wants one and its tokenizer does not put it itself."""
    if not model.append_eos or tokenizer.encode("a").ids[-1] == eos:
        return []
    if eos is None:
        raise ConfigError(f"embedding model {model.model!r} has no end-of-text token: set append_eos to false")
    return [eos]


def _to_openvino(transformer: "SentenceTransformer", model: EmbeddingModel) -> Any:
    """All modules of the model (transformer, pooling, …) as one float32 graph: token IDs and mask to vectors."""
    import torch

    openvino = import_openvino()

    class Whole(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return transformer({"input_ids": input_ids, "attention_mask": attention_mask})["sentence_embedding"]

    whole = Whole()
    whole.transformer = transformer  # its weights belong to the graph
    # Two texts, one of them padded, so that nothing is taken for granted that holds for one text alone.
    ids = torch.ones((2, 8), dtype=torch.int64)
    mask = ids.clone()
    mask[1, 5:] = 0
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the tracer: that shapes are taken as constants, which the tests refute
            return openvino.convert_model(whole.eval(), example_input={"input_ids": ids, "attention_mask": mask})
    except Exception as error:  # the converter raises whatever its many parts raise
        raise EnvironmentFault(
            f"OpenVINO cannot convert {model.model!r} ({type(error).__name__}: {error}): set embedding.backend to torch"
        ) from error


def _weights_to_int8(graph: Any) -> None:
    """Keep the weights of the graph's matrix products in 8 bits, with one scale and one zero point for each output.

    OpenVINO's CPU plugin knows this form, and then quantizes what the weights are multiplied with too, as it comes.
    (nncf's `compress_weights` makes the same and measured the same; it would be five more packages.)
    """
    import numpy as np

    openvino = import_openvino()
    from openvino import opset13 as op

    for product in graph.get_ordered_ops():
        if product.get_type_name() != "MatMul":
            continue
        constant = product.input_value(1).get_node()
        if constant.get_type_name() != "Constant" or constant.get_element_type() != openvino.Type.f32:
            continue
        weights = constant.get_data()
        if weights.ndim != 2:
            continue
        axis = 1 if product.get_attributes()["transpose_b"] else 0
        low = np.minimum(weights.min(axis=axis, keepdims=True), 0)
        high = np.maximum(weights.max(axis=axis, keepdims=True), 0)
        scale = np.maximum((high - low) / 255, np.finfo(np.float32).tiny)
        zero = np.rint(-low / scale)
        small = np.clip(np.rint(weights / scale) + zero, 0, 255).astype(np.uint8)
        shifted = op.subtract(
            op.convert(op.constant(small), "f32"), op.convert(op.constant(zero.astype(np.uint8)), "f32")
        )
        whole = op.multiply(shifted, op.constant(scale.astype(np.float32)))
        product.input(1).replace_source_output(whole.output(0))


@contextmanager
def _whole_directory(target: Path) -> Iterator[Path]:
    """A new directory that becomes `target` only when it is complete. The caller holds the lock of `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".new-{target.name}-"
    for killed in target.parent.glob(f"{prefix}*"):
        shutil.rmtree(killed, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=prefix) as folder:
        made = Path(folder) / target.name
        made.mkdir()
        yield made
        for file in made.iterdir():
            with file.open("rb") as content:
                os.fsync(content.fileno())
        if target.exists():  # without its model.json: not made by this function
            shutil.rmtree(target)
        made.rename(target)
