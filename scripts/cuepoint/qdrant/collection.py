"""What a place for points must be able to do: the same few calls for a directory and for a server."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from cuepoint.qdrant.points import Points

KEYWORD_INDEXES = ("video_id", "fingerprint", "channel", "channel_id", "language")
DATETIME_INDEXES = ("upload_date",)


@dataclass(frozen=True)
class Shape:
    """What a collection is made for; another shape is another collection."""

    name: str
    dimension: int
    distance: str  # Cosine or Dot
    provenance: dict[str, Any]  # model, chunking: kept with the collection, for people


@dataclass(frozen=True)
class Filters:
    """Which points a search may find; None stands for all."""

    video: str | None = None
    channel: str | None = None  # name or ID
    language: str | None = None
    since: date | None = None  # upload date, inclusive
    until: date | None = None


@dataclass(frozen=True)
class Hit:
    """A point found, or read back by its ID."""

    id: str
    payload: dict[str, Any]
    score: float = 0.0
    vector: Sequence[float] | None = None


class Collection(Protocol):
    """The points of one model."""

    def provenance(self) -> dict[str, Any]:
        """The shape's provenance that the collection was made with; empty when the place does not keep it."""
        ...

    def count(self) -> int:
        """Exact number of points."""
        ...

    def counts(self, key: str) -> dict[str, int]:
        """Exact number of points for each value of an indexed payload key."""
        ...

    def upsert(self, points: "Points") -> None:
        """Write points, replacing those with the same IDs; they are in the collection on return."""
        ...

    def trim(self, fingerprints: Mapping[str, str]) -> None:
        """Delete what these videos (video_id -> fingerprint) hold under any other fingerprint."""
        ...

    def delete_videos(self, video_ids: Sequence[str]) -> None:
        """Delete all points of these videos."""
        ...

    def retrieve(self, ids: Sequence[str]) -> list[Hit]:
        """Points with vector and payload; unknown IDs are left out."""
        ...

    def search(
        self, vector: Sequence[float], limit: int, filters: Filters | None = None, *, exact: bool = False
    ) -> list[Hit]:
        """The points nearest to a vector of the collection's dimension, best first; `exact` uses no index."""
        ...


class Store(Protocol):
    """A place that holds collections, and names that people query."""

    def published(self, name: str) -> str | None:
        """Collection that a published name stands for."""
        ...

    def read(self, collection: str) -> AbstractContextManager[Collection | None]:
        """An existing collection for reading, None if there is none."""
        ...

    def write(
        self, shape: Shape, *, adding: int = 0, deleting: int = 0, whole: int = 0
    ) -> AbstractContextManager[Collection]:
        """The collection for writing, made if there is none; what was written counts when the block ends well.

        `adding` and `deleting` are the numbers of points that the block means to write and to delete. With `whole` it
        can write every point of the collection, so many, again, and a place may choose to start from an empty one.
        """
        ...

    def publish(self, names: Sequence[str], collection: str) -> None:
        """Let names stand for a collection: readers see the old one or the new one, never none."""
        ...

    def drop_previous(self, name: str, *, others: bool) -> list[str]:
        """Remove what a published name has left behind, with `others` also its earlier collections; returns these."""
        ...
