"""What an error of yt-dlp, of the network or of this machine means for the video: the table of states as code.

Error classes and HTTP statuses decide before texts do; texts are those that extractors are known to raise, in old and
new wordings. What nobody knows is transient: a session's limit must never turn into a permanent loss.
"""

import errno
import os
import re
import socket
import time
import traceback
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from yt_dlp.networking.exceptions import HTTPError, ProxyError
from yt_dlp.utils import GeoRestrictedError, UnsupportedError, UserNotLive

from cuepoint import faults
from cuepoint.download.programs import ProgramRefused
from cuepoint.errors import EnvironmentFault
from cuepoint.faults import DOCTOR, MENDS, chain
from cuepoint.states import Status

HOUR = 3600.0


@dataclass(frozen=True)
class Verdict:
    """How a try ended. `bare` marks a verdict without a reason, which a second try has to confirm."""

    status: Status
    message: str
    retry_after: float | None = None  # seconds from now before which another try makes no sense
    bare: bool = False


class Ended(Exception):
    """Ends a try from inside of yt-dlp (hooks, filters) with a verdict that needs no classification."""

    def __init__(self, verdict: Verdict):
        super().__init__(verdict.message)
        self.verdict = verdict


# (status, pattern) in the order that they are looked for: a limit of the session first, for it hides behind
# "unavailable"; then what can pass; then the reasons that are final.
_TEXTS: list[tuple[Status, str]] = [
    (
        Status.THROTTLED,
        r"(content|video) is(n't| not) available,? (please )?try again later|rate.?limit(ed|ing)\b|too many requests"
        r"|not a (ro)?bot\b|unusual traffic|solve (the|a) captcha|captcha challenge",
    ),
    (
        Status.GEO_BLOCKED,
        r"(in|from|for|to) your (country|location|region|area|geograph)|geo.?(restrict|block|locat)"
        r"|(not|isn't|only) (be )?(available|accessible|playable|viewable) (outside|within|from|in) (the )?"
        r"(u\.?s\.?a?\b|u\.?k\.?\b|eu\b|united|certain|some)"
        r"|blocked (it|this|the video) (in|on copyright grounds in) your",
    ),
    (
        Status.NOT_YET,
        r"premieres? (in|will begin|begins)|(live )?event (will begin|has not started|hasn't started)"
        r"|live ?stream (will begin|has not started|hasn't started|is scheduled|is offline)"
        r"|not (currently )?(live|streaming)\b|is (currently )?offline|has(n't| not) (yet )?(started|aired|premiered)"
        r"|waiting for (the )?(live ?)?stream|not (yet )?been (released|published|broadcast) yet"
        r"|will be available (on|in|at)"
        r"|is not yet available|available soon|we're processing this video|(video|it) is (still )?being processed",
    ),
    (
        Status.UNAVAILABLE,
        r"\bprivate\b|requires? (a )?(payment|purchase|rental)|rent(ed)? (this|the) (video|movie)|pay.?per.?view"
        r"|purchased|must be (bought|purchased)|paid (video|content|subscription)",
    ),
    (
        Status.NEEDS_AUTH,
        r"confirm your age|age.?(restrict|limit|gate|verif)|inappropriate for some users|mature (content|audience)"
        r"|members.?only|available to (this channel's )?members|join this channel|subscribers?.?only"
        r"|only (available|accessible|viewable) (to|for|by) (registered|logged|subscri|member|premium|patron|follower)"
        r"|(sign|log)(ging)? ?in\b|login|logged.?in|registered users|authenticat|credentials|--cookies|password",
    ),
    (
        Status.UNAVAILABLE,
        r"\bremoved\b|\bdeleted\b|taken down|terminated|no longer (available|exist|online)"
        r"|is(n't| not) available any ?more"
        r"|copyright|does(n't| not) exist|(video|page|clip|track|episode|media) (was |could )?not (be )?found"
        r"|\bdrm\b|violat|suspended|has expired|account (has been|is) (closed|deactivated|disabled)"
        r"|community guidelines|terms of (service|use)",
    ),
]
_TABLE = [(status, re.compile(pattern)) for status, pattern in _TEXTS]

