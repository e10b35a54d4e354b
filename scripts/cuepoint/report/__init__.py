"""The report: one self-contained HTML file that says what was ingested, how fast, and what held it back."""

from pathlib import Path

from cuepoint.atomic import write_text
from cuepoint.layout import Layout
from cuepoint.plan import Run
from cuepoint.report.gather import gather
from cuepoint.report.page import render
from cuepoint.settings import Settings

__all__ = ["write_report"]


def write_report(layout: Layout, settings: Settings, run: Run, path: Path | None = None) -> None:
    """Write the report of `run` to `path` (by default `report.html` in the report directory)."""
    write_text(path or layout.report / "report.html", render(gather(layout, settings, run)))
