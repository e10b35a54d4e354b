"""What yt-dlp may start and load: JavaScript runtimes, and nothing that a page, a user's directory or a package names.

yt-dlp hands some formats to other programs (ffmpeg, rtmpdump, mpv, PhantomJS) when it finds them, with addresses and
headers that a page names. No option forbids them all, so the interpreter does: an audit hook refuses to start a process
while a page is read. It also loads plugins from the user's directories and from anything installed beside it.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

JAVASCRIPT = ("deno", "node")
"""Programs that solve YouTube's challenges. They run yt-dlp's own scripts, deno without access to files and network."""

_STARTS = frozenset({"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn"})
_session = threading.local()


class ProgramRefused(OSError):
    """A program was to be started. An OSError without a number: to yt-dlp the program is not installed."""

    def __init__(self, program: str) -> None:
        super().__init__(f"{program} is not started for a page")
        self.program = program


@contextmanager
def no_programs() -> Iterator[None]:
    """Refuse to start a program but JavaScript runtimes, in this thread and for the time of the block."""
    _listen()
    before = getattr(_session, "closed", False)
    _session.closed = True
    try:
        yield
    finally:
        _session.closed = before


def leave_out_plugins() -> None:
    """Keep yt-dlp from looking for plugins."""
    from yt_dlp.globals import all_plugins_loaded, plugin_dirs

    plugin_dirs.value = []
    all_plugins_loaded.value = True


@cache
def _listen() -> None:
    sys.addaudithook(_audit)  # for good: a hook cannot be taken away again


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event in _STARTS and getattr(_session, "closed", False):
        program = Path(str(arguments[0])).name
        if event != "subprocess.Popen" or program not in JAVASCRIPT:
            raise ProgramRefused(program)