# A bare "unavailable" names no reason: it may be the wall of a session or a hiccup, and is asked for twice.
_BARE = re.compile(
    r"(video|content|stream|media|episode|clip) (is )?(currently )?(un|not |isn't )available|unsupported url"
)

_NO_FORMAT = "requested format is not available"
_FFMPEG = re.compile(r"ffmpeg (is )?(not|could not be) (installed|found)|install ffmpeg")
_MACHINE_TEXTS = {
    r"no space left on device|disk quota exceeded": MENDS[errno.ENOSPC],
    r"impersonat\w+ target .* is not available|requires browser impersonation": (
        "the site demands a browser's handshake: pip install 'yt-dlp[curl-cffi]'"
    ),
    r"tunnel connection failed: 407|407 proxy auth": "the proxy wants a login: correct CUEPOINT_PROXY",
}


def classify(error: BaseException, url: str | None = None) -> Verdict:
    """Verdict on an error that ended a try at `url`. Raises EnvironmentFault for a fault of this machine."""
    links = list(chain(error))
    for link in links:
        if isinstance(link, Ended):
            return link.verdict
    message = _message(links)
    _raise_machine_fault(links, message)
    if (verdict := _needs_program(links, message)) is not None:
        return verdict
    for link in links:
        if (verdict := _throttled(link, message) or _by_class(link, message)) is not None:
            return verdict
    by_text = classify_text(message)
    if by_text.status is not Status.TRANSIENT:  # an extractor's words say more than the HTTP status that it met
        return by_text
    return next(filter(None, (_by_http_status(link, message, url) for link in links)), by_text)


def classify_text(message: str) -> Verdict:
    """Verdict by an error's words alone."""
    text = _plain(message)
    for status, pattern in _TABLE:
        if pattern.search(text):
            return Verdict(status, message, _seconds_until(text) if status is Status.NOT_YET else None)
    if _BARE.search(text):
        return Verdict(Status.UNAVAILABLE, message, bare=True)
    return Verdict(Status.TRANSIENT, message)


def _needs_program(links: list[BaseException], message: str) -> Verdict | None:
    """The verdict on a video that yt-dlp could have with the help of another program only."""
    refused = next((link for link in links if isinstance(link, ProgramRefused)), None)
    if refused or _FFMPEG.search(_plain(message)):
        what = refused.program if refused else "ffmpeg"
        return Verdict(Status.UNAVAILABLE, f"it can be had with {what} only, and no program is run for a page")
    return None


def _throttled(error: BaseException, message: str) -> Verdict | None:
    """The verdict on an answer that asks everybody to wait: 429, or 503 that says for how long."""
    if not isinstance(error, HTTPError):
        return None
    wait = _retry_after(error.response.headers.get("Retry-After"))
    asks_to_wait = error.status == 429 or (error.status == 503 and wait is not None)
    return Verdict(Status.THROTTLED, message, wait) if asks_to_wait else None


def _by_class(error: BaseException, message: str) -> Verdict | None:
    if isinstance(error, GeoRestrictedError):
        where = f" (available in: {', '.join(error.countries)})" if error.countries else ""
        return Verdict(Status.GEO_BLOCKED, message + where)
    if isinstance(error, UserNotLive):
        return Verdict(Status.NOT_YET, message, retry_after=HOUR)
    if isinstance(error, UnsupportedError):
        return Verdict(Status.UNAVAILABLE, "yt-dlp finds no video behind this URL", bare=True)
    return None


