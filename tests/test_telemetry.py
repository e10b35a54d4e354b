"""Telemetry: rows while a job runs and after it, and never the reason why a job fails."""

import os

import pytest

from cuepoint import telemetry
from cuepoint.errors import DataError
from cuepoint.telemetry import Telemetry, read_telemetry


def test_what_a_job_counts_is_kept_when_it_ends(tmp_path):
    path = tmp_path / "transcribe" / "s00001.parquet"
    with Telemetry(path, stage="transcribe", name="s00001") as measured:
        measured.add(audio_seconds=30.0)
        measured.add(audio_seconds=12.5, videos=1)
        measured.gauge(queue_clips=7)
        measured.gauge(queue_clips=3)
        with measured.phase("model"), measured.phase("model"):
            pass
    job, table = read_telemetry(path)
    last = table.to_pylist()[-1]
    assert (job["stage"], job["name"], job["pid"], job["error"]) == ("transcribe", "s00001", os.getpid(), None)
    assert (last["audio_seconds"], last["videos"], last["queue_clips"]) == (42.5, 1, 3)
    assert last["rss"] > 1e6
    assert last["phase_model"] >= 0
    assert [file.name for file in path.parent.iterdir()] == ["s00001.parquet"]


def test_a_running_job_can_be_read_and_a_phase_counts_while_it_is_open(tmp_path, monkeypatch):
    monkeypatch.setattr(telemetry, "INTERVAL", 0.001)
    path = tmp_path / "s00001.parquet"
    with Telemetry(path, stage="embed", name="s00001") as measured, measured.phase("load_model"):
        rows = []
        while not any(row.get("phase_load_model") for row in rows):
            try:
                job, table = read_telemetry(path)
            except DataError:
                continue  # the first line is not written yet
            rows = table.to_pylist()
    assert "ended" not in job


def test_the_error_that_ended_a_job_passes_through_and_is_kept(tmp_path):
    path = tmp_path / "s00001.parquet"
    with pytest.raises(KeyError), Telemetry(path, stage="embed", name="s00001"):
        raise KeyError("x")
    assert read_telemetry(path)[0]["error"] == "KeyError"


def test_telemetry_that_cannot_be_written_does_not_fail_the_job(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with Telemetry(tmp_path / "file" / "s00001.parquet", stage="embed", name="s00001"):
        pass
    assert "telemetry of this job is lost" in caplog.text
