"""Loading into Qdrant: the same promises for a directory (Edge) and for a server.

For the server stands `wire_qdrant`: qdrant-client's local mode behind Qdrant's own protocols, gRPC and REST, because no
server can be had from a package registry. With QDRANT_URL set the same tests also run against a real one.
"""

import functools
import os
import signal
import subprocess
import sys
import uuid
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path

import grpc
import numpy as np
import psutil
import pyarrow as pa
import pytest
from qdrant_client import QdrantClient, models
from wire_qdrant import Refused, WireQdrant

from cuepoint import qdrant
from cuepoint.errors import CuepointError, DataError, EnvironmentFault
from cuepoint.layout import Layout
from cuepoint.qdrant import edge as edge_module
from cuepoint.qdrant import server as server_module
from cuepoint.qdrant.collection import Filters, Shape
from cuepoint.qdrant.edge import EdgeCollection, EdgeStore
from cuepoint.qdrant.edge_writers import Writers
from cuepoint.qdrant.load import load_collection
from cuepoint.qdrant.points import Points, ShardTables, link_at, survey
from cuepoint.qdrant.server import ServerStore, connect, is_published
from cuepoint.settings import load_settings
from cuepoint.tables import VIDEOS, embeddings_schema, write_table

pytestmark = pytest.mark.filterwarnings("ignore:Payload indexes have no effect", "ignore:Local mode performs exact")

DIMENSION = 16
MODEL = "all-MiniLM-L6-v2"
OTHER = "bge-small-en-v1.5"
PROTOCOLS = ["grpc", "rest"]
PLACES = ["edge", *PROTOCOLS, *(["server"] if os.environ.get("QDRANT_URL") else [])]


class Corpus:
    """Tables of a results directory, and the place that they are loaded into."""

    def __init__(self, results: Path, store, **settings):
        self.layout = Layout(results)
        self.store = store
        self.members = {}
        self.shards = []
        self.settings = load_settings({"results": str(results), "embedding": {"use": [MODEL, OTHER]}, **settings})

    def change(self, **settings):
        merged = self.settings.model_dump(mode="json") | settings
        self.settings = load_settings(merged)

    def write(self, shard, videos, model=MODEL, members=None, statuses=(), edit=None, **made_with):
        """Write a shard's tables: `videos` maps video_id to the texts of its chunks."""
        tables = ShardTables(shard, self.layout.embeddings(model, shard), self.layout.videos(shard))
        rows = [row for video_id in sorted(videos) for row in chunk_rows(video_id, videos[video_id])]
        if edit:
            edit(rows)
        schema = embeddings_schema(DIMENSION)
        write_table(
            tables.embeddings, pa.Table.from_pylist(rows, schema), schema, settings={}, revision="1", **made_with
        )
        described = [video_row(video_id, dict(statuses).get(video_id, "ok")) for video_id in sorted(videos)]
        write_table(tables.videos, pa.Table.from_pylist(described, VIDEOS), VIDEOS, settings={})
        self.members |= dict.fromkeys(videos if members is None else members, shard)
        if tables not in self.shards:
            self.shards.append(tables)

    def load(self, model=MODEL, final=True, store=None):
        return load_collection(
            model, self.shards, self.members, self.layout, self.settings, final=final, store=store or self.store
        )

    def texts(self, name=f"cuepoint-{MODEL}"):
        """What readers of a published name find: video_id -> texts in the order of the chunks."""
        collection = self.store.published(name)
        assert collection, f"{name} is not published"
        with self.store.read(collection) as opened:
            hits = opened.search(unit("anything"), 1000)
            assert len(hits) == opened.count()
        found = {}
        for payload in sorted((hit.payload for hit in hits), key=lambda payload: payload["chunk"]):
            found.setdefault(payload["video_id"], []).append(payload["text"])
        return found


def unit(text):
    vector = np.random.default_rng(list(text.encode())).standard_normal(DIMENSION)
    return (vector / np.linalg.norm(vector)).astype(np.float32).tolist()


def chunk_rows(video_id, texts):
    for number, text in enumerate(texts):
        yield {
            "point_id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{video_id}/{number}")),
            "video_id": video_id,
            "chunk": number,
            "start": number * 10.1,
            "end": number * 10.1 + 12.3,
            "text": text,
            "tokens": 3,
            "embedding": unit(text),
        }


def video_row(video_id, status):
    number = ord(video_id[-1]) - ord("a")
    return {
        "video_id": video_id,
        "url": f"https://www.youtube.com/watch?v={video_id}",
        "title": f"Title of {video_id}",
        "channel": f"Channel {number % 2}",
        "channel_id": f"UC{number % 2}",
        "upload_date": date(2024, 1, 1 + number),
        "language": "en" if number % 3 else "de",
        "status": status,
        "segments": 1,
        "flagged": 0,
    }


