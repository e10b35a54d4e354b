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
    api_key_env: str = "QDRANT_API_KEY"
    """Environment variable that holds the server's API key."""
    distance: Literal["Cosine", "Dot"] = result("Cosine")
    """Similarity of vectors."""
    batch_size: int = Field(1000, ge=1, le=10_000)
    """Points sent at a time."""
    max_delete_share: float = Field(0.2, ge=0, le=1)
    """A load that would delete more than this share of the collection's videos stops (see `allow_shrink`)."""
    timeout: float = Field(60, gt=0)
    """Seconds that one request to a server may take."""
