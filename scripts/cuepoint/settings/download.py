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
    min_bit_rate: float = result(45.0, ge=0)
    """Tracks known to be below this many kbit/s are taken only when the original language has nothing better."""
    max_bytes: int = result(4 * 1024**3, ge=1024)
    """A response larger than this is not downloaded."""
    attempts: int = Field(3, ge=1, le=20)
    """Tries for a transient error within one run, with back-off."""
    backoff: float = Field(5.0, ge=0, le=600)
    """Seconds before the second try, doubled for each one after it; a random part of them is waited."""
    max_failed_runs: int = Field(5, ge=1)
    """Runs after which a video that keeps failing is no longer tried by itself."""
    retry_final: bool = False
    """Try videos again that ended in a final state (unavailable, needs_auth, geo_blocked, empty)."""
    cookies: Path | None = None
    """Cookie file in Netscape format (environment variable CUEPOINT_COOKIES wins). Never copied anywhere."""
    video_interval: dict[str, float] = Field({"youtube.com": 20.0, "*": 1.0})
    """Seconds between the starts of two videos of a host, over all jobs of the run; `*` is for hosts not named.

    YouTube allows a guest about 300 videos an hour; the default asks for 180.
    """
    request_interval: dict[str, float] = Field({"youtube.com": 0.75, "googlevideo.com": 0.0, "*": 0.1})
    """Seconds between two requests to a host, over all jobs of the run; `*` is for hosts not named."""
    cool_down: float = Field(60.0, ge=0)
    """Seconds that all downloads from a host pause when it says that there were too many; doubled each time."""
    max_cool_down: float = Field(1800.0, ge=0)
    """No pause is longer than this many seconds."""
    throttle_budget: float = Field(7200.0, ge=0)
    """When a host still refuses after this many seconds, its remaining videos wait for the next run."""
    socket_timeout: float = Field(20.0, gt=0)
    """Seconds without an answer after which a request is broken off."""
    stall_seconds: float = Field(120.0, gt=0)
    """A transfer that brings less than 1 KiB/s over this many seconds is broken off and tried again."""
