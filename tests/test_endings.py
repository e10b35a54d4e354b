"""How a run ends: its exit status, its last lines and the ledger, also when it failed, early or late."""

import csv
from collections import Counter

import pyarrow.parquet as pq
import pytest
from conftest import Project
from made import make_receipt, make_results
from test_faults import take_back

from cuepoint import failures, faults, ledger, runs
from cuepoint.layout import Layout
from cuepoint.states import Status


def ledger_of(project):
    """Listed video -> status, as both forms of the ledger have it; each exactly once."""
    report = Layout(project.results).report
    rows = pq.read_table(report / "ledger.parquet").to_pylist()
    with (report / "ledger.csv").open(encoding="utf-8", newline="") as sheet:
        lines = list(csv.DictReader(sheet))
    assert [row["video_id"] for row in rows] == [line["video_id"] for line in lines]
    assert [row["status"] for row in rows] == [line["status"] for line in lines]
    found = {row["source"]: row["status"] for row in rows}
    assert len(found) == len(rows)
    return found


def last_lines(done):
    return done.stderr.strip().splitlines()[-12:]


@pytest.mark.slow
def test_a_run_that_fails_at_its_first_job_has_a_ledger_and_the_next_one_completes(demo, tmp_path, site):
    names = ["bread-day", "silence", "removed"]
    project = Project.create(tmp_path / "project", site.proxy_url, [*names, "bread-day"])
    models = Layout(project.results).state / "cache" / "models"
    models.parent.mkdir(parents=True)
    models.symlink_to(Layout(demo.results).state / "cache" / "models")
    quick = {"video_interval": {"*": 0}, "request_interval": {"*": 0}, "backoff": 0.1}
    project.configure(download=quick | {"cookies": "nowhere.txt"})
    failed = project.snakemake(check=False)
    assert failed.returncode != 0
    assert "the cookie file nowhere.txt cannot be read: correct download.cookies" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert ledger_of(project) == {f"http://demo.example/watch/{name}": "pending" for name in names}
    assert any("3 videos: 3 to be retried by the next run." in line for line in last_lines(failed))
    project.configure(download=quick)
    done = project.snakemake()
    assert Counter(ledger_of(project).values()) == {"ok": 1, "empty": 1, "unavailable": 1}
    assert any("3 videos: 1 loaded, 1 empty (no speech), 1 finally unavailable." in line for line in last_lines(done))


@pytest.mark.slow
def test_a_share_of_failures_makes_the_run_fail_until_it_is_allowed(demo, tmp_path):
    """2 of the demo's 15 videos have failed. Also a run with nothing else to do fails."""
    project = demo.copy(tmp_path / "project")
    take_back(project, "load")
    project.configure(max_failed_share=0.1)
    for _ in range(2):
        failed = project.snakemake(check=False)
        assert failed.returncode != 0
        assert "2 of 15 videos failed, more than max_failed_share = 0.1 allows" in failed.stderr
        assert "Traceback" not in failed.stderr
        assert "15 videos: 12 loaded, 1 empty (no speech), 2 finally unavailable." in failed.stderr
        assert len(ledger_of(project)) == 15
    project.configure(max_failed_share=0.2)
    project.snakemake()
    assert project.planned() == {}
    assert "Nothing to be done" in project.snakemake().stderr


@pytest.mark.slow
def test_videos_that_a_limit_leaves_for_later_are_in_the_ledger(tmp_path):
    files = [f"missing-{number}.opus" for number in range(5)]
    project = Project.create(tmp_path / "project", "", files, limit_unprocessed=2)
    done = project.snakemake("downloads")
    assert ledger_of(project) == dict(zip(files, ["unavailable"] * 2 + ["waiting"] * 3, strict=True))
    assert any("5 videos: 2 finally unavailable, 3 left for a later run." in line for line in last_lines(done))


@pytest.mark.slow
def test_a_disk_too_full_for_the_ledger_leaves_the_old_one_and_the_report(tmp_path, small_disk):
    disk = small_disk(tmp_path / "disk", "8m")
    layout, settings, run = make_results(disk.folder / "results")
    runs.end(settings, layout, run)
    before = {path.name: path.read_bytes() for path in layout.report.iterdir()}
    disk.fill()
    with pytest.raises(OSError, match="No space left") as caught:
        runs.end(settings, layout, run)
    assert "the disk is full: free some space" in faults.message_for(caught.value)
    assert str(layout.report) in faults.message_for(caught.value)
    assert {path.name: path.read_bytes() for path in layout.report.iterdir()} == before
    disk.free()
    runs.end(settings, layout, run)
    assert {path.name for path in layout.report.iterdir()} == before.keys()


def test_the_summary_tells_each_kind_once(tmp_path):
    layout, settings, run = make_results(tmp_path / "results", videos=8, shard_size=4)
    gone, retried = list(run.members)[4:6]
    layout.videos("00001").unlink()
    for video_id, attempts in ((gone, settings.download.max_failed_runs), (retried, 1)):
        make_receipt(layout, video_id, 0.0, Status.TRANSIENT, error="timed out")
        for number in range(attempts):
            failures.record(layout, video_id, failures.Attempt(number, Status.TRANSIENT, 1.0))
    tally = ledger.write_ledger(layout, settings, run)
    assert ledger.summary(tally, layout).startswith(
        "8 videos: 2 ok and not loaded yet, 1 empty (no speech), 1 finally unavailable, "
        "3 to be retried by the next run, 1 given up. Ledger: "
    )
    assert tally.failed == 5
