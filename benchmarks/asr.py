"""The transcribe stage against loops over files, on this machine: python -m benchmarks.asr --help.

The model has the true architecture and random weights, and gives every clip the same number of tokens; the audio is
made of the demo's voices. The sides take turns, each in a process of its own, and the medians are compared:

- stage: `transcribe_shard`, all videos in one call;
- batched: one `BatchedInferencePipeline.transcribe` after the other, model loaded once;
- sequential: one `WhisperModel.transcribe` after the other, model loaded once;
- processes: as sequential, but a process (and a model) for each file, one after the other.

All have the same model, audio, beam, language, arithmetic and number of threads. With a GPU all run there, in float16.
Measured instead of the sides: `--memory HOURS`, `--preparation MINUTES`, `--split`, `--telemetry`, `--accuracy`.
"""

import argparse
import hashlib
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import av
import jiwer
import numpy as np
import psutil
import pyarrow as pa

from benchmarks.random_whisper import SIZES, write_model
from cuepoint import devices
from cuepoint.asr.engine import Group, load
from cuepoint.asr.model import find_model
from cuepoint.asr.shard import transcribe_shard
from cuepoint.asr.speech import RATE, Speech
from cuepoint.layout import Layout
from cuepoint.receipts import Receipt
from cuepoint.settings import TranscribeSettings
from cuepoint.states import Status
from cuepoint.tables import read_table
from cuepoint.telemetry import Telemetry, read_telemetry

ROOT = Path(__file__).parents[1]
MANIFEST = json.loads((ROOT / "demo" / "manifest.json").read_text())
SIDES = ("stage", "batched", "sequential", "processes")
BEAM = 5
PIECE = 30  # minutes: longer files repeat their first so many
JOB = 1200  # hours of audio, for which the cost of each side is told


def make_audio(folder: Path, minutes: list[float], seed: int = 0) -> list[Path]:
    """Opus files of these lengths out of the demo's spoken clips."""
    draw = np.random.default_rng(seed)
    clips = [_samples(ROOT / "demo" / "clips" / clip["file"]) for clip in MANIFEST if clip["kind"] == "speech"]
    paths = []
    for number, length in enumerate(minutes):
        times = math.ceil(length / PIECE)
        wanted, pieces = round(length / times * 60 * RATE), []
        while sum(map(len, pieces)) < wanted:
            pieces.append(clips[draw.integers(len(clips))])
        paths.append(folder / f"file-{number:03d}.mka")
        write_opus(paths[-1], np.concatenate(pieces)[:wanted], times)
    return paths


@dataclass(frozen=True)
class Options:
    """What all sides of a comparison have in common."""

    model: Path
    trained: bool  # False: random weights, for which all text is improbable and no stamp means anything
    threads: int
    batch: int
    language: str


def run_side(side: str, files: list[Path], options: Options) -> dict[str, Any]:
    """Transcribe the files in this process; what it took. Runs in a process of its own."""
    transcribe = {"stage": _stage, "batched": _batched, "sequential": _sequential}[side]
    with tempfile.TemporaryDirectory() as folder:
        watch = Path(folder, "watch.parquet")
        with Telemetry(watch, stage="benchmark", name=side) as telemetry:
            if devices.count():
                telemetry.watch_gpu(devices.gpus()[0].uuid)
            before, cpu_before = time.perf_counter(), _cpu_seconds()
            in_model, texts = transcribe(files, options)
            wall, cpu = time.perf_counter() - before, _cpu_seconds() - cpu_before
        on_gpu = [busy for busy in read_telemetry(watch)[1]["gpu_busy"].to_pylist() if busy is not None]
    return {
        "wall": wall,
        "cpu": cpu,
        "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "busy": in_model / wall,
        "gpu": statistics.mean(on_gpu) if on_gpu else 0.0,
        "text": texts,
    }


def _stage(files: list[Path], options: Options) -> tuple[float, list[str]]:
    return _watched_stage(files, options)[:2]


