"""Faults of the machine and damaged files, in the real workflow: one clear error, nothing lost, and after the mend on.

Each scenario takes the finished demo, undoes a little of it, breaks something, and runs the real Snakemake twice: with
the fault, and after the mend that the message names. Results must then be those of the demo again, byte for byte.
"""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from wire_qdrant import VanishingQdrant

from cuepoint.layout import Layout
from cuepoint.locks import hold
from cuepoint.receipts import read_receipt

pytestmark = pytest.mark.slow

MODEL = "all-MiniLM-L6-v2"
SHARD = "00001"
PRODUCTS = ("transcripts/*.parquet", "videos/*.parquet", "embeddings/*/*.parquet")
PATIENCE = 240  # seconds for what takes a few on a quiet machine


@pytest.fixture
def on_small_disk(demo, tmp_path, small_disk):
    """The finished demo with its results on a small disk; the exported model, which is large, stays outside."""
    project = demo.copy(tmp_path / "project")
    shutil.rmtree(project.results)
    disk = small_disk(project.results, "512m")
    # The collection's files are sparse, and on a small disk they must stay so.
    subprocess.run(["cp", "--archive", "--sparse=always", f"{demo.results}/.", project.results], check=True)
    models = Layout(project.results).state / "cache" / "models"
    shutil.rmtree(models)
    models.symlink_to(Layout(demo.results).state / "cache" / "models")
    return project, disk


def one_error(done, *words):
    """The run failed, with one message (in the log of a job or at the end) that holds these words, and no traceback."""
    told = done.stdout + done.stderr
    assert done.returncode != 0, told
    assert "Traceback" not in told, told
    for word in words:
        assert word in told, f"{word!r} is not in:\n{told}"
    return told


def same_as(demo, project):
    """The project's tables are those of the demo, its collection answers, and nothing is left to do."""
    for pattern in PRODUCTS:
        assert project.files(pattern) == demo.files(pattern), pattern
    assert project.planned() == {}
    assert Layout(project.results).load_receipt(f"cuepoint-{MODEL}").exists()


STAGES = ("download", "transcribe", "embed", "load")


def take_back(project, stage, name="bread-day"):
    """Take a finished run back to before `stage`, for one shard; of its videos only `name` is in no cache of the stage.

    Returns the lock that the stage's job holds while it works.
    """
    layout = Layout(project.results)
    video_id = id_of(project, name)
    products = {
        "download": [layout.receipt(video_id), layout.audio(video_id)],
        "transcribe": [layout.transcripts(SHARD), layout.videos(SHARD)],
        "embed": [layout.embeddings(MODEL, SHARD)],
        "load": [layout.load_receipt(f"cuepoint-{MODEL}")],
    }
    for later in STAGES[STAGES.index(stage) :]:
        for path in products[later]:
            path.unlink()
    cache = {"download": "receipt"}.get(stage, stage)
    for path in (layout.state / "cache" / cache).glob(f"*/{video_id}.*"):
        path.unlink()
    if stage == "load":
        shutil.rmtree(project.results / "qdrant")
    return {
        "download": layout.lock("video", video_id),
        "transcribe": layout.lock("shard", f"transcribe-{SHARD}"),
        "embed": layout.lock("shard", f"{SHARD}-{MODEL}"),
        "load": layout.lock("collection", MODEL),
    }[stage]


def id_of(project, name):
    (receipt,) = project.results.glob(f"audio/*/{name}-*.json")
    return receipt.stem


@pytest.mark.parametrize("stage", STAGES)
def test_a_disk_that_fills_up_during_a_stage(demo, on_small_disk, stage, tmp_path):
    """The test holds the lock that the stage's job needs, fills the disk while the job waits, and lets it go on."""
    project, disk = on_small_disk
    lock = take_back(project, stage)
    output = tmp_path / "output"
    with output.open("w") as told, hold(lock, "this test"):
        run = subprocess.Popen(project.command(), env=project.environment, stdout=told, stderr=subprocess.STDOUT)
        wait_for(lambda: "waiting for it to end" in logs(project), run)
        disk.fill()
    run.wait(PATIENCE)
    done = subprocess.CompletedProcess(run.args, run.returncode, output.read_text(), "")
    print(done.stdout)
    one_error(done, "the disk is full: free some space")
    disk.free()
    project.snakemake()
    same_as(demo, project)


