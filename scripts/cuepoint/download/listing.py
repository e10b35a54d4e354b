"""What `sources:` stand for: the videos of channels, playlists and searches, appended to the pinned list."""

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from cuepoint.atomic import write_text
from cuepoint.errors import CuepointError
from cuepoint.layout import Layout
from cuepoint.settings import DownloadSettings
from cuepoint.sources import identify, is_url, parse_list

log = logging.getLogger(__name__)

_MAX_DEPTH = 4  # a channel holds tabs, a tab holds playlists, a playlist holds videos


@dataclass(frozen=True)
class Listed:
    """A video that a source names. What a site does not tell in its listings is None."""

    video_id: str
    source: str
    title: str | None = None
    duration: float | None = None  # seconds
    date: str | None = None  # YYYYMMDD

    def line(self) -> str:
        """The video's line in the list: what identifies it, then title and seconds for those who read it."""
        is_youtube = self.source == f"https://www.youtube.com/watch?v={self.video_id}"
        seconds = "" if self.duration is None else f"{self.duration:.0f}"
        return "\t".join([self.video_id if is_youtube else self.source, self.title or "", seconds]).rstrip("\t")


@dataclass(frozen=True)
class Filters:
    """Which videos are wanted. A filter drops only what is known to be outside of it."""

    newest: int | None = None  # of each source
    after: str | None = None  # YYYYMMDD, included
    before: str | None = None  # YYYYMMDD, included
    min_duration: float | None = None  # seconds
    max_duration: float | None = None  # seconds
    title: str | None = None  # regular expression, looked for anywhere, in any case

    def wants(self, video: Listed) -> bool:
        """Whether nothing that is known about the video speaks against it."""
        return (
            (video.date is None or (self.after or "") <= video.date <= (self.before or "99999999"))
            and (
                video.duration is None
                or (self.min_duration or 0.0) <= video.duration <= (self.max_duration or float("inf"))
            )
            and (self.title is None or re.search(self.title, video.title or "", re.IGNORECASE) is not None)
        )


def list_videos(source: str, filters: Filters, layout: Layout, settings: DownloadSettings) -> list[Listed]:
    """The wanted videos of a source, in the site's own order (channels: newest first), read only as far as needed.

    Raises CuepointError when the source cannot be read.
    """
    from yt_dlp.utils import YoutubeDLError

    from cuepoint.download.fetch import Session, without_secrets
    from cuepoint.download.limiter import Limiter
    from cuepoint.download.programs import no_programs

    # YouTube's listings name ages ("3 weeks ago"): good enough for a filter, and no request a video.
    ages = {"youtubetab": {"approximate_date": [""]}}
    try:
        with closing(Session(layout, settings, Limiter(layout, settings), extractor_args=ages)) as session:
            wanted = (video for video in _walk(session, source, set()) if filters.wants(video))
            with no_programs():  # pages are read while the list is walked
                return list(islice(wanted, filters.newest))
    except YoutubeDLError as error:
        raise CuepointError(f"{source} cannot be read: {without_secrets(str(error))}") from error


def missing(path: Path, videos: Iterable[Listed]) -> list[Listed]:
    """Those of `videos` that the list at `path` does not hold yet, each once."""
    known = {entry.video_id for entry in parse_list(_read(path), str(path))}
    new: dict[str, Listed] = {}
    for video in videos:
        if video.video_id not in known:
            new.setdefault(video.video_id, video)
    return list(new.values())


def append(path: Path, videos: Iterable[Listed]) -> list[Listed]:
    """Append the videos that the list at `path` does not hold yet; returns them. What stands there stays as it is."""
    new = missing(path, videos)
    text = _read(path)
    if text and not text.endswith("\n"):
        text += "\n"
    if new:
        write_text(path, text + "".join(f"{video.line()}\n" for video in new))
    return new


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8-sig") if path.exists() else ""


def _walk(session: Any, url: str, seen: set[str], depth: int = 0) -> Iterator[Listed]:
    """The videos behind a URL, page by page; a list that contains itself, or nothing but lists, comes to an end."""
    if url in seen or depth > _MAX_DEPTH:
        return
    seen.add(url)
    info = session.extract_info(url, download=False, process=False) or {}
    yield from _flatten(session, info | {"webpage_url": info.get("webpage_url") or url}, seen, depth)


def _flatten(session: Any, info: dict[str, Any], seen: set[str], depth: int) -> Iterator[Listed]:
    match info.get("_type", "video"):
        case "playlist" | "multi_video":
            for entry in info.get("entries") or ():
                if entry:
                    yield from _flatten(session, entry, seen, depth + 1)
        case "url" | "url_transparent" if depth == 0 or _is_list(session, info):
            yield from _walk(session, info["url"], seen, depth + 1)
        case _:
            if (video := _listed(info)) is not None:
                yield video


def _is_list(session: Any, entry: dict[str, Any]) -> bool:
    """Whether an entry stands for more videos, as far as its extractor says."""
    if not entry.get("ie_key"):
        return False
    return session.get_info_extractor(entry["ie_key"]).is_single_video(entry["url"]) is False


def _listed(info: dict[str, Any]) -> Listed | None:
    """An entry as a line of the list would have it; None, with a word in the log, for what is no listable video."""
    from cuepoint.download.fetch import clean_text

    url = str(info.get("webpage_url") or info.get("url") or "")
    try:
        if not is_url(url):
            raise ValueError("is no http(s) URL")
        video_id, source = identify(url)
    except ValueError as error:
        log.warning("%r %s; left out", url[:200], error)
        return None
    duration = info.get("duration")
    return Listed(
        video_id,
        source,
        title=clean_text(info.get("title")),
        duration=float(duration) if isinstance(duration, int | float) and 0 < duration < 1e9 else None,
        date=_date(info),
    )


def _date(info: dict[str, Any]) -> str | None:
    if re.fullmatch(r"\d{8}", str(info.get("upload_date") or "")):
        return str(info["upload_date"])
    stamp = info.get("timestamp") or info.get("release_timestamp")
    if isinstance(stamp, int | float) and 0 < stamp < 1e11:
        return datetime.fromtimestamp(stamp, UTC).strftime("%Y%m%d")
    return None