@pytest.fixture(params=PLACES)
def place(request, tmp_path):
    """Makes a store; those made by one test share what they hold, as two runs of a program do."""
    if request.param == "edge":
        yield lambda: EdgeStore(tmp_path / "edge")
    elif request.param in PROTOCOLS:
        wire = WireQdrant(request.param)
        settings = load_settings({"qdrant": wire.settings()}).qdrant
        yield lambda: ServerStore(connect(settings), settings)
        wire.stop()
    else:
        settings = load_settings({"qdrant": {"location": os.environ["QDRANT_URL"]}}).qdrant
        client = connect(settings)
        for each in client.get_collections().collections:
            if each.name.startswith("cuepoint-"):
                client.delete_collection(each.name)
        yield lambda: ServerStore(client, settings)


@pytest.fixture
def corpus(place, tmp_path):
    corpus = Corpus(tmp_path / "results", place())
    corpus.write("00000", {"a": ["a zero", "a one", "a two"], "b": ["b zero"]})
    corpus.write("00001", {"c": ["c zero", "c one"], "d": ["d zero"], "e": ["e zero"], "f": ["f zero"]})
    return corpus


@pytest.fixture
def edge(tmp_path):
    corpus = Corpus(tmp_path / "results", None)
    corpus.store = qdrant.open_store(corpus.settings, corpus.layout)
    corpus.write("00000", {"a": ["a zero", "a one", "a two"], "b": ["b zero"]})
    return corpus


def test_a_loaded_collection_holds_exactly_what_the_tables_say(corpus):
    receipt = corpus.load()
    assert corpus.texts() == {
        "a": ["a zero", "a one", "a two"],
        "b": ["b zero"],
        "c": ["c zero", "c one"],
        "d": ["d zero"],
        "e": ["e zero"],
        "f": ["f zero"],
    }
    assert (receipt.videos, receipt.points, receipt.dimension) == (6, 9, DIMENSION)
    assert receipt.verified.model_dump() == {"videos_counted": 6, "points_compared": 9, "points_found": 9}
    assert receipt.names == [f"cuepoint-{MODEL}", "cuepoint"]
    assert corpus.texts("cuepoint") == corpus.texts()
    with corpus.store.read(receipt.collection) as collection:
        assert collection.provenance() == {"settings": {}, "revision": "1"}


def test_a_point_carries_what_a_reader_needs(corpus):
    corpus.load()
    with corpus.store.read(corpus.store.published("cuepoint")) as collection:
        (point,) = collection.search(unit("a two"), 1)
    assert point.score == pytest.approx(1)
    fingerprint = point.payload.pop("fingerprint")
    assert len(fingerprint) == 24
    assert point.payload == {
        "video_id": "a",
        "chunk": 2,
        "start": pytest.approx(20.2),
        "end": pytest.approx(32.5),
        "text": "a two",
        "url": "https://www.youtube.com/watch?v=a&t=20s",
        "title": "Title of a",
        "channel": "Channel 0",
        "channel_id": "UC0",
        "upload_date": "2024-01-01",
        "language": "de",
    }


def test_rows_of_removed_moved_and_failed_videos_are_not_loaded(corpus):
    # A closed shard keeps its rows: `a` was moved to another shard, `b` taken off the list, `c` did not end well.
    corpus.write("00002", {"a": ["a again"]})
    del corpus.members["b"]
    corpus.write(
        "00001", {"c": ["c zero"], "d": ["d zero"], "e": ["e zero"], "f": ["f zero"]}, statuses={"c": "transient"}
    )
    corpus.load()
    assert corpus.texts() == {"a": ["a again"], "d": ["d zero"], "e": ["e zero"], "f": ["f zero"]}


def test_an_unchanged_load_writes_nothing(corpus):
    first = corpus.load()
    corpus.store = Breaking(corpus.store, fail_at=0)
    second = corpus.load()
    assert (first.videos_written, second.videos_written) == (6, 0)
    assert second.collection == first.collection
    assert second.verified == first.verified


def test_only_changed_videos_are_written_and_a_shorter_one_loses_its_tail(corpus):
    corpus.load()
    corpus.write("00000", {"a": ["a zero", "other"], "b": ["b zero"]})
    receipt = corpus.load()
    assert receipt.videos_written == 1
    assert corpus.texts()["a"] == ["a zero", "other"]
    assert receipt.points == 8


def test_a_new_title_is_a_change(corpus):
    corpus.load()
    table = pa.Table.from_pylist([video_row("a", "ok") | {"title": "Better"}, video_row("b", "ok")], VIDEOS)
    write_table(corpus.layout.videos("00000"), table, VIDEOS, settings={})
    assert corpus.load().videos_written == 1
    with corpus.store.read(corpus.store.published("cuepoint")) as collection:
        found = collection.search(unit("a one"), 10, Filters(video="a"))
    assert {hit.payload["title"] for hit in found} == {"Better"}


def test_unlisted_videos_go_but_not_many_at_once_without_being_told(corpus):
    corpus.load()
    del corpus.members["f"]
    assert corpus.load().videos_removed == 1
    before = corpus.texts()
    assert "f" not in before
    del corpus.members["a"], corpus.members["b"]
    with pytest.raises(DataError, match=r"delete 2 of the collection's 5 videos \(a, b\).*allow_shrink=true"):
        corpus.load()
    assert corpus.texts() == before
    corpus.change(allow_shrink=True)
    corpus.load()
    assert sorted(corpus.texts()) == ["c", "d", "e"]


