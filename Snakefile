# Cuepoint: a list of videos becomes a searchable, time-coded Qdrant collection.
#
#   videos.txt -> plan -> download (a video) -> transcribe (a shard) -> embed (a shard and model) -> load (a model)
#
# results/audio/{ab}/       receipts (how each download ended) and audio
# results/transcripts/      one row a segment       results/videos/   one row a video
# results/embeddings/{model}/  one row a chunk      results/qdrant/   collections and what was verified in them
# results/report/           ledger: every listed video and how it ended; report.html: how fast, and what held it back
from snakemake.utils import min_version

min_version("9.27.1")


if Path("config.yaml").exists():

    configfile: "config.yaml"


include: "rules/common.smk"
include: "rules/download.smk"
include: "rules/transcribe.smk"
include: "rules/embed.smk"
include: "rules/load.smk"
include: "rules/report.smk"


rule all:
    # Everything: each listed video downloaded, transcribed, embedded, loaded and verified.
    default_target: True
    input:
        get_load_receipts,
        rules.report.output,
    message:
        "All listed videos are loaded and verified"


rule downloads:
    # The receipts of all listed videos.
    input:
        get_receipts,


rule transcripts:
    # The transcripts of all listed videos.
    input:
        get_transcripts,


rule embeddings:
    # The embeddings of all listed videos with all models of `embedding.use`.
    input:
        get_embeddings,
