"""Writes the measurements of `bench_gram.py` as a table, plots and JSON."""

import json
from pathlib import Path

from gram_measure import PRINTED
from gram_table import Row, markdown
from matplotlib.figure import Figure

COLOURS = {PRINTED: "black", "dense": "C0", "tiled": "C1", "feature": "C2", "triton": "C4"}
STYLES = {"mse": "-", "kl": "--"}


def write_report(folder: Path, rows: list[Row]) -> None:
    """Writes `table.md`, `results.json`, and a plot of the largest width for each device."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(markdown(rows))
    (folder / "results.json").write_text(json.dumps([row._asdict() for row in rows], indent=1))
    for device in {row.device for row in rows}:
        name = "plot.png" if device == "cpu" else f"plot-{device}.png"
        plot(folder / name, [row for row in rows if row.device == device])


def plot(path: Path, rows: list[Row]) -> None:
    """Plots time and extra memory over the number of tokens."""
    width = max(row.width for row in rows)
    rows = [row for row in rows if row.width == width and row.algorithm in COLOURS]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, 2)
    for kind, name in dict.fromkeys((row.kind, row.algorithm) for row in rows):
        line = [row for row in rows if (row.kind, row.algorithm) == (kind, name) and row.seconds]
        counts = [row.tokens for row in line]
        look = {"color": COLOURS[name], "linestyle": STYLES[kind], "marker": "o"}
        look["label"] = f"{kind}: {name}"
        axes[0].plot(counts, [1e3 * row.fastest_seconds / row.images for row in line], **look)
        axes[1].plot(counts, [row.extra_bytes / row.images / 2**20 for row in line], **look)
    ticks = sorted({row.tokens for row in rows})
    titles = ("fastest round, ms per image", "peak extra memory, MiB per image")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(xscale="log", yscale="log", xlabel="tokens per image", title=title)
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    device = rows[0].device
    figure.suptitle(f"Structural losses, forward and backward, width {width}, {device}")
    figure.savefig(path, dpi=110)