def _watched_stage(files: list[Path], options: Options) -> tuple[float, list[str], pa.Table]:
    """Seconds in the model, the text of each file, and the telemetry."""
    settings = TranscribeSettings(
        model=str(options.model), language=options.language, beam_size=BEAM, batch_size=options.batch
    )
    if not options.trained:  # else all of it would be decoded again
        settings = settings.model_copy(update={"log_prob_threshold": -100.0})
    with tempfile.TemporaryDirectory() as folder:
        layout = Layout(Path(folder))
        receipts = [_receipt(path, layout) for path in files]
        telemetry_path = Path(folder, "telemetry.parquet")
        with Telemetry(telemetry_path, stage="transcribe", name="benchmark") as telemetry:
            paths = {"transcripts": layout.transcripts("00001"), "videos": layout.videos("00001")}
            transcribe_shard(receipts, layout, settings, **paths, threads=options.threads, telemetry=telemetry)
        rows = read_telemetry(telemetry_path)[1]
        return rows["phase_model"].to_pylist()[-1], _texts(layout.transcripts("00001"), files), rows


def _receipt(path: Path, layout: Layout) -> Receipt:
    with av.open(path) as container:
        duration = container.duration / av.time_base
    audio = layout.audio(path.stem)
    audio.parent.mkdir(parents=True, exist_ok=True)
    audio.symlink_to(path.resolve())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Receipt(
        video_id=path.stem, url=path.stem, status=Status.OK, sha256=digest, audio_hash=digest, duration=duration
    )


def _texts(transcripts: Path, files: list[Path]) -> list[str]:
    rows = read_table(transcripts, columns=["video_id", "text"]).to_pylist()
    return [" ".join(row["text"] for row in rows if row["video_id"] == path.stem) for path in files]


def _batched(files: list[Path], options: Options) -> tuple[float, list[str]]:
    from faster_whisper import BatchedInferencePipeline

    loaded = _load(options)
    pipeline = BatchedInferencePipeline(loaded)
    same = {"beam_size": BEAM, "batch_size": options.batch, "language": options.language, "without_timestamps": False}
    texts = [" ".join(segment.text for segment in pipeline.transcribe(str(path), **same)[0]) for path in files]
    return loaded.model.seconds, texts


def _sequential(files: list[Path], options: Options) -> tuple[float, list[str]]:
    loaded = _load(options)
    same: dict[str, Any] = {"beam_size": BEAM, "language": options.language, "vad_filter": True}
    same["condition_on_previous_text"] = False  # the demo's model never learnt from it
    if not options.trained:
        # Random words would be decoded at all temperatures, and random stamps make it jump back: a real model costs
        # more than this, not less.
        same |= {"temperature": 0.0, "without_timestamps": True}
    texts = [" ".join(segment.text for segment in loaded.transcribe(str(path), **same)[0]) for path in files]
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


def _load(options: Options) -> Any:
    from faster_whisper import WhisperModel

    on_gpu = devices.choose("auto") == "cuda"
    if on_gpu:
        devices.load_cuda_libraries()
    where = {"device": "cuda", "compute_type": "float16"} if on_gpu else {"device": "cpu", "compute_type": "int8"}
    loaded = WhisperModel(str(options.model), **where, cpu_threads=options.threads)
    loaded.model = _Timed(loaded.model)
    return loaded


def measure(side: str, files: list[Path], options: Options) -> dict[str, Any]:
    """One run of a side, in a fresh process."""
    if side != "processes":
        return _child(side, files, options)
    before = time.perf_counter()
    runs = [_child("sequential", [path], options) for path in files]
    wall = time.perf_counter() - before
    return {
        "wall": wall,
        "cpu": sum(run["cpu"] for run in runs),
        "rss": max(run["rss"] for run in runs),
        "busy": sum(run["busy"] * run["wall"] for run in runs) / wall,
        "gpu": sum(run["gpu"] * run["wall"] for run in runs) / wall,
    }


