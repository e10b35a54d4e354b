"""What a transcribe job asks SLURM for: time and memory from the audio that its receipts tell of."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cuepoint.errors import DataError
from cuepoint.receipts import read_receipt
from cuepoint.settings import TranscribeSettings

# Hours of audio that a job transcribes in an hour, at the least: what old GPUs do, so that a time limit that is derived
# from it holds on any. `slurm.audio_speed` replaces it by what the site's GPUs were measured to do.
_GPU_SPEED = {"tiny": 60.0, "base": 50.0, "small": 30.0, "distil": 25.0, "turbo": 25.0, "medium": 15.0, "large": 10.0}
_CPU_SLOWDOWN = 20.0
_SMALLEST_SPEED = 0.5
# Host memory while a model is loaded, in MB.
_WEIGHTS = {"tiny": 200, "base": 300, "small": 1000, "distil": 3000, "turbo": 3300, "medium": 3100, "large": 6200}

_START_MINUTES = 15  # imports, model from a cold shared file system, waiting for a lock
# CUDA's host memory, libraries, clips that wait (2.5 MB each), and the two Snakemakes of about 130 MB around every job.
_BASE_MB = 4000
_MB_PER_HOUR = 11  # of a video: the audio is read in blocks, what it says is kept (benchmarks/asr.md, 12 hours)
_VIDEOS_AT_ONCE = 8  # at most, each taken to be as long as the longest


def audio_lengths(receipts: Iterable[str | Path]) -> list[float]:
    """Seconds of audio behind each receipt, 0 for a video without.

    Raises FileNotFoundError while a receipt is missing: in a resource function that tells Snakemake "not known yet".
    """
    lengths = []
    for path in map(Path, receipts):
        path.stat()
        try:
            lengths.append(read_receipt(path).duration or 0.0)
        except DataError:
            lengths.append(0.0)  # the job itself says what is wrong; an estimate must not stop the whole run
    return lengths


def transcribe_minutes(
    lengths: Iterable[float], settings: TranscribeSettings, attempt: int = 1, speed: float | None = None
) -> int:
    """Run time in minutes to ask for, for audio of `lengths` seconds; more for each further `attempt`."""
    speed = speed or _guessed_speed(settings)
    return attempt * (_START_MINUTES + round(sum(lengths) / 60 / speed))


def transcribe_memory(lengths: Iterable[float], settings: TranscribeSettings, attempt: int = 1) -> int:
    """Host memory in MB to ask for, for audio of `lengths` seconds; more for each further `attempt`."""
    longest_hours = max(lengths, default=0.0) / 3600
    kept = _VIDEOS_AT_ONCE * longest_hours * _MB_PER_HOUR
    return attempt * (_BASE_MB + _weights(settings.model) + round(kept))


def _guessed_speed(settings: TranscribeSettings) -> float:
    speed = _of_model(_GPU_SPEED, settings.model)
    return max(speed / _CPU_SLOWDOWN, _SMALLEST_SPEED) if settings.device == "cpu" else speed


def _weights(model: str) -> int:
    """MB of host memory for the model's weights: of a local directory what its files hold."""
    files = [path for path in Path(model).glob("*") if path.is_file()] if Path(model).is_dir() else []
    return round(sum(path.stat().st_size for path in files) / 1e6) if files else _of_model(_WEIGHTS, model)


def _of_model(table: Mapping[str, Any], model: str) -> Any:
    """The value of the first size that the model's name contains (`turbo` before `large`); the largest's otherwise."""
    return next((value for size, value in table.items() if size in model.lower()), table["large"])
