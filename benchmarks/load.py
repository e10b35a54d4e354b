"""What a load costs: time, memory, disk, and what a search costs afterwards.

Embedded (Qdrant Edge) at each of `--points`, qdrant-client's local mode at each of `--local` (the same load with its
verification, and the loop that one would write by hand), and the client's side of an upload to a server, gRPC and REST,
at `--client` points. Every figure comes from a process of its own; tables are made by corpus.py and kept below `--work`
for the next time. Prints the tables of load.md.

    python benchmarks/load.py --points 10000 100000 300000 1000000 --local 10000 100000 --work /tmp/load
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent import futures
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from corpus import MODEL, videos, write_corpus
from qdrant_client import QdrantClient, models
from qdrant_client.grpc import PointsOperationResponse, UpdateResult, UpdateStatus

from cuepoint.layout import Layout
from cuepoint.qdrant import open_store, published_name
from cuepoint.qdrant.collection import Filters, Store
from cuepoint.qdrant.load import load_collection
from cuepoint.qdrant.points import Points, ShardTables, as_points, read_chunks, survey
from cuepoint.qdrant.server import ServerCollection, ServerStore, connect
from cuepoint.settings import load_settings
from cuepoint.tables import VIDEOS, read_table, write_table

QUERIES = 200
CHANGED = 100  # every n-th video gets another title


def corpus(work: Path, points: int) -> Path:
    """Results directory with the tables of a corpus, made unless it is there."""
    results = work / str(points) / "results"
    done = results / "corpus.json"
    if not done.exists():
        shutil.rmtree(results, ignore_errors=True)
        _, members = write_corpus(results, videos(points))
        done.write_text(json.dumps(members))
    shutil.rmtree(results / "qdrant", ignore_errors=True)
    return results


def tables(results: Path) -> tuple[list[ShardTables], dict[str, str]]:
    """The tables of a corpus and its members."""
    layout = Layout(results)
    members = json.loads((results / "corpus.json").read_text())
    names = sorted(set(members.values()))
    return [ShardTables(name, layout.embeddings(MODEL, name), layout.videos(name)) for name in names], members


class Memory:
    """Peak memory of this process and those it started, sampled: what they allocated, without mapped files."""

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            self._look()

    def _look(self) -> None:
        this = psutil.Process()
        self.peak = max(self.peak, sum(map(allocated, [this, *this.children(recursive=True)])))


def allocated(process: psutil.Process) -> int:
    """Bytes of memory that a process has to itself; 0 when it has just ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds that a call took, by the clock and of the processor (all threads, and processes that have ended)."""
    start, busy = time.perf_counter(), sum(os.times()[:4])
    work()
    return time.perf_counter() - start, sum(os.times()[:4]) - busy


def measure_loads(results: Path, local: bool) -> dict[str, Any]:
    """First load, a load without a change, and one after 1 % of the videos changed."""
    # Local mode builds no index: the load must not wait for one.
    settings = load_settings({"results": str(results), "qdrant": {"indexing_threshold": 0} if local else {}})
    layout = Layout(results)
    place = results / "qdrant" / ("local" if local else "edge")
    shutil.rmtree(place, ignore_errors=True)
    store: Store = (
        ServerStore(QdrantClient(path=str(place)), settings.qdrant) if local else open_store(settings, layout)
    )
    shards, members = tables(results)

    def load() -> Any:
        return load_collection(MODEL, shards, members, layout, settings, final=True, store=store)

    with Memory() as memory:
        first = timed(load)
    disk = sum(path.stat().st_blocks * 512 for path in place.rglob("*"))
    same = timed(load)
    originals = {shard.videos: shard.videos.read_bytes() for shard in shards}
    try:
        retitle(shards)
        changed = timed(load)
    finally:
        for path, content in originals.items():
            path.write_bytes(content)
    return {
        "load": first,
        "memory": memory.peak,
        "disk": disk,
        "same": same,
        "changed": changed,
    }


def measure_plain(results: Path) -> dict[str, Any]:
    """What one writes by hand for local mode: the tables' rows, with the same payload, upserted in batches."""
    place = results / "qdrant" / "plain"
    shutil.rmtree(place, ignore_errors=True)
    shards, _ = tables(results)

    def upload() -> None:
        client = QdrantClient(path=str(place))
        vectors = models.VectorParams(size=384, distance=models.Distance.COSINE)
        client.create_collection("plain", vectors_config=vectors)
        for shard in shards:
            videos = {row["video_id"]: row for row in read_table(shard.videos).to_pylist()}
            for batch in pq.ParquetFile(shard.embeddings).iter_batches(1000):
                points = [
                    models.PointStruct(id=row["point_id"], vector=row["embedding"], payload=described(row, videos))
                    for row in batch.to_pylist()
                ]
                client.upsert("plain", points)
        client.close()

    return {"load": timed(upload)}


