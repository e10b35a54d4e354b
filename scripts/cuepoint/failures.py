"""The failure log: what makes Snakemake try a video again, and only that video.

Each attempt that did not end well appends a line to the video's log, which is no output of any rule and so survives
reruns. `attempt_due` turns the log into a number that the download rule carries in its `params`: it grows by one when
another attempt is due, so Snakemake's own `params` trigger runs the job again, and it stays when nothing is due.
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
class Failure:
    """One line of the log: how the attempt with the number `attempt` ended."""

    attempt: int
    status: Status
    time: float  # Unix time
    error: str | None = None
    retry_after: float | None = None  # Unix time before which another attempt makes no sense
    credentials: str | None = None  # fingerprint of the cookies in use: when it changes, `needs_auth` is tried again


MISSING_AUDIO = "audio is needed again and was not kept"


def record(layout: Layout, video_id: str, failure: Failure) -> None:
    """Append one line, in one write, so that a crash leaves whole lines only.

    An attempt that is already in the log is not written again: a job that is repeated after a crash between its
    failure and its end counts once.
    """
    path = layout.failures(video_id)
    if any(known.attempt == failure.attempt for known in read(path)):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(asdict(failure), ensure_ascii=False) + "\n"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.write(fd, line.encode())
        os.fsync(fd)
    finally:
        os.close(fd)


def read(path: Path) -> list[Failure]:
    """All failures of a video, oldest first; a last line that a crash cut short is dropped."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return []
    failures = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            values = json.loads(line)
            failures.append(Failure(**values | {"status": Status(values["status"])}))
        except (ValueError, TypeError, KeyError):
            raise DataError(
                f"{path}, line {number} is no failure record: delete the file to try this video afresh"
            ) from None
    return failures


def attempt_due(
    failures: list[Failure],
    *,
    now: float | None = None,
    retry_final: bool = False,
    max_failed_runs: int = 5,
    credentials: str | None = None,
) -> int:
    """Number of the attempt that the download rule should have made by now: 0 for a video that never failed.

    The last failure's own number when nothing is due (so nothing is run again), one more when another attempt is.
    """
    if not failures:
        return 0
    last = failures[-1]
    now = time.time() if now is None else now
    return last.attempt + int(_is_due(last, failures, now, retry_final, max_failed_runs, credentials))


def _is_due(
    last: Failure, failures: list[Failure], now: float, retry_final: bool, max_failed_runs: int, credentials: str | None
) -> bool:
    if last.status is Status.OK:  # the audio was needed again: see MISSING_AUDIO
        return True
    if last.status is Status.NOT_YET:
        return last.retry_after is None or now >= last.retry_after
    if last.status is Status.NEEDS_AUTH and credentials != last.credentials:
        return True
    if last.status.final:
        return retry_final
    charged = sum(failure.status is Status.TRANSIENT for failure in failures)
    return last.status is Status.THROTTLED or charged < max_failed_runs or retry_final
