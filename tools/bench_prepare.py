"""Compares `srepa-ds prepare` with REPA's preprocessing as published, on photographs.

Both read the same JPEG files of ImageNet's usual size, in turns, each in processes of its own. Time
is that of the processors, without starting: what more images take, divided by their number.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

from prepare_images import write_photographs
from prepare_measure import REPA, Run, measured, storages
from prepare_report import report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=600, help="more than those of the start")
    parser.add_argument("--start", type=int, default=200, help="as many as a preview shows")
    parser.add_argument("--size", type=int, default=256, help="side of the prepared images")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--pixels", nargs="+", default=["webp", "png", "raw"])
    parser.add_argument("--output", type=Path, required=True, help="folder for table and json")
    options = parser.parse_args()
    variants = [REPA] + [Run(pixels, 1) for pixels in options.pixels]
    variants += [Run(options.pixels[0], ranks) for ranks in options.ranks if ranks > 1]
    with TemporaryDirectory(dir=options.output.parent) as name:
        folder = Path(name)
        counts = (options.start, options.start + options.images)
        trees = [write_photographs(folder / str(n), n) for n in counts]
        rows = measured(variants, trees, size=options.size, rounds=options.rounds)
        stored = storages(trees[1], size=options.size)
    options.output.mkdir(parents=True, exist_ok=True)
    found = {"runs": [row._asdict() for row in rows], "storages": [s._asdict() for s in stored]}
    (options.output / "results.json").write_text(json.dumps(found, indent=1))
    text = report(rows, stored)
    (options.output / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
