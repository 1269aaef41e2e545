"""Times full training steps of the engine beside a plain loop as research code runs it.

python tools/bench_step.py --models SiT-B/2 --pixels 256 --batch 4 --output bench-step
"""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from step_case import ARRANGEMENTS, MODES, Case
from step_measure import measured

HEADER = "| model | px | mode | arrangement | ms/step | img/s | vs plain | GB | MFU |"


def main() -> None:
    options = parsed()
    if options.case:
        found = measured(
            Case(**json.loads(options.case)),
            steps=options.steps,
            warmup=options.warmup,
            profiled=options.output,
        )
        print(json.dumps(found))
        return
    options.output.mkdir(parents=True, exist_ok=True)
    print(f"{HEADER}\n{'|---' * 9}|", flush=True)
    for model in options.models:
        for pixels in options.pixels:
            for mode in options.modes:
                compare(model, pixels, mode, options)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--models", nargs="+", default=["SiT-XL/2"])
    parser.add_argument("--pixels", nargs="+", type=int, default=[256])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["sit", "repa", "srepa-mse"])
    parser.add_argument("--arrangements", nargs="+", default=ARRANGEMENTS[device])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--teacher", default="dinov2-vit-b")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("bench-step"))
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(model: str, pixels: int, mode: str, options: argparse.Namespace) -> None:
    """Prints a row for every arrangement, each run in a process of its own."""
    plain = None
    for arrangement in options.arrangements:
        case = Case(model, pixels, mode, options.batch, options.teacher, arrangement)
        row = in_own_process(case, options)
        shown = f"| {model} | {pixels} | {mode} | {arrangement} |"
        if isinstance(row, str):
            print(f"{shown} {row} |||||", flush=True)
            continue
        with (options.output / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(case) | row) + "\n")
        rate = options.batch / row["seconds"]
        plain = rate if case.is_plain else plain
        against = "" if plain is None else f"{rate / plain:.2f}x"
        shown += f" {1e3 * row['seconds']:,.0f} | {rate:,.2f} | {against} |"
        print(f"{shown} {row['gb']:.1f} | {row['mfu']:.1%} |", flush=True)


def in_own_process(case: Case, options: argparse.Namespace) -> dict[str, float] | str:
    """Returns what was measured, or the last line of what went wrong."""
    name = f"{case.model}-{case.pixels}-{case.mode}-{case.arrangement}.txt"
    profiled = options.output / name.replace("/", "-").replace(" ", "-")
    command = [sys.executable, __file__, "--case", json.dumps(asdict(case))]
    command += ["--steps", str(options.steps), "--warmup", str(options.warmup)]
    command += ["--output", str(profiled)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.splitlines() or ["no message"])[-1]
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
