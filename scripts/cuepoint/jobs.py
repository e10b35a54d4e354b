"""What every rule's script does around its work: a log file, and one clear message instead of a traceback."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cuepoint import faults, slurm

log = logging.getLogger(__name__)


@contextmanager
def job(log_file: str | Path, level: int = logging.INFO) -> Iterator[None]:
    """Log to `log_file` for the time of the block; end the process with status 1 and one message on a known error.

    Snakemake prints the log of a failed job (`show-failed-logs` in the default profile), so the message reaches the
    user there. A log that cannot be written, for the disk is full, has its errors in the terminal.
    """
    try:
        Path(log_file).parent.mkdir(parents=True, exist_ok=True)
        handler: logging.Handler = _LogFile(log_file)
    except OSError as error:
        sys.exit(faults.message_for(error) or f"{log_file} cannot be written: {error}")
    logging.basicConfig(
        handlers=[handler], level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    logging.captureWarnings(True)
    if allocation := slurm.allocation():
        log.info("%s", allocation)
    try:
        yield
    except Exception as error:
        if (message := faults.message_for(error)) is None:
            log.exception("unexpected error: please report it with this log")
            raise
        log.error("%s", message)
        sys.exit(1)


class _LogFile(logging.FileHandler):
    """A log file; what it cannot take is left out, errors go to the terminal."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path, mode="a", encoding="utf-8", errors="backslashreplace")

    def handleError(self, record: logging.LogRecord) -> None:
        """Called by `emit` when writing has failed."""
        if record.levelno >= logging.ERROR and isinstance(sys.exception(), OSError):
            sys.stderr.write(f"{record.getMessage()}\n")
