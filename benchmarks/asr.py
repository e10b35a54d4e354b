"""The transcribe stage against loops over files, on this machine: python -m benchmarks.asr --help.

The model has the true architecture and random weights, and gives every clip the same number of tokens; the audio is
made of the demo's voices. The sides take turns, each in a process of its own, and the medians are compared:

- stage: `transcribe_shard`, all videos in one call;
- batched: one `BatchedInferencePipeline.transcribe` after the other, model loaded once;
- sequential: one `WhisperModel.transcribe` after the other, model loaded once;
- processes: as sequential, but a process (and a model) for each file, one after the other.

All have the same model, audio, beam, language, arithmetic and number of threads. `--memory HOURS` measures instead how
much memory the stage needs for one video of that length; `--accuracy` the word error rate of the demo's model.
"""

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import av
import numpy as np

from benchmarks.random_whisper import SIZES, write_model
from cuepoint.asr.shard import transcribe_shard
from cuepoint.asr.speech import RATE, Speech
from cuepoint.layout import Layout
from cuepoint.receipts import Receipt
from cuepoint.settings import TranscribeSettings
from cuepoint.states import Status
from cuepoint.telemetry import Telemetry, read_telemetry

ROOT = Path(__file__).parents[1]
MANIFEST = json.loads((ROOT / "demo" / "manifest.json").read_text())
SIDES = ("stage", "batched", "sequential", "processes")
BEAM = 5
BATCH = 16


def make_audio(folder: Path, minutes: list[float], seed: int = 0) -> list[Path]:
    """Opus files of these lengths out of the demo's spoken clips."""
    draw = np.random.default_rng(seed)
    clips = [_samples(ROOT / "demo" / "clips" / clip["file"]) for clip in MANIFEST if clip["kind"] == "speech"]
    paths = []
    for number, length in enumerate(minutes):
        wanted, pieces = round(length * 60 * RATE), []
        while sum(map(len, pieces)) < wanted:
            pieces.append(clips[draw.integers(len(clips))])
        paths.append(folder / f"file-{number:03d}.mka")
        _write_opus(paths[-1], np.concatenate(pieces)[:wanted])
    return paths


def run_side(side: str, files: list[Path], model: Path, *, threads: int, language: str) -> dict[str, Any]:
    """Transcribe the files in this process; what it took. Runs in a process of its own."""
    before, cpu_before = time.perf_counter(), _cpu_seconds()
    busy, text = {"stage": _stage, "batched": _batched, "sequential": _sequential}[side](
        files, model, threads=threads, language=language
    )
    wall = time.perf_counter() - before
    return {
        "wall": wall,
        "cpu": _cpu_seconds() - cpu_before,
        "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "busy": busy / wall,
        "text": text,
    }


def _stage(files: list[Path], model: Path, *, threads: int, language: str) -> tuple[float, list[str]]:
    # Random words are improbable words: without this all of them would be decoded again.
    settings = TranscribeSettings(model=str(model), language=language, beam_size=BEAM, log_prob_threshold=-100)
    with tempfile.TemporaryDirectory() as folder:
        layout = Layout(Path(folder))
        receipts = [_receipt(path, layout) for path in files]
        telemetry_path = Path(folder, "telemetry.parquet")
        with Telemetry(telemetry_path, stage="transcribe", name="benchmark") as telemetry:
            paths = {"transcripts": layout.transcripts("00001"), "videos": layout.videos("00001")}
            transcribe_shard(receipts, layout, settings, **paths, threads=threads, telemetry=telemetry)
        busy = read_telemetry(telemetry_path)[1]["phase_model"].to_pylist()[-1]
        return busy, _texts(layout.transcripts("00001"), files)


def _receipt(path: Path, layout: Layout) -> Receipt:
    audio = layout.audio(path.stem)
    audio.parent.mkdir(parents=True, exist_ok=True)
    audio.symlink_to(path.resolve())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Receipt(video_id=path.stem, url=path.stem, status=Status.OK, sha256=digest, audio_hash=digest)


def _texts(transcripts: Path, files: list[Path]) -> list[str]:
    from cuepoint.tables import read_table

    rows = read_table(transcripts, columns=["video_id", "text"]).to_pylist()
    return [" ".join(row["text"] for row in rows if row["video_id"] == path.stem) for path in files]


