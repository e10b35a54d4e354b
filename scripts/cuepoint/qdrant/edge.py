"""Embedded collections: Qdrant Edge, the engine in this process, one directory for each state of a collection.

A directory is built under a temporary name, closed, and renamed; from then on it is only read. So a search never sees
half a load and never blocks one, and any number of processes may read one directory at a time: without a write-ahead
log Edge takes no lock, and it needs none here because an unfinished directory is thrown away. (Tried: processes that
opened and closed one directory 450 times side by side; opening writes `edge_config.json` anew, by rename, and leaves
all other bytes as they are.)
"""

import fcntl
import glob
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import qdrant_edge as edge

from cuepoint.atomic import write_json
from cuepoint.errors import CuepointError, DataError, EnvironmentFault
from cuepoint.locks import hold
from cuepoint.qdrant import is_version_of, pointer
from cuepoint.qdrant.collection import DATETIME_INDEXES, KEYWORD_INDEXES, Filters, Hit, Shape
from cuepoint.qdrant.edge_writers import Writers
from cuepoint.qdrant.points import Points

log = logging.getLogger(__name__)

ALL = 2**31  # limit of a facet: every value
REBUILD_SHARE = 0.25  # deleted points stay in the files: from this share on a directory is built anew
SET_ASIDE = 128 << 20  # bytes: each writer takes 32 MiB at a time, and not every file system counts only what is used
FLUSH_POINTS = 50_000  # the engine holds in memory what is not flushed
MANY_POINTS = 20_000  # worth the half second in which a process starts
WRITERS = 2  # the cores that the rule asks for
NOTES = "cuepoint.json"
ZEROS = bytes(1 << 16)  # what is looked for to be left out of a copy
BUILDING, REMOVED = ".building", ".removed"  # suffixes of directories that are not yet, or no longer, a state


class EdgeCollection:
    """One opened directory."""

    def __init__(self, shard: edge.EdgeShard, provenance: dict[str, Any]):
        self._shard, self._provenance = shard, provenance
        self._unflushed = 0  # points

    def provenance(self) -> dict[str, Any]:
        """What the collection was made with."""
        return self._provenance

    def count(self) -> int:
        """Exact number of points."""
        return self._shard.count(edge.CountRequest(exact=True))

    def counts(self, key: str) -> dict[str, int]:
        """Exact number of points for each value of an indexed payload key."""
        response = self._shard.facet(edge.FacetRequest(key=key, limit=ALL, exact=True))
        return {str(hit.value): hit.count for hit in response.hits}

    def upsert(self, points: Points) -> None:
        """Write points, replacing those with the same IDs."""
        # The engine takes numbers one by one, and from a buffer three times as fast as from an array.
        rows = zip(points.ids, map(memoryview, points.vectors), points.payloads, strict=True)
        self._shard.update(edge.UpdateOperation.upsert_points([edge.Point(*row) for row in rows]))
        self._unflushed += len(points.ids)
        if self._unflushed >= FLUSH_POINTS:
            self.flush()

    def flush(self) -> None:
        """Bring what was written to the disk."""
        self._shard.flush()
        self._unflushed = 0

    def trim(self, fingerprints: Mapping[str, str]) -> None:
        """Delete what these videos hold under any other fingerprint."""
        stale = edge.Filter(
            must=[_among("video_id", list(fingerprints))], must_not=[_among("fingerprint", list(fingerprints.values()))]
        )
        self._shard.update(edge.UpdateOperation.delete_points_by_filter(stale))

    def delete_videos(self, video_ids: Sequence[str]) -> None:
        """Delete all points of these videos."""
        gone = edge.Filter(must=[_among("video_id", list(video_ids))])
        self._shard.update(edge.UpdateOperation.delete_points_by_filter(gone))

    def retrieve(self, ids: Sequence[str]) -> list[Hit]:
        """Points with vector and payload."""
        records = self._shard.retrieve(list(ids), with_payload=True, with_vector=True)
        return [Hit(str(record.id), dict(record.payload or {}), vector=record.vector) for record in records]

    def search(
        self, vector: Sequence[float], limit: int, filters: Filters | None = None, *, exact: bool = False
    ) -> list[Hit]:
        """The points nearest to a vector; always exact, there is no vector index."""
        request = edge.QueryRequest(
            query=edge.Query.Nearest(list(vector)),
            limit=limit,
            filter=_filter(filters or Filters()),
            params=edge.SearchParams(exact=exact),
            with_payload=True,
        )
        return [Hit(str(hit.id), dict(hit.payload or {}), hit.score) for hit in self._shard.query(request)]


