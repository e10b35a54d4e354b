"""`cuepoint doctor`: each thing that is missing is found before the run finds it, and comes with its mend."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cuepoint import doctor
from cuepoint.cli import app
from cuepoint.doctor import Health, Project
from cuepoint.download import classify
from cuepoint.layout import Layout
from cuepoint.settings import load_settings


@pytest.fixture(autouse=True)
def in_a_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUEPOINT_PROXY", raising=False)
    monkeypatch.delenv("CUEPOINT_COOKIES", raising=False)
    Path("videos.txt").write_text("dQw4w9WgXcQ\nhttps://vimeo.com/1\n")


def project(**settings) -> Project:
    loaded = load_settings(settings)
    return Project(loaded, Layout(loaded.results))


def test_a_missing_javascript_runtime_stops_youtube_and_nothing_else(monkeypatch):
    """The runtimes that are found are replaced: this machine may have one, or none."""
    monkeypatch.setattr(classify, "javascript_runtimes", lambda: [])
    finding = doctor.check_javascript(project())
    assert (finding.health, "deno" in finding.mend) == (Health.BAD, True)
    Path("videos.txt").write_text("https://vimeo.com/1\n")
    assert doctor.check_javascript(project()).health is Health.DOUBTFUL
    monkeypatch.setattr(classify, "javascript_runtimes", lambda: ["deno 2.5.0"])
    assert doctor.check_javascript(project()).health is Health.GOOD


@pytest.mark.parametrize(
    ("installed", "health"), [("2020.01.31", Health.DOUBTFUL), (None, Health.BAD), ("2999.01.31", Health.GOOD)]
)
def test_an_old_yt_dlp_is_doubtful(monkeypatch, installed, health):
    monkeypatch.setattr(doctor, "_installed", lambda _: installed)
    assert doctor.check_yt_dlp(project()).health is health


def test_a_place_that_cannot_be_written_is_named():
    Path("file").write_text("")
    finding = doctor.check_writing(project(results="file/results"))
    assert finding.health is Health.BAD
    assert "file/results" in finding.text
    assert doctor.check_writing(project()).health is Health.GOOD


def test_the_disk_is_compared_with_what_is_still_to_be_downloaded(monkeypatch):
    monkeypatch.setattr(doctor, "_BYTES_PER_VIDEO", 2**60)
    run = project()
    assert doctor.check_space(run).health is Health.BAD
    for entry in run.entries:
        receipt = run.layout.receipt(entry.video_id)
        receipt.parent.mkdir(parents=True)
        receipt.touch()
    assert doctor.check_space(run).health is Health.GOOD


def test_a_dead_proxy_and_a_lost_cookie_file_are_found_and_not_shown(monkeypatch):
    assert doctor.check_access(project()).health is Health.GOOD
    assert doctor.check_access(project(download={"cookies": "nothing.txt"})).health is Health.BAD
    monkeypatch.setenv("CUEPOINT_PROXY", "http://user:hunter2@127.0.0.1:9")
    finding = doctor.check_access(project())
    assert finding.health is Health.BAD
    assert "hunter2" not in finding.text + finding.mend


def test_an_unusable_model_and_a_silent_server_are_findings_like_any_other():
    Path("model").mkdir()
    settings = {
        "transcribe": {"model": "model"},
        "embedding": {"models": {"all-MiniLM-L6-v2": {"model": "package:no_such_package"}}},
        "qdrant": {"location": "http://127.0.0.1:9", "timeout": 1, "attempts": 1},
    }
    findings = dict(doctor.examine(project(**settings)))
    assert "model.bin" in findings["speech model"].text
    assert "no_such_package" in findings["embedding models"].text
    assert findings["Qdrant"].health is Health.BAD
    assert findings["list of videos"].health is Health.GOOD


def test_the_command_shows_every_check_and_fails_when_one_does(monkeypatch):
    def broken(_):
        raise RuntimeError("half installed")

    monkeypatch.setattr(doctor, "check_speech_model", lambda _: doctor.Finding(Health.GOOD, "here"))
    monkeypatch.setattr(doctor, "check_javascript", lambda _: doctor.Finding(Health.GOOD, "here"))
    monkeypatch.setattr(doctor, "check_embedding_models", lambda _: doctor.Finding(Health.DOUBTFUL, "far", "bring it"))
    Path("config.yaml").write_text("{}")
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    assert "warning  embedding models: far\n         -> bring it" in result.stdout
    monkeypatch.setattr(doctor, "check_qdrant", broken)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "missing  Qdrant: RuntimeError: half installed" in result.stdout
    assert "ok       writing" in result.stdout