def test_a_single_video_may_always_go(corpus):
    for shard, videos in (("00000", {"a": ["a zero"], "b": ["b zero"]}), ("00001", {"c": ["c zero"]})):
        corpus.write(shard, videos)
    for video_id in "def":
        del corpus.members[video_id]
    corpus.load()
    del corpus.members["c"]
    assert corpus.load().videos_removed == 1, "though it is a third of all"


def test_a_listed_video_that_no_longer_ends_well_goes_too(corpus):
    corpus.load()
    corpus.write("00000", {"a": ["a zero"], "b": ["b zero"]}, statuses={"b": "unavailable"})
    assert corpus.load().videos_removed == 1
    assert "b" not in corpus.texts()


def test_a_new_collection_is_guarded_too(corpus):
    corpus.load()
    corpus.members = {"a": "00000"}
    for shard, videos in (("00000", {"a": ["a"]}), ("00001", {"c": ["c"]})):
        corpus.write(shard, videos, members=[], chunking={"target_tokens": 99})
    with pytest.raises(DataError, match="delete 5 of the collection's 6 videos"):
        corpus.load()
    assert len(corpus.texts()) == 6


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


class Breaking:
    """A store whose changes of points end at the n-th, which never happens."""

    def __init__(self, store, fail_at):
        self._store, self._left = store, fail_at

    def __getattr__(self, name):
        return getattr(self._store, name)

    @contextmanager
    def write(self, shape, **sizes):
        with self._store.write(shape, **sizes) as collection:
            for name in ("upsert", "trim", "delete_videos"):
                setattr(collection, name, functools.partial(self._change, collection, getattr(collection, name)))
            yield collection

    def _change(self, collection, change, *arguments):
        if self._left == 0:
            raise Killed
        self._left -= 1
        change(*arguments)


@pytest.mark.parametrize("changes_done", range(4))
def test_a_load_that_dies_halfway_is_finished_by_the_next_one(corpus, place, changes_done):
    corpus.change(qdrant={"batch_size": 2})
    corpus.load()
    corpus.write("00000", {"a": ["new"], "b": ["b zero", "b one", "b two"]})
    del corpus.members["f"]
    with pytest.raises(Killed):
        corpus.load(store=Breaking(corpus.store, changes_done))
    corpus.store = place()
    corpus.load()
    assert corpus.texts() == {
        "a": ["new"],
        "b": ["b zero", "b one", "b two"],
        "c": ["c zero", "c one"],
        "d": ["d zero"],
        "e": ["e zero"],
    }


def test_what_exists_is_searchable_before_the_rest_and_the_final_load_completes_it(corpus):
    late = corpus.shards[1]
    hidden = late.embeddings.rename(late.embeddings.with_suffix(".later"))
    receipt = corpus.load(final=False)
    assert not receipt.complete
    assert sorted(corpus.texts()) == ["a", "b"]
    hidden.rename(late.embeddings)
    assert corpus.load().videos_written == 4
    # Tables that are made again are missing for a while: their videos stay, those off the list go.
    late.embeddings.unlink()
    del corpus.members["f"]
    receipt = corpus.load(final=False)
    assert sorted(corpus.texts()) == ["a", "b", "c", "d", "e"]
    assert (receipt.videos, receipt.points) == (5, 8)


def test_what_was_measured_of_an_int8_model_makes_no_other_collection(corpus):
    corpus.write("00000", {"aaa": ["one"]}, quality={"passages": 128, "least_cosine": 0.999})
    corpus.write("00001", {"bbb": ["two"]}, quality={"passages": 64, "least_cosine": 0.998})
    corpus.load()
    assert set(corpus.texts()) == {"aaa", "bbb"}


def test_a_new_chunking_is_a_new_collection_and_readers_never_see_half_of_it(corpus):
    old = corpus.load().collection
    before = corpus.texts()
    corpus.write("00000", {"a": ["longer"], "b": ["b longer"]}, chunking={"target_tokens": 99})
    with pytest.raises(DataError, match=r"were embedded differently \(.*chunking.*\)"):
        corpus.load()
    assert not corpus.load(final=False).videos_written  # goes on with the published version
    corpus.write("00001", {name: [f"{name} longer"] for name in "cdef"}, chunking={"target_tokens": 99})
    with pytest.raises(Killed):
        corpus.load(store=Breaking(corpus.store, 1))
    assert corpus.texts() == before
    receipt = corpus.load()
    assert receipt.collection != old
    assert receipt.previous_dropped == [old]
    assert corpus.texts()["a"] == ["longer"]
    with corpus.store.read(old) as collection:
        assert collection is None


def test_the_previous_collection_is_kept_when_asked_for(corpus):
    corpus.change(qdrant={"keep_previous": True})
    old = corpus.load().collection
    for shard, videos in (("00000", "ab"), ("00001", "cdef")):
        corpus.write(shard, {name: ["longer"] for name in videos}, chunking={"target_tokens": 99})
    assert corpus.load().previous_dropped == []
    with corpus.store.read(old) as collection:
        assert collection.count() == 9


