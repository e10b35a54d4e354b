"""A run from its start to its end, as the main Snakemake process sees it: plan, lock, ledger."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, suppress

from cuepoint import faults, ledger, qdrant
from cuepoint.atomic import write_text
from cuepoint.download.cookies import credentials
from cuepoint.errors import CuepointError, EnvironmentFault
from cuepoint.layout import Layout
from cuepoint.locks import hold
from cuepoint.plan import Draft, Run, draft_run, write_run
from cuepoint.settings import Settings
from cuepoint.sources import read_list

log = logging.getLogger("snakemake.logging")

_THREADS = 32  # that a job may need at the least, beside two for each core
_CLOCKS_DIFFER = 300.0  # seconds by which the clocks of nodes may differ

SIDE_TARGETS = frozenset({"load_available"})
"""Targets that look at what a run has left so far, and may do so while another run goes on."""


def check_place(layout: Layout) -> None:
    """Raise EnvironmentFault, before Snakemake looks at a file, when it would meet what it could not explain."""
    nearest = next(path for path in (layout.results, *layout.results.absolute().parents) if path.exists())
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise EnvironmentFault(
            f"{nearest} cannot be written (a read-only file system, or another user's directory): mount it for "
            "writing, give this user the right to write there, or set `results` to another directory"
        )
    _check_threads()
    with suppress(FileNotFoundError):
        begun = layout.run.stat().st_mtime
        if begun > time.time() + _CLOCKS_DIFFER:  # and Snakemake goes by the times of files
            raise EnvironmentFault(
                f"the last run over {layout.results} began in the future ({time.ctime(begun)}): the clock of this "
                "machine is wrong, or was wrong then. Set it; if it is right now, set the times of the files:\n"
                f'find {layout.results} -newermt now -exec touch --date="$(date --rfc-3339=seconds)" {{}} +'
            )


def draft(settings: Settings, layout: Layout) -> Draft:
    """Plan a run from the list and what earlier runs remember; writes nothing."""
    return draft_run(
        read_list(settings.videos),
        layout,
        shard_size=settings.shard_size,
        limit_unprocessed=settings.limit_unprocessed,
        transcribe_settings=settings.transcribe.result_settings(),
        keep_audio=settings.keep_audio,
        missing_collections=_missing_collections(settings, layout),
        retry_final=settings.download.retry_final,
        max_failed_runs=settings.download.max_failed_runs,
        credentials=credentials(settings.download),
    )


def locked(layout: Layout, targets: Collection[str]) -> AbstractContextManager[None]:
    """The lock that keeps a second run out of these results; side targets have a lock of their own."""
    name = "side" if _is_side_run(targets) else "run"
    return hold(layout.lock("run", name), f"another run over {layout.results}", wait=False)


def begin(draft: Draft, layout: Layout, targets: Collection[str]) -> None:
    """Write the drafted run down; from here on editing the list changes nothing in it."""
    if not _is_side_run(targets):
        write_run(draft, layout)


def stop_on_sigterm(stop: Callable[[], object]) -> None:
    """Have SIGTERM call `stop` in a thread of its own.

    Snakemake's own handler runs in the main thread and takes a lock that this very thread holds whenever it notes that
    a job has ended: hit then, the run would hang for ever and keep others out (tried with 9.27.1).
    """
    told, tell = os.pipe()

    def wait() -> None:
        while os.read(told, 1):
            stop()

    threading.Thread(target=wait, name="sigterm", daemon=True).start()
    with suppress(ValueError):  # not in the main thread of the process: then nobody handles signals here
        signal.signal(signal.SIGTERM, lambda *_: os.write(tell, b"."))


def end(settings: Settings, layout: Layout, run: Run) -> None:
    """Write the ledger and the report, and say how the listed videos ended.

    Raises CuepointError when more of them failed than `max_failed_share` allows.
    """
    from cuepoint.report import write_report  # not needed by the jobs, which import this module too

    tally = ledger.write_ledger(layout, settings, run)
    write_report(layout, settings, run)
    log.info(ledger.summary(tally, layout))
    if tally.failed > settings.max_failed_share * tally.total:
        write_text(layout.refusals, f"{refusals(layout) + 1}\n")
        raise CuepointError(
            f"{tally.failed} of {tally.total} videos failed, more than max_failed_share = {settings.max_failed_share} "
            f"allows; {layout.report / 'ledger.csv'} has the reasons"
        )


def _check_threads() -> None:
    """Raise EnvironmentFault when a limit leaves no room for what jobs start: their libraries would end by a signal."""
    enough = threading.Event()
    started: list[threading.Thread] = []
    try:
        for _ in range(_THREADS + 2 * (os.cpu_count() or 1)):
            thread = threading.Thread(target=enough.wait, daemon=True)
            thread.start()
            started.append(thread)
    except RuntimeError as error:
        raise EnvironmentFault(faults.explain(error) or str(error)) from error
    finally:
        enough.set()
        for thread in started:
            thread.join()


def refusals(layout: Layout) -> int:
    """How many runs have failed because of `max_failed_share`.

    Snakemake asks nobody when there is nothing to do. This number is a parameter of the report, so that after such a
    run there is: the next one looks again, and fails again until the share is right.
    """
    with suppress(FileNotFoundError, ValueError):
        return int(layout.refusals.read_bytes()[:9])
    return 0


def _is_side_run(targets: Collection[str]) -> bool:
    return bool(targets) and SIDE_TARGETS.issuperset(targets)


def _missing_collections(settings: Settings, layout: Layout) -> list[str]:
    """Models whose load receipt exists while the collection that it speaks of does not."""
    return [
        model
        for model in settings.embedding.use
        if layout.load_receipt(f"{settings.qdrant.collection}-{model}").exists()
        and not qdrant.present(settings, layout, model)
    ]
