"""Loading: make a collection hold what the tables say, prove that it does, then let people see it."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from cuepoint.atomic import write_text
from cuepoint.errors import DataError
from cuepoint.fingerprint import fingerprint
from cuepoint.layout import Layout
from cuepoint.qdrant import VERSION, collection_name, open_store, published_name, shown_location
from cuepoint.qdrant.collection import Collection, Hit, Shape, Store
from cuepoint.qdrant.points import Chunk, Sample, ShardTables, Survey, as_points, payload, read_chunks, survey
from cuepoint.settings import Settings
from cuepoint.tables import read_metadata

if TYPE_CHECKING:
    from cuepoint.telemetry import Telemetry

log = logging.getLogger(__name__)

DELETE_BATCH = 200  # videos named in one request
SEARCHES = 16  # points of the sample that are also searched for: each reads all vectors
VECTOR_TOLERANCE = 1e-5  # of a stored number: float32 that was scaled to unit length once more
SCORE_TOLERANCE = 1e-4


class Verified(BaseModel):
    """What was found to be right in the collection after the load."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    videos_counted: int = 0  # each has exactly its points
    points_compared: int = 0  # read back: vector and payload are those of the tables
    points_found: int = 0  # came first when searched for by their own vector


class LoadReceipt(BaseModel):
    """What a load left in the collection, and what was verified there."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = 1
    model: str
    location: str
    complete: bool  # all tables were loaded, not only those that existed so far
    members: str | None = None  # hash of the list that it is complete for: the ledger asks whether it still is
    collection: str | None = None  # None: there was nothing to load
    names: list[str] = []  # that stand for the collection from now on
    dimension: int = 0
    videos: int = 0
    points: int = 0
    videos_written: int = 0
    videos_removed: int = 0
    verified: Verified = Verified()
    previous_dropped: list[str] = []

    def write(self, path: Path) -> None:
        """Write the receipt atomically."""
        write_text(path, self.model_dump_json(indent=1) + "\n")


@dataclass(frozen=True)
class State:
    """What a collection holds: exact numbers of points by video and by fingerprint."""

    videos: dict[str, int] = field(default_factory=dict)
    fingerprints: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Changes:
    """How a collection must change to hold what the tables say."""

    write: list[str]  # videos that are new or changed, or were left half written
    remove: list[str]  # videos that must not be found any more
    keep: list[str]  # listed videos whose tables are not there (yet)

    def __bool__(self) -> bool:
        return bool(self.write or self.remove)


@dataclass(frozen=True)
class Outcome:
    """How a synchronisation went."""

    changes: Changes
    before: State
    verified: Verified

    @property
    def kept_points(self) -> int:
        """Points of videos whose tables were not there."""
        return sum(self.before.videos[video_id] for video_id in self.changes.keep)


def load_collection(
    model_name: str,
    shards: Sequence[ShardTables],
    members: Mapping[str, str],
    layout: Layout,
    settings: Settings,
    *,
    final: bool,
    telemetry: "Telemetry | None" = None,
    store: Store | None = None,
) -> LoadReceipt:
    """Synchronise the model's collection with the tables of `shards`, verify it and publish it.

    `members` places each listed video in its shard: rows of other videos or from other shards do not count. With
    `final`, the tables are all there are and other points go; without, points of listed videos whose tables are missing
    stay, and a collection that is published in another version (model revision, chunking) is left alone. Killed at any
    moment and called again, it ends in the same state.

    Raises DataError (tables, verification, a load that would delete too much) and EnvironmentFault (disk, server).
    """
    phase = telemetry.phase if telemetry else _no_phase
    store = store or open_store(settings, layout)
    published = published_name(settings, model_name)
    receipt = LoadReceipt(model=model_name, location=shown_location(settings), complete=final)
    shards, identity = _one_version(model_name, shards, settings, store.published(published), final=final)
    if identity is None:
        log.warning("there is nothing to load for %s: its collection, if it has one, stays as it is", model_name)
        return receipt

    with phase("read"):
        normalized = settings.embedding.models[model_name].normalize
        wanted = survey(shards, members, unit_length=normalized, batch_size=settings.qdrant.batch_size)
    shape = Shape(
        name=collection_name(settings, model_name, identity),
        dimension=wanted.dimension,
        distance=settings.qdrant.distance,
        provenance=_made_with(shards[0]),
    )
    _guard_readers(store, published, shape.name, wanted, settings)
    outcome = _synchronise(store, shape, shards, wanted, members, settings=settings, final=final, telemetry=telemetry)
    names = [published]
    if model_name == settings.embedding.use[0]:
        names.append(settings.qdrant.collection)
    store.publish(names, shape.name)
    log.info(
        "%s is published: %d written and %d removed videos, %s",
        shape.name,
        len(outcome.changes.write),
        len(outcome.changes.remove),
        outcome.verified,
    )
    return receipt.model_copy(
        update={
            "collection": shape.name,
            "names": names,
            "dimension": wanted.dimension,
            "videos": len(wanted.videos) + len(outcome.changes.keep),
            "points": wanted.points + outcome.kept_points,
            "videos_written": len(outcome.changes.write),
            "videos_removed": len(outcome.changes.remove),
            "verified": outcome.verified,
            "previous_dropped": store.drop_previous(published, others=final and not settings.qdrant.keep_previous),
        }
    )


def _synchronise(
    store: Store,
    shape: Shape,
    shards: Sequence[ShardTables],
    wanted: Survey,
    members: Mapping[str, str],
    *,
    settings: Settings,
    final: bool,
    telemetry: "Telemetry | None",
) -> Outcome:
    """Change the collection until it holds what is wanted, and verify it; it is not published yet."""
    phase = telemetry.phase if telemetry else _no_phase
    with phase("compare"), store.read(shape.name) as collection:
        state = _state(collection) if collection else State()
        changes = compare(wanted, state, members, final=final)
        _guard(changes.remove, state, settings)
        if collection and not changes:
            return Outcome(changes, state, _verify(collection, wanted, changes, wanted.sample))
    log.info("%s: %d videos to write, %d to remove", shape.name, len(changes.write), len(changes.remove))
    with store.write(shape, **_sizes(wanted, state, changes)) as collection:
        # An embedded store may have begun an empty directory, and then everything has to be written.
        found = _state(collection)
        todo = compare(wanted, found, members, final=final)
        with phase("write"):
            written = _apply(
                collection, found, todo, wanted, shards, batch_size=settings.qdrant.batch_size, telemetry=telemetry
            )
        with phase("verify"):
            return Outcome(changes, state, _verify(collection, wanted, changes, wanted.sample | written))


def compare(wanted: Survey, state: State, members: Mapping[str, str], *, final: bool) -> Changes:
    """What to change. A video counts as unchanged when exactly its points are there, all with its fingerprint."""
    write = [
        video_id
        for video_id, video in wanted.videos.items()
        if not state.videos.get(video_id) == state.fingerprints.get(video.fingerprint) == video.points
    ]
    others = [video_id for video_id in state.videos if video_id not in wanted.videos]
    keep = [video_id for video_id in others if not final and video_id in members]
    return Changes(write, sorted(set(others).difference(keep)), keep)


def _state(collection: Collection) -> State:
    return State(collection.counts("video_id"), collection.counts("fingerprint"))


def _guard(removed: Sequence[str], state: State, settings: Settings) -> None:
    """Refuse to delete much of a collection: an emptied list or a lost directory is more likely than the wish.

    One video may always go: of a collection of four, any one is more than the default share.
    """
    allowed = max(1, settings.qdrant.max_delete_share * len(state.videos))
    if len(removed) > allowed and not settings.allow_shrink:
        raise DataError(
            f"this load would delete {len(removed)} of the collection's {len(state.videos)} videos "
            f"({', '.join(removed[:3])}{', …' if len(removed) > 3 else ''}), more than qdrant.max_delete_share = "
            f"{settings.qdrant.max_delete_share} allows. If that is meant, run once with --config allow_shrink=true"
        )


def _guard_readers(store: Store, published: str, name: str, wanted: Survey, settings: Settings) -> None:
    """The same for readers whose name is about to move from another collection to the one called `name`."""
    seen = store.published(published)
    if seen is None or seen == name:
        return
    with store.read(seen) as collection:
        state = State(collection.counts("video_id")) if collection else State()
    _guard([video_id for video_id in state.videos if video_id not in wanted.videos], state, settings)


def _sizes(wanted: Survey, state: State, changes: Changes) -> dict[str, Any]:
    """What `Store.write` wants to know: points that come and go, and all of them if they could be written again."""
    going = sum(state.videos[video_id] for video_id in changes.remove)
    coming = sum(wanted.videos[video_id].points for video_id in changes.write)
    return {"adding": coming, "deleting": going, "whole": 0 if changes.keep else wanted.points}


def _apply(
    collection: Collection,
    found: State,
    changes: Changes,
    wanted: Survey,
    shards: Sequence[ShardTables],
    *,
    batch_size: int,
    telemetry: "Telemetry | None",
) -> Sample:
    """Write first, delete after: whoever reads meanwhile finds a video's old passages or its new ones."""
    written = Sample()
    todo = {video_id: wanted.videos[video_id] for video_id in changes.write}
    for shard in shards:
        mine = {video_id: video for video_id, video in todo.items() if video.shard == shard.shard}
        if not mine:
            continue
        for chunks in read_chunks(shard.embeddings, mine, batch_size):
            collection.upsert(as_points(chunks, mine))
            written.offer(chunks)
            if telemetry:
                telemetry.add(points=len(chunks))
    for videos in _batches([video_id for video_id in changes.write if video_id in found.videos]):
        collection.trim({video_id: todo[video_id].fingerprint for video_id in videos})
    for videos in _batches(changes.remove):
        collection.delete_videos(videos)
    return written


