# Audio of one video. The job always ends with a receipt that says how; only a fault of this machine fails it.
from cuepoint.download import VERSION as DOWNLOAD_VERSION
from cuepoint.plan import source_stamp


rule download:
    output:
        receipt=str(LAYOUT.results / "audio" / "{ab}" / "{video_id}.json"),
    log:
        str(LAYOUT.logs / "download" / "{ab}" / "{video_id}.log"),
    priority: lambda wc: -int(RUN.members[wc.video_id])  # early shards first, so that the GPU's work begins early
    group:
        None if "download" in SETTINGS.slurm.local else "download"
    localrule: "download" in SETTINGS.slurm.local
    conda:
        "../envs/download.yaml"
    threads: 0  # bounded by `downloads`; a core each would keep the cores from the GPU job
    resources:
        downloads=1,
    params:
        source=lambda wc: RUN.sources[wc.video_id],
        attempt=lambda wc: RUN.attempts.get(wc.video_id, 0),
        stamp=lambda wc: source_stamp(RUN.sources[wc.video_id]),
        settings=SETTINGS.download.result_settings(),
        version=DOWNLOAD_VERSION,
    message:
        "Downloading {wildcards.video_id}"
    script:
        "../scripts/download.py"
