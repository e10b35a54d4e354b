"""A synthetic corpus of any size: the tables that the stages write, without a video, a microphone or a model.

Lengths of videos follow Zipf's law, as those of a real channel do: many short ones, a few that last for hours.
Everything depends on the seed alone. Used by the benchmarks of loading (load.py) and of the report (report.py);
Snakemake's cost (workflow.py) depends on the number of videos only.

    python benchmarks/corpus.py --points 300000 --results /tmp/corpus/results --transcripts --downloads
"""

import argparse
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow as pa

from cuepoint.layout import Layout
from cuepoint.qdrant.points import ShardTables
from cuepoint.receipts import Receipt
from cuepoint.states import Status
from cuepoint.tables import TRANSCRIPTS, VIDEOS, embeddings_schema, write_table
from cuepoint.telemetry import Telemetry

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


def endless(seed: int = 0, mean: int = 30, longest: int = 1000) -> Iterator[Video]:
    """Videos of about `mean` chunks each, Zipf-distributed (exponent 1.4, cut at `longest`), without end."""
    random = np.random.default_rng(seed)
    ranks = np.arange(1, longest + 1)
    weights = ranks**-1.4
    shares = weights / weights.sum()
    scale = mean / float((ranks * shares).sum())
    for number in count():
        yield Video(video_id(number, seed), max(1, round(scale * float(random.choice(ranks, p=shares)))))


def videos(points: int, seed: int = 0) -> list[Video]:
    """Videos whose chunks add up to `points`."""
    made, left = [], points
    for video in endless(seed):
        if not left:
            return made
        made.append(Video(video.video_id, min(left, video.chunks)))
        left -= made[-1].chunks
    raise AssertionError("the videos have an end")


def video_id(number: int, seed: int = 0) -> str:
    """ID of the video with this number, of the form that YouTube has."""
    return uuid.uuid5(uuid.NAMESPACE_OID, f"{seed}/{number}").hex[:11]


def shards(listed: list[Video], size: int = 64) -> Iterator[tuple[str, list[Video]]]:
    """Shards of up to `size` videos, named as the plan names them."""
    for number, first in enumerate(range(0, len(listed), size)):
        yield f"{number:05d}", sorted(listed[first : first + size], key=lambda video: video.video_id)


def write_corpus(
    results: Path,
    listed: list[Video],
    *,
    dimension: int = 384,
    shard_size: int = 64,
    seed: int = 0,
    transcripts: bool = False,
    downloads: bool = False,
) -> tuple[list[ShardTables], dict[str, str]]:
    """Write the tables of `listed` videos below `results`; returns them and the members (video_id -> shard).

    `downloads` also writes the receipts, and the telemetry of the jobs.
    """
    layout = Layout(results)
    tables, members = [], {}
    for shard, of_shard in shards(listed, shard_size):
        entry = ShardTables(shard, layout.embeddings(MODEL, shard), layout.videos(shard))
        write_table(entry.videos, video_table(of_shard, seed), VIDEOS, settings={})
        write_embeddings(entry.embeddings, of_shard, dimension, seed)
        if transcripts:
            write_table(layout.transcripts(shard), transcript_table(of_shard, seed), TRANSCRIPTS, settings={})
        if downloads:
            write_downloads(layout, of_shard)
            write_telemetry(layout, shard, of_shard)
        tables.append(entry)
        members |= dict.fromkeys((video.video_id for video in of_shard), shard)
    return tables, members


def write_embeddings(path: Path, listed: list[Video], dimension: int = 384, seed: int = 0) -> None:
    """Write the embedding table of a shard."""
    schema = embeddings_schema(dimension)
    write_table(path, embedding_table(listed, dimension, seed), schema, settings={}, model={"name": MODEL})


def write_downloads(layout: Layout, listed: list[Video]) -> None:
    """Write the receipts of videos; not each of them fsynced, as a run's are."""
    for video in listed:
        path = layout.receipt(video.video_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        receipt = Receipt(
            video_id=video.video_id,
            url=f"https://www.youtube.com/watch?v={video.video_id}",
            status=Status.OK,
            sha256="0" * 64,
            duration=video.chunks * SECONDS_OF_A_CHUNK,
            seconds=10.0,
            waited=5.0,
        )
        path.write_text(receipt.model_dump_json(indent=1))


def write_telemetry(layout: Layout, shard: str, listed: list[Video]) -> None:
    """Write what the two jobs of a shard would have measured, had they taken no time."""
    audio, chunks = sum(video.chunks for video in listed) * SECONDS_OF_A_CHUNK, sum(video.chunks for video in listed)
    with Telemetry(layout.telemetry / "transcribe" / f"{shard}.parquet", stage="transcribe", name=shard) as telemetry:
        telemetry.add(videos=len(listed), audio_seconds=audio)
    with Telemetry(layout.telemetry / f"embed-{MODEL}" / f"{shard}.parquet", stage="embed", name=shard) as telemetry:
        telemetry.add(videos=len(listed), chunks=chunks)


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
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--transcripts", action="store_true", help="also write the transcript tables")
    parser.add_argument("--downloads", action="store_true", help="also write the receipts and the jobs' telemetry")
    arguments = parser.parse_args()
    written, placed = write_corpus(
        arguments.results,
        videos(arguments.points),
        dimension=arguments.dimension,
        shard_size=arguments.shard_size,
        transcripts=arguments.transcripts,
        downloads=arguments.downloads,
    )
    print(f"{arguments.points} points of {len(placed)} videos in {len(written)} shards below {arguments.results}")
