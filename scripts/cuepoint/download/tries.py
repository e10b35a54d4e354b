"""All tries at one video within one run: what ends it, what is tried again, and after which pause."""

import logging
import math
import random
import re
import shutil
import time
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import av
from yt_dlp.utils import YoutubeDLError

from cuepoint.download.classify import Ended, Verdict, classify
from cuepoint.download.fetch import Fetcher, clean_text, without_secrets
from cuepoint.download.limiter import CircuitExhausted, Limiter
from cuepoint.download.remux import Audio, file_hash, remux
from cuepoint.errors import EnvironmentFault
from cuepoint.layout import Layout
from cuepoint.plan import source_stamp
from cuepoint.settings import DownloadSettings
from cuepoint.states import Status

log = logging.getLogger(__name__)

_YEAR = 366 * 86_400.0  # seconds: nobody waits longer, whatever a page says


@dataclass(frozen=True)
class Try:
    """How one try ended, and what was learnt in it (fields of a receipt)."""

    verdict: Verdict
    facts: dict[str, Any] = field(default_factory=dict)
    damaged: str | None = None  # hash of a file that came whole and that nothing can decode


def from_file(source: Path, target: Path) -> dict[str, Any]:
    """Take the audio track of a local media file to `target`; returns fields of a receipt.

    A file stays as it is until someone changes it (and then the rule runs again), so nothing is tried twice.
    """
    if source_stamp(str(source)) is None or not source.is_file():  # also of a name that no file can have
        verdict = Verdict(Status.UNAVAILABLE, f"there is no file {source}")
        return _end(Try(verdict), tries=1)
    facts = {"title": clean_text(source.stem)}
    try:
        audio = remux(source, target)
    except av.FFmpegError as error:
        _raise_local_fault(error)
        return _end(Try(Verdict(Status.UNAVAILABLE, f"{source} is no media file ({error.strerror})"), facts), tries=1)
    if audio and audio.stated_duration and _falls_short(audio.duration, audio.stated_duration):
        log.warning("%s holds %.1f s of the %.1f s that it states", source, audio.duration, audio.stated_duration)
    return _end(_judge(audio, None, facts), tries=1)


def from_url(source: str, target: Path, layout: Layout, settings: DownloadSettings) -> dict[str, Any]:
    """Try to download `source` to `target` until that ended in a state; returns fields of a receipt.

    Transient errors are tried `settings.attempts` times, an "unavailable" without a reason is confirmed once, and so is
    a file that cannot be decoded: when the site sends the same bytes again, it has no others. Being throttled is not
    counted, the limiter's budget ends it.
    """
    limiter = Limiter(layout, settings)
    partial = layout.partial(target.stem)
    tries, waited, cooled, confirmed, afresh = 0, 0.0, 0.0, False, False
    damaged: set[str] = set()
    refusals: set[float] = set()  # circuits of the site that this video opened: others were answered in between
    while True:
        try:
            admission = limiter.admit(source)
        except CircuitExhausted as exhausted:
            return _end(Try(Verdict(Status.THROTTLED, str(exhausted))), tries, waited, cooled)
        waited += admission.waited
        cooled += admission.cooled
        partial.mkdir(parents=True, exist_ok=True)
        ended = _try(source, target, Fetcher(partial, layout, settings, limiter))
        if ended.damaged in damaged:
            verdict = Verdict(Status.UNAVAILABLE, f"{ended.verdict.message}, and the same bytes came twice")
            ended = replace(ended, verdict=verdict)
        elif ended.damaged:
            damaged.add(ended.damaged)
        verdict = ended.verdict
        if "HTTP Error 416" in verdict.message and not afresh:
            # A job was killed between the last byte and the file's name: there is nothing left to ask for.
            log.info("the partial download cannot be gone on with: starting afresh")
            shutil.rmtree(partial, ignore_errors=True)
            afresh = True
            limiter.undecided(source, admission)
            continue
        log.info("%s: %s", verdict.status, verdict.message or source)
        match verdict.status:
            case Status.THROTTLED:
                refusals.add(limiter.throttled(source, admission, verdict.retry_after))
                if len(refusals) > settings.attempts:
                    return _end(ended, tries, waited, cooled)
                continue
            case Status.TRANSIENT:
                limiter.undecided(source, admission)
            case _:
                limiter.answered(source, admission)
        tries += 1
        if verdict.bare and not confirmed:
            confirmed = True
        elif verdict.status is not Status.TRANSIENT or tries >= settings.attempts:
            return _end(ended, tries, waited, cooled)
        pause = settings.backoff * 2 ** (tries - 1) * random.uniform(0.5, 1.0)
        log.info("tried again in %.1f s", pause)
        time.sleep(pause)