def _verify(collection: Collection, wanted: Survey, changes: Changes, sample: Sample) -> Verified:
    """Compare the collection with the tables; raises DataError on the first difference."""
    counted = collection.counts("video_id")
    kept = sum(counted.get(video_id, 0) for video_id in changes.keep)
    for video_id, video in wanted.videos.items():
        if counted.get(video_id, 0) != video.points:
            raise _unlike(f"video {video_id} has {counted.get(video_id, 0)} points there, {video.points} in the tables")
    total = collection.count()
    if total != wanted.points + kept:
        raise _unlike(f"{total} points are there, {wanted.points + kept} should be")
    ids = [chunk.point_id for chunk in sample.chunks]
    stored = {hit.id: hit for hit in collection.retrieve(ids)} if ids else {}
    for chunk in sample.chunks:
        _compare_point(chunk, stored.get(chunk.point_id), payload(chunk, wanted.videos[chunk.video_id]))
    searched = sample.chunks[-SEARCHES:]  # those that have just been written, if any were
    for chunk in searched:
        _find_point(collection, chunk)
    return Verified(videos_counted=len(wanted.videos), points_compared=len(sample.chunks), points_found=len(searched))


def _compare_point(chunk: Chunk, hit: Hit | None, wanted: Mapping[str, Any]) -> None:
    """Raise DataError if a stored point has not its chunk's vector and the payload that is wanted."""
    if hit is None or hit.vector is None:
        raise _unlike(f"{_named(chunk)} is missing")
    stored = np.asarray(hit.vector, dtype=np.float32)
    # With cosine distance the engine stores vectors scaled to unit length.
    if not any(np.allclose(stored, each, atol=VECTOR_TOLERANCE) for each in (chunk.vector, _unit(chunk.vector))):
        raise _unlike(f"{_named(chunk)} has another vector there")
    if not _same_payload(hit.payload, wanted):
        raise _unlike(f"{_named(chunk)} has another payload there")


