"""The section of token similarities: small heat maps on the grid of tokens."""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from matplotlib import colormaps
from numpy import ndarray
from PIL import Image, ImageDraw
from torch import Tensor

from srepa_ds.report.markup import Markup, element, image, joined, png_of, section, table
from srepa_ds.report.probe import Pictures, Probe
from srepa_ds.report.student_vs_teacher import Comparison, Space

_COLORMAP = "viridis"
_QUERY_COLOUR = (255, 64, 64)
_SIDE = 144


def similarity_section(
    comparisons: tuple[Comparison, ...], seen: Probe | Pictures, *, weights: str = ""
) -> Markup:
    """Returns the maps of all comparisons; `weights` names the student's weights."""
    count = len(seen.batch)
    student = ""
    if isinstance(seen, Probe):
        student = (
            f", and in the student ({weights} weights), which sees it noised at t = {seen.t:g}"
        )
    intro = (
        "Each map shows the cosine similarity of one token, outlined in red, to all tokens of "
        f"the image: in the teacher, which sees the real image{student}. The first query is the "
        "token in the middle; each further one is the token that, for the teacher, resembles "
        "the earlier ones least."
    )
    legend = element(
        "p", "low", image(_legend(), alt="colour scale from low to high"), "high", class_="scale"
    )
    blocks = [_block(comparison, seen, count) for comparison in comparisons]
    return section("similarity", "Token similarities", element("p", intro), legend, *blocks)


def _block(comparison: Comparison, seen: Probe | Pictures, count: int) -> Markup:
    title = f"Teacher: {comparison.teacher}"
    if not comparison.is_aligned:
        title += " (the student was not aligned with it)"
    cards = [_card(comparison, seen, row) for row in range(len(seen.shown))]
    measured = [
        (space.name, _mean(space.correlations))
        for space in comparison.spaces
        if space.correlations is not None
    ]
    text = "Each image and space has its own colour scale, given above its maps."
    if not measured:
        heading = element("h3", title)
        return joined(heading, element("div", *cards, class_="cards"), element("p", text))
    text = (
        "Correlation of the off-diagonal similarities with the teacher's, mean and standard "
        f"deviation over {count} images. {text}"
    )
    if any(name == "projected" for name, _ in measured):
        text += " The alignment losses see the projected tokens."
    return joined(
        element("h3", title),
        element("div", *cards, class_="cards"),
        table(measured, header=("student's tokens", "correlation")),
        element("p", text, class_="soft"),
    )


def _card(comparison: Comparison, seen: Probe | Pictures, row: int) -> Markup:
    images = seen.batch.images
    assert images is not None
    number = int(seen.shown[row])
    real = _resized(images[number].permute(1, 2, 0).cpu().numpy())
    label, sample = int(seen.batch.labels[number]), int(seen.batch.sample_ids[number])
    pictures = [image(png_of(real), alt=f"real image {sample}")]
    caption = f"Image {sample}, class {label}"
    if isinstance(seen, Probe):
        noised = _resized(seen.noised[number].cpu().numpy())
        pictures.append(image(png_of(noised), alt=f"the same, noised at t = {seen.t:g}"))
        caption += ", and as the student sees it"
    before = element("div", *pictures, element("figcaption", caption), class_="before")
    return element("figure", before, _maps(comparison, row, real), class_="card")


def _maps(comparison: Comparison, row: int, real: Image.Image) -> Markup:
    """Returns a row per query: the query on the image, and its map in every space."""
    scaled = [_scaled(space, row) for space in comparison.spaces]
    cells = [element("span", "query")]
    for space, (low, high, _) in zip(comparison.spaces, scaled, strict=True):
        cells.append(element("span", space.name, element("small", f"{low:.2f} … {high:.2f}")))
    for number, query in enumerate(comparison.queries[row].tolist()):
        place = divmod(query, comparison.grid[1])
        cells.append(_cell(real.copy(), place, comparison.grid, f"the token at {place}"))
        for space, (_, _, maps) in zip(comparison.spaces, scaled, strict=True):
            picture = _resized(coloured(maps[number], grid=comparison.grid))
            alt = f"similarity to the token at {place}, {space.name}"
            cells.append(_cell(picture, place, comparison.grid, alt))
    return element("div", *cells, class_="maps", style=f"--columns:{len(scaled) + 1}")


def _scaled(space: Space, row: int) -> tuple[float, float, Tensor]:
    """Returns the range of one image's similarities (low, high), and these as shares of it.

    The range leaves out the queries themselves, whose similarity is 1.
    """
    maps = space.similarities[row].cpu()
    others = maps[maps < 1 - 1e-5]
    low, high = (float(others.min()), float(others.max())) if len(others) else (0.0, 1.0)
    return low, high, ((maps - low) / max(high - low, 1e-6)).clamp(0, 1)


def coloured(
    values: Float[Tensor, " tokens"], *, grid: tuple[int, int]
) -> UInt8[ndarray, "rows columns 3"]:
    """Returns one colour per token for values in [0, 1]."""
    colours = colormaps[_COLORMAP](values.reshape(grid).numpy(), bytes=True)
    return np.ascontiguousarray(colours[..., :3])


def _resized(pixels: np.ndarray) -> Image.Image:
    """Returns a picture of about the common size, enlarged by whole pixels or reduced smoothly."""
    picture = Image.fromarray(pixels)
    longest = max(picture.size)
    zoom = max(1, round(_SIDE / longest))
    if zoom > 1 or longest <= _SIDE:
        size = (picture.width * zoom, picture.height * zoom)
        return picture.resize(size, Image.Resampling.NEAREST)
    share = _SIDE / longest
    return picture.resize((round(picture.width * share), round(picture.height * share)))


def _cell(picture: Image.Image, place: tuple[int, int], grid: tuple[int, int], alt: str) -> Markup:
    """Returns the picture with the token at `place` outlined."""
    height, width = picture.height / grid[0], picture.width / grid[1]
    left, top = round(place[1] * width), round(place[0] * height)
    right, bottom = round((place[1] + 1) * width) - 1, round((place[0] + 1) * height) - 1
    box = (left, top, max(right, left), max(bottom, top))
    ImageDraw.Draw(picture).rectangle(box, outline=_QUERY_COLOUR, width=2)
    return image(png_of(picture), alt=alt)


def _legend() -> bytes:
    strip = coloured(torch.linspace(0, 1, 128), grid=(1, 128))
    return png_of(Image.fromarray(strip))


def _mean(values: Tensor) -> str:
    finite = values[values.isfinite()]
    if len(finite) == 0:
        return "undefined: all tokens are alike"
    return f"{float(finite.mean()):.3f} ± {float(finite.std(correction=0)):.3f}"