class _LargeNewCollection(EdgeCollection):
    """One that is still empty and about to be large: several processes write it, and it is opened for anything else."""

    def __init__(self, directories: Sequence[Path], provenance: dict[str, Any]):
        self._directories, self._provenance = directories, provenance
        self._unflushed = 0
        self._opened: edge.EdgeShard | None = None
        self._writers: Writers | None = None
        self._written = False

    @property
    def _shard(self) -> edge.EdgeShard:
        if self._writers:
            self._writers.finish()
            self._writers, self._written = None, True
        if self._opened is None:
            self._opened = edge.EdgeShard.load(str(self._directories[0]))
        return self._opened

    def upsert(self, points: Points) -> None:
        """Write points, replacing those with the same IDs: before the first other call no ID may come twice."""
        if self._written:
            super().upsert(points)
            return
        if self._writers is None:
            self.close()
            self._writers = Writers(self._directories)
        self._writers.write(points)

    def close(self) -> None:
        """Let go of the directory; points that are still on their way are lost."""
        if self._writers:
            self._writers.stop()
        if self._opened:
            self._opened.close()
        self._writers = self._opened = None


class EdgeStore:
    """A directory of embedded collections."""

    def __init__(self, directory: Path):
        self.directory = directory

    def published(self, name: str) -> str | None:
        """Collection that a published name stands for."""
        found = pointer.target(self.directory, name)
        return found.collection if found else None

    @contextmanager
    def read(self, collection: str) -> Iterator[EdgeCollection | None]:
        """The newest complete state of a collection; it stays on disk for the time of the block."""
        while latest := self._latest(collection):
            with _reading(latest.path) as there:
                if there:
                    with open_shard(latest.path) as shard:
                        yield EdgeCollection(shard, _notes(latest.path)["provenance"])
                    return
        yield None

    @contextmanager
    def write(self, shape: Shape, *, adding: int = 0, deleting: int = 0, whole: int = 0) -> Iterator[EdgeCollection]:
        """A copy of the newest state, or an empty one, that becomes the newest when the block ends well."""
        with hold(self.directory / f".{shape.name}.lock", f"the collection {shape.name}"):
            self._remove_leftovers(shape.name)
            latest = self._latest(shape.name)
            if latest and whole and _wasteful(latest.path, deleting):
                latest, adding = None, whole
            deleted = (_notes(latest.path)["deleted"] + deleting) if latest else 0
            building = Path(tempfile.mkdtemp(prefix=f".{shape.name}.", suffix=BUILDING, dir=self.directory))
            try:
                with _clear_errors(building):
                    _check_space(self.directory, latest, adding * _bytes_of_a_point(shape))
                    if latest:
                        shutil.copytree(latest.path, building, copy_function=_copy_sparse, dirs_exist_ok=True)
                    else:
                        _create(building, shape)
                    with _writable(building, shape, adding=0 if latest else adding) as collection:
                        yield collection
                        points = collection.count()
                        collection.flush()
                    notes = {"points": points, "deleted": deleted, "provenance": shape.provenance}
                    write_json(building / NOTES, notes)
                    _fsync_tree(building)
                    building.chmod(self.directory.stat().st_mode & 0o777)  # mkdtemp makes private directories
                    building.rename(self.directory / f"{shape.name}.{self._next(shape.name)}")
            except BaseException:
                shutil.rmtree(building, ignore_errors=True)
                raise

    def publish(self, names: Sequence[str], collection: str) -> None:
        """Move the pointers of `names`, each atomically, to the newest state of a collection."""
        latest = self._latest(collection)
        if latest is None:
            raise DataError(f"{self.directory} has no collection {collection}")
        for name in names:
            if pointer.target(self.directory, name) != latest:
                pointer.point(self.directory, name, latest)

    def drop_previous(self, name: str, *, others: bool) -> list[str]:
        """Remove states that no name stands for and that nobody reads; with `others` also of earlier collections."""
        for killed in self.directory.glob(f".*{REMOVED}"):  # nobody reads these: see `_remove_unread`
            shutil.rmtree(killed, ignore_errors=True)
        current = self.published(name)
        in_use = {pointer.target(self.directory, each) for each in pointer.names(self.directory)}
        dropped = []
        for generation in pointer.generations(self.directory):
            ours = is_version_of(name, generation.collection)
            if generation in in_use or not ours or (generation.collection != current and not others):
                continue
            if _remove_unread(generation.path) and generation.collection != current:
                dropped.append(generation.collection)
        return dropped

    def _remove_leftovers(self, collection: str) -> None:
        """Remove what a killed load left: only the holder of the collection's lock may."""
        for suffix in (BUILDING, REMOVED):
            for path in self.directory.glob(f".{glob.escape(collection)}.*{suffix}"):
                shutil.rmtree(path, ignore_errors=True)

    def _latest(self, collection: str) -> pointer.Generation | None:
        found = [entry for entry in pointer.generations(self.directory) if entry.collection == collection]
        return found[-1] if found else None

    def _next(self, collection: str) -> int:
        latest = self._latest(collection)
        return latest.number + 1 if latest else 1


def _among(key: str, values: Sequence[str]) -> edge.FieldCondition:
    return edge.FieldCondition(key=key, match=edge.MatchAny(list(values)))


def _filter(filters: Filters) -> edge.Filter | None:
    conditions: list[Any] = []
    if filters.video:
        conditions.append(_among("video_id", [filters.video]))
    if filters.language:
        conditions.append(_among("language", [filters.language]))
    if filters.channel:
        either = [_among("channel", [filters.channel]), _among("channel_id", [filters.channel])]
        conditions.append(edge.Filter(should=either))
    if filters.since or filters.until:
        since, until = (day and day.isoformat() for day in (filters.since, filters.until))
        conditions.append(edge.FieldCondition(key="upload_date", range=edge.RangeDateTime(gte=since, lte=until)))
    return edge.Filter(must=conditions) if conditions else None


