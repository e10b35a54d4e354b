"""Whatever stands in a file that people or crashes can change: it is used, or one clear error says what is wrong."""

import json
import logging
from contextlib import contextmanager
from datetime import date
from string import printable

import pyarrow as pa
import pytest
import yaml
from conftest import Project
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made import MODEL, make_results

from cuepoint import failures, ledger
from cuepoint.cli.options import _read as read_config
from cuepoint.download.limiter import Limiter
from cuepoint.embedding.exported import _read as read_exported
from cuepoint.errors import CuepointError
from cuepoint.layout import Layout
from cuepoint.locks import _owner, holder_lives
from cuepoint.plan import draft_run, read_run
from cuepoint.qdrant import pointer
from cuepoint.qdrant.edge import EdgeStore
from cuepoint.qdrant.points import ShardTables, survey
from cuepoint.receipts import read_receipt
from cuepoint.report import write_report
from cuepoint.settings import load_settings
from cuepoint.slurm import transcribe_memory, transcribe_minutes
from cuepoint.sources import read_list
from cuepoint.states import Status
from cuepoint.tables import TRANSCRIPTS, VIDEOS, embeddings_schema, read_metadata, read_table, write_table
from cuepoint.work import read_job

often = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

odd = st.sampled_from(
    ["../../outside", "/tmp/outside", "a/b", "..", "", "\0", "\ud800", "nan", "-1", "{x}", "x" * 300, "\u202e", "~root"]
)
text = st.text(max_size=30) | odd
scalar = st.none() | st.booleans() | st.integers() | st.floats() | text | st.just(10**400) | st.just(1e308)
value = st.recursive(
    scalar, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3), max_leaves=8
)
noise = st.binary(max_size=200) | st.text(alphabet=printable, max_size=200).map(str.encode)
NESTED = b"[" * 3000  # deeper than Python follows


@contextmanager
def clearly():
    """One clear error, or none. (Another exception would be a traceback for the user.)"""
    try:
        yield
    except CuepointError as error:
        assert str(error).strip()


def mutated(content):
    """Versions of a file as crashes, disks and editors make them: cut, overwritten, lengthened, or something else."""

    @st.composite
    def draw_one(draw):
        kind = draw(st.sampled_from(["cut", "flip", "overwrite", "insert"]))
        place = draw(st.integers(0, len(content) - 1))
        if kind == "cut":
            return content[:place]
        if kind == "flip":
            return content[:place] + bytes([content[place] ^ 1 << draw(st.integers(0, 7))]) + content[place + 1 :]
        other = draw(st.binary(min_size=1, max_size=16))
        return content[:place] + other + content[place + (len(other) if kind == "overwrite" else 0) :]

    return draw_one()


def as_json(document):
    """JSON of a document of which some fields, on any level, hold something else or are missing."""

    def changed(inner):
        if isinstance(inner, dict) and inner:
            one = st.sampled_from(sorted(inner)).flatmap(
                lambda key: st.one_of(
                    st.just({name: each for name, each in inner.items() if name != key}),
                    (value | changed(inner[key])).map(lambda other: inner | {key: other}),
                )
            )
            return one | st.tuples(text, value).map(lambda pair: inner | {pair[0]: pair[1]}) | value
        return value

    def dump(found):
        return json.dumps(found).encode()

    return changed(document).map(dump) | mutated(dump(document)) | noise | st.just(NESTED)


RECEIPT = {
    "format": 1, "video_id": "a", "url": "http://x.example/a", "status": "ok", "title": "T", "upload_date": "20240101",
    "duration": 12.5, "bytes": 100, "sha256": "0" * 64, "audio_hash": "1" * 32, "attempts": 1, "seconds": 1.5,
}  # fmt: skip


