"""Ten thousand videos and more: what a run looks at, opens and keeps, counted on small lists."""

import json
import re
import subprocess
import tracemalloc
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import BIN, ROOT

from benchmarks.workflow import cuepoint_project, write_list
from cuepoint import scheduling
from cuepoint.layout import Layout
from cuepoint.ledger import Tally, write_ledger
from cuepoint.plan import Run, read_plan
from cuepoint.settings import load_settings

PARALLEL = 3  # downloads at once
SHARD = 4  # videos

# Counts, inside of the real Snakemake, the jobs that the scheduler weighs, and the files that are opened and looked at.
COUNTERS = f"""
import atexit, json, os, sys
from collections import Counter
from snakemake.scheduling.job_scheduler import JobScheduler

weighed, opened, looks = [], [], Counter()
select, stat = JobScheduler.job_selector, os.stat

def counting_select(self, jobs):
    chosen = select(self, jobs)
    weighed.append([sorted(job.name for job in jobs), [int(job.priority) for job in chosen if job.name == "download"]])
    return chosen

def counting_stat(path, *args, **kwargs):
    looks[os.fspath(path) if not isinstance(path, int) else path] += 1
    return stat(path, *args, **kwargs)

def audit(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, os.PathLike)):
        opened.append(os.path.relpath(arguments[0]))

JobScheduler.job_selector, os.stat = counting_select, counting_stat
sys.addaudithook(audit)
main = os.getpid()
atexit.register(lambda: os.getpid() == main and open("counted.json", "w").write(json.dumps(
    dict(weighed=weighed, opened=opened, looks={{str(k): v for k, v in looks.items()}}))))
config |= dict(shard_size={SHARD}, download=dict(parallel={PARALLEL}))
"""


class Counted:
    """A project of no-op stages, run by the real Snakemake with counters in it."""

    def __init__(self, folder: Path, videos: int):
        folder.mkdir()
        self.folder = cuepoint_project(folder)
        self.videos = videos
        write_list(self.folder, videos)
        snakefile = self.folder / "Snakefile"
        snakefile.write_text(COUNTERS + snakefile.read_text())

    said = ""

    def run(self, *arguments):
        done = subprocess.run(
            [BIN / "snakemake", "--cores", "2", "--resources", "gpu=1", *arguments],
            cwd=self.folder, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        self.said = done.stdout + done.stderr
        return json.loads((self.folder / "counted.json").read_text())


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("small") / "project", 2 * SHARD)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("large") / "project", 8 * SHARD)


def finished(folder, videos):
    project = Counted(folder, videos)
    project.planned = project.run("--dry-run")
    project.ran = project.run()
    project.idle = project.run()
    assert "Nothing to be done" in project.said
    return project


def test_the_scheduler_weighs_what_could_run_and_no_more_often_than_jobs_end(large):
    weighed = [Counter(names) for names, _ in large.ran["weighed"]]
    assert max(names["download"] for names in weighed) == PARALLEL
    assert max(names["transcribe"] for names in weighed) == 1  # the only GPU
    jobs = large.videos + 2 * large.videos // SHARD + 3
    assert len(weighed) <= jobs


def test_early_shards_are_downloaded_first(large):
    shards = [-priority for _, priorities in large.ran["weighed"] for priority in sorted(priorities, reverse=True)]
    assert len(shards) == large.videos
    assert all(first <= second for first, second in pairwise(shards))


def test_a_job_that_fails_is_tried_again_and_what_it_holds_up_goes_on(tmp_path):
    project = Counted(tmp_path / "project", SHARD)
    script = project.folder / "scripts" / "transcribe.py"
    fails_once = 'import os\nif not os.path.exists("failed"):\n    open("failed", "w")\n    raise SystemExit(1)\n'
    script.write_text(fails_once + script.read_text())
    counted = project.run("--retries", "1")
    assert sum("transcribe" in names for names, _ in counted["weighed"]) >= 2
    assert project.run() and "Nothing to be done" in project.said


def test_a_rate_limit_that_somebody_asked_for_stays(tmp_path):
    project = Counted(tmp_path / "project", 2)
    common = project.folder / "rules" / "common.smk"
    told = '    open("limiter", "w").write(str(workflow.scheduler.job_rate_limiter))\n'
    common.write_text(common.read_text().replace("\n\nonsuccess:", f"{told}\n\nonsuccess:", 1))
    project.run()
    assert (project.folder / "limiter").read_text() == "None"
    write_list(project.folder, 3)
    project.run("--max-jobs-per-timespan", "50/1s")
    assert "JobRateLimiter" in (project.folder / "limiter").read_text()


