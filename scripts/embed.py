"""Embed one shard with one model: transcripts in, chunks with their vectors out."""

from pathlib import Path
from typing import TYPE_CHECKING

from cuepoint.embedding import embed_shard
from cuepoint.jobs import job
from cuepoint.layout import Layout
from cuepoint.locks import hold
from cuepoint.settings import load_settings
from cuepoint.telemetry import Telemetry

if TYPE_CHECKING:
    from snakemake.script import snakemake

settings = load_settings(snakemake.config)
layout = Layout(settings.results)
name, shard = snakemake.wildcards.model, snakemake.wildcards.shard

with (
    job(snakemake.log[0]),
    hold(layout.lock("shard", f"{shard}-{name}"), f"shard {shard} of {name}"),
    Telemetry(layout.telemetry / f"embed-{name}" / f"{shard}.parquet", stage="embed", name=shard) as telemetry,
):
    embed_shard(
        Path(snakemake.input.transcripts),
        Path(snakemake.output.embeddings),
        settings.embedding.models[name],
        chunking=settings.chunking,
        settings=settings.embedding,
        layout=layout,
        threads=snakemake.threads,
        telemetry=telemetry,
    )