def _try(source: str, target: Path, fetcher: Fetcher) -> Try:
    try:
        with closing(fetcher):
            fetched = fetcher.fetch(source)
    except EnvironmentFault:
        raise
    except Exception as error:  # yt-dlp and its 1,800 extractors may raise anything
        if not isinstance(error, YoutubeDLError | Ended):
            log.info("an error that yt-dlp did not expect", exc_info=True)
        verdict = classify(error, source)
        verdict = replace(verdict, message=without_secrets(verdict.message))
        return Try(verdict, _facts(fetcher.info))
    facts = _facts(fetched.info)
    try:
        ended = _judge(remux(fetched.path, target), facts["advertised_duration"], facts)
    except av.FFmpegError as error:
        _raise_local_fault(error)
        verdict = Verdict(Status.TRANSIENT, f"what was downloaded is no media file ({error.strerror})")
        ended = Try(verdict, facts, damaged=None if _is_text(fetched.path) else file_hash(fetched.path))
    if ended.verdict.status is not Status.OK:
        fetched.path.unlink()  # whole by the server's word and yet wrong: going on from it would keep the damage
        target.unlink(missing_ok=True)
    return ended


def _is_text(path: Path) -> bool:
    """Whether a file begins like a page or a message: what a site that refuses a session sends in place of media."""
    with path.open("rb") as file:
        head = file.read(512).strip()
    return not head or head.isascii()


def _judge(audio: Audio | None, advertised: float | None, facts: dict[str, Any]) -> Try:
    """Whether what was kept is all that was advertised, by the site or else by the container's header."""
    if audio is None:
        return Try(Verdict(Status.EMPTY, "the file has no audio track"), facts)
    kept = {name: getattr(audio, name) for name in ("duration", "codec", "bit_rate", "bytes", "sha256", "audio_hash")}
    if advertised and _falls_short(audio.duration, advertised):
        message = f"{audio.duration:.1f} s of audio were received of {advertised:.1f} s"
        return Try(Verdict(Status.TRANSIENT, message), facts)
    if audio.duration <= 0:
        return Try(Verdict(Status.EMPTY, "the audio track holds no sound"), facts)
    return Try(Verdict(Status.OK, ""), facts | kept)


def _falls_short(decoded: float, advertised: float) -> bool:
    return advertised - decoded > max(2.0, 0.01 * advertised)


def _end(ended: Try, tries: int, waited: float = 0.0, cooled: float = 0.0) -> dict[str, Any]:
    verdict = ended.verdict
    due = None if verdict.retry_after is None else time.time() + min(verdict.retry_after, _YEAR)
    return ended.facts | {
        "status": verdict.status,
        "error": verdict.message or None,
        "retry_after": due,
        "attempts": tries,
        "waited": round(waited, 3),
        "cooled": round(cooled, 3),
    }


def _raise_local_fault(error: av.FFmpegError) -> None:
    """Raise EnvironmentFault when PyAV met a full disk or the like, and nothing about the media."""
    if isinstance(error, OSError):
        classify(error)


def _facts(info: dict[str, Any]) -> dict[str, Any]:
    """What a site says about a video, as fields of a receipt. All of it is data from outside: checked and cleaned."""
    date = str(info.get("upload_date") or "")
    return {
        "title": clean_text(info.get("title")),
        "channel": clean_text(info.get("channel") or info.get("uploader")),
        "channel_id": clean_text(info.get("channel_id") or info.get("uploader_id")),
        "upload_date": date if re.fullmatch(r"\d{8}", date) else None,
        "advertised_duration": _seconds(info.get("duration")),
        "format_id": clean_text(info.get("format_id")),
        "language": clean_text(info.get("language")),
    }


def _seconds(value: Any) -> float | None:
    is_usable = isinstance(value, int | float) and math.isfinite(value) and value > 0
    return float(value) if is_usable else None
