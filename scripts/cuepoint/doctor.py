"""Whether this machine can do a run: each check says what it found and, when something is missing, the mend.

A check asks the part of the library that would fail in the run itself, so that the two never disagree.
"""

import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime
from enum import StrEnum
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import urlsplit

from cuepoint.errors import CuepointError
from cuepoint.layout import Layout
from cuepoint.locks import hold
from cuepoint.settings import Settings
from cuepoint.sources import Entry, read_list

_MAX_AGE_DAYS = 60  # of yt-dlp: sites change, and its releases follow every few weeks
_BYTES_PER_VIDEO = 8 * 1024**2  # 20 minutes at about 48 kbit/s, and what the later stages make of them


class Health(StrEnum):
    """How a check ended."""

    GOOD = "ok"
    DOUBTFUL = "warning"  # a run works without it, or may
    BAD = "missing"  # a run would stop


@dataclass(frozen=True)
class Finding:
    """What a check found, and what to do about it."""

    health: Health
    text: str
    mend: str = ""


@dataclass(frozen=True)
class Project:
    """What a run would work on."""

    settings: Settings
    layout: Layout

    @cached_property
    def entries(self) -> list[Entry]:
        """The listed videos; none when the list cannot be read, which is a finding of its own."""
        try:
            return read_list(self.settings.videos)
        except CuepointError:
            return []


def examine(project: Project) -> list[tuple[str, Finding]]:
    """Run all checks; one that fails in an unforeseen way is a finding too."""
    checks: dict[str, Callable[[Project], Finding]] = {
        "list of videos": check_list,
        "JavaScript runtime": check_javascript,
        "yt-dlp": check_yt_dlp,
        "proxy and cookies": check_access,
        "writing": check_writing,
        "disk space": check_space,
        "GPU": check_gpu,
        "speech model": check_speech_model,
        "embedding models": check_embedding_models,
        "Qdrant": check_qdrant,
    }
    return [(name, _run(check, project)) for name, check in checks.items()]


def check_list(project: Project) -> Finding:
    """The list can be read."""
    if not project.entries:
        read_list(project.settings.videos)  # raises with the reason
    return Finding(Health.GOOD, f"{len(project.entries)} videos in {project.settings.videos}")


def check_javascript(project: Project) -> Finding:
    """A JavaScript runtime that yt-dlp supports, and its scripts: YouTube gives no formats without."""
    from cuepoint.download.classify import javascript_runtimes

    needed = any("youtube.com/" in entry.source for entry in project.entries)
    absent = Health.BAD if needed else Health.DOUBTFUL
    if not (found := javascript_runtimes()):
        text = "none that yt-dlp supports; YouTube needs one"
        return Finding(absent, text, "pip install deno, or install a newer node")
    if (scripts := _installed("yt-dlp-ejs")) is None:
        return Finding(absent, "yt-dlp-ejs is not installed; YouTube needs it", "pip install yt-dlp-ejs")
    return Finding(Health.GOOD, f"{', '.join(found)}, yt-dlp-ejs {scripts}")


def check_yt_dlp(project: Project) -> Finding:
    """yt-dlp is there and of this season; its version is the date of its release."""
    installed = _installed("yt-dlp")
    if installed is None:
        return Finding(Health.BAD, "not installed", "pip install yt-dlp yt-dlp-ejs")
    year, month, day = (int(part) for part in installed.split(".")[:3])
    age = (datetime.now(UTC).date() - date(year, month, day)).days
    text = f"{installed}, {max(age, 0)} days old"
    if age > _MAX_AGE_DAYS:
        return Finding(Health.DOUBTFUL, f"{text}: sites may have changed since", "pip install -U yt-dlp yt-dlp-ejs")
    return Finding(Health.GOOD, text)


