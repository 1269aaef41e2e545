"""Times full training steps of the engine beside a plain loop as research code runs it.

python tools/bench_step.py --models SiT-B/2 --pixels 256 --batch 2
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict

import torch
from step_case import MODES, PLAIN, Case

from srepa_ds.distributed import choose_accelerator
from srepa_ds.model.flops import training_flops
from srepa_ds.model.variants import SiTConfig
from srepa_ds.throughput import peak_memory_gb

ARRANGEMENTS = [PLAIN, "precision=bf16_autocast", "precision=bf16", "precision=bf16 compile=true"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["SiT-XL/2"])
    parser.add_argument("--pixels", nargs="+", type=int, default=[256, 512])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["sit", "repa", "srepa-mse"])
    parser.add_argument("--arrangements", nargs="+", default=ARRANGEMENTS)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--teacher", default="dinov2-vit-b")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measured(Case(**json.loads(options.case)), options)))
        return
    print("| model | px | mode | arrangement | ms/step | img/s | vs plain | GB | MFU |")
    print("|---|---|---|---|---|---|---|---|---|")
    for model in options.models:
        for pixels in options.pixels:
            for mode in options.modes:
                compare(model, pixels, mode, options)


def compare(model: str, pixels: int, mode: str, options: argparse.Namespace) -> None:
    """Prints a row for every arrangement, each run in a process of its own."""
    plain = None
    for arrangement in options.arrangements:
        case = Case(model, pixels, mode, options.batch, options.teacher, arrangement)
        command = [sys.executable, __file__, "--case", json.dumps(asdict(case))]
        command += ["--steps", str(options.steps), "--warmup", str(options.warmup)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        shown = f"| {model} | {pixels} | {mode} | {arrangement} |"
        if done.returncode:
            print(f"{shown} {(done.stderr.splitlines() or ['?'])[-1]} ||||", flush=True)
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        rate = options.batch / row["seconds"]
        plain = rate if arrangement == PLAIN else plain
        against = "" if plain is None else f"{rate / plain:.2f}"
        print(
            f"{shown} {1e3 * row['seconds']:,.0f} | {rate:,.1f} | {against} | {row['gb']:.1f} "
            f"| {row['mfu']:.1%} |",
            flush=True,
        )


def measured(case: Case, options: argparse.Namespace) -> dict[str, float]:
    """Returns the median step, the peak memory, and the share of this device's matmul ceiling."""
    choose_accelerator()
    # After that, because it imports DeepSpeed, which looks for an accelerator at once.
    from step_build import step_of

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step = step_of(case)
    # Reading the loss waits for the device, so every step is timed whole.
    times = [timed(step) for _ in range(options.warmup + options.steps)][options.warmup :]
    model = SiTConfig(
        variant=case.model, input_size=case.pixels // 8, in_channels=4, num_classes=1000
    )
    seconds = statistics.median(times)
    flops = training_flops(model) * case.batch / seconds
    memory = peak_memory_gb(device)
    return {"seconds": seconds, "gb": memory, "mfu": flops / matmul_ceiling(device)}


def timed(step) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def matmul_ceiling(device: torch.device) -> float:
    """Returns the operations per second of large products, the fastest of bf16 and fp32."""
    size = 8192 if device.type == "cuda" else 1536
    best = 0.0
    for dtype in (torch.bfloat16, torch.float32):
        left = torch.randn(size, size, device=device, dtype=dtype)
        times = [timed(lambda left=left: (left @ left)[0, 0].item()) for _ in range(7)]
        best = max(best, 2 * size**3 / min(times))
    return best


if __name__ == "__main__":
    main()
