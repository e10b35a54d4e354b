"""The demo's run as people see it: while it went on, in its report, video by video."""

import re
import subprocess

import pytest
from conftest import BIN

pytestmark = pytest.mark.slow


def ask(project, *arguments):
    command = [BIN / "cuepoint", *arguments, "--directory", project.directory]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_run_told_how_far_each_stage_was_and_what_held_it_back(demo):
    for stage in ("download", "transcribe", "embed", "load"):
        assert re.search(rf"^{stage} +15/15 +100%", demo.first_run.stderr, re.MULTILINE)
    assert re.search(r"^.*(is the bottleneck|is balanced).*$", demo.first_run.stderr, re.MULTILINE)
    assert "Finished jobid" not in demo.first_run.stderr
    assert (demo.results / "logs" / "progress.log").exists()
    assert re.search(r"^load +15/15 +100%", ask(demo, "status"), re.MULTILINE)


def test_the_report_is_written_and_part_of_snakemake_s_own(demo, project):
    page = (demo.results / "report" / "report.html").read_text()
    for told in ("<b>15</b>videos listed", "<b>12</b>ok", "<b>1</b>empty", "The string players rehearse"):
        assert told in page, told
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    project.snakemake("--report", str(project.directory / "all.html"))
    assert "Cuepoint" in (project.directory / "all.html").read_text()


def test_subtitles_and_text_are_made_on_demand_and_do_not_run_the_pipeline_again(demo, project):
    video_id = next(path.stem for path in demo.results.glob("audio/*/*.mka"))
    targets = [f"results/subtitles/{video_id}.vtt", f"results/subtitles/{video_id}.srt", f"results/text/{video_id}.txt"]
    assert project.planned(*targets) == {"subtitles": 2, "text": 1}
    project.snakemake(*targets)
    subtitles, srt, text = ((project.directory / target).read_text() for target in targets)
    assert subtitles.startswith("WEBVTT\n\n00:00:")
    assert srt.startswith("1\n00:00:")
    assert len(text.split()) > 5
    unknown = project.snakemake("results/text/nobody.txt", check=False)
    assert "nobody is not in videos.txt" in unknown.stderr


def test_a_video_s_story_goes_from_its_source_to_its_points(demo):
    story = ask(demo, "explain", "http://demo.example/watch/bread-day")
    for told in ("http://demo.example/watch/bread-day", "download: ok", "segments", "points", "in the collection of",
                 "transcribe of shard"):  # fmt: skip
        assert told in story, told
