"""Progress as a run's files tell it, while it goes on, afterwards, and in the words of `cuepoint`."""

import json
import logging
import time
from contextlib import chdir
from dataclasses import replace

import pytest
from made import MODEL, START, make_receipt, make_results, make_telemetry
from pytest import approx
from typer.testing import CliRunner

from cuepoint import progress
from cuepoint.cli import app
from cuepoint.download.limiter import Limiter
from cuepoint.layout import Layout
from cuepoint.live import LiveProgress
from cuepoint.progress import Observer, StageProgress
from cuepoint.settings import DownloadSettings
from cuepoint.states import Status
from cuepoint.work import covered, last_stretch, read_download


def stages(layout, settings, run, now=None):
    return {stage.stage: stage for stage in Observer(layout, settings, run).look(now).stages}


def test_a_finished_run_is_told_with_its_rates(tmp_path):
    seen = stages(*make_results(tmp_path / "results"))
    assert [(seen[stage].done, seen[stage].total) for stage in ("download", "transcribe", "embed")] == [(12, 12)] * 3
    assert seen["download"].failed == 1
    assert seen["download"].videos_per_hour == approx(3600 * 12 / 238)
    assert seen["embed"].videos_per_hour == approx(3600 * 12 / (600 + 2 * 660))
    assert seen["transcribe"].gpu.mean == approx(0.93)
    assert all(stage.eta is None for stage in seen.values())


def test_a_running_job_counts_for_the_part_that_it_has_done(tmp_path):
    layout, settings, run = make_results(tmp_path / "results")
    layout.transcripts("00002").unlink()
    (layout.telemetry / "transcribe" / "00002.parquet").unlink()
    now = START + 2000
    job = {"stage": "transcribe", "name": "00002", "pid": 1, "host": "test", "started": now - 60}
    rows = [{"time": now - 30, "cpu": 1, "rss": 1, "videos": 1}, {"time": now, "cpu": 1, "rss": 1, "videos": 2}]
    live = layout.telemetry / "transcribe" / "00002.jsonl"
    live.write_text("".join(json.dumps(line) + "\n" for line in [job, *rows]))
    running = stages(layout, settings, run, now)["transcribe"]
    assert running.done == 10
    assert running.eta == approx(2 / (running.videos_per_hour / 3600))
    killed = stages(layout, settings, run, now + 600)["transcribe"]
    assert (killed.done, killed.failed, killed.eta) == (8, 4, None)


def test_only_what_has_changed_is_read_again_and_nothing_is_missed(tmp_path, monkeypatch):
    layout, settings, run = make_results(tmp_path / "results")
    lost = layout.receipt("video0000005")
    lost.unlink()
    observer = Observer(layout, settings, run)
    later = time.time() + 60
    assert observer.look(later).stages[0].done == 11
    read = []
    real = progress.read_download
    monkeypatch.setattr(progress, "read_download", lambda *args: read.append(args[1]) or real(*args))
    observer.look(later)
    assert read == []
    make_receipt(layout, "video0000005", START + 400, Status.UNAVAILABLE)
    seen = observer.look(later).stages[0]
    assert (seen.done, seen.failed) == (12, 2)
    assert len(read) < len(run.members)


def test_a_video_whose_next_attempt_is_due_is_not_done(tmp_path):
    layout, settings, run = make_results(tmp_path / "results")
    due = replace(run, attempts={"video0000001": 1})
    assert stages(layout, settings, due)["download"].done == 11


def test_the_pause_between_a_crash_and_its_resumption_does_not_slow_a_stage_down(tmp_path):
    layout, settings, run = make_results(tmp_path / "results")
    rest_ended = START + 80 + 3 * 660 + 30
    make_receipt(layout, "video0000011", rest_ended + 600, seconds=18.0)
    worked = rest_ended - (START + 2) + 18
    assert stages(layout, settings, run)["download"].videos_per_hour == approx(3600 * 12 / worked)


