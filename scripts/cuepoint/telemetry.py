"""What a job does with its machine, second by second: for `cuepoint status` while it runs, for the report afterwards.

A job's telemetry is a small table with one row a second and these columns:

- `time` (Unix time), `cpu` (cores that the process kept busy since the row before), `rss` (bytes of memory);
- `gpu_busy` (share of the last second, 0 to 1) and `gpu_memory` (bytes in use) of the watched GPU, null without one;
- one column for each counter (cumulative: `audio_seconds`, `chunks`) and gauge (value of that moment: `queue_clips`);
- `phase_<name>`: seconds spent in that phase so far, summed over threads, open phases counted.

While the job runs the rows are appended to `<name>.jsonl`, whole lines only, after a first line that says who runs
(`stage`, `name`, `pid`, `host`, `started`, `gpu`). When the job ends, well or not, they become `<name>.parquet`, with
that line and how the job ended (`ended`, `error`) as JSON under the metadata key `cuepoint.job`, and the JSONL goes.
A job that was killed leaves its JSONL; `read_telemetry` reads either.
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from cuepoint.atomic import atomic_path
from cuepoint.errors import DataError

log = logging.getLogger(__name__)

INTERVAL = 1.0  # seconds between rows: fine enough to see a stall, and far below 1 % of one core
_JOB = b"cuepoint.job"


class Telemetry:
    """Samples this process in a thread of its own between `__enter__` and `__exit__`.

    `path` is the Parquet file. Never raises because of what it cannot measure or write: a job does not fail for its
    telemetry. All methods may be called from any thread.
    """

    def __init__(self, path: Path, *, stage: str, name: str) -> None:
        self._path = Path(path)
        self._job: dict[str, Any] = {
            "stage": stage,
            "name": name,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": time.time(),
            "gpu": None,
        }
        self._process = psutil.Process()
        self._cpu_before = (time.perf_counter(), _cpu_seconds(self._process))
        self._gpu: Any = None  # NVML handle
        self._values: dict[str, float] = {}  # counters and gauges
        self._phases: dict[str, float] = {}  # seconds of ended phases
        self._open: dict[object, tuple[str, float]] = {}  # name and start of open ones
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self._job |= {"ended": time.time(), "error": None if kind is None else kind.__name__}
        try:
            _to_parquet(self._path, self._job)
        except (OSError, ValueError, DataError, pa.ArrowException) as problem:  # also half a line of a full disk
            log.warning("telemetry of this job is lost: %s", problem)

    def add(self, **amounts: float) -> None:
        """Add to cumulative counters."""
        with self._lock:
            for name, amount in amounts.items():
                self._values[name] = self._values.get(name, 0) + amount

    def gauge(self, **values: float) -> None:
        """Set current values."""
        with self._lock:
            self._values |= values

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block's wall time as spent in the phase `name`."""
        key = object()
        with self._lock:
            self._open[key] = (name, time.perf_counter())
        try:
            yield
        finally:
            with self._lock:
                _, start = self._open.pop(key)
                self._phases[name] = self._phases.get(name, 0.0) + time.perf_counter() - start

    def watch_gpu(self, uuid: str) -> None:
        """Sample the GPU with this NVML UUID (`GPU-…`) from now on; without NVML nothing is sampled."""
        with suppress(ImportError):
            import pynvml

            try:
                pynvml.nvmlInit()
                self._gpu = pynvml.nvmlDeviceGetHandleByUUID(uuid)
                self._job["gpu"] = pynvml.nvmlDeviceGetName(self._gpu)
            except pynvml.NVMLError as error:
                log.info("GPU use is not measured: %s", error)

    def _run(self) -> None:
        try:
            live = _live(self._path)
            live.parent.mkdir(parents=True, exist_ok=True)
            with live.open("w", encoding="utf-8", buffering=1) as lines:
                _append(lines, self._job)
                while not self._stop.wait(INTERVAL):
                    _append(lines, self._sample())
                _append(lines, self._sample())
        except OSError as error:
            log.warning("telemetry of this job is lost: %s", error)

    def _sample(self) -> dict[str, float | None]:
        now, busy = time.perf_counter(), _cpu_seconds(self._process)
        before, busy_before = self._cpu_before
        self._cpu_before = (now, busy)
        row: dict[str, float | None] = {
            "time": round(time.time(), 3),
            "cpu": round((busy - busy_before) / max(now - before, 1e-6), 3),
            "rss": self._process.memory_info().rss,
            **self._gpu_sample(),
        }
        with self._lock:
            phases = dict(self._phases)
            for name, start in self._open.values():
                phases[name] = phases.get(name, 0.0) + now - start
            row |= self._values
        return row | {f"phase_{name}": round(seconds, 3) for name, seconds in phases.items()}

    def _gpu_sample(self) -> dict[str, float | None]:
        found: dict[str, float | None] = {"gpu_busy": None, "gpu_memory": None}
        if self._gpu is not None:
            import pynvml

            with suppress(pynvml.NVMLError):
                found["gpu_memory"] = pynvml.nvmlDeviceGetMemoryInfo(self._gpu).used
            with suppress(pynvml.NVMLError):  # a MIG slice does not tell
                found["gpu_busy"] = pynvml.nvmlDeviceGetUtilizationRates(self._gpu).gpu / 100
        return found


def read_telemetry(path: Path) -> tuple[dict[str, Any], pa.Table]:
    """The job and its rows, from the Parquet file `path` or, while the job runs, from the JSONL beside it.

    When both are there the JSONL is the newer: a job of the same name is running, or was killed. Raises DataError when
    there is neither, or it is damaged.
    """
    live = _live(path)
    try:
        if live.exists():
            return _read_live(live)
        table = pq.read_table(path, partitioning=None)
        return json.loads((table.schema.metadata or {})[_JOB]), table.replace_schema_metadata(None)
    except FileNotFoundError:
        raise DataError(f"{path}: this job has left no telemetry (yet)") from None
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise DataError(f"{path} is no telemetry ({error}): delete it, the next run of the job writes it") from error


def _live(path: Path) -> Path:
    return path.with_suffix(".jsonl")


def _append(lines: TextIO, value: dict[str, Any]) -> None:
    lines.write(json.dumps(value) + "\n")


def _read_live(path: Path) -> tuple[dict[str, Any], pa.Table]:
    whole = path.read_text(encoding="utf-8").split("\n")[:-1]  # a line that is being written has no end yet
    if not whole:
        raise ValueError("empty")
    job, *rows = map(json.loads, whole)
    if not all(isinstance(each, dict) for each in (job, *rows)):
        raise ValueError("no telemetry")
    columns = dict.fromkeys(name for row in rows for name in row)
    arrays = {name: pa.array([row.get(name) for row in rows], pa.float64()) for name in columns}
    return job, pa.table(arrays)


def _to_parquet(path: Path, job: dict[str, Any]) -> None:
    live = _live(path)
    _, table = _read_live(live)
    table = table.replace_schema_metadata({_JOB: json.dumps(job).encode()})
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    live.unlink()


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system + times.children_user + times.children_system