def described(row: dict[str, Any], videos: dict[str, Any]) -> dict[str, Any]:
    """Payload of a table's row."""
    video = videos[row["video_id"]]
    return {
        **{name: row[name] for name in ("video_id", "chunk", "start", "end", "text")},
        **{name: video[name] for name in ("title", "channel", "channel_id", "language")},
        "upload_date": str(video["upload_date"]),
        "url": f"{video['url']}&t={int(row['start'])}s",
    }


def retitle(shards: list[ShardTables]) -> None:
    """Give every `CHANGED`-th video another title: all its points change, its vectors stay."""
    for shard in shards:
        rows = read_table(shard.videos).to_pylist()
        chosen = [row for row in rows if int(row["video_id"], 16) % CHANGED == 0]
        for row in chosen:
            row["title"] += " (revised)"
        if chosen:
            write_table(shard.videos, pa.Table.from_pylist(rows, VIDEOS), VIDEOS, settings={})


def measure_search(results: Path, local: bool) -> dict[str, float]:
    """Opening what was loaded, and searching it with and without a filter."""
    settings = load_settings({"results": str(results)})
    start = time.perf_counter()
    store: Store = (
        ServerStore(QdrantClient(path=str(results / "qdrant" / "local")), settings.qdrant)
        if local
        else open_store(settings, Layout(results))
    )
    random = np.random.default_rng(1)
    name = store.published(published_name(settings, MODEL))
    with store.read(name or "") as collection:
        assert collection is not None
        collection.search(random.standard_normal(384).tolist(), 10)
        figures = {"open": time.perf_counter() - start}
        for kind, filters in (("plain", Filters()), ("filtered", Filters(channel="Channel 3"))):
            took = [
                timed(lambda: collection.search(random.standard_normal(384).tolist(), 10, filters))[0]  # noqa: B023
                for _ in range(QUERIES if not local else 10)
            ]
            figures |= {
                f"{kind}_p50": float(np.quantile(took, 0.5)),
                f"{kind}_p99": float(np.quantile(took, 0.99)),
            }
    return figures