def _find_point(collection: Collection, chunk: Chunk) -> None:
    """Search for a point by its own vector; raises DataError if what comes first is farther away than itself."""
    first = collection.search(_unit(chunk.vector).tolist(), 1, exact=True)
    own_score = min(1.0, float(np.linalg.norm(chunk.vector)))  # by dot product below 1 for a shorter vector
    # Passages with the same words have the same vector: one of these may come first, with the same score.
    if not first or first[0].score < own_score - SCORE_TOLERANCE:
        raise _unlike(f"{_named(chunk)} is not what a search for it finds")


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def _same_payload(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Equal but for the last digits of floats: Edge keeps payload as JSON and parses it not quite exactly."""
    return stored.keys() == wanted.keys() and all(
        math.isclose(stored[key], value) if isinstance(value, float) else stored[key] == value
        for key, value in wanted.items()
    )


def _unlike(difference: str) -> DataError:
    return DataError(
        f"the collection is not what was loaded: {difference}. Run snakemake again; if that does not help, "
        "delete the collection"
    )


def _named(chunk: Chunk) -> str:
    return f"chunk {chunk.chunk} of video {chunk.video_id}"


def _made_with(shard: ShardTables) -> dict[str, Any]:
    """What a shard's vectors depend on as a whole: model with revision, chunking, settings."""
    metadata = read_metadata(shard.embeddings)
    measured = {"format", "version", "packages", "quality"}
    return {name: value for name, value in metadata.items() if name not in measured}


def _one_version(
    model: str, shards: Sequence[ShardTables], settings: Settings, published: str | None, *, final: bool
) -> tuple[list[ShardTables], str | None]:
    """The shards to load, all made by the same model and chunking, and the identity of their collection.

    While a run goes on, tables of two versions may be there: then those that belong to the published collection are
    taken, or without one the larger part.
    """
    versions: dict[str, list[ShardTables]] = {}
    for shard in shards:
        if final or (shard.embeddings.exists() and shard.videos.exists()):
            identity = fingerprint(made_with=_made_with(shard), distance=settings.qdrant.distance, payload=VERSION)
            versions.setdefault(identity, []).append(shard)
    if final and len(versions) > 1:
        first, second, *_ = (_made_with(group[0]) for group in versions.values())
        differing = [name for name in first if first[name] != second.get(name)]
        one, other, *_ = versions.values()
        raise DataError(
            f"{one[0].embeddings} and {other[0].embeddings} were embedded differently ({', '.join(differing)}): "
            f"pin embedding.models.{model}.revision, delete the older files ({min(len(one), len(other))}) and run again"
        )
    if not final and published:
        versions = {
            identity: group
            for identity, group in versions.items()
            if collection_name(settings, model, identity) == published
        }
    if not versions:
        return [], None
    identity, chosen = max(versions.items(), key=lambda version: len(version[1]))
    return chosen, identity


def _batches(items: Sequence[str]) -> Iterator[list[str]]:
    rest = iter(items)
    while batch := list(islice(rest, DELETE_BATCH)):
        yield batch


def _no_phase(_: str) -> AbstractContextManager[None]:
    return nullcontext()
