"""Models come from the hub once, however many jobs want them, and a run fetches them before its jobs start."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT
from hub import COMMIT, Hub

from cuepoint.layout import Layout
from cuepoint.models import fetch_models
from cuepoint.settings import Settings

FIND = """
from cuepoint.asr.model import find_model
from cuepoint.settings import TranscribeSettings
print(find_model(TranscribeSettings(model="demo/tiny")).revision)
"""
JOBS = 4


@pytest.fixture
def hub():
    with Hub("demo/tiny", ROOT / "demo" / "asr-model", crowd=JOBS) as running:
        yield running


def test_many_jobs_at_once_download_a_model_once(hub, tmp_path):
    environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "cache")}
    jobs = [
        subprocess.Popen([sys.executable, "-c", FIND], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(JOBS)
    ]
    told = [job.communicate(timeout=120)[0].strip() for job in jobs]
    assert told == [COMMIT] * JOBS
    assert hub.asked >= JOBS
    assert hub.fetched["model.bin"] == 1


def test_what_cannot_be_fetched_here_is_said_and_left_to_the_jobs(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fetch_models(Settings(transcribe={"model": "demo/tiny"}), Layout(tmp_path))
    assert "demo/tiny" in caplog.text
    assert "the jobs will try" in caplog.text