def _child(side: str, files: list[Path], options: Options) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.asr", "--side", side, "--model", str(options.model)]
    command += ["--threads", str(options.threads), "--batch", str(options.batch), "--language", options.language]
    if not options.trained:
        command += ["--random"]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run([*command, *map(str, files)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(name: str, minutes: list[float], options: Options, *, rounds: int, sides: list[str]) -> None:
    """All sides in turn, `rounds` times; prints medians and, per round, how much faster the stage is."""
    with tempfile.TemporaryDirectory() as folder:
        files = make_audio(Path(folder), minutes)
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for number in range(rounds):
            for side in sides[number % len(sides) :] + sides[: number % len(sides)]:
                run, others = _beside_others(partial(measure, side, files, options))
                runs[side].append(run)
                told = f"{run['wall']:.1f} s, other programs used {others:.0%} of the cores"
                print(f"  {name}, round {number + 1}, {side}: {told}", file=sys.stderr)
    hours = sum(minutes) / 60
    price = "GPU-hours" if devices.count() else "core-hours"
    print(f"\n### {name}: {len(minutes)} files, {hours * 60:.0f} minutes\n")
    print(
        "| side | wall s | CPU s | peak RSS MB | audio-hours per hour | wall time in the model | GPU busy | "
        f"{price} for {JOB:,} h | stage is faster by |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for side, measured in runs.items():
        wall, cpu, rss, busy, gpu = (
            statistics.median(run[key] for run in measured) for key in ("wall", "cpu", "rss", "busy", "gpu")
        )
        ratios = [mine["wall"] / stage["wall"] for mine, stage in zip(measured, runs["stage"], strict=True)]
        devices_held = 1 if devices.count() else options.threads
        print(
            f"| {side} | {wall:.1f} | {cpu:.1f} | {rss / 1e6:.0f} | {hours * 3600 / wall:.1f} | {busy:.0%} | "
            f"{format(gpu, '.0%') if devices.count() else ''} | "
            f"{devices_held * JOB * wall / hours / 3600:.1f} | "
            f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f}) |"
        )


def _beside_others(measured: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], float]:
    """What is measured in child processes, and the share of all cores that other programs used meanwhile."""

    def seconds() -> float:
        times = psutil.cpu_times()
        own = resource.getrusage(resource.RUSAGE_CHILDREN)
        return sum(times) - times.idle - times.iowait - times.guest - times.guest_nice - own.ru_utime - own.ru_stime

    before, busy_before = time.perf_counter(), seconds()
    result = measured()
    available = (time.perf_counter() - before) * (os.cpu_count() or 1)
    return result, max(0.0, seconds() - busy_before) / available