def test_a_corpus_without_a_word_is_an_empty_collection(corpus):
    for shard, videos in (("00000", "ab"), ("00001", "cdef")):
        corpus.write(shard, {video_id: [] for video_id in videos})
    receipt = corpus.load()
    assert (receipt.videos, receipt.points) == (0, 0)
    assert corpus.texts("cuepoint") == {}


def test_two_models_have_two_collections_and_the_short_name_is_the_first(corpus):
    corpus.load()
    loaded = corpus.store.published("cuepoint")
    corpus.shards.clear()
    corpus.write("00000", {"a": ["a"], "b": ["b"]}, model=OTHER)
    corpus.write("00001", {name: [name] for name in "cdef"}, model=OTHER)
    receipt = corpus.load(model=OTHER)
    assert receipt.names == [f"cuepoint-{OTHER}"]
    assert corpus.store.published("cuepoint") == loaded != receipt.collection


def test_damage_in_the_collection_is_found_and_not_published(corpus):
    class Forgetful(Breaking):
        def _change(self, collection, change, *arguments):
            change(*arguments)
            type(collection).delete_videos(collection, ["c"])

    with pytest.raises(DataError, match="video c has 0 points there, 2 in the tables"):
        corpus.load(store=Forgetful(corpus.store, -1))
    assert corpus.store.published("cuepoint") is None


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        (Filters(), "abcdef"),
        (Filters(video="b"), "b"),
        (Filters(channel="Channel 1"), "bdf"),
        (Filters(channel="UC1"), "bdf"),
        (Filters(language="de"), "ad"),
        (Filters(since=date(2024, 1, 5)), "ef"),
        (Filters(until=date(2024, 1, 2)), "ab"),
        (Filters(since=date(2024, 1, 2), until=date(2024, 1, 3), language="en"), "bc"),
        (Filters(channel="nobody"), ""),
    ],
)
def test_a_search_finds_only_what_the_filters_allow(corpus, filters, found):
    corpus.load()
    with corpus.store.read(corpus.store.published("cuepoint")) as collection:
        hits = collection.search(unit("a"), 100, filters)
    assert {hit.payload["video_id"] for hit in hits} == set(found)


@pytest.mark.parametrize(
    ("vector", "length"), [([float("nan")] * DIMENSION, "nan"), ([0.0] * DIMENSION, "0"), ([1.0] * DIMENSION, "4")]
)
def test_a_vector_that_cannot_be_searched_stops_the_load_and_is_named(edge, vector, length):
    edge.write("00000", {"a": ["zero", "one"]}, edit=lambda rows: rows[1].update(embedding=vector))
    with pytest.raises(DataError, match=f"chunk 1 of video a .*length {length}"):
        edge.load()
    assert edge.store.published("cuepoint") is None


