"""Load what exists so far into Qdrant, while the run that makes the rest goes on or has stopped."""

from typing import TYPE_CHECKING

from cuepoint.jobs import job
from cuepoint.layout import Layout
from cuepoint.locks import hold
from cuepoint.plan import read_run
from cuepoint.qdrant.load import load_collection
from cuepoint.qdrant.points import ShardTables
from cuepoint.settings import load_settings

if TYPE_CHECKING:
    from snakemake.script import snakemake

settings = load_settings(snakemake.config)
layout = Layout(settings.results)

with job(snakemake.log[0]):
    run = read_run(layout)
    for model in snakemake.params.models:
        shards = [ShardTables(shard, layout.embeddings(model, shard), layout.videos(shard)) for shard in run.shards()]
        with hold(layout.lock("collection", model), f"the collection of {model}"):
            load_collection(model, shards, run.members, layout, settings, final=False)