class _Swallow(grpc.GenericRpcHandler):
    """A gRPC server that says yes to every upsert."""

    received = 0

    def service(self, _: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        def accept(request: bytes, _: grpc.ServicerContext) -> bytes:
            _Swallow.received += len(request)
            done = UpdateResult(operation_id=0, status=UpdateStatus.Completed)
            return PointsOperationResponse(result=done, time=0).SerializeToString()

        return grpc.unary_unary_rpc_method_handler(accept)


class _SwallowHttp(BaseHTTPRequestHandler):
    """An HTTP server that says yes to every upsert."""

    protocol_version = "HTTP/1.1"
    received = 0

    def do_PUT(self) -> None:
        _SwallowHttp.received += len(self.rfile.read(int(self.headers["Content-Length"])))
        answer = b'{"result": {"operation_id": 0, "status": "completed"}, "status": "ok", "time": 0}'
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def serve(kind: str) -> None:
    """Run a swallowing server until standard input ends; prints its port, then the bytes that it received."""
    if kind == "grpc":
        server = grpc.server(
            futures.ThreadPoolExecutor(1),
            handlers=[_Swallow()],
            options=[("grpc.max_receive_message_length", -1)],
        )
        print(server.add_insecure_port("127.0.0.1:0"), flush=True)
        server.start()
        sys.stdin.read()
        print(_Swallow.received)
    else:
        http = ThreadingHTTPServer(("127.0.0.1", 0), _SwallowHttp)
        print(http.server_port, flush=True)
        threading.Thread(target=http.serve_forever, daemon=True).start()
        sys.stdin.read()
        print(_SwallowHttp.received)


def measure_client(results: Path, kind: str) -> dict[str, float]:
    """CPU seconds of this process and bytes sent for the upload of a corpus to a server that swallows it."""
    command = [sys.executable, __file__, "--serve", kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin and server.stdout
        port = int(server.stdout.readline())
        location = f"http://127.0.0.1:{port}"
        settings = load_settings(
            {"qdrant": {"location": location, "grpc_port": port, "prefer_grpc": kind == "grpc", "attempts": 1}}
        ).qdrant
        collection = ServerCollection(ServerStore(connect(settings), settings), "any")
        batches = points_of(results)
        busy, start = time.process_time(), time.perf_counter()
        for batch in batches:
            collection.upsert(batch)
        figures = {"cpu": time.process_time() - busy, "seconds": time.perf_counter() - start}
        received = int(server.communicate()[0])
    return figures | {"bytes": received, "points": sum(len(batch.ids) for batch in batches)}


def points_of(results: Path) -> list[Points]:
    """All points of a corpus, in batches of 1,000 or fewer."""
    shards, members = tables(results)
    videos = survey(shards, members, unit_length=True).videos
    return [
        as_points(chunks, videos)
        for shard in shards
        for chunks in read_chunks(shard.embeddings, videos, batch_size=1000)
    ]


def alone(measure: str, results: Path, *options: str) -> dict[str, Any]:
    """Run one measurement in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--measure", measure, "--work", str(results), *options]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def row(points: int, load: dict[str, Any], search: dict[str, Any]) -> str:
    """One line of the table of loads."""
    cells = [
        f"{points:,}",
        seconds(load["load"]),
        f"{load['memory'] / 1e6:.0f} MB",
        f"{load['disk'] / 1e6:.0f} MB",
        seconds(load["same"]),
        seconds(load["changed"]),
        f"{search['open']:.2f} s",
        *(
            f"{search[f'{kind}_p50'] * 1e3:.1f} / {search[f'{kind}_p99'] * 1e3:.1f} ms"
            for kind in ("plain", "filtered")
        ),
    ]
    return f"| {' | '.join(cells)} |"


def seconds(took: tuple[float, float]) -> str:
    """Clock and processor seconds."""
    return f"{took[0]:.1f} s ({took[1]:.1f})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--points", type=int, nargs="*", default=[10_000], help="sizes of embedded collections")
    parser.add_argument("--local", type=int, nargs="*", default=[], help="sizes for qdrant-client's local mode")
    parser.add_argument("--client", type=int, default=0, help="points to upload over gRPC and REST")
    parser.add_argument("--work", type=Path, required=True, help="where tables and collections are put")
    parser.add_argument("--measure", choices=["loads", "plain", "search", "grpc", "rest"], help=argparse.SUPPRESS)
    parser.add_argument("--mode", choices=["edge", "local"], default="edge", help=argparse.SUPPRESS)
    parser.add_argument("--serve", choices=["grpc", "rest"], help=argparse.SUPPRESS)
    if "--serve" in sys.argv:
        serve(sys.argv[-1])
        return
    chosen = parser.parse_args()
    local = chosen.mode == "local"
    match chosen.measure:
        case "loads":
            print(json.dumps(measure_loads(chosen.work, local)))
        case "plain":
            print(json.dumps(measure_plain(chosen.work)))
        case "search":
            print(json.dumps(measure_search(chosen.work, local)))
        case "grpc" | "rest":
            print(json.dumps(measure_client(chosen.work, chosen.measure)))
        case _:
            report(chosen)


def report(chosen: argparse.Namespace) -> None:
    """Print the tables of load.md."""
    heading = (
        "points | first load | memory | disk | no change | 1 % changed | open and first query | query p50 / p99 | "
    )
    first: dict[tuple[str, int], float] = {}
    for mode, sizes in (("edge", chosen.points), ("local", chosen.local)):
        if sizes:
            print(f"\n{mode}\n\n| {heading}filtered p50 / p99 |\n|{'---|' * 9}", flush=True)
        for points in sizes:
            results = corpus(chosen.work, points)
            load, search = (alone(measure, results, "--mode", mode) for measure in ("loads", "search"))
            print(row(points, load, search), flush=True)
            first[mode, points] = load["load"][0]
    if chosen.local:
        print("\n| points | embedded | local mode, the same load | local mode, a plain loop |\n|---|---|---|---|")
    for points in chosen.local:
        sides = [first["local", points], alone("plain", corpus(chosen.work, points))["load"][0]]
        ours = first.get(("edge", points))
        times = [f"{took:.1f} s" + (f" ({took / ours:.1f}x)" if ours else "") for took in sides]
        print(f"| {points:,} | {f'{ours:.1f} s' if ours else ''} | {' | '.join(times)} |", flush=True)
    if chosen.client:
        results = corpus(chosen.work, chosen.client)
        print("\n| upload | CPU of the client per 10,000 points | bytes per point |\n|---|---|---|")
        for kind in ("grpc", "rest"):
            figures = alone(kind, results)
            per_point = figures["bytes"] / figures["points"]
            print(f"| {kind} | {figures['cpu'] / figures['points'] * 1e4:.2f} s | {per_point:.0f} |", flush=True)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