def _by_http_status(error: BaseException, message: str, url: str | None) -> Verdict | None:
    """The verdict on an HTTP status; a 403 may be an expired media link, and 5xx pass: both are left to try again."""
    if not isinstance(error, HTTPError):
        return None
    match error.status:
        case 401:
            return Verdict(Status.NEEDS_AUTH, message)
        case 404 | 410:  # of something that the page has just named: the page may name another one next time
            return Verdict(Status.UNAVAILABLE, message, bare=error.response.url != url)
        case 451:
            return Verdict(Status.GEO_BLOCKED, message)
    return None


def _raise_machine_fault(links: list[BaseException], message: str) -> None:
    """Raise EnvironmentFault when this machine is at fault: its disk, its rights, its programs."""
    if any(isinstance(link, ProxyError) for link in links) and not _proxy_answers():
        raise EnvironmentFault(f"the proxy does not answer: correct CUEPOINT_PROXY, or start it; {DOCTOR}")
    if (fault := faults.by_number(links)) is not None:
        raise EnvironmentFault(fault)
    text = _plain(message)
    for pattern, mend in _MACHINE_TEXTS.items():
        if re.search(pattern, text):
            raise EnvironmentFault(f"{mend} ({message}); {DOCTOR}")
    if _NO_FORMAT in text and message.startswith("[youtube") and not javascript_runtimes():
        raise EnvironmentFault(
            "YouTube needs a JavaScript runtime that yt-dlp supports and none was found: install deno (`pip install "
            "deno`) or a newer node; `cuepoint doctor` says what is there"
        )


def _proxy_answers() -> bool:
    """Whether the proxy takes connections: the same error class also reports hosts that fail behind it."""
    proxy = urlsplit(os.environ.get("CUEPOINT_PROXY") or "")
    if not proxy.hostname:  # one of the system's own settings, about which nothing is known here
        return True
    try:
        socket.create_connection((proxy.hostname, proxy.port or 80), timeout=10).close()
    except (OSError, ValueError):
        return False
    return True


def javascript_runtimes() -> list[str]:
    """JavaScript runtimes on this machine, with their versions, that yt-dlp would use for YouTube."""
    from yt_dlp.globals import supported_js_runtimes

    found = [runtime().info for runtime in supported_js_runtimes.value.values()]
    return [f"{info.name} {info.version}" for info in found if info and info.supported]


def _message(links: list[BaseException]) -> str:
    """The error's words on one line, without yt-dlp's decoration and its plea to report a bug."""
    text = str(links[0]) or traceback.format_exception_only(links[0])[-1]
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    text = re.sub(r"^ERROR:\s*", "", text.strip())
    text = re.split(r"; please report this issue on|\s*Confirm you are on the latest version", text)[0]
    return re.sub(r"\s+", " ", text)[:1000]


def _plain(text: str) -> str:
    """What the words are looked up in: lower case, straight apostrophes (both kinds occur), no ID and no URL."""
    text = re.sub(r"^\[[\w:.+-]+\] (\S+: )?", "", text)
    text = re.sub(r"\b\w+://\S+", "", text)
    return re.sub("[\u2018\u2019\u02bc\u0060\u00b4]", "'", text).lower()


def _retry_after(header: str | None) -> float | None:
    """Seconds of a Retry-After header, which holds seconds or a date; None when it says nothing usable."""
    if not header:
        return None
    if re.fullmatch(r"\s*\d{1,9}\s*", header):
        return float(header)
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


_UNITS = {"moment": 60.0, "second": 1.0, "minute": 60.0, "hour": HOUR, "day": 24 * HOUR, "week": 168 * HOUR}


def _seconds_until(text: str) -> float:
    """Seconds that a message like "premieres in 3 hours" speaks of; an hour when it names no time."""
    match = re.search(r"\bin (?:about )?(\d+|an?|a few)? ?(moment|second|minute|hour|day|week)s?\b", text)
    if match is None:
        return HOUR
    count = float(match[1]) if (match[1] or "").isdigit() else 1.0
    return count * _UNITS[match[2]]
