"""Telemetry: rows while a job runs and after it, and never the reason why a job fails."""

import ctypes
import os
import shutil
import subprocess

import pynvml
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


NVML = r"""
#include <string.h>
int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) { *device = (void *)uuid; return strcmp(uuid, "GPU-a"); }
int nvmlDeviceGetName(void *device, char *name, unsigned length) { strcpy(name, "Some GPU"); return 0; }
int nvmlDeviceGetMemoryInfo(void *device, unsigned long long *memory) {
  memory[0] = 8ull << 30; memory[1] = 5ull << 30; memory[2] = 3ull << 30; return 0; }
int nvmlDeviceGetUtilizationRates(void *device, unsigned *rates) { rates[0] = 87; rates[1] = 20; return UTILIZATION; }
"""
NOT_SUPPORTED = 3


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler for the stand-in of NVML")
@pytest.mark.parametrize(("answer", "busy"), [(0, 0.87), (NOT_SUPPORTED, None)])
def test_the_watched_gpu_is_sampled_as_far_as_it_tells(tmp_path, monkeypatch, answer, busy):
    # There is no GPU here: NVML is a stand-in in C behind its real Python binding.
    (tmp_path / "nvml.c").write_text(NVML)
    library = tmp_path / f"nvml-{answer}.so"
    command = ["cc", "-shared", "-fPIC", "-w", f"-DUTILIZATION={answer}", "-o", library, tmp_path / "nvml.c"]
    subprocess.run(command, check=True)
    monkeypatch.setattr(pynvml, "nvmlLib", ctypes.CDLL(str(library)))
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    path = tmp_path / "s00001.parquet"
    with Telemetry(path, stage="transcribe", name="s00001") as measured:
        measured.watch_gpu("GPU-a")
    job, table = read_telemetry(path)
    assert job["gpu"] == "Some GPU"
    assert table["gpu_busy"].to_pylist()[-1] == busy
    assert table["gpu_memory"].to_pylist()[-1] == 3 * 2**30


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
