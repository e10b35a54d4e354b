"""What every rule's script does around its work: a log file, and one clear message instead of a traceback."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cuepoint import slurm
from cuepoint.errors import CuepointError

log = logging.getLogger(__name__)


@contextmanager
def job(log_file: str | Path, level: int = logging.INFO) -> Iterator[None]:
    """Log to `log_file` for the time of the block; end the process with status 1 and one message on a known error.

    Snakemake prints the log of a failed job (`show-failed-logs` in the default profile), so the message reaches the
    user there.
    """
    Path(log_file).parent.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        filename=log_file, level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    logging.captureWarnings(True)
    if allocation := slurm.allocation():
        log.info("%s", allocation)
    try:
        yield
    except CuepointError as error:
        log.error("%s", error)
        sys.exit(1)
    except Exception:
        log.exception("unexpected error: please report it with this log")
        raise
