"""Measures reading samples from our shards against REPA's layout of one PNG and .npy per image.

python tools/bench_loader.py --output bench-loader
"""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path

from loader_case import MAPPED, Case
from loader_data import REPA, write
from loader_measure import Measured, measured
from loader_report import table

PARTS = ("moments", "pixels+moments")


def main() -> None:
    options = parsed()
    data = options.output / "data"
    if options.case:
        case = Case(**json.loads(options.case))
        found = measured(case, data, samples=options.samples, seconds=options.seconds)
        print(json.dumps(asdict(found)))
        return
    for size in options.sizes:
        if not (data / str(size)).exists():
            write(data / str(size), size=size, samples=options.samples, storages=options.storages)
    rounds: dict[Case, list[Measured]] = {case: [] for case in cases(options)}
    # In turns, so that other programs disturb every case alike.
    for case in list(rounds) * options.rounds:
        command = [sys.executable, __file__, "--case", json.dumps(asdict(case))]
        command += ["--output", str(options.output), "--samples", str(options.samples)]
        command += ["--seconds", str(options.seconds)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rounds[case].append(Measured(**json.loads(done.stdout)))
        (options.output / "table.md").write_text(table(rounds))
    print(table(rounds))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", type=int, default=[256, 512])
    parser.add_argument("--samples", type=int, default=2000, help="images written, per size")
    parser.add_argument("--storages", nargs="+", default=["webp", "raw"])
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=4, help="of each warm measurement")
    parser.add_argument("--rounds", type=int, default=2, help="how many turns each case gets")
    parser.add_argument("--output", type=Path, required=True, help="folder for data and table")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args()


def cases(options: argparse.Namespace) -> list[Case]:
    """Returns all cases; those that are compared follow one another."""
    found = []
    for size, parts, is_cold in product(options.sizes, PARTS, (False, True)):
        # Moments lie in files of their own, the same beside every storage.
        ours = options.storages[:1] if parts == "moments" else options.storages
        for workers in options.workers:
            readers = [REPA, *ours]
            if "raw" in options.storages and not workers:
                readers += dict.fromkeys(["raw", MAPPED])
            for reader in dict.fromkeys(readers):
                found.append(Case(size, parts, reader, workers, is_cold))
    return found


if __name__ == "__main__":
    main()
