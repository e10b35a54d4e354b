"""Progress of a run in the terminal and in `results/logs/progress.log`, driven by what Snakemake logs.

Snakemake tells of each job in several lines; with ten thousand videos they bury its errors. While the progress is shown
those lines are left out of the terminal (`.snakemake/log` keeps them) and everything else comes through: warnings,
errors with the log of the failed job, and the run's last words. In a terminal the stages' lines stand below and are
refreshed in place, elsewhere (a cluster's log, CI) they are printed now and then.
"""

import atexit
import logging
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack
from typing import TextIO

from rich.console import Console, Group
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.text import Text

from cuepoint.errors import CuepointError
from cuepoint.layout import Layout
from cuepoint.plan import Run
from cuepoint.progress import Observer
from cuepoint.settings import Settings

log = logging.getLogger(__name__)

SNAKEMAKE = "snakemake.logging"  # Snakemake's logger; its records carry an `event`
STREAM_HANDLER = "DefaultStreamHandler"  # the name of the handler that writes to the terminal
NOISE = {"job_info", "group_info", "job_started", "job_finished", "progress", "shellcmd"}

REFRESH = 2.0  # seconds between two looks in a terminal
REPORT = 60.0  # seconds between two reports in the log file, and on a stream that is no terminal
SHARE = 0.02  # of the main process's time that looking may take: with very many videos it looks less often


class LiveProgress(logging.Handler):
    """Watches a run from `start` to `stop`. Never fails it: what goes wrong here is logged and ends the display."""

    def __init__(self, layout: Layout, settings: Settings, run: Run) -> None:
        super().__init__()
        self._layout, self._settings, self._run = layout, settings, run
        self._rules: dict[int, str] = {}  # of the jobs that run, by Snakemake's number
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)
        self._started = ExitStack()
        self._live: Live | None = None

    def start(self) -> None:
        """Begin to watch; from now on Snakemake's stream handler is quiet about single jobs."""
        logger = logging.getLogger(SNAKEMAKE)
        consoles = [handler for handler in logger.handlers if handler.name == STREAM_HANDLER]
        logger.addHandler(self)
        self._started.callback(logger.removeHandler, self)
        for handler in consoles:
            handler.addFilter(_is_no_noise)
            self._started.callback(handler.removeFilter, _is_no_noise)
        if sys.stderr.isatty():
            console = Console(stderr=True, highlight=False)
            self._live = self._started.enter_context(Live(console=console, auto_refresh=False))
            for handler in consoles:  # what Snakemake says scrolls by above the lines
                old = handler.setStream(FileProxy(console, sys.stderr))
                self._started.callback(handler.setStream, old)
        atexit.register(self.stop)
        self._started.callback(atexit.unregister, self.stop)
        self._thread.start()

    def stop(self) -> None:
        """Show the last state and leave Snakemake's handlers as they were. Does nothing when it is not watching."""
        if self._thread.is_alive():
            self._stop.set()
            self._thread.join()
        self._started.close()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep count of the jobs that run."""
        match str(getattr(record, "event", "")):
            case "job_info":
                self._rules[record.jobid] = record.rule_name
            case "job_finished":
                self._rules.pop(record.job_id, None)
            case "job_error":
                self._rules.pop(record.jobid, None)

    def _watch(self) -> None:
        try:
            self._layout.logs.mkdir(parents=True, exist_ok=True)
            with (self._layout.logs / "progress.log").open("a", encoding="utf-8", buffering=1) as file:
                self._watch_into(file)
        except (OSError, CuepointError) as error:
            log.warning("progress is not shown any more: %s", error)

    def _watch_into(self, file: TextIO) -> None:
        """Look and show until it is time to stop; what is seen last is always reported."""
        observer = Observer(self._layout, self._settings, self._run)
        reported = time.monotonic()
        pause = REFRESH
        while True:
            stopping = self._stop.wait(pause)
            began = time.monotonic()
            lines = observer.look().lines(Counter(list(self._rules.values())))
            if self._live:
                self._live.update(_in_terminal(lines), refresh=True)
            if stopping or began - reported >= REPORT:
                reported = began
                self._report(lines, file)
            if stopping:
                return
            pause = max(REFRESH, (time.monotonic() - began) / SHARE)

    def _report(self, lines: list[str], file: TextIO) -> None:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write("".join(f"{now} {line}\n" for line in lines))
        if not self._live:
            sys.stderr.write("".join(f"{line}\n" for line in lines))


def _in_terminal(lines: list[str]) -> Group:
    """Stages stay on a line each in a narrow terminal; the sentence below them may take several."""
    *stages, sentence = lines
    return Group(*(Text(stage, no_wrap=True, overflow="ellipsis") for stage in stages), Text(sentence))


def _is_no_noise(record: logging.LogRecord) -> bool:
    """Filter for Snakemake's own handler: what is not about the course of a single job."""
    return str(getattr(record, "event", "")) not in NOISE and record.msg != "Select jobs to execute..."
