"""One try at one video with yt-dlp: from a URL to a media file on this disk, or an error that says why not."""

import logging
import math
import os
import threading
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from yt_dlp import YoutubeDL

from cuepoint.download.classify import HOUR, Ended, Verdict
from cuepoint.download.cookies import cookie_path
from cuepoint.download.limiter import Limiter
from cuepoint.download.programs import JAVASCRIPT, leave_out_plugins, no_programs
from cuepoint.errors import EnvironmentFault
from cuepoint.layout import Layout
from cuepoint.settings import DownloadSettings
from cuepoint.states import Status

log = logging.getLogger(__name__)

_MAX_PAGE_BYTES = 64 * 1024**2  # of a page or an API answer; the largest real ones have a few MB
_MIN_RATE = 1024  # bytes/s: a transfer that is slower brings less audio than is spoken meanwhile
_MAX_TEXT = 1000  # characters of a title or a name that are kept
_BLOCK = 16 * 1024  # bytes read at a time, so that the speed of a slow transfer is seen while it goes on


@dataclass(frozen=True)
class Fetched:
    """A downloaded media file and what the site says about it."""

    path: Path
    info: dict[str, Any]


class Session(YoutubeDL):
    """yt-dlp as this project uses it: its requests go through the limiter, its answers are bounded in size."""

    def __init__(self, layout: Layout, settings: DownloadSettings, limiter: Limiter, **options: Any):
        self._limiter = limiter
        self._responses: list[Any] = []
        leave_out_plugins()
        super().__init__(_options(layout, settings) | options)

    def urlopen(self, req: Any) -> Any:
        """Open a URL (yt-dlp's one door to the network) when the host's pace allows it."""
        self._limiter.request(req if isinstance(req, str) else getattr(req, "url", None) or req.full_url)
        response = super().urlopen(req)
        self._responses.append(response)
        _bound_pages(response)
        return response

    def extract_info(self, *arguments: Any, **named: Any) -> Any:
        """Look at a URL, and download it; no program but a JavaScript runtime is started meanwhile."""
        with no_programs():
            return super().extract_info(*arguments, **named)

    def save_cookies(self) -> None:
        """Leave the user's cookie file alone: parallel jobs would overwrite each other's."""


