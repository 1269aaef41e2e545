"""Times full training steps of the engine against a plain loop like that of research code.

python tools/bench_step.py --models SiT-B/2 --pixels 256 --batch 4 --output bench-step
"""

import argparse
import json
import math
import subprocess
import sys
import time
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch
from step_case import ARRANGEMENTS, MODES, Case
from step_measure import Measured, measured
from step_report import HEADER, row


def main() -> None:
    options = parsed()
    if options.case:
        case = Case(**json.loads(options.case))
        found = measured(case, steps=options.steps, warmup=options.warmup, profiled=options.output)
        print(json.dumps(asdict(found)))
        return
    options.output.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    print(HEADER, flush=True)
    for model, pixels, mode in product(options.models, options.pixels, options.modes):
        cases = [
            Case(model, pixels, mode, options.batch, options.teacher, arrangement)
            for arrangement in options.arrangements
        ]
        compare(cases, options, deadline)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--models", nargs="+", default=["SiT-XL/2"])
    parser.add_argument("--pixels", nargs="+", type=int, default=[256])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["srepa-mse"])
    parser.add_argument("--arrangements", nargs="+", default=ARRANGEMENTS[device])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--teacher", default="dinov2-vit-b")
    parser.add_argument("--steps", type=int, default=20)
    rounds = 1 if device == "cuda" else 2
    parser.add_argument("--rounds", type=int, default=rounds, help="how many turns each case gets")
    parser.add_argument("--warmup", type=int, default=5)
    minutes = 9 if device == "cuda" else math.inf
    parser.add_argument(
        "--minutes", type=float, default=minutes, help="when to stop, finished or not"
    )
    parser.add_argument("--output", type=Path, default=Path("bench-step"))
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(cases: list[Case], options: argparse.Namespace, deadline: float) -> None:
    """Times the cases in turns, each in its own process, and prints a row for each.

    At `deadline` the running process is killed and no other is started.
    """
    rounds: dict[Case, list[Measured]] = {case: [] for case in cases}
    failed: dict[Case, str] = {}
    for case in cases * options.rounds:
        name = f"{case.model}-{case.pixels}-{case.mode}-{case.arrangement}.txt"
        profiled = options.output / name.replace("/", "-").replace(" ", "-")
        command = [sys.executable, __file__, "--case", json.dumps(asdict(case))]
        command += ["--steps", str(options.steps), "--warmup", str(options.warmup)]
        command += ["--output", str(profiled)]
        done = finished(command, deadline)
        if done is None:
            failed[case] = f"not finished: the {options.minutes:g} minutes of --minutes are over"
            continue
        if done.returncode:
            failed[case] = (done.stderr.splitlines() or ["no message"])[-1]
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        rounds[case].append(Measured(**found))
        with (options.output / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(case) | found) + "\n")
    for case in cases:
        print(row(case, rounds, failed.get(case)), flush=True)


def finished(command: list[str], deadline: float) -> subprocess.CompletedProcess[str] | None:
    """Runs `command` and returns its process, or None if it did not end by `deadline`."""
    left = None if deadline == math.inf else deadline - time.monotonic()
    if left is not None and left <= 0:
        return None
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=left)
    except subprocess.TimeoutExpired:
        return None


if __name__ == "__main__":
    main()
