"""Searching a loaded collection: the passages that answer a query, and the links that open them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from cuepoint.errors import ConfigError, DataError
from cuepoint.layout import Layout
from cuepoint.qdrant import open_store, published_name, shown_location
from cuepoint.qdrant.collection import Collection, Filters, Hit
from cuepoint.settings import Settings


@dataclass(frozen=True)
class Result:
    """One answer: a passage, and how many overlapping ones of the same video it stands for."""

    rank: int  # from 1
    score: float  # similarity, 1 at most
    title: str | None
    start: float  # seconds
    end: float
    text: str
    url: str  # opens the video at `start`
    video_id: str
    channel: str | None
    upload_date: str | None  # YYYY-MM-DD
    language: str | None
    overlapping: int = 0


@contextmanager
def open_published(settings: Settings, layout: Layout, model: str) -> Iterator[Collection]:
    """The collection that a model's published name stands for now.

    Raises ConfigError for a model that is not in use, DataError when nothing is loaded for it.
    """
    if model not in settings.embedding.use:
        raise ConfigError(f"nothing is embedded with {model!r}: embedding.use has {', '.join(settings.embedding.use)}")
    store = open_store(settings, layout)
    name = store.published(published_name(settings, model))
    if name is None:
        raise DataError(
            f"nothing is loaded for {model} at {shown_location(settings)} (results: {layout.results}): run snakemake, "
            "or `snakemake load_available` to search what exists so far"
        )
    with store.read(name) as collection:
        if collection is None:
            raise DataError(f"collection {name} has just been removed: search again, or run snakemake")
        yield collection


def check_model(collection: Collection, model: str, revision: str) -> None:
    """Raise DataError if queries are embedded by another revision than the passages: scores would mean nothing."""
    loaded = collection.provenance().get("revision")
    if loaded not in {None, revision}:
        raise DataError(
            f"the collection was embedded with revision {loaded} of {model}, here is revision {revision}: set "
            f"embedding.models.{model}.revision to the first, or run snakemake to embed with the second"
        )


def search(collection: Collection, vector: np.ndarray, limit: int, filters: Filters | None = None) -> list[Result]:
    """The best `limit` passages for a query's vector, (d,) float32; overlapping neighbours count as one."""
    asked = limit
    while True:
        asked *= 2
        hits = collection.search(vector.tolist(), asked, filters)
        groups = merge_overlapping(hits)
        if len(groups) >= limit or len(hits) < asked:
            return [_result(rank, group) for rank, group in enumerate(groups[:limit], 1)]


def merge_overlapping(hits: Sequence[Hit]) -> list[list[Hit]]:
    """Group hits, given best first, of one video that share some of its time; each group's best hit comes first."""
    groups: list[list[Hit]] = []
    for hit in hits:
        group = next((group for group in groups if _overlap(group[0].payload, hit.payload)), None)
        if group:
            group.append(hit)
        else:
            groups.append([hit])
    return groups


def _overlap(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one["video_id"] == other["video_id"] and one["start"] < other["end"] and other["start"] < one["end"]


def _result(rank: int, group: list[Hit]) -> Result:
    best = group[0]
    optional = {name: best.payload.get(name) for name in ("title", "channel", "upload_date", "language")}
    required = {name: best.payload[name] for name in ("start", "end", "text", "url", "video_id")}
    return Result(rank=rank, score=best.score, overlapping=len(group) - 1, **required, **optional)
