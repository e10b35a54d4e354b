"""Settings of chunking and of the embed stage."""

from typing import Any, Literal

from pydantic import Field, field_validator

from cuepoint.settings.base import Section, result


class ChunkSettings(Section):
    """How transcripts are cut into passages."""

    target_tokens: int = result(200, ge=16)
    """Tokens of a chunk by the embedding model's own tokenizer; never more than the model can read."""
    overlap_sentences: int = result(1, ge=0, le=10)
    """Whole sentences that a chunk repeats from the one before."""
    max_gap: float = result(15.0, gt=0)
    """Seconds of pause that no chunk spans."""


class EmbeddingModel(Section):
    """One embedding model."""

    model: str = result(min_length=1)
    """A sentence-transformers model: Hugging Face repository, local directory, or `package:NAME/SUBDIRECTORY`."""
    revision: str | None = result(None)
    """Commit of the model's repository; without one the newest is taken, and recorded as resolved."""
    query_prompt: str = result("")
    """Put before every query (and never before passages)."""
    passage_prompt: str = result("")
    """Put before every passage."""
    max_tokens: int | None = result(None, ge=16)
    """Tokens that the model reads, special tokens counted; by default what the model itself says."""
    truncate_dim: int | None = result(None, ge=8)
    """Keep only the first N dimensions (for models trained for it)."""
    normalize: bool = result(True)
    """Scale vectors to unit length (cosine search needs it)."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = result("auto")
    """Arithmetic on a GPU: `auto` measures best there; on a CPU it is always float32."""
    trust_remote_code: bool = result(False)
    """Run Python code from the model's repository. Off unless you trust it."""
    batch_tokens: int = Field(16384, ge=256)
    """Tokens of a batch, padding counted."""


READY_MADE: dict[str, dict[str, Any]] = {
    "all-MiniLM-L6-v2": {"model": "sentence-transformers/all-MiniLM-L6-v2"},
    "bge-small-en-v1.5": {
        "model": "BAAI/bge-small-en-v1.5",
        "query_prompt": "Represent this sentence for searching relevant passages: ",
    },
    "gte-Qwen2-1.5B-instruct": {
        "model": "Alibaba-NLP/gte-Qwen2-1.5B-instruct",
        "query_prompt": (
            "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: "
        ),
    },
}


class EmbeddingSettings(Section):
    """Which models embed the chunks."""

    use: list[str] = Field(["all-MiniLM-L6-v2"], min_length=1)
    """Names of the models to embed with; each has its own files and its own collection."""
    models: dict[str, EmbeddingModel] = Field(default_factory=dict)
    """Models that `use` can name, beside the ready-made ones (an entry of the same name replaces it)."""
    backend: Literal["auto", "torch", "onnx", "openvino"] = "auto"
    """Engine on a CPU; `auto` takes the one that measured fastest."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where the model runs; `auto` takes a GPU if there is one."""

    @field_validator("models", mode="before")
    @classmethod
    def _with_ready_made(cls, value: Any) -> Any:
        return READY_MADE | value if isinstance(value, dict) else value
