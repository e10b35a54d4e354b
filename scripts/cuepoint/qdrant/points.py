"""Points: what a chunk looks like in Qdrant, how a table is read into points, and which videos have changed."""

import hashlib
import heapq
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cuepoint.errors import DataError
from cuepoint.qdrant import VERSION
from cuepoint.states import Status
from cuepoint.tables import DAMAGE, VIDEOS, check_seal, damaged, embeddings_schema, read_table

UNIT_TOLERANCE = 1e-2  # of a vector's length: half precision on a GPU stays well below
SAMPLE = 64  # points that are read back and compared
FINGERPRINT_BYTES = 12  # 96 bits; not 16, whose 32 hex digits qdrant-client's local mode takes for a UUID


@dataclass(frozen=True)
class ShardTables:
    """The tables of one shard that a load reads."""

    shard: str
    embeddings: Path
    videos: Path


class Chunk(NamedTuple):
    """One row of an embedding table; `vector` is (d,) float32. (A tuple, for there are hundreds of thousands.)"""

    point_id: str
    video_id: str
    chunk: int
    start: float
    end: float
    text: str
    vector: np.ndarray


@dataclass(frozen=True)
class Points:
    """Points on their way: n IDs, (n, d) float32, n payloads."""

    ids: list[str]
    vectors: np.ndarray
    payloads: list[dict[str, Any]]


@dataclass(frozen=True)
class Video:
    """What the tables say about one video's points."""

    shard: str
    fields: dict[str, Any]  # of the payload, the same in all its points
    fingerprint: str = ""
    points: int = 0


@dataclass
class Sample:
    """The chunks with the smallest point IDs: as UUIDv5 these are evenly spread, and the same in every run."""

    size: int = SAMPLE
    chunks: list[Chunk] = field(default_factory=list)

    @property
    def bound(self) -> str:
        """Only chunks with smaller point IDs would be kept."""
        return self.chunks[-1].point_id if len(self.chunks) == self.size else "~"

    def offer(self, chunks: Iterable[Chunk]) -> None:
        """Keep the smallest of those already kept and `chunks`."""
        known = {id(chunk) for chunk in self.chunks}
        fitting = [chunk for chunk in chunks if chunk.point_id < self.bound]
        smallest = heapq.nsmallest(self.size, [*self.chunks, *fitting], key=lambda chunk: chunk.point_id)
        # A row of an array keeps its whole batch in memory: what stays gets a vector of its own.
        self.chunks = [
            chunk if id(chunk) in known else chunk._replace(vector=chunk.vector.copy()) for chunk in smallest
        ]

    def __or__(self, other: "Sample") -> "Sample":
        either = {chunk.point_id: chunk for chunk in [*self.chunks, *other.chunks]}
        return Sample(len(either), list(either.values()))


@dataclass(frozen=True)
class Survey:
    """All that the tables want in the collection: which videos, and how they are recognised."""

    videos: dict[str, Video]  # video_id -> those with points only
    dimension: int
    sample: Sample

    @property
    def points(self) -> int:
        """Points of all videos."""
        return sum(video.points for video in self.videos.values())


def link_at(url: str, seconds: float) -> str:
    """Link that opens a video at a second: YouTube's `t`, for any other address a media fragment."""
    before, after = _around_time(url)
    return f"{before}{int(seconds)}{after}"


@lru_cache(maxsize=1024)
def _around_time(url: str) -> tuple[str, str]:
    """What stands before and after the second in a video's links."""
    parts = urlsplit(url)
    host = (parts.hostname or "").removeprefix("www.").removeprefix("m.")
    if host not in {"youtube.com", "youtu.be", "music.youtube.com", "youtube-nocookie.com"}:
        return f"{url.partition('#')[0]}#t=", ""
    query = urlencode([(key, value) for key, value in parse_qsl(parts.query, keep_blank_values=True) if key != "t"])
    before = urlunsplit(parts._replace(query=f"{query}&t=" if query else "t=", fragment=""))
    return before, f"s#{parts.fragment}" if parts.fragment else "s"


