"""The failure log: what makes Snakemake try a video again, and only that video.

Each attempt that did not end well appends a line to the video's log, which is no output of any rule and so survives
reruns; a success after failures appends one too, so that the story is closed. `attempt_due` turns the log into a
number that the download rule carries in its `params`: it grows by one when another attempt is due, so Snakemake's own
`params` trigger runs the job again, and it stays when nothing is due.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config

from cuepoint import atomic
from cuepoint.errors import DataError
from cuepoint.layout import Layout
from cuepoint.states import Status

UnixTime = Annotated[float, Field(ge=0, le=253_402_300_799)]
"""Seconds since 1970, before the year 10000: what can be written as a date."""


@with_config(ConfigDict(extra="forbid", allow_inf_nan=False))
@dataclass(frozen=True)
class Attempt:
    """One line of the log: how the attempt with this number ended.

    Status `pending` means that the audio of a finished video is needed again and is not there.
    """

    number: int
    status: Status
    time: UnixTime
    error: str | None = None
    retry_after: UnixTime | None = None  # before which another attempt makes no sense
    credentials: str | None = None  # fingerprint of the cookies in use: when it changes, `needs_auth` is tried again


_ATTEMPT = TypeAdapter(Attempt)


def record(layout: Layout, video_id: str, attempt: Attempt) -> None:
    """Add one line. The small file is written anew, so that neither a crash nor a full disk leaves half a line.

    An ending that is already in the log is not written again: a job that is repeated after a crash counts once. A
    success is written only if there is a failure to close.
    """
    path = layout.failures(video_id)
    known = read(path)
    if any((line.number, line.status) == (attempt.number, attempt.status) for line in known):
        return
    if attempt.status is Status.OK and not known:
        return
    lines = [json.dumps(asdict(line), ensure_ascii=False) + "\n" for line in [*known, attempt]]
    atomic.write_text(path, "".join(lines))


def read(path: Path) -> list[Attempt]:
    """The lines of a video's log, oldest first; a last line without an end (of an older version) is dropped."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    attempts = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            attempts.append(_ATTEMPT.validate_json(line))
        except ValidationError:
            raise DataError(
                f"{path}, line {number} is no failure record: delete the file to try this video afresh"
            ) from None
    return attempts


def attempt_due(
    attempts: list[Attempt],
    *,
    now: float | None = None,
    retry_final: bool = False,
    max_failed_runs: int = 5,
    credentials: str | None = None,
) -> int:
    """Number of the attempt that the download rule should have made by now: 0 for a video that never failed.

    The last attempt's own number when nothing is due (so nothing is run again), one more when another one is.
    """
    if not attempts:
        return 0
    last = attempts[-1]
    due = False
    match last.status:
        case Status.OK:
            due = False
        case Status.PENDING | Status.THROTTLED:
            due = True
        case Status.NOT_YET:
            now = time.time() if now is None else now
            # Noted in the future: the clock was wrong then, and so is the time to come back.
            due = now >= (last.retry_after or 0) or now < last.time
        case Status.TRANSIENT:
            due = retry_final or _charged(attempts) < max_failed_runs
        case Status.NEEDS_AUTH:
            due = retry_final or credentials != last.credentials
        case _:
            due = retry_final
    return last.number + int(due)


def _charged(attempts: list[Attempt]) -> int:
    """Runs in a row that ended in a transient failure."""
    count = 0
    for attempt in reversed(attempts):
        if attempt.status is Status.OK:
            break
        count += attempt.status is Status.TRANSIENT
    return count