def _create(path: Path, shape: Shape) -> None:
    vectors = edge.EdgeVectorParams(size=shape.dimension, distance=getattr(edge.Distance, shape.distance))
    no_index = edge.HnswIndexConfig(m=0, ef_construct=100, full_scan_threshold=10_000)
    shard = edge.EdgeShard.create(str(path), edge.EdgeConfig(vectors=vectors, hnsw_config=no_index, wal_enabled=False))
    keyword, datetime = edge.PayloadSchemaType.Keyword, edge.PayloadSchemaType.Datetime
    for key, kind in [*((key, keyword) for key in KEYWORD_INDEXES), *((key, datetime) for key in DATETIME_INDEXES)]:
        shard.update(edge.UpdateOperation.create_field_index(key, kind))
    shard.flush()
    shard.close()


@contextmanager
def _writable(path: Path, shape: Shape, *, adding: int) -> Iterator[EdgeCollection]:
    """A collection at `path` for writing; it is new if points will be `adding` to it, so many of them."""
    writers = min(WRITERS, len(os.sched_getaffinity(0)))
    if adding < MANY_POINTS or writers < 2:
        with open_shard(path) as shard:
            yield EdgeCollection(shard, shape.provenance)
        return
    parts = [path / f"part-{number}" for number in range(1, writers)]
    for part in parts:
        part.mkdir()
        _create(part, shape)
    with closing(_LargeNewCollection([path, *parts], shape.provenance)) as collection:
        yield collection


@contextmanager
def open_shard(path: Path) -> Iterator[edge.EdgeShard]:
    """The engine on one directory; raises DataError or EnvironmentFault if it cannot be used."""
    with _clear_errors(path):
        shard = edge.EdgeShard.load(str(path))
    try:
        yield shard
    finally:
        shard.close()


@contextmanager
def _reading(path: Path) -> Iterator[bool]:
    """Keep a directory from being removed; False when it has just been."""
    try:
        fd = os.open(path / "readers.lock", os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:
        yield False
        return
    except OSError as error:
        raise EnvironmentFault(
            f"{path} cannot be opened for reading and writing, which the engine needs: {error}"
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        yield path.is_dir()
    finally:
        os.close(fd)


def _remove_unread(path: Path) -> bool:
    """Remove a directory unless somebody reads it; the next load tries again."""
    fd = os.open(path / "readers.lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        gone = path.rename(path.with_name(f".{path.name}{REMOVED}"))  # at once for others, however long removing takes
        shutil.rmtree(gone)
    except BlockingIOError:
        log.info("%s is being read and stays until the next load", path)
        return False
    finally:
        os.close(fd)
    return True


def _notes(path: Path) -> dict[str, Any]:
    try:
        notes = json.loads((path / NOTES).read_text(encoding="utf-8"))
        return {
            "points": int(notes["points"]),
            "deleted": int(notes["deleted"]),
            "provenance": dict(notes["provenance"]),
        }
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}): delete the directory and run snakemake again") from error


def _wasteful(path: Path, deleting: int) -> bool:
    notes = _notes(path)
    return notes["deleted"] + deleting > REBUILD_SHARE * notes["points"]


def _bytes_of_a_point(shape: Shape) -> int:
    return 4 * shape.dimension + 1500  # ASSUME about 1 kB of payload, and its indexes


def _check_space(directory: Path, base: pointer.Generation | None, more: int) -> None:
    """The engine writes through memory maps: on a full disk it would be killed by a signal, without a message."""
    needed = SET_ASIDE + more + (sum(path.stat().st_blocks * 512 for path in base.path.rglob("*")) if base else 0)
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise EnvironmentFault(
            f"{directory} has {free >> 20} MiB free, the new collection takes about {needed >> 20} MiB: make room, or "
            "name another directory in qdrant.location"
        )


@contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    """The engine raises bare `Exception`s: give them a message that says where, and what to do."""
    try:
        yield
    except CuepointError:
        raise
    except OSError as error:
        raise EnvironmentFault(f"{path}: {error}") from error
    except Exception as error:
        if type(error) is not Exception:
            raise
        if "os error" in str(error).lower():
            raise EnvironmentFault(f"{path} cannot be used: {error}") from error
        raise DataError(
            f"{path} is no collection that this version can use ({error}): delete it and run snakemake again"
        ) from error


def _copy_sparse(source: str, target: str) -> None:
    """Copy a file without its zeros: the engine sets aside 32 MiB at a time, and a small collection uses little."""
    with Path(source).open("rb") as old, Path(target).open("wb") as new:
        while block := old.read(len(ZEROS)):
            if block == ZEROS[: len(block)]:
                new.seek(len(block), os.SEEK_CUR)
            else:
                new.write(block)
        new.truncate(old.tell())


def _fsync_tree(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