@often
@given(as_json(RECEIPT))
def test_receipts(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with clearly():
        receipt = read_receipt(path)
        assert receipt.video_id == "a"
        transcribe_minutes([receipt.duration or 0.0], load_settings({}).transcribe)
        transcribe_memory([receipt.duration or 0.0], load_settings({}).transcribe)
        pa.array([receipt.title, receipt.url, receipt.error])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda receipt: "no JSON", "no valid receipt"),
        (lambda receipt: receipt | {"duration": "long"}, r"no valid receipt \(duration"),
        (lambda receipt: receipt | {"video_id": "b"}, r"the receipt of another video \(b\)"),
        (lambda receipt: receipt | {"status": "unavailable"}, "status unavailable and names audio"),
        (lambda receipt: {**receipt, "sha256": None}, "status ok and names no audio"),
        (lambda receipt: receipt | {"status": "fine"}, r"no valid receipt \(status"),
    ],
)
def test_a_receipt_edited_by_hand_is_told_with_the_mend(tmp_path, change, told):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(change(RECEIPT)))
    with pytest.raises(CuepointError, match=rf"a\.json .*{told}.*delete it, then run again"):
        read_receipt(path)


@often
@given(mutated(b"a\t00000\thttp://x.example/a\nb\t-\t\nc\t00001\tclips/c.opus\n") | noise)
def test_the_plan(tmp_path, content):
    layout = Layout(tmp_path)
    layout.plan.parent.mkdir(exist_ok=True)
    layout.plan.write_bytes(content)
    (tmp_path / "list").write_text("http://x.example/a\n")
    with clearly():
        draft_run(read_list(tmp_path / "list"), layout, shard_size=2)


RUN = {
    "members": {"a": "00000"}, "sources": {"a": "http://x.example/a"}, "attempts": {"a": 1}, "waiting": {"b": "b.mp3"},
    "settings": {"beam_size": 5}, "reloads": {MODEL: 1},
}  # fmt: skip


@often
@given(as_json(RUN))
def test_the_frozen_run(tmp_path, content):
    layout = Layout(tmp_path)
    layout.run.parent.mkdir(exist_ok=True)
    layout.run.write_bytes(content)
    with clearly():
        run = read_run(layout)
        ledger.write_ledger(layout, load_settings({}), run)
        assert {path.name for path in tmp_path.iterdir()} <= {".state", "report"}
    with clearly():
        draft_run([], layout, shard_size=2)


@often
@given(
    st.lists(
        as_json({"number": 0, "status": "not_yet", "time": 1.0, "error": "e", "retry_after": 2.0, "credentials": None}),
        max_size=3,
    )
)
def test_failure_logs(tmp_path, lines):
    path = Layout(tmp_path).failures("a")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    with clearly():
        attempts = failures.read(path)
        failures.attempt_due(attempts)
        ledger._next(Layout(tmp_path), load_settings({}), "not_yet", "downloaded", "a")
        failures.record(Layout(tmp_path), "a", failures.Attempt(9, Status.TRANSIENT, 1.0))
        assert len(failures.read(path)) == len(attempts) + 1


@often
@given(as_json({"members": "0" * 32, "points": 3}))
def test_load_receipts(tmp_path, content):
    layout = Layout(tmp_path)
    layout.load_receipt("c").parent.mkdir(exist_ok=True)
    layout.load_receipt("c").write_bytes(content)
    ledger.is_loaded(layout, "c", read_run_of(RUN))


def read_run_of(document):
    from cuepoint.plan import Run

    return Run(**document)


@often
@given(as_json({"directory": "c.1"}))
def test_pointers_never_lead_out_of_their_directory(tmp_path, content):
    directory = tmp_path / "edge"
    (directory / "c.1").mkdir(parents=True, exist_ok=True)
    (tmp_path / "outside.1").mkdir(exist_ok=True)
    (directory / "name.pointer.json").write_bytes(content)
    with clearly():
        found = pointer.target(directory, "name")
        assert found is None or found.path.parent == directory


@pytest.mark.parametrize("entry", ["../outside.1", "/tmp", "..", "a/../../outside.1"])
def test_a_pointer_to_another_place_is_refused(tmp_path, entry):
    (tmp_path / "outside.1").mkdir()
    (tmp_path / "edge").mkdir()
    (tmp_path / "edge" / "name.pointer.json").write_text(json.dumps({"directory": entry}))
    with pytest.raises(CuepointError, match="names no collection beside it"):
        pointer.target(tmp_path / "edge", "name")


