"""Subtitles and plain text of one video, from its shard's transcript.

A segment becomes one cue, or several of at most two lines of 42 characters (what players and the guidelines of
broadcasters agree on), its time divided by the length of their texts. Text is data: what a player would read as markup
is escaped, and what would end a cue early is taken out.
"""

import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc

from cuepoint.atomic import write_text
from cuepoint.tables import read_table

LINE = 42  # characters
LINES = 2  # of a cue
PARAGRAPH_GAP = 2.0  # seconds of pause that begin a new paragraph in the plain text


@dataclass(frozen=True)
class Cue:
    """Text and when it is said, in seconds."""

    start: float
    end: float
    text: str


def read_cues(transcripts: Path, video_id: str) -> list[Cue]:
    """The video's segments in order of time. Raises DataError when the table is missing or damaged."""
    table = read_table(transcripts, columns=["video_id", "start", "end", "text"])
    rows = table.filter(pc.field("video_id") == video_id).sort_by([("start", "ascending"), ("end", "ascending")])
    cues = (Cue(row["start"], row["end"], " ".join(row["text"].split())) for row in rows.to_pylist())
    return [cue for cue in cues if cue.text]


def write_subtitles(transcripts: Path, video_id: str, path: Path) -> int:
    """Write the video's transcript as the suffix of `path` says (`.vtt`, `.srt`, `.txt`); count its segments."""
    cues = read_cues(transcripts, video_id)
    write_text(path, FORMATS[path.suffix](cues))
    return len(cues)


def webvtt(cues: Iterable[Cue]) -> str:
    """The cues as WebVTT."""
    blocks = [f"{_clock(cue.start, '.')} --> {_clock(cue.end, '.')}\n{_escape(cue.text)}" for cue in _split_long(cues)]
    return "\n\n".join(["WEBVTT", *blocks]) + "\n"


def subrip(cues: Iterable[Cue]) -> str:
    """The cues as SubRip."""
    blocks = [
        f"{number}\n{_clock(cue.start, ',')} --> {_clock(cue.end, ',')}\n{cue.text.replace('-->', '->')}"
        for number, cue in enumerate(_split_long(cues), 1)
    ]
    return "\n\n".join(blocks) + "\n" * bool(blocks)


def plain_text(cues: Iterable[Cue]) -> str:
    """What is said, as paragraphs that a pause separates."""
    paragraphs: list[list[str]] = []
    end = float("-inf")
    for cue in cues:
        if cue.start - end > PARAGRAPH_GAP:
            paragraphs.append([])
        paragraphs[-1].append(cue.text)
        end = max(end, cue.end)
    return "".join(textwrap.fill(" ".join(texts), 100, break_on_hyphens=False) + "\n\n" for texts in paragraphs)


FORMATS: dict[str, Callable[[Iterable[Cue]], str]] = {".vtt": webvtt, ".srt": subrip, ".txt": plain_text}


def _split_long(cues: Iterable[Cue]) -> list[Cue]:
    """Cues of at most `LINES` lines, broken into lines; a segment's time is divided by the length of the parts."""
    parts: list[Cue] = []
    for cue in cues:
        lines = textwrap.wrap(cue.text, LINE, break_on_hyphens=False)
        groups = [lines[i : i + LINES] for i in range(0, len(lines), LINES)]
        total = sum(map(len, lines))
        told = 0
        for group in groups:
            start = cue.start + (cue.end - cue.start) * told / total
            told += sum(map(len, group))
            end = cue.start + (cue.end - cue.start) * told / total
            parts.append(Cue(start, end, "\n".join(group)))
    return parts


def _clock(seconds: float, point: str) -> str:
    """`HH:MM:SS.mmm`, with as many digits for the hours as they need."""
    milliseconds = round(max(seconds, 0.0) * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 1000:02d}{point}{rest % 1000:03d}"


def _escape(text: str) -> str:
    """WebVTT's escapes; with `>` escaped no text can contain the arrow of a timing line."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