def _batched(files: list[Path], model: Path, *, threads: int, language: str) -> tuple[float, list[str]]:
    from faster_whisper import BatchedInferencePipeline

    loaded = _load(model, threads)
    pipeline = BatchedInferencePipeline(loaded)
    options = {"beam_size": BEAM, "batch_size": BATCH, "language": language, "without_timestamps": False}
    texts = [" ".join(s.text for s in pipeline.transcribe(str(path), **options)[0]) for path in files]
    return loaded.model.seconds, texts


def _sequential(files: list[Path], model: Path, *, threads: int, language: str) -> tuple[float, list[str]]:
    loaded = _load(model, threads)
    # One temperature and no previous text: the words are random, and would be decoded five times. Without stamps, as
    # random ones would make it jump back. With a real model it does more than this, not less.
    options = {"beam_size": BEAM, "temperature": 0.0, "condition_on_previous_text": False, "language": language}
    options["without_timestamps"] = not (model / "trained").exists()
    texts = [" ".join(s.text for s in loaded.transcribe(str(path), vad_filter=True, **options)[0]) for path in files]
    return loaded.model.seconds, texts


class _Timed:
    """CTranslate2's model, and the seconds spent in its calls."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._model, name)
        if name not in {"encode", "generate", "align", "detect_language"}:
            return value

        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return value(*arguments, **named)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def _load(model: Path, threads: int) -> Any:
    from faster_whisper import WhisperModel

    from cuepoint import devices

    on_gpu = devices.choose("auto") == "cuda"
    if on_gpu:
        devices.load_cuda_libraries()
    where = {"device": "cuda", "compute_type": "float16"} if on_gpu else {"device": "cpu", "compute_type": "int8"}
    loaded = WhisperModel(str(model), **where, cpu_threads=threads)
    loaded.model = _Timed(loaded.model)
    return loaded


def measure(side: str, files: list[Path], model: Path, *, threads: int, language: str = "en") -> dict[str, Any]:
    """One run of a side, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.asr", "--threads", str(threads), "--model", str(model)]
    command += ["--language", language]
    if side != "processes":
        return _child([*command, "--side", side, *map(str, files)])
    before = time.perf_counter()
    runs = [_child([*command, "--side", "sequential", str(path)]) for path in files]
    wall = time.perf_counter() - before
    return {
        "wall": wall,
        "cpu": sum(run["cpu"] for run in runs),
        "rss": max(run["rss"] for run in runs),
        "busy": sum(run["busy"] * run["wall"] for run in runs) / wall,
    }


def _child(command: list[str]) -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": command[command.index("--threads") + 1]}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(name: str, minutes: list[float], model: Path, *, rounds: int, threads: int, sides: list[str]) -> None:
    """All sides in turn, `rounds` times; prints medians and, per round, how much faster the stage is."""
    with tempfile.TemporaryDirectory() as folder:
        files = make_audio(Path(folder), minutes)
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for number in range(rounds):
            for side in sides[number % len(sides) :] + sides[: number % len(sides)]:
                runs[side].append(measure(side, files, model, threads=threads))
                print(f"  {name}, round {number + 1}, {side}: {runs[side][-1]['wall']:.1f} s", file=sys.stderr)
    hours = sum(minutes) / 60
    print(f"\n### {name}: {len(minutes)} files, {hours * 60:.0f} minutes\n")
    print(
        "| side | wall s | CPU s | peak RSS MB | audio-hours per hour | wall time in the model | stage is faster by |"
    )
    print("|---|---|---|---|---|---|---|")
    for side, measured in runs.items():
        wall, cpu, rss, busy = (
            statistics.median(run[key] for run in measured) for key in ("wall", "cpu", "rss", "busy")
        )
        ratios = [mine["wall"] / stage["wall"] for mine, stage in zip(measured, runs["stage"], strict=True)]
        print(
            f"| {side} | {wall:.1f} | {cpu:.1f} | {rss / 1e6:.0f} | {hours * 3600 / wall:.1f} | {busy:.0%} | "
            f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f}) |"
        )


