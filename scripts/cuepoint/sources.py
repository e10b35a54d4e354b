"""The list of videos: one video ID, URL or local media file per line, mapped to IDs without the network."""

import hashlib
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlsplit, urlunsplit

from cuepoint.errors import ConfigError

log = logging.getLogger(__name__)

MEDIA_SUFFIXES = frozenset(
    {".aac", ".aif", ".aiff", ".avi", ".flac", ".flv", ".m4a", ".m4v", ".mka", ".mkv", ".mov", ".mp3", ".mp4", ".mpeg"}
    | {".mpg", ".oga", ".ogg", ".ogv", ".opus", ".ts", ".wav", ".webm", ".wma", ".wmv"}
)
_YOUTUBE_ID = re.compile(r"[A-Za-z0-9_-]{11}")
_YOUTUBE_HOSTS = frozenset(
    prefix + domain
    for domain in ("youtube.com", "youtube-nocookie.com")
    for prefix in ("", "www.", "m.", "music.", "gaming.")
)
_YOUTUBE_PATHS = ("shorts", "embed", "live", "v", "e")


@dataclass(frozen=True)
class Entry:
    """One listed video. `source` is the URL to download or the path of a local file, as the list writes it."""

    video_id: str
    source: str
    line: int

    @property
    def is_local(self) -> bool:
        """Whether the source is a file on this machine."""
        return not is_url(self.source)


def read_list(path: Path) -> list[Entry]:
    """Read the list file. Raises ConfigError when it cannot be read or a line means nothing; drops duplicates aloud."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(
            f"videos = {str(path)!r}: there is no such file in {Path.cwd()}; "
            "write one video ID, URL or media file per line into it"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); save the list as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"videos = {str(path)!r}: cannot be read ({error.strerror})") from None
    return parse_list(text, str(path))


def parse_list(text: str, name: str = "videos.txt") -> list[Entry]:
    """Parse the list's text: the first tab-separated column counts, ` #` starts a comment.

    Raises ConfigError that names every line that is no video. A video listed twice (also once as URL and once as ID)
    is reported and kept once, at its first place.
    """
    entries: dict[str, Entry] = {}
    wrong: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        written = re.sub(r"(^|\s)#.*", "", line.split("\t")[0]).strip()
        if not written:
            continue
        try:
            entry = Entry(*identify(written), line=number)
        except ValueError as error:
            wrong.append(f"  {name}, line {number}: {written[:80]!r} {error}")
            continue
        first = entries.setdefault(entry.video_id, entry)
        if first is not entry:
            log.warning("%s, line %d: %s is listed in line %d already; dropped", name, number, written, first.line)
    if wrong:
        raise ConfigError("\n".join(["the list of videos cannot be used:", *wrong[:20], *_more(wrong, 20)]))
    return list(entries.values())


def identify(written: str) -> tuple[str, str]:
    """Map what a line says to (video_id, source). Raises ValueError with what would be allowed.

    YouTube's IDs and all its kinds of URLs give the ID itself. Any other URL or file gives a readable name and a hash
    of the URL or path, so that it is a safe file name and never looks like a YouTube ID.
    """
    if any(ord(character) < 32 or ord(character) == 127 for character in written):
        raise ValueError("contains control characters")
    if len(written) > 4096:
        raise ValueError("is longer than any URL or path (4096 characters)")
    if is_url(written):
        return _identify_url(written)
    if _YOUTUBE_ID.fullmatch(written):
        return written, f"https://www.youtube.com/watch?v={written}"
    if "://" in written:
        raise ValueError("is a URL of a kind that is not supported (http:// and https:// are)")
    path = Path(os.path.expanduser(written))  # leaves an unknown `~name` as it is, where pathlib's own raises
    if path.suffix.lower() in MEDIA_SUFFIXES or os.path.isfile(path):  # False also for names that no file can have
        return _named(path.stem, str(path)), str(path)
    raise ValueError(
        "is neither a YouTube video ID (11 characters of A-Z, a-z, 0-9, - and _), nor an http(s) URL, nor a media file"
    )


def is_url(source: str) -> bool:
    """Whether a source is downloaded and not read from this machine."""
    return re.match(r"https?://", source, re.IGNORECASE) is not None


def _identify_url(written: str) -> tuple[str, str]:
    try:
        parts = urlsplit(written)
        host = (parts.hostname or "").lower()
    except ValueError as error:
        raise ValueError(f"is no valid URL ({error})") from None
    if not host or re.search(r"\s", written):
        raise ValueError("is no valid URL")
    if (youtube := _youtube_id(host, parts.path, parts.query)) is not None:
        return youtube, f"https://www.youtube.com/watch?v={youtube}"
    if host in _YOUTUBE_HOSTS:
        raise ValueError("is not one video; name channels and playlists under `sources:` and run `cuepoint list`")
    url = urlunsplit((parts.scheme.lower(), parts.netloc.lower(), parts.path or "/", parts.query, ""))
    return _named(Path(parts.path).stem or host, url), url


def _youtube_id(host: str, path: str, query: str) -> str | None:
    pieces = path.strip("/").split("/")
    candidate = ""
    if host in {"youtu.be", "www.youtu.be"}:
        candidate = pieces[0]
    elif host in _YOUTUBE_HOSTS:
        if pieces[0] == "watch":
            candidate = parse_qs(query).get("v", [""])[0]
        elif pieces[0] in _YOUTUBE_PATHS and len(pieces) > 1:
            candidate = pieces[1]
    return candidate if _YOUTUBE_ID.fullmatch(candidate) else None


def _named(name: str, identity: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].strip("-") or "video"
    return f"{slug}-{hashlib.blake2b(identity.encode(), digest_size=6).hexdigest()}"


def _more(lines: list[str], shown: int) -> list[str]:
    return [f"  and {len(lines) - shown} more"] if len(lines) > shown else []
