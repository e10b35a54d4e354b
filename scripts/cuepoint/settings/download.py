"""Settings of the download stage."""

from pathlib import Path

from pydantic import Field

from cuepoint.settings.base import Section, result


class DownloadSettings(Section):
    """How audio is fetched. A proxy is taken from the environment variable CUEPOINT_PROXY only, cookies by path."""

    parallel: int = Field(4, ge=1, le=64)
    """Downloads at a time, over all hosts (`--resources downloads=N` on the command line wins)."""
    format: str = result("ba/b", min_length=1)
    """yt-dlp's format selector: the best audio-only track, else the best track with audio."""
    format_sort: list[str] = result(["lang", "abr~48"])
    """yt-dlp's format sort: the original language first, then the track nearest to 48 kbit/s (enough for speech)."""
    max_bytes: int = result(4 * 1024**3, ge=1024)
    """A response larger than this is not downloaded."""
    attempts: int = Field(3, ge=1, le=20)
    """Tries for a transient error within one run, with back-off."""
    max_failed_runs: int = Field(5, ge=1)
    """Runs after which a video that keeps failing is no longer tried by itself."""
    retry_final: bool = False
    """Try videos again that ended in a final state (unavailable, needs_auth, geo_blocked, empty)."""
    cookies: Path | None = None
    """Cookie file in Netscape format (environment variable CUEPOINT_COOKIES wins). Never copied anywhere."""