def survey(
    tables: Iterable[ShardTables], members: Mapping[str, str], *, unit_length: bool, batch_size: int = 1000
) -> Survey:
    """Read all tables once: check every vector and take a fingerprint of each video's points.

    Only rows of videos that `members` (video_id -> shard) places in the row's own shard count, and only of videos that
    ended `ok`. Holds one batch in memory. Raises DataError naming the chunk with a vector that cannot be searched.
    """
    videos: dict[str, Video] = {}
    sample = Sample()
    dimension = 0
    for shard in tables:
        found = shard_dimension(shard.embeddings)
        if dimension and found != dimension:
            raise DataError(
                f"{shard.embeddings} has {found} dimensions, other shards {dimension}: delete it and run again"
            )
        dimension = found
        known = read_videos(shard, members)
        hashes = {video_id: _Hash(video) for video_id, video in known.items()}
        for batch in _read_batches(shard.embeddings, known, batch_size):
            _check_vectors(shard.embeddings, batch, unit_length)
            columns, first = _hashed_columns(batch), 0
            for video_id, rows in groupby(batch.column("video_id").to_pylist()):
                count = sum(1 for _ in rows)
                hashes[video_id].update(columns, slice(first, first + count))
                first += count
            small = pc.less(batch.column("point_id"), sample.bound)
            sample.offer(_chunks(batch.filter(small)))
        for video_id, seen in hashes.items():
            if seen.points:
                videos[video_id] = Video(shard.shard, known[video_id].fields, seen.fingerprint(), seen.points)
    return Survey(videos, dimension, sample)


def shard_dimension(path: Path) -> int:
    """Dimension of the vectors in an embedding table; only the file's footer is read."""
    with _open(path) as file:
        try:
            names = file.schema_arrow.names  # which need not be text in a damaged file
        except DAMAGE as error:
            raise damaged(path, error) from error
        kind = file.schema_arrow.field("embedding").type if "embedding" in names else None
        dimension = kind.list_size if isinstance(kind, pa.FixedSizeListType) else 0
        if not dimension or not file.schema_arrow.equals(embeddings_schema(dimension), check_metadata=False):
            raise DataError(f"{path} has not the columns of this version ({names}): delete it and run again")
        return dimension


def read_videos(shard: ShardTables, members: Mapping[str, str]) -> dict[str, Video]:
    """Videos of a shard whose points belong in the collection, with their part of the payload."""
    rows = read_table(shard.videos, VIDEOS).to_pylist()
    return {
        row["video_id"]: Video(shard.shard, _video_fields(row))
        for row in rows
        if row["status"] == Status.OK and members.get(row["video_id"]) == shard.shard
    }


def read_chunks(path: Path, videos: Mapping[str, Any], batch_size: int) -> Iterator[list[Chunk]]:
    """Chunks of the given videos, at most `batch_size` at a time, in the table's order."""
    for batch in _read_batches(path, videos, batch_size):
        yield _chunks(batch)


def as_points(chunks: list[Chunk], videos: Mapping[str, Video]) -> Points:
    """Points of chunks, whose videos must be among `videos`."""
    return Points(
        [chunk.point_id for chunk in chunks],
        np.stack([chunk.vector for chunk in chunks]),
        [payload(chunk, videos[chunk.video_id]) for chunk in chunks],
    )


def payload(chunk: Chunk, video: Video) -> dict[str, Any]:
    """What is stored with a point. Unknown values are left out."""
    return {
        **video.fields,
        "video_id": chunk.video_id,
        "chunk": chunk.chunk,
        "start": chunk.start,
        "end": chunk.end,
        "text": chunk.text,
        "url": link_at(video.fields["url"], chunk.start),
        "fingerprint": video.fingerprint,
    }


def _video_fields(row: Mapping[str, Any]) -> dict[str, Any]:
    fields = {name: row[name] for name in ("url", "title", "channel", "channel_id", "language")}
    fields["upload_date"] = row["upload_date"].isoformat() if row["upload_date"] else None
    return {name: value for name, value in fields.items() if value is not None}


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, page_checksum_verification=True)
    except FileNotFoundError:
        raise DataError(f"{path} is missing: run snakemake again and it is made from the caches") from None
    except DAMAGE as error:
        raise damaged(path, error) from error