def measure_memory(hours: float, model: Path, threads: int) -> None:
    """Peak memory of the stage for one video of this length, and of its decoding and VAD alone."""
    with tempfile.TemporaryDirectory() as folder:
        files = make_audio(Path(folder), [hours * 60])
        run = measure("stage", files, model, threads=threads)
    print(f"one video of {hours:g} h: peak RSS {run['rss'] / 1e6:.0f} MB in {run['wall']:.0f} s")


def measure_preparation(minutes: float) -> None:
    """How fast one thread decodes and finds speech."""
    with tempfile.TemporaryDirectory() as folder:
        (path,) = make_audio(Path(folder), [minutes])
        before = time.thread_time(), time.perf_counter()
        clips = sum(1 for _ in Speech(path))
        cpu, wall = time.thread_time() - before[0], time.perf_counter() - before[1]
    print(f"decoding and VAD of {minutes:g} min, {clips} clips: {wall:.1f} s wall, {cpu:.1f} s CPU of one thread")


def measure_accuracy(model: Path, threads: int) -> None:
    """Word error rate of each side on the demo's spoken clips."""
    import jiwer

    spoken = [clip for clip in MANIFEST if clip["kind"] == "speech"]
    said = [_plain(" ".join(sentence["text"] for sentence in clip["sentences"])) for clip in spoken]
    files = [ROOT / "demo" / "clips" / clip["file"] for clip in spoken]
    for side in ("stage", "batched", "sequential"):
        heard = list(map(_plain, measure(side, files, model, threads=threads)["text"]))
        print(f"word error rate, {side}: {jiwer.wer(said, heard):.1%}")


def _plain(text: str) -> str:
    return " ".join(text.lower().replace(".", " ").replace(":", " ").split())


def _samples(path: Path) -> np.ndarray:
    from faster_whisper.audio import decode_audio

    return (decode_audio(str(path)) * 32767).astype(np.int16)


def _write_opus(path: Path, samples: np.ndarray) -> None:
    with av.open(path, "w") as container:
        stream = container.add_stream("libopus", rate=48_000, layout="mono")
        stream.bit_rate = 32_000
        resampler = av.AudioResampler(format="s16", layout="mono", rate=48_000)
        for at in range(0, len(samples), RATE):
            frame = av.AudioFrame.from_ndarray(samples[None, at : at + RATE], format="s16", layout="mono")
            frame.sample_rate, frame.pts = RATE, at
            for resampled in resampler.resample(frame):
                container.mux(stream.encode(resampled))
        container.mux(stream.encode(None))


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="base", help="architecture of the random model")
    parser.add_argument("--model", type=Path, help="a model directory instead (with --accuracy: demo/asr-model)")
    parser.add_argument("--tokens", type=int, default=100, help="tokens that the random model gives a clip")
    parser.add_argument("--short", type=int, default=6, help="short files (1 to 4 minutes)")
    parser.add_argument("--long", type=int, default=0, help="long files")
    parser.add_argument("--minutes", type=float, default=30, help="length of a long file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--memory", type=float, metavar="HOURS", help="measure memory for one video of this length")
    parser.add_argument("--preparation", type=float, metavar="MINUTES", help="measure decoding and VAD alone")
    parser.add_argument("--accuracy", action="store_true", help="measure word error rates with the demo's model")
    parser.add_argument("--language", default="en", help=argparse.SUPPRESS)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("files", nargs="*", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        result = run_side(given.side, given.files, given.model, threads=given.threads, language=given.language)
        print(json.dumps(result))
        return
    if given.preparation:
        measure_preparation(given.preparation)
        return
    if given.accuracy:
        measure_accuracy(given.model or ROOT / "demo" / "asr-model", given.threads)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = given.model or Path(folder, given.size)
        if given.model is None:
            write_model(model, SIZES[given.size], tokens=given.tokens, quantization="int8")
        if given.memory:
            measure_memory(given.memory, model, given.threads)
            return
        draw = np.random.default_rng(0)
        short = [round(float(length), 2) for length in draw.uniform(1, 4, given.short)]
        options = {"rounds": given.rounds, "threads": given.threads, "sides": given.sides}
        if given.short:
            compare("Short files", short, model, **options)
        if given.long:
            compare("Long files", [given.minutes] * given.long, model, **options)


if __name__ == "__main__":
    main()
