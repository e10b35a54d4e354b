"""Settings of the load stage."""

from typing import Literal

from pydantic import Field

from cuepoint.settings.base import Section, result


class QdrantSettings(Section):
    """Where the points go. The API key is taken from the environment variable named by `api_key_env`."""

    location: str = result("embedded", min_length=1)
    """`embedded` (under the results directory), another directory, or a server's URL (http://host:6333)."""
    collection: str = result("cuepoint", pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,99}$")
    """Name that people query; each model's points are in `{collection}-{model}`, and this name points to the first."""
    distance: Literal["Cosine", "Dot"] = result("Cosine")
    """Similarity of vectors."""
    keep_previous: bool = False
    """Keep the collection of an earlier model revision or chunking beside the new one, to go back to it quickly."""
    max_delete_share: float = Field(0.2, ge=0, le=1)
    """A load that would delete more than this share of the collection's videos, and more than one, stops (see
    `allow_shrink`)."""
    batch_size: int = Field(1000, ge=1, le=10_000)
    """Points written at a time; all that a load holds in memory. A server in strict mode gets as many as it allows."""
    api_key_env: str = "QDRANT_API_KEY"
    """Environment variable that holds the server's API key."""
    timeout: float = Field(60, gt=0)
    """Seconds that one request to a server may take."""
    attempts: int = Field(5, ge=1, le=20)
    """Tries of a request that a server did not answer or refused as too much, with back-off."""
    prefer_grpc: bool = True
    """Talk gRPC to a server (a third of the bytes of REST); `false` where only its HTTP port is open."""
    grpc_port: int = Field(6334, ge=1, le=65535)
    """The server's gRPC port."""
    hnsw_m: int = result(16, ge=0, le=256)
    """Server: edges of a node in the vector index; 0 builds none. (An embedded collection is searched exactly.)"""
    hnsw_ef_construct: int = result(100, ge=4, le=2000)
    """Server: neighbours looked at while the vector index is built."""
    indexing_threshold: int = result(10_000, ge=0)
    """Server: kilobytes of vectors from which a segment is indexed, in force once the first load is through."""
    quantization: Literal["none", "scalar", "binary"] = result("none")
    """Server: also keep compressed vectors for a faster search: int8 (a quarter) or one bit (needs many dimensions)."""
    vectors_on_disk: bool = result(False)
    """Server: keep full vectors on disk, not in memory."""
    payload_on_disk: bool = result(True)
    """Server: keep texts and other payload on disk, not in memory."""
    shard_number: int | None = result(None, ge=1)
    """Server: shards of a new collection; by default what the server decides."""
    replication_factor: int | None = result(None, ge=1)
    """Server: copies of each shard of a new collection in a cluster."""
