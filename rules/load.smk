# Points of one model into Qdrant: synchronised, verified, then published.
from cuepoint import qdrant
from cuepoint.plan import members_hash


rule load:
    input:
        embeddings=get_embeddings,
        videos=get_videos,
    output:
        receipt=str(LAYOUT.load_receipt(f"{SETTINGS.qdrant.collection}-{{model}}")),
    log:
        str(LAYOUT.logs / "load" / "{model}.log"),
    benchmark:
        str(LAYOUT.logs / "benchmark" / "load" / "{model}.tsv")
    priority: 30
    localrule: "load" in SETTINGS.slurm.local
    conda:
        "../envs/load.yaml"
    threads: 2
    params:
        settings=SETTINGS.qdrant.result_settings(),
        members=members_hash(RUN),
        first=lambda wc: wc.model == SETTINGS.embedding.use[0],  # the one that people search by default
        reloads=lambda wc: RUN.reloads.get(wc.model, 0),
        version=qdrant.VERSION,
    message:
        "Loading {wildcards.model} into Qdrant"
    script:
        "../scripts/load.py"


rule load_available:
    # What exists so far into Qdrant, at any time, also while another run goes on: search before the last video is done.
    log:
        str(LAYOUT.logs / "load" / "available.log"),
    localrule: "load" in SETTINGS.slurm.local
    conda:
        "../envs/load.yaml"
    params:
        models=SETTINGS.embedding.use,
    message:
        "Loading what exists so far into Qdrant"
    script:
        "../scripts/load_available.py"
