"""The embed stage: the transcripts of one shard in, its table of chunks and vectors out."""

import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cuepoint import chunks as chunking_rules
from cuepoint import devices
from cuepoint.chunks import Chunk, Segment, chunk_video, point_id
from cuepoint.embedding.embedder import VERSION, Embedder, check_vectors, open_model
from cuepoint.embedding.location import locate
from cuepoint.errors import DataError
from cuepoint.fingerprint import fingerprint
from cuepoint.layout import Layout
from cuepoint.settings import ChunkSettings, EmbeddingModel, EmbeddingSettings
from cuepoint.tables import TRANSCRIPTS, embeddings_schema, package_versions, read_table, write_table
from cuepoint.telemetry import Telemetry

log = logging.getLogger(__name__)

STAGE = "embed"  # its name in the cache
WINDOW_BATCHES = 32  # sorted by length together and then saved: what a crash can lose, and what padding is spread over
_COLUMNS = ["video_id", "start", "end", "text", "words", "flags"]


@dataclass(frozen=True)
class _Video:
    """A video whose chunks are to be embedded."""

    video_id: str
    cache: Path
    chunks: list[Chunk]
    texts: list[list[int]]  # token IDs of each chunk

    @property
    def names(self) -> list[str]:
        return [f"chunk {chunk.chunk} of video {self.video_id}" for chunk in self.chunks]


def embed_shard(
    transcripts: Path,
    output: Path,
    model: EmbeddingModel,
    *,
    chunking: ChunkSettings,
    settings: EmbeddingSettings,
    layout: Layout,
    threads: int,
    telemetry: Telemetry | None = None,
) -> None:
    """Write a shard's embedding table with `model` to `output`, from its transcript table.

    What an earlier job has computed comes from the cache, video by video; the weights are loaded only if something is
    missing. Raises DataError for a table that cannot be read, or a vector that is broken, with the chunk named.
    """
    files = locate(model)
    provenance = {"model": model.result_settings(), "chunking": chunking.result_settings()}
    versions = {"chunks": chunking_rules.VERSION, "embedding": VERSION}
    segments = _segments(transcripts)
    caches = _caches(segments, layout, revision=files.revision, versions=versions, **provenance)
    with _phase(telemetry, "open_model"):
        device = devices.choose(settings.device)
        embedder = open_model(model, settings, layout, device=device, threads=threads, files=files)
    schema = embeddings_schema(embedder.dimension)
    known = {video_id: table for video_id, path in caches.items() if (table := _cached(path, schema, model))}
    missing = {video_id: of_video for video_id, of_video in segments.items() if video_id not in known}
    log.info("%d videos with speech, %d of them in the cache", len(segments), len(known))
    if missing:
        with _loaded(embedder, telemetry):
            for video, vectors in _embed(missing, caches, chunking, embedder, telemetry):
                known[video.video_id] = table = _table(video, vectors, schema)
                write_table(video.cache, table, schema, settings=provenance, revision=files.revision)
    table = pa.concat_tables([schema.empty_table(), *(known[video_id] for video_id in sorted(known))])
    write_table(
        output,
        table,
        schema,
        settings=provenance,
        revision=files.revision,
        max_tokens=embedder.max_tokens,
        versions=versions,
        packages=package_versions("sentence-transformers", "tokenizers"),
        **({"quality": asdict(embedder.quality)} if embedder.quality else {}),
    )
    tokens = table["tokens"].to_numpy()
    truncated = np.maximum(tokens - embedder.max_tokens, 0).sum()
    log.info("%d chunks, %d tokens; truncated tokens: %d", len(table), tokens.sum(), truncated)


def _segments(transcripts: Path) -> dict[str, list[Segment]]:
    """The segments of each video that has unflagged text, sorted by video ID."""
    rows = read_table(transcripts, TRANSCRIPTS, _COLUMNS).to_pylist()
    rows.sort(key=lambda row: row["video_id"])
    videos = {
        video_id: [Segment(**{column: row[column] for column in _COLUMNS[1:]}) for row in of_video]
        for video_id, of_video in groupby(rows, key=lambda row: row["video_id"])
    }
    return {
        video_id: segments
        for video_id, segments in videos.items()
        if any(segment.text.strip() and not segment.flags for segment in segments)
    }


def _caches(segments: dict[str, list[Segment]], layout: Layout, **depends_on: Any) -> dict[str, Path]:
    """Where each video's table is kept: under all that it depends on, its own segments and what all videos share."""
    return {
        video_id: layout.cache(
            STAGE, video_id, fingerprint(segments=[asdict(segment) for segment in of_video], **depends_on), ".parquet"
        )
        for video_id, of_video in segments.items()
    }


