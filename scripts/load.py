"""Load one model's embeddings of all shards into Qdrant, verified and published."""

from pathlib import Path
from typing import TYPE_CHECKING

from cuepoint.jobs import job
from cuepoint.layout import Layout
from cuepoint.locks import hold
from cuepoint.plan import members_hash, read_run
from cuepoint.qdrant.load import load_collection
from cuepoint.qdrant.points import ShardTables
from cuepoint.settings import load_settings
from cuepoint.telemetry import Telemetry

if TYPE_CHECKING:
    from snakemake.script import snakemake

settings = load_settings(snakemake.config)
layout = Layout(settings.results)
model = snakemake.wildcards.model
tables = zip(snakemake.input.embeddings, snakemake.input.videos, strict=True)
shards = [ShardTables(Path(videos).stem, Path(embeddings), Path(videos)) for embeddings, videos in tables]

with (
    job(snakemake.log[0]),
    hold(layout.lock("collection", model), f"the collection of {model}"),
    Telemetry(layout.telemetry / "load" / f"{model}.parquet", stage="load", name=model) as telemetry,
):
    run = read_run(layout)
    receipt = load_collection(model, shards, run.members, layout, settings, final=True, telemetry=telemetry)
    receipt.model_copy(update={"members": members_hash(run)}).write(Path(snakemake.output.receipt))