def test_a_collection_that_would_not_fit_is_not_begun(demo, tmp_path, small_disk):
    """The engine would be killed by a signal when its disk is full: on a small one the load says so before."""
    disk = small_disk(tmp_path / "disk", "40m")
    project = demo.copy(tmp_path / "project")
    project.configure(qdrant={"location": str(disk.folder)})
    one_error(project.snakemake(check=False), "the new collection takes about", "qdrant.location")
    subprocess.run(["mount", "-o", "remount,size=512m", str(disk.folder)], check=True)
    project.snakemake()
    assert list(disk.folder.glob("*.pointer.json"))
    same_as(demo, project)


def test_results_that_cannot_be_written(demo, tmp_path, mounted):
    project = demo.copy(tmp_path / "project")
    take_back(project, "embed")
    before = contents(project)
    mounted("--bind", project.results, project.results)
    subprocess.run(["mount", "-o", "remount,bind,ro", project.results], check=True)
    one_error(project.snakemake(check=False), "a read-only file system", "mount it for writing")
    assert contents(project) == before
    subprocess.run(["mount", "-o", "remount,bind,rw", project.results], check=True)
    project.snakemake()
    same_as(demo, project)


def contents(project):
    return {path: path.read_bytes() for path in project.results.glob("**/*") if path.is_file()}


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    """Change one bit: of a Parquet file the last of the first column's data, of any other file one in the middle."""
    content = bytearray(path.read_bytes())
    place = len(content) // 2
    if path.suffix == ".parquet":
        column = pq.read_metadata(path).row_group(0).column(0)
        start = column.dictionary_page_offset or column.data_page_offset
        place = start + column.total_compressed_size - 1
    content[place] ^= 0x40
    path.write_bytes(content)


def garble(path):
    path.write_bytes(b"{ no more JSON")


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        (None, shutil.rmtree, ["transcribe.model = 'asr-model'", "neither a directory here"]),
        ("model.bin", Path.unlink, ["transcribe.model = 'asr-model'", "model.bin is missing"]),
        ("model.bin", cut, ["asr-model", "cannot be loaded", "fetch the model again"]),
        ("tokenizer.json", garble, ["asr-model", "cannot be loaded", "fetch the model again"]),
    ],
)
def test_a_speech_model_that_is_missing_or_damaged(demo, tmp_path, file, damage, words):
    project = demo.copy(tmp_path / "project")
    take_back(project, "transcribe")
    model = project.directory / "asr-model"
    model.unlink()
    shutil.copytree(ROOT / "demo" / "asr-model", model)
    damage(model / file if file else model)
    told = one_error(project.snakemake(check=False, HF_HUB_OFFLINE="1"), *words)
    ended = "6 ok and not loaded yet, 1 empty (no speech), 2 finally unavailable, 6 to be retried by the next run"
    assert f"15 videos: {ended}." in told
    shutil.rmtree(model, ignore_errors=True)
    model.symlink_to(ROOT / "demo" / "asr-model")
    project.snakemake()
    same_as(demo, project)


@pytest.mark.parametrize(
    ("table", "stage", "damage"),
    [
        ("transcripts", "embed", cut),
        ("transcripts", "embed", flip),
        ("videos", "load", flip),
        ("embeddings", "load", flip),
    ],
)
def test_a_damaged_table_is_named_and_made_again_from_the_caches(demo, tmp_path, table, stage, damage):
    """Bytes change behind Snakemake's back, under the same time: only reading finds it."""
    project = demo.copy(tmp_path / "project")
    take_back(project, stage)
    layout = Layout(project.results)
    path = layout.embeddings(MODEL, SHARD) if table == "embeddings" else getattr(layout, table)(SHARD)
    unseen(damage, path)
    told = one_error(project.snakemake(check=False), f"{path.name} is damaged", "delete it and run snakemake again")
    named = re.search(r"(results/\S+\.parquet) is damaged", told)
    (project.directory / named[1]).unlink()
    project.snakemake()
    same_as(demo, project)


