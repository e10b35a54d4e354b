# What came out, for people: the report, and subtitles or plain text of single videos on demand.


localrules:
    report,
    subtitles,
    text,


rule report:
    # What was ingested, how fast, and what held it back. Every run ends with writing these files too, also one that
    # failed; but after a crash just then nothing would be left to do, and they would stay as they were.
    input:
        get_load_receipts,
    output:
        ledger=[str(LAYOUT.report / "ledger.parquet"), str(LAYOUT.report / "ledger.csv")],
        report=report(str(LAYOUT.report / "report.html"), category="Cuepoint", labels={"content": "ingestion report"}),
    log:
        str(LAYOUT.logs / "report.log"),
    conda:
        "../envs/report.yaml"
    params:
        refusals=runs.refusals(LAYOUT),
    message:
        "Writing the ledger and the report"
    script:
        "../scripts/report.py"


rule subtitles:
    # results/subtitles/VIDEO_ID.vtt or .srt: the transcript of one video as subtitles.
    input:
        transcripts=get_transcript_of,
    output:
        str(SETTINGS.results / "subtitles" / "{video_id}.{format}"),
    log:
        str(LAYOUT.logs / "subtitles" / "{video_id}.{format}.log"),
    wildcard_constraints:
        format="vtt|srt",
    conda:
        "../envs/report.yaml"
    message:
        "Writing {output}"
    script:
        "../scripts/subtitles.py"


rule text:
    # results/text/VIDEO_ID.txt: what is said in one video.
    input:
        transcripts=get_transcript_of,
    output:
        str(SETTINGS.results / "text" / "{video_id}.txt"),
    log:
        str(LAYOUT.logs / "text" / "{video_id}.log"),
    conda:
        "../envs/report.yaml"
    message:
        "Writing {output}"
    script:
        "../scripts/subtitles.py"
