"""What runs a model: OpenVINO on a CPU, torch on a GPU (or, by the `backend` setting, on a CPU).

An engine takes batches of texts as token IDs and gives each batch's vectors as the model itself makes them.

On a CPU a batch holds texts of one length, without padding: then a text's vector is the same to the last bit whatever
the batch, the number of threads and the run it was computed in (measured, and held by a test), and padding costs
nothing. On a GPU batches are padded and large, and vectors may differ in the last bits from one batch to another.
"""

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cuepoint import atomic, faults
from cuepoint.embedding.exported import damaged, import_openvino, load_sentence_transformer
from cuepoint.embedding.location import ModelFiles
from cuepoint.errors import EnvironmentFault
from cuepoint.settings import EmbeddingModel

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

CPU_BATCH_TOKENS = 1024  # measured: more is no faster
INT8_GROUP = 32  # numbers that share a scale; measured: 64 is 5 % faster, but further from float32
_ATTENTION = ("sdpa", "eager", "flash_attention_2")  # implementations, as transformers names them
_ATTENTION_TOKENS = 4096  # of the batch that implementations of attention are timed with: enough to fill a GPU
_ATTENTION_LENGTH = 256  # of its longest text: a long chunk


@dataclass(frozen=True)
class Batch:
    """Texts that are computed together."""

    numbers: Sequence[int]  # which texts
    ids: np.ndarray  # (n, length) int64, padded at the right
    mask: np.ndarray  # (n, length) int64: 1 for tokens, 0 for padding


class Engine(Protocol):
    """Runs batches, in any order."""

    batch_tokens: int
    """Tokens of a batch, padding counted."""
    one_length: bool
    """Whether all texts of a batch must have the same number of tokens."""

    def run(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, np.ndarray]]:
        """Each batch with its vectors, (n, d) float32."""
        ...


def batches(texts: Sequence[Sequence[int]], tokens: int, one_length: bool) -> Iterator[Batch]:
    """Texts (as token IDs) in batches of at most `tokens`, longest first, so that memory runs out at once or never."""
    order = sorted(range(len(texts)), key=lambda i: (-len(texts[i]), i))
    begin = 0
    for position in range(1, len(order) + 1):
        length = len(texts[order[begin]])
        if (
            position == len(order)
            or (position + 1 - begin) * length > tokens
            or (one_length and len(texts[order[position]]) != length)
        ):
            yield _batch(texts, order[begin:position])
            begin = position


class OpenVinoEngine:
    """An exported graph on the CPU: one stream a thread, so that no thread waits for another within a text."""

    one_length = True
    batch_tokens = CPU_BATCH_TOKENS

    def __init__(self, graph: Path, threads: int, **other: str | int | bool) -> None:
        """`other` options of OpenVINO's CPU device than these: for benchmarks."""
        openvino = import_openvino()
        options = {
            "PERFORMANCE_HINT": "THROUGHPUT",
            "NUM_STREAMS": threads,
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",  # the default is bfloat16 where the CPU has it
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": INT8_GROUP,  # of what int8 weights are multiplied with
            "ENABLE_CPU_PINNING": False,  # jobs beside this one would be pinned to the same cores
            **other,
        }
        try:
            compiled = openvino.Core().compile_model(graph, "CPU", options)
        except RuntimeError as error:
            if faults.explain(error):
                raise
            raise damaged(graph.parent, error) from error
        self._queue = openvino.AsyncInferQueue(compiled, threads)
        self._finished: deque[tuple[Batch, np.ndarray]] = deque()
        self._queue.set_callback(
            lambda request, batch: self._finished.append((batch, request.get_output_tensor().data.copy()))
        )

    def run(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, np.ndarray]]:
        """Each batch with its vectors, (n, d) float32."""
        for batch in batches:
            self._queue.start_async([batch.ids, batch.mask], batch)  # waits while all streams are busy
            while self._finished:
                yield self._finished.popleft()
        self._queue.wait_all()
        while self._finished:
            yield self._finished.popleft()


