"""Curves over time as inline SVG: no script, no library, and it takes its colours from the page."""

import time
from collections.abc import Callable

import numpy as np
from markupsafe import Markup

from cuepoint.report.series import Series

WIDTH, HEIGHT = 720, 200  # of a plot, in units of its viewBox
LEFT, RIGHT, TOP, BOTTOM = 60, 8, 10, 26  # margins
TICKS = 4


def plot(series: list[Series], *, share: bool = False) -> Markup:
    """Curves in one plot with a legend; with `share` the values are 0 to 1 and shown in per cent."""
    highest = max((float(curve.values.max()) for curve in series), default=0.0)
    top = 1.0 if share else _round_up(highest)
    first, last = float(series[0].times[0]), float(series[0].times[-1])
    x = _scale(first, max(last, first + 1e-6), LEFT, WIDTH - RIGHT)
    y = _scale(0.0, top, HEIGHT - BOTTOM, TOP)
    curves = Markup().join(
        Markup('<path class="curve c{}" d="{}"/>').format(number, _path(x(curve.times), y(curve.values)))
        for number, curve in enumerate(series)
    )
    keys = Markup(" ").join(
        Markup('<span class="key k{}">{}</span>').format(number, curve.name) for number, curve in enumerate(series)
    )
    return Markup(
        '<figure><svg viewBox="0 0 {} {}" role="img" aria-label="{} over time">{}{}{}</svg>'
        "<figcaption>{}</figcaption></figure>"
    ).format(
        WIDTH,
        HEIGHT,
        ", ".join(curve.name for curve in series),
        _levels(top, y, "{:.0%}" if share else "{:g}"),
        _moments(first, last, x),
        curves,
        keys,
    )


def _levels(top: float, y: Callable[[float], float], form: str) -> Markup:
    lines = []
    for i in range(TICKS + 1):
        value = top * i / TICKS
        lines.append(
            Markup(
                '<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/><text class="level" x="{}" y="{:.1f}">{}'
            ).format(LEFT, WIDTH - RIGHT, y(value), y(value), LEFT - 6, y(value) + 4, form.format(value))
            + Markup("</text>")
        )
    return Markup().join(lines)


def _moments(first: float, last: float, x: Callable[[float], float]) -> Markup:
    form = "%H:%M:%S" if last - first < 600 else "%H:%M" if last - first < 86400 else "%d %b %H:%M"
    anchors = ["start", *["middle"] * (TICKS - 1), "end"]
    return Markup().join(
        Markup('<text class="moment" text-anchor="{}" x="{:.1f}" y="{}">{}</text>').format(
            anchor, x(moment), HEIGHT - 6, time.strftime(form, time.localtime(moment))
        )
        for moment, anchor in zip(np.linspace(first, last, TICKS + 1), anchors, strict=True)
    )


def _path(xs: np.ndarray, ys: np.ndarray) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in zip(xs, ys, strict=True))


def _scale(low: float, high: float, start: float, end: float) -> Callable:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _round_up(value: float) -> float:
    """The next 1, 2, 4, 6 or 8 times a power of ten: quarters of it read well on an axis."""
    power = 10.0 ** np.floor(np.log10(max(value, 1.0)))
    return next(float(factor * power) for factor in (1, 2, 4, 6, 8, 10) if factor * power >= value)
