"""Download one video: its receipt, and its audio beside it when there is any."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from cuepoint import failures
from cuepoint.download import download
from cuepoint.download.cookies import credentials
from cuepoint.jobs import job
from cuepoint.layout import Layout
from cuepoint.locks import hold
from cuepoint.settings import load_settings

if TYPE_CHECKING:
    from snakemake.script import snakemake

with job(snakemake.log[0]):
    settings = load_settings(snakemake.config)
    layout = Layout(settings.results)
    video_id, params = snakemake.wildcards.video_id, snakemake.params
    with hold(layout.lock("video", video_id), f"video {video_id}"):
        receipt = download(video_id, params.source, layout, settings.download, params.attempt)
        attempt = failures.Attempt(
            number=params.attempt,
            status=receipt.status,
            time=time.time(),
            error=receipt.error,
            retry_after=receipt.retry_after,
            credentials=credentials(settings.download),
        )
        failures.record(layout, video_id, attempt)
        receipt.write(Path(snakemake.output.receipt))