def _cached(path: Path, schema: pa.Schema, model: EmbeddingModel) -> pa.Table | None:
    """A video's table from the cache; None when it is not there or (logged) damaged."""
    if not path.exists():
        return None
    try:
        table = read_table(path, schema).replace_schema_metadata(None)
        check_vectors(_vectors(table), [f"row {i} of {path}" for i in range(len(table))], model.normalize)
    except DataError as error:
        log.warning("computing again: %s", error)
        return None
    return table


@contextmanager
def _loaded(embedder: Embedder, telemetry: Telemetry | None) -> Iterator[None]:
    """The weights loaded and, on a GPU, the GPU leased for the block."""
    with devices.lease() if embedder.device == "cuda" else nullcontext() as gpu:
        if gpu and telemetry:
            telemetry.watch_gpu(gpu.uuid)
        with _phase(telemetry, "load_model"):
            embedder.load(gpu.index if gpu else 0)
        yield


def _embed(
    segments: dict[str, list[Segment]],
    caches: dict[str, Path],
    chunking: ChunkSettings,
    embedder: Embedder,
    telemetry: Telemetry | None,
) -> Iterator[tuple[_Video, np.ndarray]]:
    """Each video with its vectors, window by window; the next window is cut and tokenized while one is computed."""
    prepared = _prepare(segments, caches, chunking, embedder, telemetry)
    for window in _ahead(_windows(prepared, WINDOW_BATCHES * embedder.load().batch_tokens)):
        texts = [text for video in window for text in video.texts]
        if quality := embedder.check_quality(texts):
            log.info("int8: %s", quality)
        names = [name for video in window for name in video.names]
        with _phase(telemetry, "encode"):
            vectors = embedder.encode_tokens(texts, names)
        if telemetry:
            telemetry.add(chunks=len(texts), tokens=sum(map(len, texts)))
        splits = np.cumsum([len(video.texts) for video in window])[:-1]
        yield from zip(window, np.split(vectors, splits), strict=True)


def _prepare(
    segments: dict[str, list[Segment]],
    caches: dict[str, Path],
    chunking: ChunkSettings,
    embedder: Embedder,
    telemetry: Telemetry | None,
) -> Iterator[_Video]:
    for video_id, of_video in segments.items():
        with _phase(telemetry, "chunk"):
            found = chunk_video(of_video, chunking, embedder.count_tokens, embedder.max_tokens)
            texts = embedder.tokenize([chunk.text for chunk in found])
        yield _Video(video_id, caches[video_id], found, texts)


def _windows(videos: Iterable[_Video], tokens: int) -> Iterator[list[_Video]]:
    """Videos in groups of at least `tokens` tokens (the last one may have fewer)."""
    window: list[_Video] = []
    held = 0
    for video in videos:
        window.append(video)
        held += sum(map(len, video.texts))
        if held >= tokens:
            yield window
            window, held = [], 0
    if window:
        yield window


def _ahead(windows: Iterator[list[_Video]]) -> Iterator[list[_Video]]:
    """The same windows; while one is used, the next is made in a thread."""
    with ThreadPoolExecutor(1, thread_name_prefix="chunks") as worker:
        following = worker.submit(next, windows, None)
        while window := following.result():
            following = worker.submit(next, windows, None)
            yield window


def _table(video: _Video, vectors: np.ndarray, schema: pa.Schema) -> pa.Table:
    dimension = vectors.shape[1]
    columns: dict[str, Any] = {
        "point_id": [point_id(video.video_id, chunk.chunk) for chunk in video.chunks],
        "video_id": [video.video_id] * len(video.chunks),
        "chunk": [chunk.chunk for chunk in video.chunks],
        "start": [chunk.start for chunk in video.chunks],
        "end": [chunk.end for chunk in video.chunks],
        "text": [chunk.text for chunk in video.chunks],
        "tokens": [chunk.tokens for chunk in video.chunks],
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel(), pa.float32()), dimension),
    }
    return pa.table(columns, schema=schema)


def _vectors(table: pa.Table) -> np.ndarray:
    """The embedding column, (n, d) float32."""
    column = table["embedding"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(table), -1)


def _phase(telemetry: Telemetry | None, name: str) -> AbstractContextManager[None]:
    return telemetry.phase(name) if telemetry else nullcontext()
