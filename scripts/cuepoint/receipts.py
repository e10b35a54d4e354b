"""Receipts: how a video's download ended. A receipt is the edge of the workflow's graph, so every video gets one."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cuepoint.atomic import write_text
from cuepoint.errors import DataError
from cuepoint.failures import UnixTime
from cuepoint.states import Status

MAX_SECONDS = 10.0 * 365 * 86_400  # ten years of audio: longer is a mistake, and no plan for a job can be made of it


class Receipt(BaseModel):
    """The JSON beside the audio. `audio_hash` (of the packets) ties the two together; `sha256` is of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    format: int = 1
    video_id: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    url: str
    status: Status
    error: str | None = None
    title: str | None = None
    channel: str | None = None
    channel_id: str | None = None
    upload_date: str | None = None  # YYYYMMDD, as yt-dlp gives it
    duration: float | None = Field(None, ge=0, le=MAX_SECONDS)  # seconds, decoded
    advertised_duration: float | None = None  # seconds, as the site says
    retry_after: UnixTime | None = None  # before which a `not_yet` video is not tried again
    format_id: str | None = None
    codec: str | None = None
    language: str | None = None  # of the chosen track, as the site says
    bit_rate: float | None = None  # kbit/s
    bytes: int | None = None
    sha256: str | None = None
    audio_hash: str | None = None
    attempts: int = 0  # of this job, those not charged (throttled) left out
    attempt: int = 0  # which run's attempt this was: see `failures`
    yt_dlp: str | None = None
    seconds: float | None = None  # wall time of the download
    waited: float | None = None  # seconds of it spent waiting for the limiter
    cooled: float | None = None  # seconds of those in cool-downs that the host asked for

    def write(self, path: Path) -> None:
        """Write the receipt atomically."""
        write_text(path, self.model_dump_json(indent=1) + "\n")


def read_receipt(path: Path) -> Receipt:
    """Read a receipt. Raises DataError with the file, the field and the mend when it is not one.

    One that was copied from another video, or whose status was changed by hand, is none either: what it says of the
    audio would not be true.
    """
    try:
        receipt = Receipt.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path} is missing: run snakemake again") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise DataError(f"{path} is no valid receipt ({where}: {first['msg']}): delete it, then run again") from None
    if receipt.video_id != path.name.partition(".")[0]:
        raise DataError(f"{path} is the receipt of another video ({receipt.video_id}): delete it, then run again")
    if (receipt.status is Status.OK) != (receipt.sha256 is not None):
        has = "names audio" if receipt.sha256 else "names no audio"
        raise DataError(f"{path} has status {receipt.status} and {has}: it was changed; delete it, then run again")
    return receipt
