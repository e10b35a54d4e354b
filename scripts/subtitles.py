"""One video's transcript as subtitles or plain text."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from cuepoint.jobs import job
from cuepoint.subtitles import write_subtitles

if TYPE_CHECKING:
    from snakemake.script import snakemake

log = logging.getLogger(__name__)

with job(snakemake.log[0]):
    segments = write_subtitles(
        Path(snakemake.input.transcripts), snakemake.wildcards.video_id, Path(snakemake.output[0])
    )
    log.info("%d segments written", segments)
