"""Rule transcribe: the audio of a shard's videos as text with times."""

from pathlib import Path
from typing import TYPE_CHECKING

from cuepoint.asr.shard import transcribe_shard
from cuepoint.jobs import job
from cuepoint.layout import Layout
from cuepoint.locks import hold
from cuepoint.receipts import read_receipt
from cuepoint.settings import load_settings
from cuepoint.telemetry import Telemetry

if TYPE_CHECKING:
    from snakemake.script import snakemake

shard = snakemake.wildcards.shard
settings = load_settings(snakemake.config)
layout = Layout(settings.results)

with (
    job(snakemake.log[0]),
    hold(layout.lock("shard", f"transcribe-{shard}"), f"shard {shard}"),
    Telemetry(layout.telemetry / "transcribe" / f"{shard}.parquet", stage="transcribe", name=shard) as telemetry,
):
    transcribe_shard(
        [read_receipt(Path(path)) for path in snakemake.input.receipts],
        layout,
        settings.transcribe,
        transcripts=Path(snakemake.output.transcripts),
        videos=Path(snakemake.output.videos),
        threads=snakemake.threads,
        telemetry=telemetry,
        keep_audio=settings.keep_audio,
    )