class Fetcher(Session):
    """One try at one video; partial files stay in `folder`, from where another try goes on.

    `info` holds what was learnt about the video, also when the try failed.
    """

    def __init__(self, folder: Path, layout: Layout, settings: DownloadSettings, limiter: Limiter):
        self.info: dict[str, Any] = {}
        self._limits = settings
        super().__init__(
            layout,
            settings,
            limiter,
            format=self.select,
            format_sort=settings.format_sort,
            match_filter=self.examine,
            progress_hooks=[self.check_size],
            outtmpl={"default": f"{str(folder).replace('%', '%%')}/media.%(format_id).40B.%(ext)s"},
            restrictfilenames=True,
            overwrites=False,
            noplaylist=True,
            playlist_items="1:2",
        )

    def fetch(self, url: str) -> Fetched:
        """Download the audio of `url`. Raises whatever yt-dlp raises, or Ended, for anything else than a file."""
        with self._broken_off_when_stalled():
            info = self.extract_info(url, download=True) or {}
        if info.get("_type", "video") != "video":
            raise Ended(_playlist_verdict())
        for download in info.get("requested_downloads") or []:
            if download.get("filepath") and Path(download["filepath"]).is_file():
                return Fetched(Path(download["filepath"]), info | download)
        raise Ended(Verdict(Status.TRANSIENT, "yt-dlp ended without an error and without a file"))

    def examine(self, info: dict[str, Any], *, incomplete: Any) -> None:
        """yt-dlp's match filter: note what is known about the video, and end the try for what is no finished video."""
        if info.get("playlist_index") is not None or info.get("playlist_id"):
            raise Ended(_playlist_verdict())
        self.info = info
        if (verdict := _live_verdict(info)) is not None:
            raise Ended(verdict)

    def select(self, context: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """yt-dlp's format selector: the settings' own, applied to what serves for speech in the original language."""
        tracks = speech_tracks(context["formats"], self._limits.min_bit_rate)
        if not tracks and context["formats"]:
            raise Ended(Verdict(Status.EMPTY, "the video has no audio track"))
        return self.build_format_selector(self._limits.format)({**context, "formats": tracks})

    def check_size(self, progress: dict[str, Any]) -> None:
        """yt-dlp's progress hook: end the try when the download is, or says that it will be, too large."""
        size = max(progress.get("downloaded_bytes") or 0, progress.get("total_bytes") or 0)
        if size > self._limits.max_bytes:
            raise Ended(Verdict(Status.UNAVAILABLE, f"larger than download.max_bytes ({self._limits.max_bytes} bytes)"))

    @contextmanager
    def _broken_off_when_stalled(self) -> Iterator[None]:
        """Shut down responses that trickle: a socket's timeout only sees those that bring nothing at all."""
        ended = threading.Event()
        watch = threading.Thread(target=self._watch, args=(ended,), daemon=True)
        watch.start()
        try:
            yield
        finally:
            ended.set()
            watch.join()

    def _watch(self, ended: threading.Event) -> None:
        seen: dict[int, tuple[float, int]] = {}  # response -> when a window began, and bytes read by then
        window = self._limits.stall_seconds
        while not ended.wait(min(1.0, window / 4)):
            now = time.monotonic()
            for response in [response for response in self._responses if not response.closed]:
                read = _bytes_read(response)
                began, bytes_then = seen.setdefault(id(response), (now, read))
                if now - began < window:
                    continue
                seen[id(response)] = (now, read)
                if read - bytes_then < _MIN_RATE * window:
                    log.warning("%d bytes in %.0f s: the transfer is broken off", read - bytes_then, now - began)
                    with suppress(AttributeError, ValueError, RuntimeError, OSError):
                        response.fp.shutdown()  # urllib3's door for other threads: the reader sees an early end


def speech_tracks(formats: list[dict[str, Any]], min_bit_rate: float) -> list[dict[str, Any]]:
    """Of yt-dlp's formats (worst first, order kept) those to choose from for speech.

    Only tracks with audio, of the most original language (yt-dlp's `language_preference`: original over default over
    dubs over descriptions), and without those known to be below `min_bit_rate` kbit/s unless there are no others.
    """
    audible = [track for track in formats if track.get("acodec") != "none"]
    if not audible:
        return []
    original = max(_language_rank(track) for track in audible)
    tracks = [track for track in audible if _language_rank(track) == original]
    return [track for track in tracks if not 0 < (track.get("abr") or 0) < min_bit_rate] or tracks


def _language_rank(track: dict[str, Any]) -> float:
    rank = track.get("language_preference")
    return -1 if rank is None else rank


def _options(layout: Layout, settings: DownloadSettings) -> dict[str, Any]:
    """yt-dlp's options: nothing from its config files, nothing executed, no retries of its own (the caller's count)."""
    return {
        "quiet": True,
        "noprogress": True,
        "logger": _Log(),
        "color": "never",
        "extract_flat": "in_playlist",
        "continuedl": True,
        "retries": 0,
        "extractor_retries": 1,
        "fragment_retries": 1,
        "file_access_retries": 0,
        "skip_unavailable_fragments": False,
        "fixup": "never",
        "updatetime": False,
        "hls_prefer_native": True,
        "socket_timeout": settings.socket_timeout,
        "buffersize": _BLOCK,
        "noresizebuffer": True,
        # The players' scripts of sites, which each job would fetch again.
        "cachedir": str(layout.state / "cache" / "yt-dlp"),
        "js_runtimes": {name: {} for name in JAVASCRIPT},
        "proxy": os.environ.get("CUEPOINT_PROXY"),
        "cookiefile": _cookie_file(settings),
        "enable_file_urls": False,
    }


def without_secrets(text: str) -> str:
    """A message without the proxy's address and password, should a library have put them into it."""
    proxy = os.environ.get("CUEPOINT_PROXY") or ""
    password = urlsplit(proxy).password if "@" in proxy else None
    for secret in filter(None, (proxy, password, unquote(password) if password else None)):
        text = text.replace(secret, "***")
    return text


def clean_text(value: Any) -> str | None:
    """A text without control characters and lone surrogates (which no file could hold), cut to a bearable length."""
    if value is None:
        return None
    clean = "".join(" " if unicodedata.category(character) in {"Cc", "Cs"} else character for character in str(value))
    return " ".join(clean.split())[:_MAX_TEXT] or None


def _cookie_file(settings: DownloadSettings) -> str | None:
    path = cookie_path(settings)
    if path is not None and not os.access(path, os.R_OK):
        raise EnvironmentFault(f"the cookie file {path} cannot be read: correct download.cookies or CUEPOINT_COOKIES")
    return str(path) if path else None


def _live_verdict(info: dict[str, Any]) -> Verdict | None:
    """`not_yet` for what is upcoming, live or still being processed after it."""
    state = info.get("live_status") or ("is_live" if info.get("is_live") else None)
    if state == "is_upcoming":
        start = info.get("release_timestamp")
        wait = max(start - time.time(), 0.0) if isinstance(start, int | float) and math.isfinite(start) else HOUR
        return Verdict(Status.NOT_YET, "it has not started yet", wait)
    if state in {"is_live", "post_live"}:
        return Verdict(Status.NOT_YET, "it is live, or has just been", HOUR)
    return None


def _playlist_verdict() -> Verdict:
    return Verdict(
        Status.UNAVAILABLE,
        "a playlist, not a video: name it under `sources:` and run `cuepoint list` to add its videos",
    )


def _bound_pages(response: Any) -> None:
    """Let `response.read()` of a whole answer end at a size that no page has; media are read in blocks."""
    read = response.read

    def read_bounded(amt: int | None = None) -> bytes:
        if amt is not None:
            return read(amt)
        body = bytearray()
        while block := read(1024**2):
            body += block
            if len(body) > _MAX_PAGE_BYTES:
                response.close()
                raise Ended(Verdict(Status.UNAVAILABLE, f"a page of more than {_MAX_PAGE_BYTES} bytes"))
        return bytes(body)

    response.read = read_bounded


def _bytes_read(response: Any) -> int:
    with suppress(AttributeError, OSError, ValueError):
        return int(response.fp.tell())
    return 0


class _Log:
    """yt-dlp's messages in this project's log. Errors are raised as well, so they are only noted here."""

    def debug(self, message: str) -> None:
        log.debug("%s", without_secrets(message))

    def warning(self, message: str) -> None:
        log.info("%s", without_secrets(message))

    def error(self, message: str) -> None:
        log.debug("%s", without_secrets(message))