def _read_batches(path: Path, videos: Mapping[str, Any], batch_size: int) -> Iterator[pa.RecordBatch]:
    """Rows of the given videos, at most `batch_size` at a time, in the table's order."""
    listed = pa.array(list(videos), pa.string())
    with _open(path) as file:
        try:
            rows = 0
            for batch in file.iter_batches(batch_size, use_threads=False):  # threads take twice the time
                rows += len(batch)
                found = batch.filter(pc.is_in(batch.column("video_id"), listed))
                if len(found):
                    yield found
            check_seal(file.metadata.metadata, rows)
        except DAMAGE as error:
            raise damaged(path, error) from error


def _vectors(batch: pa.RecordBatch) -> np.ndarray:
    """The batch's vectors, (n, d) float32, in its memory."""
    embedding = batch.column("embedding")
    return embedding.flatten().to_numpy(zero_copy_only=True).reshape(len(batch), embedding.type.list_size)


def _chunks(batch: pa.RecordBatch) -> list[Chunk]:
    columns = [batch.column(name).to_pylist() for name in ("point_id", "video_id", "chunk", "start", "end", "text")]
    return [Chunk(*row) for row in zip(*columns, _vectors(batch), strict=True)]


class _Hash:
    """Fingerprint of one video's points, taken column by column: much faster than row by row."""

    def __init__(self, video: Video):
        self._fields = json.dumps([VERSION, video.fields], sort_keys=True, ensure_ascii=False)
        self._columns = [hashlib.blake2b() for _ in HASHED]
        self.points = 0

    def update(self, columns: list[Callable[[slice], Any]], rows: slice) -> None:
        """Add some of a batch's rows, whose columns give their bytes."""
        for known, column in zip(self._columns, columns, strict=True):
            known.update(column(rows))
        self.points += rows.stop - rows.start

    def fingerprint(self) -> str:
        """The same for the same rows, however they came in batches."""
        whole = hashlib.blake2b(self._fields.encode(), digest_size=FINGERPRINT_BYTES)
        for known in self._columns:
            whole.update(known.digest())
        return whole.hexdigest()


HASHED = ("numbers", "point_id", "text", "vectors")


def _hashed_columns(batch: pa.RecordBatch) -> list[Callable[[slice], Any]]:
    """Functions that give the bytes of some rows, one for each of `HASHED`."""
    (ids, id_lengths), (texts, text_lengths) = _strings(batch.column("point_id")), _strings(batch.column("text"))
    numbers = [batch.column(name).to_numpy() for name in ("chunk", "start", "end")]
    table = np.column_stack([*numbers, id_lengths, text_lengths]).astype(np.float64)
    vectors = _vectors(batch)
    return [table.__getitem__, ids, texts, vectors.__getitem__]


def _strings(column: pa.Array) -> tuple[Callable[[slice], memoryview], np.ndarray]:
    """A function that gives the joined bytes of some of a column's strings, and the length of each."""
    _, places, data = column.buffers()
    offsets = np.frombuffer(places, np.int32)[column.offset : column.offset + len(column) + 1]
    content = memoryview(data) if data else memoryview(b"")
    return lambda rows: content[offsets[rows.start] : offsets[rows.stop]], np.diff(offsets)


def _check_vectors(path: Path, batch: pa.RecordBatch, unit_length: bool) -> None:
    vectors = _vectors(batch)
    lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
    bad = ~np.isfinite(lengths) | (lengths == 0)
    if unit_length:
        bad |= np.abs(lengths - 1) > UNIT_TOLERANCE
    if bad.any():
        index = int(np.argmax(bad))
        (chunk,) = _chunks(batch.slice(index, 1))
        raise DataError(
            f"{path}: chunk {chunk.chunk} of video {chunk.video_id} has a vector that cannot be searched (length "
            f"{lengths[index]:.6g}, not {'1' if unit_length else 'finite and above 0'}): delete the file and run again"
        )
