"""Curves of a run's metrics: one small picture each, for light and dark screens."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from srepa_ds.report.markup import Markup, element, image
from srepa_ds.report.record import Line

TITLES = {
    "loss_total": "total loss",
    "loss_flow": "flow matching",
    "loss_pointwise": "point-wise (negative cosine)",
    "loss_structural": "structural",
    "loss_cls": "flow matching of the class token",
    "frechet_distance": "Fréchet distance during training",
    "heldout_flow_loss": "flow matching, held-out images",
    "ema_distance": "distance between EMA and weights",
    "gradient_norm": "gradient norm before clipping",
    "images_per_second": "images per second",
    "learning_rate": "learning rate",
    "skipped": "skipped steps",
    "data_wait_share": "share of the time spent waiting for data",
}
# A range this wide is easier to read on a logarithmic axis.
_LOG_RATIO = 4.0
_SMOOTHED_FROM_POINTS = 120
_INCHES, _DOTS_PER_INCH = (4.2, 2.3), 150
_MARGINS = (0.14, 0.19, 0.84, 0.77)
"""Left, bottom, width and height of the axes, as shares of the picture."""


@dataclass(frozen=True)
class Curve:
    """One quantity over the steps it was recorded at."""

    title: str
    steps: Sequence[int]
    values: Sequence[float]


@dataclass(frozen=True)
class Theme:
    """The colours for one kind of screen."""

    ink: str
    grid: str
    line: str


THEMES: Mapping[str, Theme] = {
    "light": Theme(ink="#5d6673", grid="#dfe3e8", line="#1a5fb4"),
    "dark": Theme(ink="#9aa4b1", grid="#343a42", line="#7fb5f5"),
}


def curves_of(lines: Sequence[Line]) -> tuple[Curve, ...]:
    """Returns the curves worth drawing; a quantity that the run does not have is always zero."""
    names = dict.fromkeys(name for line in lines for name in line if name.startswith("loss_"))
    found = {}
    for name in {**{known: None for known in TITLES}, **names}:
        points = [(int(line["step"]), line[name]) for line in lines if name in line]
        if any(value != 0 for _, value in points):
            steps, values = zip(*points, strict=True)
            title = TITLES.get(name, name.removeprefix("loss_").replace("_", " "))
            found[name] = Curve(title, steps, values)
    if sum(name in found for name in names) == 2:
        # With a single term the total equals it.
        found.pop("loss_total", None)
    return tuple(found.values())


def panel(curve: Curve) -> Markup:
    """Returns the picture of a curve with its title and last value."""
    last = f"{curve.values[-1]:.4g}"
    caption = element("figcaption", curve.title, element("b", last))
    alt = f"{curve.title} over {len(curve.steps)} points, last {last}"
    light, dark = (draw(curve, THEMES[name]) for name in ("light", "dark"))
    return element("figure", caption, image(light, alt=alt, dark=dark))


def draw(curve: Curve, theme: Theme) -> bytes:
    """Returns a PNG with a transparent background; does without pyplot, which keeps figures."""
    figure = Figure(figsize=_INCHES)
    # Fixed margins keep the panels alike, and a layout engine would draw everything twice.
    axes = figure.add_axes(_MARGINS)
    _line(axes, curve, theme)
    _axes(axes, curve, theme)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH, transparent=True)
    return buffer.getvalue()


def _line(axes: Axes, curve: Curve, theme: Theme) -> None:
    steps, values = np.asarray(curve.steps), np.asarray(curve.values)
    if len(values) < _SMOOTHED_FROM_POINTS:
        marker = "o" if len(values) < 3 else None
        axes.plot(steps, values, color=theme.line, linewidth=1.5, marker=marker, markersize=4)
        return
    window = len(values) // 40
    smooth = np.convolve(values, np.full(window, 1 / window), mode="valid")
    first = (window - 1) // 2
    axes.plot(steps, values, color=theme.line, linewidth=0.7, alpha=0.35)
    axes.plot(steps[first : first + len(smooth)], smooth, color=theme.line, linewidth=1.6)


def _axes(axes: Axes, curve: Curve, theme: Theme) -> None:
    low, high = min(curve.values), max(curve.values)
    plain = FuncFormatter(lambda value, _: f"{value:,.6g}")
    if low > 0 and high / low > _LOG_RATIO:
        axes.set_yscale("log")
        subdivisions = (1, 2, 3, 5, 7) if high / low < 10 else (1, 2, 5)
        axes.yaxis.set_major_locator(LogLocator(subs=subdivisions, numticks=8))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(plain)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 2.5, 5, 10), integer=True))
    axes.xaxis.set_major_formatter(plain)
    axes.set_xlabel("step", color=theme.ink, fontsize=8)
    axes.tick_params(colors=theme.ink, labelsize=8, length=0)
    axes.grid(color=theme.grid, linewidth=0.7)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
