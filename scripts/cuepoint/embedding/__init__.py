"""Embedding: chunks of transcripts as vectors of one model, and queries as vectors of the same."""

from cuepoint.embedding.embedder import VERSION, Embedder, open_embedder, open_model
from cuepoint.embedding.shards import embed_shard

__all__ = ["VERSION", "Embedder", "embed_shard", "open_embedder", "open_model"]