def measure_memory(hours: float, options: Options) -> None:
    """Memory of the stage for one video of this length, tenth by tenth of its speech; in this process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.asr", "--make", folder, "--minutes", str(60 * hours)]
        subprocess.run(command, cwd=ROOT, check=True)
        before = time.perf_counter()
        _, _, table = _watched_stage([Path(folder, "file-000.mka")], options)
        wall = time.perf_counter() - before
    rows = table.to_pylist()
    spoken = rows[-1]["speech_seconds"]
    print(f"one video of {hours:g} h, {spoken / 3600:.1f} h of it speech: {wall:.0f} s")
    for tenth in range(1, 11):
        so_far = [row["rss"] for row in rows if (row["speech_seconds"] or 0) <= spoken * tenth / 10]
        print(
            f"  after {tenth * 10} % of the speech: peak RSS {max(so_far) / 1e6:.0f} MB, now {so_far[-1] / 1e6:.0f} MB"
        )


def measure_preparation(minutes: float) -> None:
    """How fast one thread decodes and finds speech."""
    with tempfile.TemporaryDirectory() as folder:
        (path,) = make_audio(Path(folder), [minutes])
        before = time.thread_time(), time.perf_counter()
        clips = sum(1 for _ in Speech(path))
        cpu, wall = time.thread_time() - before[0], time.perf_counter() - before[1]
    print(f"decoding and VAD of {minutes:g} min, {clips} clips: {wall:.1f} s wall, {cpu:.1f} s CPU of one thread")


def measure_split(options: Options) -> None:
    """Seconds a clip of 29 s takes, by how the cores are split and by how many clips are in a call; CPU only."""
    import ctranslate2

    settings = TranscribeSettings(
        model=str(options.model), language="en", beam_size=BEAM, device="cpu", log_prob_threshold=-100.0
    )
    engine = load(find_model(settings), settings, None, workers=1)
    speech = np.concatenate(
        [_samples(ROOT / "demo" / "clips" / clip["file"]) for clip in MANIFEST if clip["kind"] == "speech"]
    )
    features = [engine.prepare(speech[at * 29 * RATE :][: 29 * RATE]) for at in range(8)]

    def decode(clips: int) -> None:
        for at in range(0, len(features), clips):
            engine.transcribe([Group(features[at : at + clips], [29.0] * clips, "en")])

    print("| clips in a call | seconds a clip in the encoder, one thread |\n|---|---|")
    for clips in (1, 2, 4, 8):
        before = time.perf_counter()
        for at in range(0, len(features), clips):
            engine._model.encode(np.stack(features[at : at + clips]))
        print(f"| {clips} | {(time.perf_counter() - before) / len(features):.2f} |", flush=True)
    print("\n| workers x threads | clips in a call | seconds a clip |\n|---|---|---|")
    cores = options.threads
    splits = {(1, 1), (1, cores), (cores, 1), *((n, cores // n) for n in (2, 4, 8) if n < cores)}
    for workers, threads in sorted(splits):
        engine._model.model = ctranslate2.models.Whisper(
            str(options.model), device="cpu", compute_type="int8", inter_threads=workers, intra_threads=threads
        )
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(decode, [8] * workers))  # warm
            for clips in (1, 2, 4, 8):
                before = time.perf_counter()
                list(pool.map(decode, [clips] * workers))
                took = (time.perf_counter() - before) / (workers * len(features))
                print(f"| {workers} x {threads} | {clips} | {took:.2f} |", flush=True)


def measure_telemetry() -> None:
    """Processor time of the telemetry: its rows, one a second, and what the pipeline calls for each batch."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Telemetry(Path(folder, "t.parquet"), stage="x", name="x") as telemetry,
    ):
        for number in range(8):
            telemetry.add(**{f"counter_{number}": 1.0})
        before = _cpu_seconds()
        time.sleep(30)
        rows = (_cpu_seconds() - before) / 30
        calls, before = 10_000, _cpu_seconds()
        for _ in range(calls):  # what a group of clips costs: see pipeline.py
            with telemetry.phase("model"):
                telemetry.gauge(queue_clips=1, queue_videos=1)
                telemetry.gauge(queue_clips=1, queue_videos=1)
                telemetry.add(speech_seconds=1.0, clips=4)
        batch = (_cpu_seconds() - before) / calls
    print(f"telemetry: {rows:.2%} of a core for its rows, {batch * 1e6:.0f} us for a batch of clips")


def measure_accuracy(options: Options) -> None:
    """Word error rate of each side: on the demo's clips and on held-out recordings made for it."""
    from demo.train.evaluate import clip_recordings, held_out_recordings, normalise

    sets = {
        "the demo's clips": clip_recordings(),
        "held out, 5 sentences": held_out_recordings(40),
        "held out, 15 sentences": held_out_recordings(12, sentences=15),
        "held out, light noise": held_out_recordings(20, noise=0.002),
    }
    sides = ("sequential", "batched", "stage")
    print(f"| recordings | {' | '.join(sides)} |\n|---|---|---|---|")
    all_said: list[str] = []
    all_heard: list[list[str]] = [[] for _ in sides]
    for name, recordings in sets.items():
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder, f"file-{number:03d}.mka") for number in range(len(recordings))]
            for path, recording in zip(files, recordings, strict=True):
                write_opus(path, (recording.audio.clip(-1, 1) * 32767).astype(np.int16))
            said = [normalise(recording.text) for recording in recordings]
            heard = [list(map(normalise, measure(side, files, options)["text"])) for side in sides]
        _print_error_rates(name, said, heard)
        all_said += said
        for texts, more in zip(all_heard, heard, strict=True):
            texts.extend(more)
    _print_error_rates("all", all_said, all_heard)


