"""The report as a page: Jinja2 fills `report.html.j2`; style, script and plots stand in the file itself."""

import time
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from cuepoint.durations import duration
from cuepoint.report.gather import Report
from cuepoint.report.plots import plot


def render(report: Report) -> str:
    """The page. Every value is escaped: titles and error messages come from strangers."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"duration": duration, "moment": _moment, "count": "{:,.0f}".format, "clock": _clock}
    environment.globals |= {"plot": plot}
    template = files("cuepoint.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(report=report)


def _moment(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(when))


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"
