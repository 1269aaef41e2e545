"""Measures the structural losses, forward and backward, against the paper's Algorithm 1.

python tools/bench_gram.py --output bench
"""

import argparse
import statistics
from pathlib import Path

import torch
from gram_measure import PROBES, free_bytes, losses, predicted_bytes, seconds, tokens, traced
from gram_report import Row, write_report

from srepa_ds.alignment.gram import resolve_algorithm

# The share of free memory that a run may take: other programs run on the machine too.
SHARE = 0.75


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    parser.add_argument("--widths", type=int, nargs="+", default=[768, 1024])
    parser.add_argument("--kinds", nargs="+", choices=["mse", "kl"], default=["mse", "kl"])
    parser.add_argument("--images", type=int, help="batch size; default 4, on CUDA 32 to 4")
    parser.add_argument("--rounds", type=int, default=15, help="at most; fewer for many tokens")
    default = ["cuda"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--devices", nargs="+", choices=["cpu", "cuda"], default=default)
    parser.add_argument("--output", type=Path, required=True, help="folder for table, plot, json")
    options = parser.parse_args()
    if "cuda" in options.devices and not torch.cuda.is_available():
        parser.error("--devices cuda: torch sees no GPU here")
    rows: list[Row] = []
    for device in options.devices:
        for kind in options.kinds:
            for count in options.tokens:
                for width in options.widths:
                    images = options.images or (4 if device == "cpu" else batch(count))
                    rows += measure(device, kind, count, width, images, options.rounds)
                    write_report(options.output, rows)
    print((options.output / "table.md").read_text())


def batch(count: int) -> int:
    """Returns a typical batch size per GPU at this resolution."""
    return max(4, min(32, 32 * 1024 // count))


def measure(device: str, kind: str, count: int, width: int, images: int, rounds: int) -> list[Row]:
    """Times Algorithm 1 and our algorithms in turns; returns a row for each and for `auto`."""
    print(f"{device} {kind}: {count} tokens of width {width}, {images} images", flush=True)
    student, teacher = tokens(images, count, width, device)
    table = losses(kind, device)
    times: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}
    needs: dict[str, float] = {}
    for name, loss in table.items():
        size = {"images": images, "count": count, "width": width, "device": device}
        need = predicted_bytes(loss, **size) if count > 2 * PROBES[-1] else 0.0
        if need > SHARE * free_bytes(device):
            needs[name] = need
            print(f"  {name} does not fit: needs {need / 2**30:.1f} GiB", flush=True)
        else:
            elapsed, peaks[name] = traced(loss, student, teacher)
            times[name] = [elapsed]
    # The traced run warms up; where it takes minutes, it is the measurement (no rounds).
    rounds = 0 if device == "cpu" and count >= 16384 else min(rounds, max(3, 16384 // count))
    for name in [name for _ in range(rounds) for name in peaks]:
        times[name] = [*times[name], seconds(table[name], student, teacher)]
    chosen = resolve_algorithm(kind, "auto", student, teacher)
    rows = []
    for name in [*table, chosen]:
        label = f"auto ({name})" if len(rows) == len(table) else name
        timed = times.get(name, [])[-rounds:]
        spread = (statistics.median(timed), min(timed)) if timed else (None, None)
        where = (device, kind, count, width, images, label)
        rows.append(Row(*where, *spread, peaks.get(name), needs.get(name)))
    return rows


if __name__ == "__main__":
    main()