@often
@given(as_json({"points": 1, "deleted": 0, "provenance": {}}))
def test_notes_of_a_collection(tmp_path, content):
    directory = tmp_path / "c.1"
    directory.mkdir(exist_ok=True)
    (directory / "cuepoint.json").write_bytes(content)
    with clearly(), EdgeStore(tmp_path).read("c") as collection:
        assert collection is None


@often
@given(as_json({"dimension": 384, "max_tokens": 256, "suffix": [102], "sizes": {"tokenizer.json": 2}}))
def test_measures_of_an_exported_model(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.json").write_bytes(content)
    with clearly():
        read_exported(tmp_path)


@often
@given(
    as_json(
        {
            "video": 1.0,
            "request": 2.0,
            "circuit": {"first": 1.0, "opened": 1.0, "until": 2.0, "level": 1, "run": "", "probe": None},
        }
    )
)
def test_the_state_of_the_limiter(tmp_path, content):
    layout = Layout(tmp_path)
    quick = load_settings({"download": {"request_interval": {"*": 0.001}, "cool_down": 0.0}}).download
    path = layout.throttle / "x.example.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    Limiter(layout, quick).request("http://x.example/")
    path.write_bytes(content)
    limiter = Limiter(layout, quick)
    with limiter._state("x.example") as state:
        before = dict(state)
        try:
            limiter._wait_for_circuit(state, "x.example")
        except Exception as error:
            assert type(error).__name__ == "CircuitExhausted", before


@often
@given(as_json({"host": "h", "pid": 1, "since": "2024-01-01 00:00:00"}))
def test_owners_of_locks(tmp_path, content):
    (tmp_path / "run.owner").write_bytes(content)
    holder_lives(tmp_path / "run.lock")
    assert _owner(tmp_path / "run.lock")


@often
@given(
    st.lists(
        as_json({"time": 5.0, "cpu": 1.0, "rss": 10, "gpu_busy": 0.5, "chunks": 3, "phase_encode": 1.0}), max_size=3
    ),
    as_json({"stage": "embed", "name": "00000", "pid": 1, "host": "h", "started": 1.0, "gpu": None}),
)
def test_telemetry(tmp_path, rows, job):
    path = tmp_path / "embed-x" / "00000.parquet"
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".jsonl").write_bytes(b"".join(line + b"\n" for line in [job, *rows]))
    read_job(path)


def example_tables():
    rows = {
        "transcripts": (TRANSCRIPTS, {"segment": 0, "start": 0.0, "end": 1.0, "text": " It rained.", "flags": []}),
        "videos": (VIDEOS, {"url": "u", "status": "ok", "segments": 1, "flagged": 0, "upload_date": date(2024, 1, 1)}),
        "embeddings": (
            embeddings_schema(2),
            {"point_id": "p", "chunk": 0, "start": 0.0, "end": 1.0, "text": "x", "tokens": 3, "embedding": [1.0, 0.0]},
        ),
    }
    return {
        name: (schema, pa.Table.from_pylist([{"video_id": id_, **row} for id_ in "ab"], schema))
        for name, (schema, row) in rows.items()
    }


TABLES = example_tables()


