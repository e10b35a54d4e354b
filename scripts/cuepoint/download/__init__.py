"""The download stage: from one listed video to a receipt that says truly how it ended, and its audio if there is any.

yt-dlp and PyAV are imported when something is really downloaded: a job that finds its receipt in the cache needs
neither.
"""

import logging
import shutil
import time
from importlib.metadata import version
from pathlib import Path

from cuepoint import faults
from cuepoint.errors import DataError, EnvironmentFault
from cuepoint.fingerprint import fingerprint
from cuepoint.layout import Layout
from cuepoint.plan import source_stamp
from cuepoint.receipts import Receipt, read_receipt
from cuepoint.settings import DownloadSettings
from cuepoint.sources import is_url
from cuepoint.states import Status

log = logging.getLogger(__name__)

VERSION = 1  # raise it when the same video would give another receipt or other audio


def download(video_id: str, source: str, layout: Layout, settings: DownloadSettings, attempt: int = 0) -> Receipt:
    """Bring the audio of one video to `layout.audio(video_id)` and say how that ended.

    `source` is an http(s) URL or a local file, `attempt` the number of the run's attempt (see `failures`). Never
    raises for a bad video; raises EnvironmentFault for a fault of this machine, which would hit every video. A job
    that is repeated after a crash finds its receipt in a cache and asks the network nothing. The caller holds the
    video's lock.
    """
    stamp = None if is_url(source) else source_stamp(source)
    inputs = fingerprint(
        source=source, stamp=stamp, settings=settings.result_settings(), version=VERSION, attempt=attempt
    )
    entry = layout.cache("receipt", video_id, inputs, ".json")
    if (known := _restore(entry, layout)) is not None:
        return known
    from cuepoint.download.tries import from_file, from_url

    began = time.time()
    target, partial = layout.audio(video_id), layout.partial(video_id)
    try:
        end = from_url(source, target, layout, settings) if is_url(source) else from_file(Path(source), target)
        receipt = Receipt(
            video_id=video_id,
            url=source,
            attempt=attempt,
            yt_dlp=version("yt-dlp"),
            seconds=round(time.time() - began, 3),
            **end,
        )
        if not receipt.status.retryable:
            shutil.rmtree(partial, ignore_errors=True)
        receipt.write(entry)
    except OSError as error:
        fault = faults.explain(error) or f"{error}; {faults.DOCTOR}"
        raise EnvironmentFault(f"{video_id}: {fault}") from error
    return receipt


def _restore(entry: Path, layout: Layout) -> Receipt | None:
    """The receipt of this very attempt, if it was written before and its audio is still what it says."""
    if not entry.exists():
        return None
    try:
        receipt = read_receipt(entry)
    except DataError as error:
        log.warning("%s; the video is downloaded again", error)
        return None
    if receipt.status is Status.OK:
        from cuepoint.download.remux import file_hash

        audio = layout.audio(receipt.video_id)
        if not audio.exists() or file_hash(audio) != receipt.sha256:
            log.warning("%s is not what its receipt says: the video is downloaded again", audio)
            return None
    log.info("%s ended as %s before; nothing is asked of the network", receipt.video_id, receipt.status)
    return receipt