def unseen(damage, path):
    before = path.stat()
    damage(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_what_is_wrong_in_a_cache_is_computed_again(demo, tmp_path):
    """Damaged entries, and one of another version, cost time and nothing else."""
    project = demo.copy(tmp_path / "project")
    take_back(project, "transcribe")
    caches = Layout(project.results).state / "cache"
    for path in [*caches.glob("transcribe/*/*.parquet")][::2]:
        table = pq.read_table(path)
        metadata = {key: value for key, value in table.schema.metadata.items() if key != b"cuepoint.seal"}
        pq.write_table(table.replace_schema_metadata(metadata | {b"cuepoint.format": b"0"}), path)
    for path in [*caches.glob("embed/*/*.parquet")][::2]:
        cut(path)
    project.snakemake()
    same_as(demo, project)
    assert "written by another version" in logs(project)


def test_audio_that_changed_behind_our_back_is_downloaded_again(demo, tmp_path):
    project = demo.copy(tmp_path / "project")
    take_back(project, "transcribe")
    video_id = id_of(project, "bread-day")
    unseen(flip, Layout(project.results).audio(video_id))
    told = one_error(project.snakemake(check=False), f"changed ({video_id})", "run snakemake again")
    assert "another hash than its receipt says" in told
    project.snakemake()
    same_as(demo, project)


def test_a_receipt_that_was_edited_by_hand_is_not_believed(demo, tmp_path):
    project = demo.copy(tmp_path / "project")
    receipt = Layout(project.results).receipt(id_of(project, "bread-day"))
    receipt.write_text(receipt.read_text().replace('"status": "ok"', '"status": "unavailable"'))
    take_back(project, "transcribe", name="night-sky")
    one_error(project.snakemake(check=False), f"{receipt.name} has status unavailable", "delete it, then run again")
    receipt.unlink()
    project.snakemake()
    same_as(demo, project)
    assert read_receipt(receipt).status == "ok"


def test_a_low_limit_of_processes_is_told_before_a_library_dies_of_it(demo, tmp_path):
    """The superuser has no such limit, so the run is another user's, with the right to read what is root's."""
    if os.geteuid() != 0:
        pytest.skip("only the superuser can run a test as another user")
    project = demo.copy(tmp_path / "project")
    take_back(project, "transcribe")
    capabilities = "-all,+dac_override,+dac_read_search"
    user = ["setpriv", "--reuid=65534", f"--inh-caps={capabilities}", f"--ambient-caps={capabilities}"]
    subprocess.run(["chown", "--recursive", "65534", project.directory], check=True)
    done = subprocess.run(
        ["prlimit", "--nproc=24", *user, *project.command()],
        env=project.environment, capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    one_error(done, "no more threads or processes can be started", "ulimit -u")
    project.snakemake()
    same_as(demo, project)


def test_a_low_limit_of_open_files_is_enough(demo, tmp_path):
    project = demo.copy(tmp_path / "project")
    take_back(project, "download")
    command = ["prlimit", "--nofile=64", *project.command()]
    subprocess.run(command, env=project.environment, timeout=PATIENCE, check=True, capture_output=True)
    same_as(demo, project)


def test_a_clock_that_was_ahead_is_told_with_the_command_that_mends_the_files(demo, tmp_path):
    project = demo.copy(tmp_path / "project")
    take_back(project, "embed")
    ahead = time.time() + 366 * 86_400
    for path in project.results.glob("**/*"):
        os.utime(path, (ahead, ahead))
    told = one_error(project.snakemake(check=False), "in the future", "the clock of this machine")
    command = re.search(r"find .* \+$", told, re.MULTILINE)[0]
    subprocess.run(["bash", "-c", command], cwd=project.directory, check=True)
    project.snakemake()
    same_as(demo, project)


def test_a_server_that_vanishes_in_the_middle_of_a_load(demo, tmp_path):
    """It goes away after two of four batches and does not come back; the next run finds it and writes the rest."""
    project = demo.copy(tmp_path / "project")
    server = VanishingQdrant(upserts=2)
    project.configure(qdrant=server.settings(batch_size=4))
    told = one_error(project.snakemake(check=False), "does not answer", "start it, or correct qdrant.location")
    assert told.count("does not answer") == 1
    written = server.points()
    assert 0 < written < len(rows(demo))
    server.come_back()
    project.snakemake()
    assert server.points() == len(rows(demo))
    assert project.planned() == {}
    server.stop()


def rows(project):
    return [
        id_ for path in project.results.glob("embeddings/*/*") for id_ in pq.read_table(path)["point_id"].to_pylist()
    ]


def logs(project):
    return "".join(path.read_text() for path in project.results.glob("logs/**/*.log"))


def wait_for(condition, run):
    until = time.monotonic() + PATIENCE
    while not condition():
        assert run.poll() is None, "the run ended before"
        assert time.monotonic() < until
        time.sleep(0.05)
