"""A sweep as a table for people: `sweep.md`, and `sweep.html`, a page that needs no other file."""

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from srepa_ds.evaluation.sweep_rows import SweepRow, best_first, deciding_score
from srepa_ds.metrics.scores import SMALLER_IS_BETTER, printed_names
from srepa_ds.report.markup import Markup, element, image, joined, note, png_of, section
from srepa_ds.report.page import page
from srepa_ds.report.tables import duration

_SETTINGS = ("weights", "solver", "steps", "scale", "interval")
_COLUMNS, _SMALLEST_SIDE, _LARGEST_SIDE = 8, 48, 128


def markdown(rows: Sequence[SweepRow], labels: Sequence[str]) -> str:
    """Returns a table of the rows, the best first and bold; `labels` are the extractors'."""
    names = _score_names(rows, labels)
    header = [*_SETTINGS, "NFE", *names, "time"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for number, row in enumerate(best_first(rows)):
        cells = _cells(row, labels, names)
        cells = [f"**{cell}**" if cell else "" for cell in cells] if number == 0 else cells
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def sweep_page(rows: Sequence[SweepRow], labels: Sequence[str], *, folder: Path) -> str:
    """Returns the page: table, plot, and the first images of each point, from `folder`."""
    ordered, field = best_first(rows), deciding_score(rows)
    extreme = "smallest" if SMALLER_IS_BETTER[field] else "largest"
    text = (
        f"{len(rows)} points of {rows[0].num_images:,} images each, of the same seed, labels and "
        f"start noise. The {extreme} {_deciding_name(rows, labels)} is first. NFE are function "
        "evaluations per image."
    )
    # A run's sweep lies in the run's folder.
    title = f"Sweep: {folder.absolute().parent.name}"
    sections = (
        section("points", "Points", element("p", text), _table(ordered, labels)),
        section("plot", "Plot", _plot(ordered, labels)),
        section("images", "The same images at each point", _sheets(ordered, labels, folder)),
    )
    return page(title, header=element("h1", title), sections=sections)


def contact_strip(images: UInt8[Tensor, "images 3 height width"]) -> Image.Image:
    """Returns the images in rows of eight; tiny ones are enlarged by whole pixels."""
    tiles = images.permute(0, 2, 3, 1)
    zoom = max(1, -(-_SMALLEST_SIDE // min(tiles.shape[1:3])))
    tiles = tiles.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    missing = -len(tiles) % min(_COLUMNS, len(tiles))
    white = torch.full((missing, *tiles.shape[1:]), 255, dtype=torch.uint8)
    rows = torch.cat((tiles, white)).split(min(_COLUMNS, len(tiles)))
    strip = torch.cat([torch.cat(tuple(row), dim=1) for row in rows])
    picture = Image.fromarray(strip.contiguous().numpy())
    picture.thumbnail((_LARGEST_SIDE * _COLUMNS, _LARGEST_SIDE * _COLUMNS))
    return picture


def _table(rows: Sequence[SweepRow], labels: Sequence[str]) -> Markup:
    names = _score_names(rows, labels)
    head = [element("th", name, scope="col") for name in (*_SETTINGS, "NFE", *names, "time")]
    body = []
    for number, row in enumerate(rows):
        cells = _cells(row, labels, names)
        body.append(
            element("tr", *(element("td", _bold(cell) if number == 0 else cell) for cell in cells))
        )
    return element("div", element("table", element("tr", *head), *body), class_="scroll")


def _bold(cell: str) -> Markup:
    return element("b", cell)


def _cells(row: SweepRow, labels: Sequence[str], names: Iterable[str]) -> list[str]:
    scores = _scores(row, labels)
    return [
        row.weights,
        row.solver,
        str(row.num_steps),
        f"{row.cfg_scale:g}",
        _interval(row) if row.cfg_scale > 1 else "",
        str(row.evaluations),
        *(f"{scores[name]:.4g}" if name in scores else "" for name in names),
        duration(row.seconds),
    ]


def _interval(row: SweepRow) -> str:
    return f"[{row.interval[0]:g}, {row.interval[1]:g}]"


def _scores(row: SweepRow, labels: Sequence[str]) -> dict[str, float]:
    """Returns the scores of a row by their printed names."""
    found = {}
    for label, scores in ((labels[0], row.scores), *row.further_scores.items()):
        names = printed_names(label)
        found |= {names.get(name, name): value for name, value in scores.items()}
    return found


def _score_names(rows: Iterable[SweepRow], labels: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in _scores(row, labels)))


def _deciding_name(rows: Iterable[SweepRow], labels: Sequence[str]) -> str:
    return printed_names(labels[0])[deciding_score(rows)]


def _plot(rows: Sequence[SweepRow], labels: Sequence[str]) -> Markup:
    if importlib.util.find_spec("matplotlib") is None:
        return note("No plot: matplotlib is not installed (pip install 'srepa_ds[demo]').")
    from srepa_ds.report.sweep_plot import draw_plot, plot_of

    found = plot_of(rows)
    if found is None:
        return note("No plot: neither the guidance scale nor the number of steps varies.")
    score = _deciding_name(rows, labels)
    light, dark = (draw_plot(found, score=score, theme=theme) for theme in ("light", "dark"))
    alt = f"{score} against {found.axis}, {len(found.lines)} lines"
    return element("figure", image(light, alt=alt, dark=dark))


def _sheets(rows: Sequence[SweepRow], labels: Sequence[str], folder: Path) -> Markup:
    name = _deciding_name(rows, labels)
    return joined(
        *(_sheet(row, name, _scores(row, labels).get(name), folder / row.picture) for row in rows)
    )


def _sheet(row: SweepRow, name: str, value: float | None, path: Path) -> Markup:
    caption = row.described if value is None else f"{row.described}: {name} {value:.4g}"
    try:
        with Image.open(path) as picture:
            png = png_of(picture.convert("RGB"))
    # The decoder has many errors for damage; among them are SyntaxError and struct.error.
    except Exception as error:
        return note(f"No images of {row.described}: {path.name}: {error}")
    return element("figure", image(png, alt=f"images of {caption}"), element("figcaption", caption))
