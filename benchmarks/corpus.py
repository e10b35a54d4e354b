"""A synthetic corpus of any size: the tables that the stages write, without a video, a microphone or a model.

Lengths of videos follow Zipf's law, as those of a real channel do: many short ones, a few that last for hours.
Everything depends on the seed alone. Used by the benchmarks of loading, of the report and of scale.

    python benchmarks/corpus.py --points 300000 --results /tmp/corpus/results
"""

import argparse
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa

from cuepoint.layout import Layout
from cuepoint.qdrant.points import ShardTables
from cuepoint.tables import TRANSCRIPTS, VIDEOS, embeddings_schema, write_table

WORDS = """
the of to and a in is it you that we this for on are with as have so be what can if from there they just at your
model time people data really little first right think thing question answer example number system because between
through without energy history language music market theory kitchen mountain river engine garden protein measure
window surface signal pressure interest computer experiment temperature probability university
""".split()  # noqa: SIM905  (words read better as a text)
SECONDS_OF_A_CHUNK = 45.0
SECONDS_OF_A_SEGMENT = 5.0
MODEL = "all-MiniLM-L6-v2"


@dataclass(frozen=True)
class Video:
    """One synthetic video: its ID and how many chunks its speech gives."""

    video_id: str
    chunks: int


def videos(points: int, seed: int = 0, mean: int = 30, longest: int = 1000) -> list[Video]:
    """Videos whose chunks add up to `points`, about `mean` each, Zipf-distributed (exponent 1.4, cut at `longest`)."""
    random = np.random.default_rng(seed)
    ranks = np.arange(1, longest + 1)
    weights = ranks**-1.4
    scale = mean / float((ranks * weights).sum() / weights.sum())
    made, left = [], points
    while left:
        chunks = min(left, max(1, round(scale * float(random.choice(ranks, p=weights / weights.sum())))))
        made.append(Video(f"{uuid.uuid5(uuid.NAMESPACE_OID, f'{seed}/{len(made)}').hex[:11]}", chunks))
        left -= chunks
    return made


def shards(listed: list[Video], size: int = 64) -> Iterator[tuple[str, list[Video]]]:
    """Shards of up to `size` videos, named as the plan names them."""
    for number, first in enumerate(range(0, len(listed), size)):
        yield f"{number:05d}", sorted(listed[first : first + size], key=lambda video: video.video_id)


def write_corpus(
    results: Path, points: int, *, dimension: int = 384, shard_size: int = 64, seed: int = 0, transcripts: bool = False
) -> tuple[list[ShardTables], dict[str, str]]:
    """Write the tables of a corpus below `results`; returns them and the members (video_id -> shard)."""
    layout = Layout(results)
    tables, members = [], {}
    for shard, listed in shards(videos(points, seed), shard_size):
        entry = ShardTables(shard, layout.embeddings(MODEL, shard), layout.videos(shard))
        write_table(entry.videos, video_table(listed, seed), VIDEOS, settings={})
        write_embeddings(entry.embeddings, listed, dimension, seed)
        if transcripts:
            write_table(layout.transcripts(shard), transcript_table(listed, seed), TRANSCRIPTS, settings={})
        tables.append(entry)
        members |= dict.fromkeys((video.video_id for video in listed), shard)
    return tables, members


def write_embeddings(path: Path, listed: list[Video], dimension: int = 384, seed: int = 0) -> None:
    """Write the embedding table of a shard."""
    schema = embeddings_schema(dimension)
    write_table(path, embedding_table(listed, dimension, seed), schema, settings={}, model={"name": MODEL})


def video_table(listed: list[Video], seed: int = 0) -> pa.Table:
    """One row a video, with title, channel and date."""
    rows = []
    for video in listed:
        random = np.random.default_rng([seed, *video.video_id.encode()])
        channel = int(random.zipf(1.5)) % 500
        rows.append(
            {
                "video_id": video.video_id,
                "url": f"https://www.youtube.com/watch?v={video.video_id}",
                "title": sentence(random, 8).capitalize(),
                "channel": f"Channel {channel}",
                "channel_id": f"UC{channel:022d}",
                "upload_date": date(2015, 1, 1) + timedelta(days=int(random.integers(4000))),
                "duration": video.chunks * SECONDS_OF_A_CHUNK,
                "speech_duration": video.chunks * SECONDS_OF_A_CHUNK * 0.9,
                "language": ["en", "en", "en", "de", "fr", "es"][int(random.integers(6))],
                "language_probability": 0.99,
                "status": "ok",
                "segments": round(video.chunks * SECONDS_OF_A_CHUNK / SECONDS_OF_A_SEGMENT),
                "flagged": 0,
                "audio_hash": video.video_id,
            }
        )
    return pa.Table.from_pylist(rows, VIDEOS)


def embedding_table(listed: list[Video], dimension: int = 384, seed: int = 0) -> pa.Table:
    """One row a chunk: about 120 words, and a random direction."""
    parts = []
    for video in listed:
        random = np.random.default_rng([seed, *video.video_id.encode(), video.chunks])
        vectors = random.standard_normal((video.chunks, dimension), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        numbers = range(video.chunks)
        columns = {
            "point_id": [str(uuid.uuid5(uuid.NAMESPACE_URL, f"{video.video_id}/1/{chunk}")) for chunk in numbers],
            "video_id": [video.video_id] * video.chunks,
            "chunk": list(numbers),
            "start": [chunk * SECONDS_OF_A_CHUNK for chunk in numbers],
            "end": [(chunk + 1.1) * SECONDS_OF_A_CHUNK for chunk in numbers],
            "text": [sentence(random, 120) for _ in numbers],
            "tokens": [160] * video.chunks,
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), dimension),
        }
        parts.append(pa.table(columns, schema=embeddings_schema(dimension)))
    return pa.concat_tables(parts)


def transcript_table(listed: list[Video], seed: int = 0) -> pa.Table:
    """One row a segment of five seconds."""
    rows = []
    for video in listed:
        random = np.random.default_rng([seed, *video.video_id.encode(), 1])
        for segment in range(round(video.chunks * SECONDS_OF_A_CHUNK / SECONDS_OF_A_SEGMENT)):
            rows.append(
                {
                    "video_id": video.video_id,
                    "segment": segment,
                    "start": segment * SECONDS_OF_A_SEGMENT,
                    "end": (segment + 0.9) * SECONDS_OF_A_SEGMENT,
                    "text": sentence(random, 14),
                    "language": "en",
                    "avg_logprob": float(random.uniform(-0.6, -0.1)),
                    "no_speech_prob": float(random.uniform(0, 0.2)),
                    "compression_ratio": float(random.uniform(1.2, 1.9)),
                    "words": None,
                    "flags": [],
                }
            )
    return pa.Table.from_pylist(rows, TRANSCRIPTS)


def sentence(random: np.random.Generator, words: int) -> str:
    """Some words, frequent ones more often."""
    ranks = np.minimum(random.geometric(0.03, words), len(WORDS)) - 1
    return " ".join(WORDS[rank] for rank in ranks)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--points", type=int, default=10_000)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--shard-size", type=int, default=64)
    parser.add_argument("--transcripts", action="store_true", help="also write the transcript tables")
    arguments = parser.parse_args()
    written, placed = write_corpus(
        arguments.results, arguments.points, shard_size=arguments.shard_size, transcripts=arguments.transcripts
    )
    print(f"{arguments.points} points of {len(placed)} videos in {len(written)} shards below {arguments.results}")
