"""The failure log: what makes Snakemake try a video again, and only that video.

Each attempt that did not end well appends a line to the video's log, which is no output of any rule and so survives
reruns; a success after failures appends one too, so that the story is closed. `attempt_due` turns the log into a
number that the download rule carries in its `params`: it grows by one when another attempt is due, so Snakemake's own
`params` trigger runs the job again, and it stays when nothing is due.
"""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from cuepoint.errors import DataError
from cuepoint.layout import Layout
from cuepoint.states import Status


@dataclass(frozen=True)
class Attempt:
    """One line of the log: how the attempt with this number ended.

    Status `pending` means that the audio of a finished video is needed again and is not there.
    """

    number: int
    status: Status
    time: float  # Unix time
    error: str | None = None
    retry_after: float | None = None  # Unix time before which another attempt makes no sense
    credentials: str | None = None  # fingerprint of the cookies in use: when it changes, `needs_auth` is tried again


def record(layout: Layout, video_id: str, attempt: Attempt) -> None:
    """Append one line, in one write, so that a crash leaves whole lines only.

    An ending that is already in the log is not written again: a job that is repeated after a crash counts once. A
    success is written only if there is a failure to close.
    """
    path = layout.failures(video_id)
    known = read(path)
    if any((line.number, line.status) == (attempt.number, attempt.status) for line in known):
        return
    if attempt.status is Status.OK and not known:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(asdict(attempt), ensure_ascii=False) + "\n"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.write(fd, line.encode())
        os.fsync(fd)
    finally:
        os.close(fd)


def read(path: Path) -> list[Attempt]:
    """The lines of a video's log, oldest first; a last line that a crash cut short is dropped."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return []
    attempts = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            values = json.loads(line)
            attempts.append(Attempt(**values | {"status": Status(values["status"])}))
        except (ValueError, TypeError, KeyError):
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
            due = (time.time() if now is None else now) >= (last.retry_after or 0)
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