def _print_error_rates(name: str, said: list[str], heard: list[list[str]]) -> None:
    print(f"| {name} | {' | '.join(f'{jiwer.wer(said, texts):.2%}' for texts in heard)} |", flush=True)


def _samples(path: Path) -> np.ndarray:
    from faster_whisper.audio import decode_audio

    return (decode_audio(str(path)) * 32767).astype(np.int16)


def write_opus(path: Path, samples: np.ndarray, times: int = 1) -> None:
    """Write (n,) int16, `times` times one after the other."""
    with av.open(path, "w") as container:
        stream = container.add_stream("libopus", rate=48_000, layout="mono")
        stream.bit_rate = 32_000
        resampler = av.AudioResampler(format="s16", layout="mono", rate=48_000)
        packets: list[av.Packet] = []
        for at in range(0, len(samples), RATE):
            frame = av.AudioFrame.from_ndarray(samples[None, at : at + RATE], format="s16", layout="mono")
            frame.sample_rate, frame.pts = RATE, at
            for resampled in resampler.resample(frame):
                packets += stream.encode(resampled)
        packets += stream.encode(None)
        length = packets[-1].pts + packets[1].pts - 2 * packets[0].pts  # the last packet may be short
        for number in range(times):
            for packet in packets:
                again = av.Packet(bytes(packet))
                again.stream, again.time_base, again.duration = stream, packet.time_base, packet.duration
                again.pts = again.dts = packet.pts + number * length
                container.mux(again)


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="base", help="architecture of the random model")
    parser.add_argument("--model", type=Path, help="a directory with a real model instead")
    parser.add_argument("--tokens", type=int, default=105, help="tokens that the random model gives a clip")
    parser.add_argument("--short", type=int, default=6, help="short files (1 to 4 minutes)")
    parser.add_argument("--long", type=int, default=0, help="long files")
    parser.add_argument("--minutes", type=float, default=30, help="length of a long file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch", type=int, default=8, help="clips in a batch (8 is faster-whisper's default)")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--memory", type=float, metavar="HOURS", help="memory for one video of this length")
    parser.add_argument("--preparation", type=float, metavar="MINUTES", help="decoding and VAD alone")
    parser.add_argument("--split", action="store_true", help="workers, threads and clips in a call, on a CPU")
    parser.add_argument("--telemetry", action="store_true", help="what telemetry costs")
    parser.add_argument(
        "--accuracy", action="store_true", help="word error rates, of the demo's model if none is given"
    )
    parser.add_argument("--language", default="en", help=argparse.SUPPRESS)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--random", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("files", nargs="*", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.accuracy and not given.model:
        given.model = ROOT / "demo" / "asr-model"
    if given.make:
        make_audio(given.make, [given.minutes])
        return
    if given.preparation:
        measure_preparation(given.preparation)
        return
    if given.telemetry:
        measure_telemetry()
        return
    with tempfile.TemporaryDirectory() as folder:
        options = Options(
            model=given.model or Path(folder, given.size),
            trained=given.model is not None and not given.random,
            threads=given.threads,
            batch=given.batch,
            language=given.language,
        )
        if given.side:
            print(json.dumps(run_side(given.side, given.files, options)))
            return
        if given.model is None:
            write_model(options.model, SIZES[given.size], tokens=given.tokens, quantization="int8")
        if given.accuracy:
            measure_accuracy(options)
        elif given.split:
            measure_split(options)
        elif given.memory:
            measure_memory(given.memory, options)
        else:
            draw = np.random.default_rng(0)
            short = [round(float(length), 2) for length in draw.uniform(1, 4, given.short)]
            for name, minutes in (("Short files", short), ("Long files", [given.minutes] * given.long)):
                if minutes:
                    compare(name, minutes, options, rounds=given.rounds, sides=given.sides)


if __name__ == "__main__":
    main()
