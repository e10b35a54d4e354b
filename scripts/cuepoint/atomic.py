"""Files that are either whole or not there: write beside the target, fsync, rename."""

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

SUFFIX = ".tmp"  # of files that are being written


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path in `target`'s directory; on success it is fsynced and renamed to `target`.

    Each caller gets a file of its own, so two writers never share one. On an exception the temporary file is removed
    and `target` stays as it was; what a killed writer left is removed by the next one.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name[:100]}."
    _remove_leftovers(target.parent, prefix)
    fd, temporary = _new_file(target.parent, prefix)
    try:
        os.fchmod(fd, 0o666 & ~_umask())  # mkstemp makes private files; products follow the user's umask
        yield temporary
        _fsync(temporary)
        temporary.replace(target)
        _fsync(target.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(target)  # a failed write does not say where
        raise
    finally:
        os.close(fd)


def write_text(target: Path, text: str) -> None:
    """Write `text` to `target` as UTF-8, atomically."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(target: Path, value: Any) -> None:
    """Write `value` to `target` as indented JSON, atomically."""
    write_text(target, json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True, allow_nan=False) + "\n")


def _new_file(directory: Path, prefix: str) -> tuple[int, Path]:
    """A new file that stays locked while its descriptor is open: the sign that its writer lives."""
    while True:
        fd, name = tempfile.mkstemp(dir=directory, prefix=prefix, suffix=SUFFIX)
        with suppress(OSError):  # without locks nobody removes leftovers
            fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return fd, Path(name)
        os.close(fd)  # another writer came between the two calls and took it for a leftover


def _remove_leftovers(directory: Path, prefix: str) -> None:
    """Remove temporary files whose writer was killed."""
    with os.scandir(directory) as entries:
        found = [entry.path for entry in entries if entry.name.startswith(prefix) and entry.name.endswith(SUFFIX)]
    for path in found:
        with suppress(OSError):  # its writer lives, or another one has just removed it
            fd = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                Path(path).unlink()
            finally:
                os.close(fd)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _umask() -> int:
    """The process's umask, read from /proc where there is one: setting it to read it would race with other threads."""
    with suppress(OSError, ValueError), Path("/proc/self/status").open() as status:
        for line in status:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
