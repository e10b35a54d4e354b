"""Curves over the time of a stretch of work: use of the device, and how many videos stood before each stage."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from cuepoint.layout import Layout
from cuepoint.plan import Run
from cuepoint.telemetry import read_telemetry
from cuepoint.work import STAGES, Download, Job, videos_of

BINS = 240  # points of a curve: as many as can be told apart on a page


@dataclass(frozen=True)
class Series:
    """One curve: `values[i]` holds at `times[i]` (Unix times, (BINS,) float64)."""

    name: str
    times: np.ndarray
    values: np.ndarray


def use_over_time(layout: Layout, jobs: Iterable[Job], stretch: tuple[float, float]) -> list[Series]:
    """GPU use (mean over the GPUs in use, 0 to 1) and busy cores (summed over jobs), job by job from the telemetry.

    Where no job ran both are zero: an idle GPU is what the curve is there to show.
    """
    edges = np.linspace(*stretch, BINS + 1)
    width = max(edges[1] - edges[0], 1e-9)
    gpu, gpu_seconds, cores = np.zeros(BINS), np.zeros(BINS), np.zeros(BINS)
    has_gpu = False
    for job in jobs:
        _, rows = read_telemetry(job.path)
        if not len(rows):
            continue
        times = np.append(job.start, rows["time"].to_numpy())
        cores += _binned(times, rows["cpu"].to_numpy(), edges)
        if job.gpu:
            has_gpu = True
            busy = rows["gpu_busy"].to_numpy().astype(float)
            gpu += _binned(times, np.nan_to_num(busy), edges)
            gpu_seconds += _binned(times, np.ones(len(busy)), edges)
    middles = (edges[:-1] + edges[1:]) / 2
    curves = [Series("cores busy", middles, cores / width)]
    if has_gpu:
        curves.insert(0, Series("GPU busy", middles, gpu / np.maximum(gpu_seconds, width)))
    return curves


def _binned(times: np.ndarray, values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Integral over each bin of what holds `values[i]` from `times[i]` to `times[i + 1]` and zero elsewhere."""
    integral = np.append(0.0, np.cumsum(values * np.diff(times)))
    return np.diff(np.interp(edges, times, integral))


def queue_depths(
    run: Run, downloads: Mapping[str, Download], jobs: Iterable[Job], stretch: tuple[float, float]
) -> list[Series]:
    """How many videos stood before transcribe, embed and load: finished by the stage before, not begun by this one."""
    shards = run.shards()
    begun, ended = _times(jobs, shards)
    ended["download"] = {id_: download.end for id_, download in downloads.items()}
    edges = np.linspace(*stretch, BINS + 1)
    middles = (edges[:-1] + edges[1:]) / 2
    curves = []
    for before, stage in pairwise(STAGES):
        enter = np.array(list(ended[before].values()))
        leave = np.array([max(begun[stage].get(id_, np.inf), time) for id_, time in ended[before].items()])
        depth = np.searchsorted(np.sort(enter), middles, "right") - np.searchsorted(np.sort(leave), middles, "right")
        curves.append(Series(f"before {stage}", middles, depth.astype(float)))
    return curves


def _times(
    jobs: Iterable[Job], shards: Mapping[str, list[str]]
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """When each stage began and ended with each video; with several models the first begin and the last end count."""
    begun: dict[str, dict[str, float]] = {stage: {} for stage in STAGES}
    ended: dict[str, dict[str, float]] = {stage: {} for stage in STAGES}
    for job in jobs:
        for video_id in videos_of(job, shards):
            begun[job.stage][video_id] = min(begun[job.stage].get(video_id, np.inf), job.start)
            if not job.running and not job.error:
                ended[job.stage][video_id] = max(ended[job.stage].get(video_id, 0.0), job.end)
    return begun, ended
