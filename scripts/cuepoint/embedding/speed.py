"""How fast a model embeds on this machine, and what share of the device's arithmetic that is."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cuepoint.embedding.embedder import Device
from cuepoint.embedding.exported import import_openvino
from cuepoint.embedding.location import ModelFiles

_NOT_MULTIPLIED = ("embed", "pooler", "lm_head")  # weights that a text's vector needs no matrix product with


@dataclass(frozen=True)
class Arithmetic:
    """What a transformer computes for a text."""

    weights: int  # numbers in the matrices that each token is multiplied with
    layers: int
    hidden: int  # width of the layers

    def operations(self, tokens: int) -> float:
        """Multiplications and additions for a text of so many tokens: the matrices, and attention's two products."""
        return 2.0 * self.weights * tokens + 4.0 * self.layers * self.hidden * tokens**2


@dataclass(frozen=True)
class Speed:
    """What was embedded in a time."""

    texts: int
    tokens: int
    operations: float
    seconds: float

    @property
    def texts_per_second(self) -> float:
        """The rate."""
        return self.texts / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """The rate, special tokens counted and padding not."""
        return self.tokens / self.seconds

    @property
    def operations_per_second(self) -> float:
        """The rate: compare with `matrix_peak`."""
        return self.operations / self.seconds


def arithmetic(files: ModelFiles) -> Arithmetic:
    """Read from the model's configuration and from the headers of its weights."""
    from safetensors import safe_open

    config = json.loads((files.path / "config.json").read_text())
    weights = 0
    for file in sorted(files.path.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (no dictionary)
                shape = tensors.get_slice(name).get_shape()
                if len(shape) == 2 and not any(part in name for part in _NOT_MULTIPLIED):
                    weights += shape[0] * shape[1]
    return Arithmetic(weights, config["num_hidden_layers"], config["hidden_size"])


def measure(
    encode: Callable[[Sequence[str]], object],
    passages: Sequence[str],
    lengths: Sequence[int],
    work: Arithmetic,
    *,
    seconds: float,
) -> Speed:
    """Time `encode` on the passages, over and over, for about `seconds`, after one call to warm up.

    `lengths` are the passages' tokens. Calls grow until four fill the time, so that a slow model is timed on few texts
    and a fast one on as many as a shard has.
    """
    begin = time.perf_counter()
    encode(passages[:1])
    size = _as_many(1 / (time.perf_counter() - begin), seconds, len(passages))
    done: list[int] = []
    begin = time.perf_counter()
    while not done or time.perf_counter() - begin < seconds:
        chosen = [(len(done) + i) % len(passages) for i in range(size)]
        encode([passages[i] for i in chosen])
        done += chosen
        size = _as_many(len(done) / (time.perf_counter() - begin), seconds, len(passages))
    elapsed = time.perf_counter() - begin
    tokens = [lengths[i] for i in done]
    return Speed(len(done), sum(tokens), sum(map(work.operations, tokens)), elapsed)


def matrix_peak(device: Device, threads: int, *, seconds: float = 1.0) -> float:
    """Operations per second of the best of many large matrix products, in the arithmetic that embedding has there.

    On a CPU the better of torch and OpenVINO: torch's library leaves half of an AMD processor's AVX-512 unused.
    """
    if device == "cuda":
        size, products = 8192, [_torch_product("cuda", 8192)]
    else:
        # So quick that the best of many is one that nothing else disturbed.
        size = min(4096, 512 * threads)
        products = [_torch_product("cpu", size, threads), _openvino_product(size, threads)]
    best = float("inf")
    for product in products:
        product()
        until = time.perf_counter() + seconds / len(products)
        while (begin := time.perf_counter()) < until:
            product()
            best = min(best, time.perf_counter() - begin)
    return 2.0 * size**3 / best


def _torch_product(device: Device, size: int, threads: int = 1) -> Callable[[], None]:
    import torch

    if device == "cpu":
        torch.set_num_threads(threads)
    dtype = torch.float32 if device == "cpu" else torch.float16
    one, other = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))

    def product() -> None:
        one @ other
        if device == "cuda":
            torch.cuda.synchronize()

    return product


def _openvino_product(size: int, threads: int) -> Callable[[], None]:
    import numpy as np

    openvino = import_openvino()
    from openvino import opset13 as op

    chance = np.random.default_rng(0)
    one, other = (chance.standard_normal((size, size), np.float32) for _ in range(2))
    parameter = op.parameter(one.shape, np.float32)
    model = openvino.Model([op.matmul(parameter, op.constant(other), False, False)], [parameter])
    options = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
    request.set_input_tensor(openvino.Tensor(one))
    return request.infer


def _as_many(rate: float, seconds: float, most: int) -> int:
    return max(1, min(most, int(rate * seconds / 4)))
