# Speech of a shard's videos as text with times.
from cuepoint.asr import VERSION as ASR_VERSION


rule transcribe:
    input:
        receipts=get_receipts,
    output:
        transcripts=str(LAYOUT.results / "transcripts" / "{shard}.parquet"),
        videos=str(LAYOUT.results / "videos" / "{shard}.parquet"),
    log:
        str(LAYOUT.logs / "transcribe" / "{shard}.log"),
    benchmark:
        str(LAYOUT.logs / "benchmark" / "transcribe" / "{shard}.tsv")
    priority: 20
    conda:
        "../envs/transcribe.yaml"
    threads: get_gpu_job_threads
    resources:
        gpu=1,
        mem_mb=get_transcribe_memory,
        runtime=get_transcribe_minutes,
    params:
        settings=SETTINGS.transcribe.result_settings(),
        version=ASR_VERSION,
    message:
        "Transcribing shard {wildcards.shard}"
    script:
        "../scripts/transcribe.py"
