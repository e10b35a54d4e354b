"""Settings of chunking and of the embed stage."""

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from cuepoint.settings.base import Section, result


class ChunkSettings(Section):
    """How transcripts are cut into passages."""

    target_tokens: int = result(200, ge=16)
    """Most tokens of a chunk, counted by the embedding model's own tokenizer with its special tokens and prompt; never
    more than the model reads."""
    overlap_sentences: int = result(1, ge=0, le=10)
    """Whole sentences that a chunk repeats from the one before, where they are at most a quarter of it."""
    max_gap: float = result(15.0, gt=0)
    """Seconds of pause that no chunk spans."""


class EmbeddingModel(Section):
    """One embedding model."""

    model: str = result(min_length=1)
    """A sentence-transformers model with safetensors weights: Hugging Face repository, local directory, or
    `package:NAME/SUBDIRECTORY` inside an installed Python package (`package:NAME` if it holds one model)."""
    revision: str | None = result(None)
    """Commit of the model's repository; without one the newest is taken, and recorded as resolved."""
    query_prompt: str = ""
    """Put before every query (and never before passages): changing it embeds nothing again."""
    passage_prompt: str = result("")
    """Put before every passage."""
    max_tokens: int | None = result(None, ge=16)
    """Tokens that the model reads, special tokens counted; by default what the model itself says."""
    append_eos: bool = result(False)
    """End every text with the tokenizer's end-of-text token, for models that pool it and a tokenizer that leaves it
    to the caller."""
    truncate_dim: int | None = result(None, ge=8)
    """Keep only the first N dimensions (for models trained for it)."""
    normalize: bool = result(True)
    """Scale vectors to unit length (cosine search needs it)."""
    dtype: Literal["auto", "float32", "float16", "bfloat16", "int8"] = result("auto")
    """Arithmetic on a GPU: `auto` is float16, which measured nearest to float32. On a CPU it is always float32, but for
    `int8` (CPU only): faster and less exact. How much less is measured on the first passages, logged, and kept in the
    tables' metadata."""
    trust_remote_code: bool = result(False)
    """Run Python code from the model's repository. Off unless you trust it."""
    batch_tokens: int = Field(16384, ge=256)
    """Tokens of a batch on a GPU, padding counted; it halves by itself when memory runs out."""


READY_MADE: dict[str, dict[str, Any]] = {
    "all-MiniLM-L6-v2": {
        "model": "sentence-transformers/all-MiniLM-L6-v2",
        "revision": "c9745ed1d9f207416be6d2e6f8de32d1f16199bf",
    },
    "bge-small-en-v1.5": {
        "model": "BAAI/bge-small-en-v1.5",
        "revision": "5c38ec7c405ec4b44b94cc5a9bb96e735b38267a",
        "query_prompt": "Represent this sentence for searching relevant passages: ",
    },
    # Pools the last token, so texts must end in the end-of-text token. Its config.json says `is_causal: false` (since
    # the commit named here: vllm-project/vllm#14609), which transformers' own Qwen2 follows by attending to both sides:
    # no code from the repository is needed. float16 spoils its 7B sibling's vectors (embeddings-benchmark/mteb#4935).
    "gte-Qwen2-1.5B-instruct": {
        "model": "Alibaba-NLP/gte-Qwen2-1.5B-instruct",
        "revision": "0d2ad8e1ac654a2b626e62154778a70868141208",
        "query_prompt": (
            "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: "
        ),
        "append_eos": True,
        "dtype": "bfloat16",
    },
}


INT8_NEEDS = "dtype int8 is for OpenVINO on a CPU: set embedding.device to cpu and embedding.backend to auto"


class EmbeddingSettings(Section):
    """Which models embed the chunks."""

    use: list[str] = Field(["all-MiniLM-L6-v2"], min_length=1)
    """Names of the models to embed with; each has its own files and its own collection."""
    models: dict[str, EmbeddingModel] = Field(default_factory=dict)
    """Models that `use` can name, beside the ready-made ones (an entry of the same name replaces it)."""
    backend: Literal["auto", "torch", "openvino"] = "auto"
    """Engine on a CPU: `auto` is openvino, which measured fastest (the model is converted once, and kept), or torch if
    the memory is less than twice the weights. A GPU always uses torch."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where the model runs; `auto` takes a GPU if there is one."""

    @field_validator("models", mode="before")
    @classmethod
    def _with_ready_made(cls, value: Any) -> Any:
        return READY_MADE | value if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _int8_can_run(self) -> "EmbeddingSettings":
        if self.backend == "torch" or self.device == "cuda":
            for name in self.use:
                if name in self.models and self.models[name].dtype == "int8":
                    raise ValueError(f"embedding.models.{name}: {INT8_NEEDS}")
        return self

    @field_validator("models")
    @classmethod
    def _names_are_names_of_files(cls, value: dict[str, EmbeddingModel]) -> dict[str, EmbeddingModel]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
                raise ValueError(
                    f"{name[:100]!r} cannot name a model: files and collections are called by it, so at most 100 "
                    "letters, digits, dots, - and _ are allowed, the first a letter or digit"
                )
        return value
