"""Which cookie file is in use. Its content is yt-dlp's alone: only the path and a stamp of the file go further."""

import os
from pathlib import Path

from cuepoint.fingerprint import fingerprint
from cuepoint.settings import DownloadSettings


def cookie_path(settings: DownloadSettings) -> Path | None:
    """The cookie file in use: that of the environment variable CUEPOINT_COOKIES, else that of the settings."""
    path = os.environ.get("CUEPOINT_COOKIES") or settings.cookies
    return Path(path) if path else None


def credentials(settings: DownloadSettings) -> str | None:
    """Fingerprint of the cookie file by size and time, never of its content; None without one."""
    path = cookie_path(settings)
    try:
        status = path.stat() if path else None
    except OSError:
        return None
    return fingerprint(size=status.st_size, mtime=status.st_mtime_ns) if status else None
