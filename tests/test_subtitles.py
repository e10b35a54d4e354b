"""Subtitles that players read, and text that people read."""

import re

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cuepoint.errors import DataError
from cuepoint.subtitles import LINE, LINES, Cue, plain_text, subrip, webvtt, write_subtitles
from cuepoint.tables import TRANSCRIPTS, write_table

SAID = [
    Cue(0.0, 2.5, "Hello."),
    Cue(2.6, 4.0, "Is 1 < 2 & 3 --> 4?"),
    Cue(3661.5, 3665.0, "An hour later."),
]


def test_webvtt():
    assert webvtt(SAID) == (
        "WEBVTT\n\n"
        "00:00:00.000 --> 00:00:02.500\nHello.\n\n"
        "00:00:02.600 --> 00:00:04.000\nIs 1 &lt; 2 &amp; 3 --&gt; 4?\n\n"
        "01:01:01.500 --> 01:01:05.000\nAn hour later.\n"
    )


def test_subrip():
    assert subrip(SAID) == (
        "1\n00:00:00,000 --> 00:00:02,500\nHello.\n\n"
        "2\n00:00:02,600 --> 00:00:04,000\nIs 1 < 2 & 3 -> 4?\n\n"
        "3\n01:01:01,500 --> 01:01:05,000\nAn hour later.\n"
    )


def test_plain_text_has_a_paragraph_where_a_pause_was():
    assert plain_text(SAID) == "Hello. Is 1 < 2 & 3 --> 4?\n\nAn hour later.\n\n"


@given(st.lists(st.tuples(st.floats(0, 1e5), st.floats(0, 60), st.text(st.characters(codec="utf-8"), max_size=400))))
def test_any_text_becomes_cues_that_fit_and_that_a_parser_reads(said):
    cues = [Cue(start, start + length, " ".join(text.split())) for start, length, text in said]
    cues = [cue for cue in cues if cue.text]
    blocks = webvtt(cues).removeprefix("WEBVTT").strip("\n").split("\n\n")
    words = []
    for block in filter(None, blocks):
        timing, *lines = block.split("\n")
        start, end = re.fullmatch(r"(\d+:\d\d:\d\d\.\d{3}) --> (\d+:\d\d:\d\d\.\d{3})", timing).groups()
        assert len(start) == len(end) <= 12 and start <= end
        assert 1 <= len(lines) <= LINES
        for line in lines:
            assert "-->" not in line and "<" not in line
            text = line.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
            assert len(text) <= LINE
            words.append(text)
    assert "".join("".join(words).split()) == "".join("".join(cue.text.split()) for cue in cues)


def test_a_video_is_taken_from_its_shard_in_order_of_time(tmp_path):
    rows = [
        {"video_id": id_, "segment": i, "start": start, "end": start + 1, "text": f" {id_} {i} ", "flags": []}
        for id_, i, start in [("a", 1, 5.0), ("a", 0, 1.0), ("b", 0, 0.0), ("a", 2, 9.0)]
    ]
    write_table(tmp_path / "0.parquet", pa.Table.from_pylist(rows, schema=TRANSCRIPTS), TRANSCRIPTS, settings={})
    assert write_subtitles(tmp_path / "0.parquet", "a", tmp_path / "a.txt") == 3
    assert (tmp_path / "a.txt").read_text().split() == ["a", "0", "a", "1", "a", "2"]
    assert write_subtitles(tmp_path / "0.parquet", "silent", tmp_path / "silent.vtt") == 0
    assert (tmp_path / "silent.vtt").read_text() == "WEBVTT\n"


def test_a_missing_transcript_is_said(tmp_path):
    with pytest.raises(DataError, match="run snakemake again"):
        write_subtitles(tmp_path / "0.parquet", "a", tmp_path / "a.vtt")
