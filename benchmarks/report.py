"""What the end of a run costs: the ledger and the report, written after every run, over a synthetic corpus.

    python benchmarks/report.py 10000 100000 --work /tmp/report

For each number of videos, of about two chunks (18 segments) each: what the ledger and the report cost is per video and
shard, so the tables may be small. Prints rows of workflow.md: wall seconds, processor seconds in brackets, and how much
memory they took at most beyond that of the process with the run's plan in it.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
from corpus import endless, write_corpus
from load import Memory, allocated, timed

from cuepoint import ledger
from cuepoint.layout import Layout
from cuepoint.plan import Draft, Run, read_run, write_run
from cuepoint.report import write_report
from cuepoint.settings import load_settings

CHUNKS = 2  # of a video, on average


def main() -> None:
    """Make each corpus unless it is there, and measure in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", type=int, nargs="+")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.work)
        return
    print("| videos | ledger | its memory | report | its memory |\n|---|---|---|---|---|", flush=True)
    for number in options.videos:
        results = options.work / f"{number}" / "results"
        if not (results / ".state" / "run.json").exists():
            make(results, number)
        command = [sys.executable, __file__, str(number), "--work", str(results), "--measure"]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        print(f"| {number:,} {told.strip()}", flush=True)


def make(results: Path, number: int) -> None:
    """A corpus of `number` videos that was downloaded, transcribed and embedded, and its frozen run."""
    listed = list(islice(endless(mean=CHUNKS), number))
    _, members = write_corpus(results, listed, dimension=8, transcripts=True, downloads=True)
    sources = {video_id: f"https://www.youtube.com/watch?v={video_id}" for video_id in members}
    write_run(Draft(Run(members, sources, attempts={}), rows=[], audio_wanted=[], based_on=""), Layout(results))


def measure(results: Path) -> None:
    """Print the cells of one row."""
    layout, settings = Layout(results), load_settings({"results": str(results)})
    run = read_run(layout)
    cells = []
    steps: list[Callable[[], Any]] = [
        lambda: ledger.write_ledger(layout, settings, run),
        lambda: write_report(layout, settings, run),
    ]
    for step in steps:
        before = allocated(psutil.Process())
        with Memory() as memory:
            wall, cpu = timed(step)
        cells += [f"{wall:.1f} s ({cpu:.1f})", f"{(memory.peak - before) / 1e6:.0f} MB"]
    print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
