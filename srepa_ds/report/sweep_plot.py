"""The plot of a sweep: a score against the setting that varies, a line for all others."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from matplotlib import colormaps
from matplotlib.figure import Figure

from srepa_ds.evaluation.sweep_rows import SweepRow, deciding_score
from srepa_ds.report.curves import THEMES, Theme

_INCHES, _DOTS_PER_INCH = (8.4, 4.2), 120
_MOST_LINES = 20
"""Lines of more would share colours."""
_AXES = {"cfg_scale": "guidance scale", "num_steps": "steps"}
_COLOURS = "tab20"


class Line(NamedTuple):
    """One line: its name, and its points in the order of the axis."""

    name: str
    places: tuple[float, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Plot:
    """What is drawn: the axis, and its lines."""

    axis: str
    lines: tuple[Line, ...]


def plot_of(rows: Sequence[SweepRow]) -> Plot | None:
    """Returns the score that decides against the guidance scale, or the steps if these alone vary.

    None if neither varies. A point without guidance belongs to the lines of all intervals.
    """
    score = deciding_score(rows)
    measured = [row for row in rows if score in row.scores]
    axis = next((a for a in _AXES if len({getattr(r, a) for r in measured}) > 1), None)
    if axis is None:
        return None
    intervals = {row.interval for row in measured if row.cfg_scale > 1} or {(0.0, 1.0)}
    found: dict[str, dict[float, float]] = {}
    for row in measured:
        for interval in {row.interval} if row.cfg_scale > 1 else intervals:
            line = found.setdefault(_name(row, interval, axis, rows), {})
            line[getattr(row, axis)] = row.scores[score]
    return Plot(
        _AXES[axis],
        tuple(
            Line(name, *zip(*sorted(points.items()), strict=True))
            for name, points in sorted(found.items())
        ),
    )


def _name(row: SweepRow, interval: tuple[float, float], axis: str, rows: Sequence[SweepRow]) -> str:
    """Returns the settings in which the line of a row differs from others."""
    parts = {
        "weights": row.weights,
        "solver": row.solver,
        "num_steps": f"{row.num_steps} steps",
        "cfg_scale": f"scale {row.cfg_scale:g}",
    }
    varying = [text for name, text in parts.items() if name != axis and _varies(name, rows)]
    if len({one.interval for one in rows if one.cfg_scale > 1}) > 1:
        varying.append(f"guided in [{interval[0]:g}, {interval[1]:g}]")
    return ", ".join(varying) or "all points"


def _varies(name: str, rows: Sequence[SweepRow]) -> bool:
    return len({getattr(row, name) for row in rows}) > 1


def draw_plot(plot: Plot, *, score: str, theme: str) -> bytes:
    """Returns a PNG with a transparent background for the screens of a theme of `THEMES`."""
    figure, colours = Figure(figsize=_INCHES, layout="constrained"), THEMES[theme]
    axes = figure.add_subplot()
    for number, line in enumerate(plot.lines[:_MOST_LINES]):
        colour = colormaps[_COLOURS](number % _MOST_LINES)
        axes.plot(line.places, line.scores, marker="o", markersize=4, color=colour, label=line.name)
    _style(axes, plot, score, colours)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH, transparent=True)
    return buffer.getvalue()


def _style(axes, plot: Plot, score: str, theme: Theme) -> None:
    axes.set_xlabel(plot.axis, color=theme.ink)
    axes.set_ylabel(score, color=theme.ink)
    axes.tick_params(colors=theme.ink, length=0)
    axes.grid(color=theme.grid, linewidth=0.7)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if len(plot.lines) > 1:
        axes.legend(fontsize=8, frameon=False, labelcolor=theme.ink)