@pytest.mark.parametrize("name", TABLES)
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_parquet_readers(tmp_path, name, data):
    """A change is told, or it does not change what is read."""
    schema, table = TABLES[name]
    path = tmp_path / "00000.parquet"
    write_table(path, table, schema, settings={}, revision="1")
    path.write_bytes(data.draw(mutated(path.read_bytes()) | noise))
    with clearly():
        found = read_table(path, schema)
        assert found.equals(table)
    with clearly():
        read_metadata(path)
    other = {kind: tmp_path / kind / "00000.parquet" for kind in ("videos", "embeddings")}
    for kind, target in other.items():
        write_table(target, TABLES[kind][1], TABLES[kind][0], settings={})
    if name in other:
        other[name].write_bytes(path.read_bytes())
    with clearly():
        survey([ShardTables("00000", other["embeddings"], other["videos"])], {"a": "00000"}, unit_length=True)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    st.lists(
        st.sampled_from(
            [
                "dQw4w9WgXcQ",
                "http://x.example/../../../etc/x.mp4",
                "../../../etc/passwd.mp3",
                "https://youtu.be/../../x",
            ]
        )
        | text
        | st.text(alphabet="./\\%~:#?&=aé ", max_size=30).map(lambda path: f"http://x.example/{path}")
        | st.text(alphabet="./\\%~:#aé ", max_size=30).map(lambda path: f"{path}.mp3"),
        max_size=5,
    ).map(lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass"))
    | noise
)
def test_the_list_leads_to_paths_below_the_results(tmp_path, content):
    path = tmp_path / "videos.txt"
    path.write_bytes(content)
    layout = Layout(tmp_path / "results")
    logging.disable(logging.WARNING)
    with clearly():
        for entry in read_list(path):
            id_ = entry.video_id
            for made in (
                *(layout.receipt(id_), layout.audio(id_), layout.failures(id_), layout.partial(id_)),
                *(layout.cache("receipt", id_, "f", ".json"), layout.lock("video", id_)),
            ):
                inside = made.relative_to(layout.results)
                assert ".." not in inside.parts
                assert len(inside.name) < 120
    logging.disable(logging.NOTSET)


documents = st.dictionaries(
    st.sampled_from([*load_settings({}).model_dump(), "nonsense"]) | text | st.integers() | st.none(), value, max_size=4
)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    documents.map(lambda found: yaml.safe_dump(found, allow_unicode=True).encode("utf-8", "surrogatepass"))
    | noise
    | st.sampled_from([NESTED, b"&a [*a]", b"shard_size: 0x" + b"f" * 5000, b"results: !!binary aGk=", b"? [a]\n: b"])
)
def test_config_yaml(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    with clearly():
        found = load_settings(read_config(tmp_path / "config.yaml"))
        read_list(found.videos)
        Layout(found.results).plan.exists()


@pytest.mark.parametrize(
    "config",
    [
        {"embedding": {"use": ["../../x"], "models": {"../../x": {"model": "x"}}}},
        {"embedding": {"use": ["/x"], "models": {"/x": {"model": "x"}}}},
        {"qdrant": {"collection": "../x"}},
        {"results": "a{b}"},
        {"results": "a\0b"},
        {"videos": "a\nb"},
    ],
)
def test_names_that_would_be_paths_are_refused(config):
    with pytest.raises(CuepointError, match=r"config\.yaml cannot be used"):
        load_settings(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "told"),
    [
        (b"[1, 2]", "Config file"),
        (b"shard_size: [", "onfig"),
        (b"\xff\xfe", "can't decode byte"),
        (b"shard_size: 0x" + b"f" * 5000, "shard_size = a int"),
        (b"results: 'a{b}'", "braces"),
        (b"embedding: {use: [../../x], models: {../../x: {model: x}}}", "cannot name a model"),
    ],
)
def test_snakemake_itself_shows_no_traceback_for_a_bad_config(tmp_path, config, told):
    project = Project.create(tmp_path / "project", "", ["dQw4w9WgXcQ"])
    (project.directory / "config.yaml").write_bytes(config)
    done = project.snakemake("--dry-run", check=False)
    assert done.returncode != 0
    assert told in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not project.results.exists()


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.data())
def test_the_report_is_written_whatever_the_files_of_a_run_have_become(tmp_path_factory, data):
    layout, found, run = make_results(tmp_path_factory.mktemp("made") / "results", videos=6, shard_size=3)
    files = sorted(path for path in layout.results.glob("**/*") if path.is_file() and ".state" not in path.parts)
    for path in data.draw(st.lists(st.sampled_from(files), min_size=1, max_size=3, unique=True)):
        content = path.read_bytes()
        path.write_bytes(data.draw(mutated(content) | noise) if content else b"x")
    with clearly():
        tally = ledger.write_ledger(layout, found, run)
        assert tally.total == len(run.members)
        write_report(layout, found, run)
