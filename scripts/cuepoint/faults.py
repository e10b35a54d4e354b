"""Faults of this machine, told from errors that anything may raise: a full disk, a read-only directory, a limit.

Libraries raise them in many forms: an OSError with a number, the same wrapped once or twice, or only its words in a
bare Exception (tokenizers, OpenVINO). Here is the one list of what they mean and how they are mended.
"""

import errno
import re
from collections.abc import Iterable, Iterator

from cuepoint.errors import CuepointError

DOCTOR = "`cuepoint doctor` checks this machine"

_SPACE = "the disk is full: free some space and run again, everything that is finished is kept"
_RIGHTS = "permission denied: give this user the right to read and write there"
_THREADS = (
    "no more threads or processes can be started: raise the limit (`ulimit -u`, or the container's limit of processes)"
)
MENDS = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: "the disk quota is used up: free some space and run again, everything that is finished is kept",
    errno.EFBIG: "a file is larger than this file system or a limit (`ulimit -f`) allows",
    errno.EROFS: "the file system is read-only: mount it for writing, or set `results` to another directory",
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EMFILE: "too many open files: raise `ulimit -n`",
    errno.ENFILE: "too many open files on this machine: end what else opens many",
    errno.ENOMEM: "out of memory: lower download.parallel or --cores, or end what else runs here",
    errno.EIO: "the disk reports an input/output error: look into the system's log, the disk may be failing",
    errno.ENAMETOOLONG: "a path is too long for this file system: shorten `results` or move it up",
    errno.EISDIR: "a directory stands where a file is needed: move it away",
    errno.ENOTDIR: "a part of this path is a file where a directory is needed: move it away",
}
"""What each of these numbers means, and the mend."""

_WORDS = {
    r"no space left on device|not enough space|os error 28\b": _SPACE,
    r"disk quota exceeded": MENDS[errno.EDQUOT],
    r"read-only file ?system": MENDS[errno.EROFS],
    r"too many open files": MENDS[errno.EMFILE],
    r"can't start new thread|resource temporarily unavailable|thread constructor failed": _THREADS,
    r"cannot allocate memory": MENDS[errno.ENOMEM],
}


def message_for(error: BaseException) -> str | None:
    """The one message for an error that a user can act on; None for one that is a fault of this program."""
    return str(error) if isinstance(error, CuepointError) else explain(error)


def explain(error: BaseException) -> str | None:
    """What a fault of this machine is and how to mend it; None when `error` tells of none."""
    links = list(chain(error))
    if (fault := by_number(links)) is not None:
        return fault
    for link in links:
        if isinstance(link, MemoryError):
            return f"{MENDS[errno.ENOMEM]}; {DOCTOR}"
        for words, mend in _WORDS.items():
            if re.search(words, str(link), re.IGNORECASE):
                return f"{mend} ({_line(link)}); {DOCTOR}"
    return None


def by_number(links: Iterable[BaseException]) -> str | None:
    """The same by the operating system's error numbers alone: words may be those of a page or of a remote server."""
    for link in links:
        if isinstance(link, OSError) and link.errno in MENDS and not isinstance(link, ConnectionError):
            return f"{MENDS[link.errno]}{_where(link)}; {DOCTOR}"
    return None


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and all that it was made from: `exc_info` and `cause` (yt-dlp), `__cause__`, `__context__`."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        link = waiting.pop(0)
        if not isinstance(link, BaseException) or id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        exc_info = getattr(link, "exc_info", None)
        waiting += [exc_info[1] if isinstance(exc_info, tuple) else None, getattr(link, "cause", None)]
        waiting += [link.__cause__, None if link.__suppress_context__ else link.__context__]


def _where(error: OSError) -> str:
    """The file, where the error names one, else its words, which may."""
    return f" ({error.filename})" if error.filename else f" ({_line(error)})"


def _line(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error))[:300]
