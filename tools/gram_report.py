"""The measurements of `bench_gram.py` as a table, a plot and JSON."""

import json
from pathlib import Path
from typing import NamedTuple

from gram_measure import PRINTED
from matplotlib.figure import Figure

COLOURS = {PRINTED: "black", "dense": "C0", "tiled": "C1", "feature": "C2", "triton": "C4"}
STYLES = {"mse": "-", "kl": "--"}


class Row(NamedTuple):
    """One algorithm in one setting; `needed_bytes` where it did not fit and was not run."""

    device: str
    kind: str
    tokens: int
    width: int
    images: int
    algorithm: str
    seconds: float | None
    """Median."""
    fastest_seconds: float | None
    extra_bytes: int | None
    needed_bytes: float | None


def write_report(folder: Path, rows: list[Row]) -> None:
    """Writes `table.md`, `results.json`, and `plot.png` of the greatest width (CUDA: its own)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(markdown(rows))
    (folder / "results.json").write_text(json.dumps([row._asdict() for row in rows], indent=1))
    for device in {row.device for row in rows}:
        name = "plot.png" if device == "cpu" else f"plot-{device}.png"
        plot(folder / name, [row for row in rows if row.device == device])


def markdown(rows: list[Row]) -> str:
    """Returns the table; its ratios are Algorithm 1's numbers divided by the row's.

    The fastest round is given beside the median: other programs on the machine disturb it least.
    """
    where = ["device", "loss", "tokens", "width", "images", "algorithm"]
    what = ["median ms", "faster", "fastest ms", "faster", "extra MiB", "less"]
    lines = ["| " + " | ".join(where + what) + " |", "|---" * len(where) + "|--:" * len(what) + "|"]
    printed = {row[:5]: row for row in rows if row.algorithm == PRINTED}
    for row in rows:
        base = printed[row[:5]]
        if row.seconds is None or row.fastest_seconds is None or row.extra_bytes is None:
            gib = (row.needed_bytes or 0) / 2**30
            numbers = [f"does not fit: needs {gib:.0f} GiB", "", "", "", "", ""]
        else:
            numbers = [
                f"{row.seconds * 1e3:,.1f}",
                _ratio(base.seconds, row.seconds),
                f"{row.fastest_seconds * 1e3:,.1f}",
                _ratio(base.fastest_seconds, row.fastest_seconds),
                f"{row.extra_bytes / 2**20:,.1f}",
                _ratio(base.extra_bytes or base.needed_bytes, row.extra_bytes),
            ]
        lines.append("| " + " | ".join([*map(str, row[:6]), *numbers]) + " |")
    return "\n".join(lines) + "\n"


def _ratio(base: float | None, value: float) -> str:
    return f"{base / value:.2f}x" if base else ""


def plot(path: Path, rows: list[Row]) -> None:
    """Draws time and extra memory over the number of tokens."""
    width = max(row.width for row in rows)
    rows = [row for row in rows if row.width == width and row.algorithm in COLOURS]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, 2)
    for kind, name in dict.fromkeys((row.kind, row.algorithm) for row in rows):
        line = [row for row in rows if (row.kind, row.algorithm) == (kind, name) and row.seconds]
        counts = [row.tokens for row in line]
        look = {"color": COLOURS[name], "linestyle": STYLES[kind], "marker": "o"}
        milliseconds = [1e3 * (row.fastest_seconds or 0) / row.images for row in line]
        mebibytes = [(row.extra_bytes or 0) / row.images / 2**20 for row in line]
        axes[0].plot(counts, milliseconds, label=f"{kind}: {name}", **look)
        axes[1].plot(counts, mebibytes, label=f"{kind}: {name}", **look)
    ticks = sorted({row.tokens for row in rows})
    for axis, label in zip(
        axes, ("fastest round, ms per image", "peak extra memory, MiB per image"), strict=True
    ):
        axis.set(xscale="log", yscale="log", xlabel="tokens per image", title=label)
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    device = rows[0].device
    figure.suptitle(f"Structural losses, forward and backward, width {width}, {device}")
    figure.savefig(path, dpi=110)