class TorchEngine:
    """The model as sentence-transformers loads it, on a GPU in half precision or on the CPU in float32."""

    def __init__(self, model: EmbeddingModel, files: ModelFiles, device: str, threads: int) -> None:
        import torch

        on_cpu = device == "cpu"
        if on_cpu:
            torch.set_num_threads(threads)
        self.one_length = on_cpu
        self.batch_tokens = CPU_BATCH_TOKENS if on_cpu else model.batch_tokens
        self._device = device
        dtype = "float32" if on_cpu else "float16" if model.dtype == "auto" else model.dtype
        log.info("torch on %s in %s", device, dtype)
        try:
            self._modules = load_sentence_transformer(model, files, device=device, model_kwargs={"dtype": dtype})
        except torch.OutOfMemoryError as error:
            raise _too_small(f"the model {model.model}", error) from error

    def run(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, np.ndarray]]:
        """Each batch with its vectors, (n, d) float32; the next one is under way while the last one is fetched."""
        before: tuple[Batch, torch.Tensor] | None = None
        for batch in batches:
            under_way = (batch, self._forward(batch.ids, batch.mask))
            if before:
                yield before[0], before[1].cpu().numpy()
            before = under_way
        if before:
            yield before[0], before[1].cpu().numpy()

    def choose_attention(self, remembered: Path) -> str:
        """Take the implementation of attention that is fastest here: timed once, then read from `remembered`."""
        transformer = self._modules[0].auto_model
        candidates = _ATTENTION if find_spec("flash_attn") else _ATTENTION[:2]
        name = remembered.read_text(errors="replace") if remembered.is_file() else ""
        if name not in candidates:
            seconds, budget = {}, self.batch_tokens
            for candidate in candidates:
                try:
                    transformer.set_attn_implementation(candidate)
                    seconds[candidate] = min(self._time_batch() for _ in range(3))
                except (ImportError, ValueError, RuntimeError) as error:
                    log.info("attention by %s is not to be had here: %s", candidate, error)
            self.batch_tokens = budget  # whatever an implementation that was not taken needed
            told = ", ".join(f"{candidate} {taken * 1000:.1f} ms" for candidate, taken in seconds.items())
            log.info("attention, for %d tokens: %s", _ATTENTION_TOKENS, told)
            name = min(seconds, key=seconds.__getitem__, default="sdpa")
            atomic.write_text(remembered, name)
        transformer.set_attn_implementation(name)
        return name

    def _time_batch(self) -> float:
        """Seconds for a batch of texts, the shortest half as long as the longest."""
        texts = _ATTENTION_TOKENS // _ATTENTION_LENGTH
        lengths = np.linspace(_ATTENTION_LENGTH, _ATTENTION_LENGTH // 2, texts).astype(int)
        batch = _batch([[1] * length for length in lengths], range(texts))
        begin = time.perf_counter()
        self._forward(batch.ids, batch.mask).cpu()  # waits for the GPU
        return time.perf_counter() - begin

    def _forward(self, ids: np.ndarray, mask: np.ndarray) -> "torch.Tensor":
        import torch

        if ids.size > self.batch_tokens and len(ids) > 1:  # cut before memory turned out to be short
            return self._in_halves(ids, mask)
        try:
            with torch.inference_mode():
                features: dict[str, Any] = {
                    "input_ids": torch.from_numpy(ids).to(self._device, non_blocking=True),
                    "attention_mask": torch.from_numpy(mask).to(self._device, non_blocking=True),
                }
                return self._modules(features)["sentence_embedding"].float()
        except torch.OutOfMemoryError as error:
            if len(ids) == 1:
                raise _too_small(f"a single text of {ids.shape[1]} tokens", error) from error
        torch.cuda.empty_cache()
        self.batch_tokens = ids.size // 2
        log.warning("out of GPU memory with %d texts of %d tokens: halving the batch", *ids.shape)
        return self._in_halves(ids, mask)

    def _in_halves(self, ids: np.ndarray, mask: np.ndarray) -> "torch.Tensor":
        import torch

        half = len(ids) // 2
        return torch.cat([self._forward(ids[:half], mask[:half]), self._forward(ids[half:], mask[half:])])


def _too_small(what: str, error: Exception) -> EnvironmentFault:
    return EnvironmentFault(
        f"the GPU's memory is too small for {what} ({str(error).splitlines()[0]}): end what else uses this GPU, set "
        "embedding.device to cpu, or take a smaller model"
    )


def _batch(texts: Sequence[Sequence[int]], numbers: Sequence[int]) -> Batch:
    ids = np.zeros((len(numbers), len(texts[numbers[0]])), np.int64)
    mask = np.zeros_like(ids)
    for row, number in enumerate(numbers):
        ids[row, : len(texts[number])] = texts[number]
        mask[row, : len(texts[number])] = 1
    return Batch(numbers, ids, mask)