def test_shards_of_two_dimensions_stop_the_load(edge):
    path, schema = edge.layout.embeddings(MODEL, "00001"), embeddings_schema(DIMENSION // 2)
    edge.write("00001", {"c": ["c zero"]})
    rows = [row | {"embedding": row["embedding"][: DIMENSION // 2]} for row in chunk_rows("c", ["c zero"])]
    write_table(path, pa.Table.from_pylist(rows, schema), schema, settings={}, revision="1")
    with pytest.raises(DataError, match=r"00001.parquet has 8 dimensions, other shards 16: delete it and run again"):
        edge.load()


def test_a_fingerprint_depends_on_every_column_and_not_on_the_batches(edge):
    def fingerprints(texts, change=None, batch_size=1000):
        def edit(rows):
            for row in rows:
                row["embedding"] = unit("the same")
            rows[1].update(change or {})

        edge.write("00000", {"a": texts, "b": ["b zero"], "c": ["not listed"]}, members="ab", edit=edit)
        videos = survey(edge.shards, edge.members, unit_length=True, batch_size=batch_size).videos
        return [videos[video_id].fingerprint for video_id in ("a", "b")]

    texts = ["a zero", "a one", "a two"]
    a, b = fingerprints(texts)
    assert fingerprints(texts, batch_size=1) == fingerprints(texts, batch_size=2) == [a, b]
    new = {"point_id": str(uuid.uuid4()), "chunk": 7, "start": 1.0, "end": 99.0, "text": "?", "embedding": unit("?")}
    found = {a}
    for column, value in new.items():
        changed, same = fingerprints(texts, {column: value})
        found.add(changed)
        assert same == b
    assert len(found) == 1 + len(new)
    assert fingerprints(["a zeroa", " one", "a two"])[0] not in found, "the same letters, cut elsewhere"


def test_a_deleted_collection_is_noticed_and_loaded_again(edge):
    assert not qdrant.present(edge.settings, edge.layout, MODEL)
    edge.load()
    assert qdrant.present(edge.settings, edge.layout, MODEL)
    (generation,) = edge.store.directory.glob("*.1")
    generation.rename(edge.store.directory.parent / "elsewhere")
    assert not qdrant.present(edge.settings, edge.layout, MODEL)
    edge.load()
    assert edge.texts()["b"] == ["b zero"]
    edge.change(qdrant={"location": str(edge.layout.results / "other place")})
    assert not qdrant.present(edge.settings, edge.layout, MODEL)


def test_looking_whether_a_collection_is_there_imports_no_engine(edge):
    code = (
        "import sys; from cuepoint import qdrant; print([m for m in sys.modules if 'qdrant_' in m or m == 'pyarrow'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


READER = """
import sys
from pathlib import Path
from cuepoint.qdrant.edge import EdgeStore
with EdgeStore(Path(sys.argv[1])).read(sys.argv[2]) as collection:
    print(collection.count(), flush=True)
    sys.stdin.readline()
    print(collection.count(), flush=True)
"""


def test_searches_and_a_load_do_not_wait_for_each_other(edge):
    name = edge.load().collection
    command = [sys.executable, "-c", READER, str(edge.store.directory), name]
    readers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) for _ in range(2)
    ]
    try:
        assert [reader.stdout.readline() for reader in readers] == ["4\n", "4\n"]
        edge.write("00001", {"c": ["c zero"]})
        edge.load()
        assert sorted(edge.texts()) == ["a", "b", "c"]
        assert (edge.store.directory / f"{name}.1").is_dir(), "a state that is being read stays"
        assert [reader.communicate("\n")[0] for reader in readers] == ["4\n", "4\n"]
    finally:
        for reader in readers:
            reader.kill()
            reader.wait()
    edge.load()
    assert [path.name for path in edge.store.directory.glob("*.[0-9]")] == [f"{name}.2"]


def test_a_killed_load_leaves_the_old_state_and_no_rubbish_after_the_next(edge):
    name = edge.load().collection
    edge.write("00001", {"c": ["c zero"]})
    pid = os.fork()
    if pid == 0:
        upsert = EdgeCollection.upsert

        def die(self, points):
            upsert(self, points)
            os.kill(os.getpid(), signal.SIGKILL)

        EdgeCollection.upsert = die
        edge.load()
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert sorted(edge.texts()) == ["a", "b"]
    assert list(edge.store.directory.glob(".*.building"))
    edge.load()
    assert sorted(edge.texts()) == ["a", "b", "c"]
    assert sorted(path.name for path in edge.store.directory.iterdir() if path.is_dir()) == [f"{name}.2"]


@pytest.fixture
def large(edge, monkeypatch):
    """An embedded collection that counts as large: several processes write it."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core: nothing to share out")
    monkeypatch.setattr(edge_module, "MANY_POINTS", 1)
    edge.change(qdrant={"batch_size": 2})
    edge.write("00001", {name: [f"{name} zero", f"{name} one", f"{name} two"] for name in "cdefgh"})
    return edge


def test_a_large_collection_is_written_by_several_processes_and_is_one_all_the_same(large):
    receipt = large.load()
    (generation,) = large.store.directory.glob("*.1")
    assert len(list((generation / "segments").iterdir())) == 2
    assert not list(generation.glob("part-*"))
    assert large.texts()["c"] == ["c zero", "c one", "c two"]
    assert (receipt.points, receipt.verified.points_compared) == (22, 22)
    # Changes find their points in whichever part they are.
    large.write("00001", {name: [f"{name} zero", f"{name} other"] for name in "cdefgh"})
    del large.members["b"]
    assert large.load().points == 15
    assert large.texts() == {"a": ["a zero", "a one", "a two"], **{n: [f"{n} zero", f"{n} other"] for n in "cdefgh"}}


def test_a_writer_that_dies_fails_the_load_and_the_next_one_goes_on(large, monkeypatch):
    write = Writers.write

    def kill_one(self, points):
        self._processes[1].kill()
        self._processes[1].wait()
        write(self, points)

    monkeypatch.setattr(Writers, "write", kill_one)
    with pytest.raises(EnvironmentFault, match=r"ended by signal 9: look whether memory or disk ran out"):
        large.load()
    assert large.store.published("cuepoint") is None
    monkeypatch.undo()
    large.load()
    assert large.texts()["c"] == ["c zero", "c one", "c two"]


def test_what_the_engine_says_in_a_writer_is_told(large, monkeypatch):
    monkeypatch.setattr(Writers, "write", _write_short)
    with pytest.raises(DataError, match=r"is no collection that this version can use \(.*[Vv]ector"):
        large.load()
    assert not list(large.store.directory.glob(".*.building"))


def _write_short(self, points):
    self._send(self._processes[0], Points(points.ids, points.vectors[:, :3].copy(), points.payloads))


def test_writers_end_with_the_process_that_started_them(large):
    pid = os.fork()
    if pid == 0:
        write = Writers.write

        def die(self, points):
            write(self, points)
            Path(large.layout.results / "pids").write_text(" ".join(str(each.pid) for each in self._processes))
            os.kill(os.getpid(), signal.SIGKILL)

        Writers.write = die
        large.load()
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    for writer in (large.layout.results / "pids").read_text().split():
        psutil.wait_procs([psutil.Process(int(writer))] if psutil.pid_exists(int(writer)) else [], timeout=60)
        assert not psutil.pid_exists(int(writer)) or psutil.Process(int(writer)).status() == psutil.STATUS_ZOMBIE
    large.load()
    assert large.texts()["c"] == ["c zero", "c one", "c two"]
    assert not list(large.store.directory.glob(".*.building"))


def test_deleted_points_do_not_pile_up(edge, monkeypatch):
    built = []
    create = edge_module._create
    monkeypatch.setattr(edge_module, "_create", lambda path, shape: (built.append(path), create(path, shape)))
    edge.change(allow_shrink=True)
    edge.write("00001", {name: [name] for name in "cdefgh"})
    edge.load()
    for video_id in "cdefgh":
        del edge.members[video_id]
        edge.load()
    assert len(built) == 3, "once at first, and when too much had been deleted from a copy"


def test_a_disk_without_room_is_said_before_anything_is_written(edge, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("cuepoint.qdrant.edge.shutil.disk_usage", lambda path: usage)
    with pytest.raises(EnvironmentFault, match="make room, or name another directory"):
        edge.load()
    assert not list(edge.store.directory.glob(".*.building"))


def test_a_damaged_directory_is_named_with_the_mend(edge):
    edge.load()
    (generation,) = edge.store.directory.glob("*.1")
    for segment in (generation / "segments").iterdir():
        (segment / "segment.json").write_text("no segment")
    with pytest.raises(DataError, match=r"\.1 is no collection that this version can use .*delete it and run"):
        edge.load()


@pytest.fixture(params=PROTOCOLS)
def start(request):
    """Starts servers; gives each with a corpus that is loaded into it."""
    started = []

    def start(results, settings=(), **options):
        wire = WireQdrant(request.param, **options)
        started.append(wire)
        corpus = Corpus(results, None, qdrant=wire.settings(**dict(settings)))
        corpus.store = qdrant.open_store(corpus.settings, corpus.layout)
        corpus.write("00000", {"a": ["a zero", "a one", "a two"], "b": ["b zero"]})
        return wire.qdrant, corpus

    yield start
    for wire in started:
        wire.stop()


def test_a_first_load_is_indexed_once_it_is_complete(tmp_path, start, monkeypatch):
    monkeypatch.setenv("CUEPOINT_TEST_KEY", "sesame")
    settings = {"api_key_env": "CUEPOINT_TEST_KEY", "indexing_threshold": 5000, "batch_size": 2}
    server, corpus = start(tmp_path, settings, api_key="sesame")
    assert not qdrant.present(corpus.settings, corpus.layout, MODEL)
    corpus.load()
    assert qdrant.present(corpus.settings, corpus.layout, MODEL)
    assert [name for name, _ in server.changes] == ["create", *["index"] * 6, "upsert", "upsert", "update", "move"]
    assert {asked for name, asked in server.changes if name == "index"} == {
        *((key, "keyword") for key in ("video_id", "fingerprint", "channel", "channel_id", "language")),
        ("upload_date", "datetime"),
    }
    asked = dict(server.changes)
    assert asked["create"].optimizers_config.indexing_threshold == 0
    assert asked["update"].optimizers_config.indexing_threshold == 5000
    assert all(isinstance(action, models.CreateAliasOperation) for action in asked["move"])
    server.changes.clear()
    corpus.write("00000", {"a": ["a zero"]}, chunking={"target_tokens": 99})
    corpus.load()
    moves = [type(action).__name__ for action in dict(server.changes)["move"]]
    assert moves == ["DeleteAliasOperation", "CreateAliasOperation"] * 2, "in one request"


def test_every_setting_reaches_the_server(tmp_path, start):
    settings = {
        "distance": "Dot",
        "hnsw_m": 24,
        "hnsw_ef_construct": 77,
        "indexing_threshold": 1234,
        "quantization": "binary",
        "vectors_on_disk": True,
        "payload_on_disk": False,
        "shard_number": 3,
        "replication_factor": 2,
    }
    server, corpus = start(tmp_path, settings)
    corpus.load()
    asked = dict(server.changes)
    created, tuned = asked["create"], asked["update"]
    assert (created.vectors.size, created.vectors.distance, created.vectors.on_disk) == (DIMENSION, "Dot", True)
    assert (created.hnsw_config.m, created.hnsw_config.ef_construct) == (24, 77)
    assert created.quantization_config.binary.always_ram
    assert (created.on_disk_payload, created.shard_number, created.replication_factor) == (False, 3, 2)
    assert created.metadata == {"cuepoint": {"settings": {}, "revision": "1"}}
    # The same again, for a collection that is there already.
    assert tuned.vectors[""].on_disk
    assert (tuned.hnsw_config.m, tuned.hnsw_config.ef_construct) == (24, 77)
    assert tuned.optimizers_config.indexing_threshold == 1234
    assert tuned.quantization_config.binary.always_ram
    assert tuned.params.on_disk_payload is False
    server.changes.clear()
    corpus.change(qdrant=corpus.settings.qdrant.model_dump() | {"quantization": "scalar"})
    corpus.load(store=qdrant.open_store(corpus.settings, corpus.layout))
    assert dict(server.changes)["update"].quantization_config.scalar.type == models.ScalarType.INT8


def test_the_alias_moves_when_the_index_is_built(tmp_path, start, monkeypatch):
    looks = []
    monkeypatch.setattr(server_module.time, "sleep", lambda _: looks.append(len(server.changes)))
    server, corpus = start(tmp_path, {"indexing_threshold": 1})
    grown = {"points_count": 10_000, "status": models.CollectionStatus.GREEN, "indexed_vectors_count": 0}
    building = [grown | {"status": models.CollectionStatus.YELLOW, "indexed_vectors_count": n} for n in (0, 4, 9, 9, 9)]
    # It says green before it has begun, as servers do.
    server.states = [grown, *building, *[grown | {"indexed_vectors_count": 10}] * 5]
    corpus.load()
    assert len(looks) >= 8
    assert server.changes[looks[-1] - 1][0] == "update", "after the last look only the alias moves"
    assert server.changes[looks[-1] :] == [server.changes[-1]]
    server.states = [grown | {"optimizer_status": models.OptimizersStatusOneOf1(error="no memory")}]
    with pytest.raises(EnvironmentFault, match=r"cannot index .*no memory"):
        corpus.load()


@pytest.mark.parametrize(
    "strict",
    [
        {"max_query_limit": 3},
        {"upsert_max_batchsize": 2},
        {"condition_max_size": 1},
        {"search_allow_exact": False},
        {"max_query_limit": 2, "upsert_max_batchsize": 1, "condition_max_size": 2, "search_allow_exact": False},
    ],
)
def test_a_server_in_strict_mode_is_asked_for_no_more_than_it_allows(tmp_path, start, strict):
    strict = models.StrictModeConfigOutput(enabled=True, **strict)
    server, corpus = start(tmp_path, strict=strict)
    corpus.write("00001", {name: [f"{name} zero"] for name in "cdefghij"})
    corpus.load()
    corpus.write("00000", {"a": ["other"], "b": ["b zero", "b one"]})
    del corpus.members["i"], corpus.members["j"]
    receipt = corpus.load()
    assert (receipt.videos_written, receipt.videos_removed, receipt.verified.points_compared) == (2, 2, 9)
    with corpus.store.read(receipt.collection) as collection:
        assert collection.counts("video_id") == {"a": 1, "b": 2, **dict.fromkeys("cdefgh", 1)}
        assert collection.counts("channel") == {"Channel 0": 4, "Channel 1": 5}
    # Refused only while strict mode is on.
    server.strict = strict.model_copy(update={"enabled": False})
    with pytest.raises(DataError, match="Limit exceeded"):
        corpus.write("00000", {name: ["zero", "one", "two", "three"] for name in "abk"})
        corpus.load()


def test_a_server_that_stops_at_any_moment_ends_in_the_same_state(tmp_path, start):
    def change(corpus):
        corpus.write("00000", {"a": ["other"], "b": ["b zero", "b one"]}, chunking={"target_tokens": 99})
        corpus.write("00001", {name: [name] for name in "cdef"}, chunking={"target_tokens": 99})

    def change_again(corpus):
        corpus.write("00000", {"a": ["once more"], "b": ["b zero"]}, chunking={"target_tokens": 99})
        del corpus.members["f"]

    server, corpus = start(tmp_path, {"batch_size": 2})
    corpus.write("00001", {name: [name] for name in "cdef"})
    for step in (lambda _: None, change, change_again):
        step(corpus)
        kept = corpus.texts() if corpus.store.published("cuepoint") else None
        new_collection = step is not change_again
        for moment in range(100):  # a load takes some twenty changes
            server.stops_after = moment
            with suppress(EnvironmentFault):
                corpus.load()
                break
            server.stops_after = None
            if new_collection and kept and server.changes[-1][0] not in {"move", "drop"}:
                assert corpus.texts() == kept, f"readers see the old collection after {moment} changes"
        else:
            pytest.fail("the load never came to its end")
        server.stops_after = None
        assert corpus.load().videos_written == 0
    assert corpus.texts() == {"a": ["once more"], "b": ["b zero"], **{name: [name] for name in "cde"}}
    assert len(server.local.get_collections().collections) == 1


def test_a_collection_that_was_deleted_from_a_server_is_noticed_and_loaded_again(tmp_path, start):
    server, corpus = start(tmp_path)
    server.local.delete_collection(corpus.load().collection)
    assert not qdrant.present(corpus.settings, corpus.layout, MODEL)
    corpus.load()
    assert qdrant.present(corpus.settings, corpus.layout, MODEL)
    assert corpus.texts()["b"] == ["b zero"]


def test_a_wrong_key_and_an_old_server_are_said(tmp_path, start, monkeypatch):
    server, corpus = start(tmp_path, api_key="sesame", version="1.9.2")
    for key, told in (("", "wants an API key: set the environment variable"), ("open", "refuses the API key in the")):
        monkeypatch.setenv("QDRANT_API_KEY", key)
        with pytest.raises(EnvironmentFault, match=f"{told} .*QDRANT_API_KEY"):
            corpus.load(store=qdrant.open_store(corpus.settings, corpus.layout))
    monkeypatch.setenv("QDRANT_API_KEY", "sesame")
    corpus.store = qdrant.open_store(corpus.settings, corpus.layout)
    with pytest.raises(EnvironmentFault, match=r"has version 1.9.2: 1.12 or newer is needed"):
        corpus.load()
    assert not server.changes
    server.version = "1.12.0"
    corpus.load()
    assert corpus.texts()["b"] == ["b zero"]


def test_a_collection_of_somebody_else_is_not_written_to():
    client = QdrantClient(":memory:")
    vectors = models.VectorParams(size=3, distance=models.Distance.COSINE)
    client.create_collection("cuepoint-m-00000000", vectors_config=vectors)
    store = ServerStore(client, load_settings({}).qdrant)
    shape = Shape("cuepoint-m-00000000", DIMENSION, "Cosine", {})
    with pytest.raises(DataError, match="3 dimensions by Cosine, not 16 by Cosine"), store.write(shape):
        pytest.fail("must not be opened")


@pytest.mark.parametrize(
    ("code", "http", "details", "message", "asked"),
    [
        ("UNAVAILABLE", 503, "", "does not answer", 2),
        ("UNAUTHENTICATED", 401, "Invalid API key", "wants an API key: set .*QDRANT_API_KEY", 1),
        ("PERMISSION_DENIED", 403, "Forbidden", "QDRANT_API_KEY", 1),
        ("INTERNAL", 500, "No space left on device", "no room left on its disk", 1),
        ("DEADLINE_EXCEEDED", 408, "", "longer than qdrant.timeout = 30 seconds", 2),
        ("RESOURCE_EXHAUSTED", 429, "too many", "refuses so many or so large requests", 2),
        ("UNIMPLEMENTED", 501, "unknown method", "of another version", 1),
        ("INVALID_ARGUMENT", 400, "expected dim: 3, got 16", "refuses the request: .*expected dim", 1),
    ],
)
def test_what_a_server_refuses_is_one_clear_message_and_a_later_run_goes_on(
    tmp_path, start, code, http, details, message, asked
):
    server, corpus = start(tmp_path, {"attempts": 2})
    server.refusals = [Refused(grpc.StatusCode[code], http, details)] * 9
    with pytest.raises(CuepointError, match=message):
        corpus.load()
    assert 9 - len(server.refusals) == asked, "only what may pass is tried again"
    server.refusals.clear()
    corpus.load()
    assert corpus.texts()["b"] == ["b zero"]


def test_a_server_that_asks_for_patience_gets_it(tmp_path, start, monkeypatch):
    waits = []
    monkeypatch.setattr("tenacity.nap.time.sleep", waits.append)
    server, corpus = start(tmp_path, {"attempts": 3})
    server.refusals = [Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, 429, "rate limit", retry_after=17)] * 2
    corpus.load()
    assert len(waits) == 2
    assert min(waits) >= 17


def test_a_server_that_says_nothing_is_not_waited_for_for_ever(tmp_path, start):
    server, corpus = start(tmp_path, {"timeout": 1})
    server.silence.clear()
    with pytest.raises(EnvironmentFault, match=r"took longer than qdrant\.timeout = 1 seconds"):
        corpus.load()
    server.silence.set()
    corpus.load()


@pytest.mark.parametrize("prefer_grpc", [True, False])
def test_a_server_that_is_not_there_is_named(prefer_grpc):
    settings = {"location": "http://127.0.0.1:1", "grpc_port": 1, "attempts": 1, "prefer_grpc": prefer_grpc}
    settings = load_settings({"qdrant": settings}).qdrant
    with pytest.raises(EnvironmentFault, match=r"http://127.0.0.1:1 does not answer .*start it, or correct"):
        ServerStore(connect(settings), settings).published("cuepoint")
    assert is_published("cuepoint", settings), "a server that is down does not schedule a load"


def test_passwords_in_a_location_are_not_written_down():
    settings = load_settings({"qdrant": {"location": "https://me:secret@host:6333/prefix"}})
    assert qdrant.shown_location(settings) == "https://host:6333/prefix"


@pytest.mark.parametrize(
    ("url", "link"),
    [
        ("https://www.youtube.com/watch?v=abc", "https://www.youtube.com/watch?v=abc&t=83s"),
        ("https://www.youtube.com/watch?v=abc&t=5", "https://www.youtube.com/watch?v=abc&t=83s"),
        ("https://youtu.be/abc", "https://youtu.be/abc?t=83s"),
        ("https://m.youtube.com/watch?v=abc#x", "https://m.youtube.com/watch?v=abc&t=83s#x"),
        ("https://media.example/talk.mp4", "https://media.example/talk.mp4#t=83"),
        ("https://media.example/talk.mp4#t=5", "https://media.example/talk.mp4#t=83"),
        ("clips/talk one.opus", "clips/talk one.opus#t=83"),
    ],
)
def test_a_link_opens_the_video_at_the_second(url, link):
    assert link_at(url, 83.9) == link
