"""Line charts as SVG, drawn for both light and dark pages: colours are classes of the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from advrad_fast.evaluation.report.markup import Node, tag

COLOURS = 6  #: classes s0 .. s5 of the style sheet; more lines than that are drawn in one quiet colour

_WIDTH, _HEIGHT = 380, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 12, 42


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: for the legend and for tool tips.
        points: (x, y), by rising x; y in [0, 1], shown in percent.
        colour: one of the style sheet's classes, or None for a quiet line.
        marks: whether the points are marked; a mark's tool tip has its values.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int | None = None
    marks: bool = False


def chart(
    lines: Sequence[Line], *, x_label: str, y_label: str, x_max: float = 1.0, x_percent: bool = False, chance: bool = False
) -> Node:
    """A chart with its legend.

    Args:
        x_max: the right end of the x axis, which begins at 0.
        x_percent: whether x is a share, shown in percent.
        chance: draw the diagonal of a detector that guesses.
    """
    label = f"{y_label} against {x_label}: " + "; ".join(line.name for line in lines)
    drawing = tag("svg", viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=label, class_="chart")
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = _y(value)
        drawing.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="grid"))
        drawing.append(tag("text", f"{100 * value:.0f}", x=_LEFT - 6, y=y + 4, class_="tick end"))
    for value in _ticks(x_max):
        x = _x(value, x_max)
        drawing.append(tag("line", x1=x, x2=x, y1=_TOP, y2=_HEIGHT - _BOTTOM, class_="grid"))
        text = f"{100 * value:.0f}" if x_percent else f"{value:.4g}"
        drawing.append(tag("text", text, x=x, y=_HEIGHT - _BOTTOM + 16, class_="tick middle"))
    across, down = (_LEFT + _WIDTH - _RIGHT) / 2, (_TOP + _HEIGHT - _BOTTOM) / 2
    drawing.append(tag("text", x_label, x=across, y=_HEIGHT - 6, class_="axis middle"))
    drawing.append(tag("text", y_label, x=12, y=down, transform=f"rotate(-90 12 {down:g})", class_="axis middle"))
    if chance:
        drawing.append(tag("path", d=_path([(0.0, 0.0), (x_max, x_max)], x_max), class_="chance"))
    for line in lines:
        colour = "quiet" if line.colour is None else f"s{line.colour}"
        drawing.append(tag("path", tag("title", line.name), d=_path(line.points, x_max), class_=f"line {colour}"))
        for x, y in line.points if line.marks else ():
            tip = f"{line.name}, {x:.4g}: {100 * y:.2f}"
            drawing.append(tag("circle", tag("title", tip), cx=_x(x, x_max), cy=_y(y), r=3.5, class_=f"mark {colour}"))
    named = [line for line in lines if line.colour is not None]
    keys = [tag("li", tag("span", class_=f"key s{line.colour}"), line.name) for line in named]
    if len(named) < len(lines):
        keys.append(tag("li", tag("span", class_="key quiet"), "each category"))
    return tag("div", drawing, tag("ul", *keys, class_="keys"), class_="plot")


def _x(value: float, x_max: float) -> float:
    return round(_LEFT + (_WIDTH - _RIGHT - _LEFT) * value / x_max, 1)


def _y(value: float) -> float:
    return round(_HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * value, 1)


def _path(points: Sequence[tuple[float, float]], x_max: float) -> str:
    return "M" + " L".join(f"{_x(x, x_max):g} {_y(y):g}" for x, y in points)


def _ticks(x_max: float) -> list[float]:
    """Round numbers from 0 up to ``x_max``, four to seven of them."""
    power = 10.0 ** math.floor(math.log10(x_max))
    step = next(power * part for part in (0.2, 0.25, 0.5, 1.0, 2.0) if x_max / (power * part) <= 6.001)
    return [i * step for i in range(int(x_max / step * 1.001) + 1)]
