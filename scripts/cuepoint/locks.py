"""Advisory locks that end with the process that holds them, also after kill -9.

A job holds the lock of its video or shard: a resumed run waits for an orphan instead of writing beside it. The lock
file keeps who holds it, for the message; the lock itself is the kernel's `flock`.
"""

import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from cuepoint import faults
from cuepoint.errors import EnvironmentFault, LockedError

log = logging.getLogger(__name__)

_NOT_SIGNED = (ValueError, TypeError, KeyError, OverflowError, RecursionError)  # what reading other JSON can raise


@contextmanager
def hold(path: Path, what: str, wait: bool = True) -> Iterator[None]:
    """Hold the lock at `path` for the time of the block.

    `what` names the thing in messages. With `wait`, says who holds it and waits; without, raises LockedError. A file
    system without locks raises EnvironmentFault.
    """
    path.parent.mkdir(parents=True, exist_ok=True)  # raises where nothing can be written at all
    lock = FileLock(path, is_singleton=False, thread_local=False, fallback_to_soft=False)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                raise LockedError(f"{what} is held by {_owner(path)}") from None
            log.warning("%s is held by %s: waiting for it to end", what, _owner(path))
            lock.acquire(poll_interval=0.2)
    except (NotImplementedError, OSError) as error:
        if (fault := faults.by_number([error])) is not None:
            raise EnvironmentFault(fault) from error
        raise EnvironmentFault(
            f"cannot lock {path}: {error}. The file system that holds the results must support file locks "
            "(on NFS: mount with working locks; on Lustre: mount with -o flock)"
        ) from error
    try:
        _sign(path)
        yield
    finally:
        lock.release()


def holder_lives(path: Path) -> bool | None:
    """Whether the process that last held the lock is still there; None when it cannot be known from this host.

    Looks without touching the lock, so that a run that is just starting never finds it taken.
    """
    try:
        owner = json.loads(path.with_suffix(".owner").read_text())
        if owner["host"] != socket.gethostname():
            return None
        since = time.mktime(time.strptime(owner["since"], "%Y-%m-%d %H:%M:%S"))
        return psutil.Process(owner["pid"]).create_time() <= since + 1  # else the number belongs to another one now
    except (OSError, *_NOT_SIGNED):
        return None
    except psutil.Error:
        return False


def _sign(path: Path) -> None:
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    path.with_suffix(".owner").write_text(json.dumps(owner))


def _owner(path: Path) -> str:
    with suppress(OSError, *_NOT_SIGNED):
        owner = json.loads(path.with_suffix(".owner").read_text())
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    return "another process"