@pytest.mark.parametrize("step", ["planned", "idle"])
def test_to_start_no_table_and_no_receipt_is_opened(large, step):
    opened = getattr(large, step)["opened"]
    assert not [path for path in opened if path.endswith(".parquet")]
    assert not [path for path in opened if path.startswith("results/audio")]


@pytest.mark.parametrize("step", ["planned", "idle"])
def test_each_video_costs_the_same_few_looks_at_files(small, large, step):
    def looks(project):
        return sum(getattr(project, step)["looks"].values())

    def opened(project):
        return len(getattr(project, step)["opened"])

    added = large.videos - small.videos
    assert (looks(large) - looks(small)) / added <= 12
    assert (opened(large) - opened(small)) / added <= 4


def test_ten_more_videos_add_ten_rows_to_the_plan(large):
    plan = Layout(large.folder / "results").plan
    before = plan.read_text()
    write_list(large.folder, large.videos + 10)
    large.run("--until", "download")
    after = plan.read_text()
    assert after.startswith(before)
    assert len(read_plan(after)) == large.videos + 10


def test_no_folder_has_more_than_a_few_thousand_entries_at_100000_videos():
    layout, entries = Layout(Path("results")), Counter()
    shards = [f"{number:05d}" for number in range(100_000 // 64 + 1)]
    locks = [layout.lock("shard", name) for shard in shards for name in (f"transcribe-{shard}", f"{shard}-model")]
    paths = [path(shard) for shard in shards for path in (layout.transcripts, layout.videos)]
    paths += [layout.embeddings("model", shard) for shard in shards]
    for number in range(100_000):
        id_ = f"{number:011x}"
        locks.append(layout.lock("video", id_))
        paths += [layout.receipt(id_), layout.audio(id_), layout.failures(id_), layout.partial(id_)]
        paths += [layout.cache(stage, id_, 32 * "0", ".json") for stage in ("transcribe", "embed")]
    paths += [path for lock in locks for path in (lock, lock.with_suffix(".owner"))]
    assert len(set(paths)) == len(paths)
    entries.update(path.parent for path in paths)
    assert max(entries.values()) < 2000


def test_a_batch_plans_only_its_part_of_the_shards(tmp_path):
    project = Counted(tmp_path / "project", 4 * SHARD)
    project.run("--dry-run", "--batch", "embeddings=1/4", "--", "embeddings")
    planned = dict(re.findall(r"^([a-z]+) +(\d+)$", project.said, re.MULTILINE))
    assert planned == {"download": "4", "transcribe": "1", "embed": "1", "total": "6"}


def test_the_guide_s_loop_works_through_a_long_list_window_by_window(tmp_path):
    project = Counted(tmp_path / "project", 3 * SHARD)
    (project.folder / "config.yaml").write_text(f"limit_unprocessed: {SHARD}\n")
    loop = re.search(r"^while .* done$", (ROOT / "docs" / "guide.md").read_text(), re.MULTILINE)[0]
    loop = loop.replace("snakemake --cores 16", f"{BIN / 'snakemake'} --cores 2")
    subprocess.run(["bash", "-c", loop], cwd=project.folder, capture_output=True, timeout=300, check=True)
    shards = (project.folder / "results" / "embeddings" / "all-MiniLM-L6-v2").glob("*.parquet")
    assert sorted(path.stem for path in shards) == ["00000", "00001", "00002"]
    assert len(list((project.folder / ".snakemake" / "log").glob("*"))) == 3


def test_the_ledger_is_written_in_pieces(tmp_path):
    layout, settings = Layout(tmp_path / "results"), load_settings({"results": str(tmp_path / "results")})

    def write(videos: int) -> Tally:
        waiting = {f"{number:011d}": f"https://example.org/{number}" for number in range(videos)}
        return write_ledger(layout, settings, Run(members={}, sources={}, attempts={}, waiting=waiting))

    write(1)  # imports
    tracemalloc.start()
    tally = write(20_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert tally.statuses == {"waiting": 20_000}
    assert peak < 12e6  # 5 MB of it the list itself; all rows together take 30 MB


def test_another_snakemake_schedules_as_it_does(monkeypatch):
    monkeypatch.setattr(scheduling, "version", lambda _: "9.28.0")
    scheduling.show_few(untouched := object())
    assert type(untouched) is object
    assert f"snakemake=={scheduling._TRIED} " in (ROOT / "requirements.txt").read_text()