def test_time_lost_to_cool_downs_is_told_apart_from_waiting_for_ones_turn(tmp_path):
    layout, url = Layout(tmp_path / "results"), "https://example.org/x"
    limiter = Limiter(layout, DownloadSettings(cool_down=0.2, video_interval={"*": 0.0}))
    first = limiter.admit(url)
    limiter.throttled(url, first, None)
    second = limiter.admit(url)
    assert first.cooled == 0
    assert 0 < second.cooled <= second.waited
    make_receipt(layout, "a", START, seconds=10.0, waited=6.0, cooled=4.0)
    make_receipt(layout, "b", START, Status.THROTTLED, seconds=10.0)
    assert [read_download(layout, video_id).cooled for video_id in "ab"] == [4.0, 10.0]


def test_yesterdays_work_does_not_slow_down_todays_rates():
    assert last_stretch([(0, 100), (90, 200), (90_000, 90_100), (90_200, 90_300)]) == (90_000, 90_300)
    assert last_stretch([]) is None
    assert covered([(0, 10), (5, 12), (20, 30)]) == 22
    assert covered([(0, 10), (5, 12), (20, 30), (100, 101)], bridge=8) == 31


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (59.6, "60 s"), (600, "10 min"), (3599, "1 h 00 min"), (11_100, "3 h 05 min"), (187_200, "2 d 4 h")],
)
def test_durations_are_read_at_a_glance(seconds, words):
    assert progress.duration(seconds) == words


@pytest.fixture
def directory(tmp_path):
    """A working directory of a workflow that has run."""
    make_results(tmp_path / "results")
    (tmp_path / "config.yaml").write_text("results: results\n")
    return tmp_path


def cuepoint(*arguments, directory):
    with chdir(directory):
        return CliRunner().invoke(app, arguments)


def test_status_shows_the_lines_of_the_last_run(directory):
    shown = cuepoint("status", directory=directory)
    assert shown.exit_code == 0
    lines = shown.output.splitlines()
    assert lines[0].startswith("Not running")
    assert [line.split()[:2] for line in lines[1:4]] == [
        ["download", "12/12"], ["transcribe", "12/12"], ["embed", "12/12"]
    ]  # fmt: skip
    assert f"embed is the bottleneck with {MODEL}" in lines[5]


def test_explain_tells_a_videos_story(directory):
    story = cuepoint("explain", "video0000000", directory=directory).output
    for words in ("in shard 00000", "Title of video0000000", "download: ok", "6 segments", "repetition: Sentence 5",
                  "2 of 100-101 tokens", "transcribe of shard 00000"):  # fmt: skip
        assert words in story
    story = cuepoint("explain", "video0000001", directory=directory).output
    assert "download: unavailable" in story and "This video is private" in story
    unknown = cuepoint("explain", "nobody", directory=directory)
    assert unknown.exit_code == 1
    assert "nobody is not in videos.txt" in unknown.output


def test_a_failing_observer_does_not_fail_the_run(tmp_path, caplog):
    layout, settings, run = make_results(tmp_path / "results")
    layout.logs.mkdir()
    (layout.logs / "progress.log").mkdir()
    live = LiveProgress(layout, settings, run)
    live.start()
    live.stop()
    assert "progress is not shown any more" in caplog.text
    assert live not in logging.getLogger("snakemake.logging").handlers


def test_telemetry_of_a_failed_job_counts_its_videos_as_failed(tmp_path):
    layout, settings, run = make_results(tmp_path / "results")
    path = layout.telemetry / "transcribe" / "00001.parquet"
    make_telemetry(path, "transcribe", START + 2000, START + 2100, error="DataError")
    assert stages(layout, settings, run)["transcribe"].failed == 4


def test_a_line_tells_what_runs_waits_and_failed():
    line = StageProgress("download", done=9, total=15, failed=1, videos_per_hour=640, eta=34).line(running=4)
    for told in ("9/15", "640 videos/h", "ETA 34 s", "4 running", "2 waiting", "1 failed"):
        assert told in line