def check_access(project: Project) -> Finding:
    """The proxy takes connections and the cookie file can be read. Neither is shown: both may hold secrets."""
    from cuepoint.download.cookies import cookie_path

    proxy, cookies = os.environ.get("CUEPOINT_PROXY"), cookie_path(project.settings.download)
    if proxy:
        address = urlsplit(proxy)
        try:
            socket.create_connection((address.hostname or "", address.port or 80), timeout=5).close()
        except (OSError, ValueError):
            return Finding(Health.BAD, "the proxy does not answer", "correct CUEPOINT_PROXY, or start the proxy")
    if cookies and not os.access(cookies, os.R_OK):
        return Finding(Health.BAD, f"{cookies} cannot be read", "correct download.cookies or CUEPOINT_COOKIES")
    return Finding(Health.GOOD, f"{'a' if proxy else 'no'} proxy, {'a' if cookies else 'no'} cookie file")


def check_writing(project: Project) -> Finding:
    """The results can be written, and their file system has the locks that jobs on several nodes need."""
    place = project.layout.results.resolve()
    mend = "give this user the right to write there, or set `results`"
    try:
        project.layout.state.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=project.layout.state) as folder,
            hold(Path(folder) / "lock", "the test lock"),
        ):
            (Path(folder) / "file").write_text("x")
    except OSError as error:
        return Finding(Health.BAD, f"{place}: {error.strerror}", mend)
    return Finding(Health.GOOD, f"{place} can be written and has locks")


def check_space(project: Project) -> Finding:
    """The disk holds what is still to be downloaded, by a rule of thumb."""
    waiting = sum(not project.layout.receipt(entry.video_id).exists() for entry in project.entries)
    place = next(
        path for path in (project.layout.results.resolve(), *project.layout.results.resolve().parents) if path.exists()
    )
    free, needed = shutil.disk_usage(place).free, waiting * _BYTES_PER_VIDEO
    text = f"{_gib(free)} free, about {_gib(needed)} needed for {waiting} videos"
    if free < needed:
        return Finding(Health.BAD, text, "free some space, or set keep_audio: false")
    return Finding(Health.GOOD, text)


def check_gpu(project: Project) -> Finding:
    """A GPU, if one is wanted, and the CUDA libraries that speech recognition opens by name."""
    from cuepoint import devices

    wanted = {project.settings.transcribe.device, project.settings.embedding.device}
    if not devices.gpus():
        if "cuda" in wanted:
            return Finding(Health.BAD, "none, and a `device` is set to cuda", "see nvidia-smi, or set it to auto")
        return Finding(Health.DOUBTFUL, "none: everything runs on the CPU", "expect about real time for speech")
    devices.load_cuda_libraries()
    return Finding(Health.GOOD, ", ".join(f"{gpu.name} ({_gib(gpu.memory)})" for gpu in devices.gpus()))


def check_speech_model(project: Project) -> Finding:
    """The speech model is here, or can be downloaded (and then it is)."""
    from cuepoint.asr.model import find_model

    found = find_model(project.settings.transcribe)
    return Finding(Health.GOOD, f"{found.name} at {found.folder}")


def check_embedding_models(project: Project) -> Finding:
    """The embedding models are here, or can be downloaded (and then they are)."""
    from cuepoint.embedding.location import locate

    places = [
        f"{name} at {locate(project.settings.embedding.models[name]).path}" for name in project.settings.embedding.use
    ]
    return Finding(Health.GOOD, ", ".join(places))


def check_qdrant(project: Project) -> Finding:
    """The place of the collections answers."""
    from cuepoint import qdrant

    store = qdrant.open_store(project.settings, project.layout)
    for model in project.settings.embedding.use:
        store.published(qdrant.published_name(project.settings, model))
    return Finding(Health.GOOD, f"{qdrant.shown_location(project.settings)} answers")


def _run(check: Callable[[Project], Finding], project: Project) -> Finding:
    try:
        return check(project)
    except CuepointError as error:
        return Finding(Health.BAD, str(error))
    except Exception as error:  # a broken package can raise anything, and the other checks still tell something
        return Finding(Health.BAD, f"{type(error).__name__}: {error}", "see whether the environment is complete")


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
