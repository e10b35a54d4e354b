"""A run from its start to its end, as the main Snakemake process sees it: plan, lock, ledger."""

import logging
import os
import signal
import threading
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, suppress

from cuepoint import ledger, qdrant
from cuepoint.download.cookies import credentials
from cuepoint.errors import CuepointError
from cuepoint.layout import Layout
from cuepoint.locks import hold
from cuepoint.plan import Draft, Run, draft_run, write_run
from cuepoint.settings import Settings
from cuepoint.sources import read_list

log = logging.getLogger("snakemake.logging")

SIDE_TARGETS = frozenset({"load_available"})
"""Targets that look at what a run has left so far, and may do so while another run goes on."""


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

    counts = ledger.write_ledger(layout, settings, run)
    write_report(layout, settings, run)
    log.info(ledger.summary(counts, layout))
    failed = sum(counts.values()) - counts["ok"] - counts["empty"] - counts["waiting"]
    if failed > settings.max_failed_share * sum(counts.values()):
        raise CuepointError(
            f"{failed} of {sum(counts.values())} videos failed, more than max_failed_share = "
            f"{settings.max_failed_share} allows; {layout.report / 'ledger.csv'} has the reasons"
        )


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
