# Chunks of a shard's transcripts as vectors of one model.
from cuepoint.chunks import VERSION as CHUNKS_VERSION
from cuepoint.embedding import VERSION as EMBEDDING_VERSION


rule embed:
    input:
        transcripts=str(LAYOUT.results / "transcripts" / "{shard}.parquet"),
    output:
        embeddings=str(LAYOUT.results / "embeddings" / "{model}" / "{shard}.parquet"),
    log:
        str(LAYOUT.logs / "embed-{model}" / "{shard}.log"),
    benchmark:
        str(LAYOUT.logs / "benchmark" / "embed-{model}" / "{shard}.tsv")
    priority: 10
    conda:
        "../envs/embed.yaml"
    threads: get_gpu_job_threads
    resources:
        gpu=1,
        mem_mb=lambda wc, attempt: 8000 * attempt,
        runtime=lambda wc, attempt: 30 * attempt,
    params:
        model=lambda wc: SETTINGS.embedding.models[wc.model].result_settings(),
        chunking=SETTINGS.chunking.result_settings(),
        version=[CHUNKS_VERSION, EMBEDDING_VERSION],
    message:
        "Embedding shard {wildcards.shard} with {wildcards.model}"
    script:
        "../scripts/embed.py"
