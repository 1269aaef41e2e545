"""Times and profiles the steps of one case, alone in its process."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from step_case import Case
from torch.profiler import ProfilerActivity, profile

from srepa_ds.distributed.devices import choose_accelerator
from srepa_ds.telemetry.throughput import peak_memory_gb


@dataclass(frozen=True)
class Measured:
    """One process's steps."""

    times: list[float]
    """Seconds of each."""

    gb: float
    """Peak memory in 1e9 bytes: of the GPU, or of the process."""

    ceiling: float
    """Operations per second of a large product on this device."""


def measured(case: Case, *, steps: int, warmup: int, profiled: Path) -> Measured:
    """Times `steps` steps of a case, and writes a profile of three more to `profiled`."""
    choose_accelerator()
    # Only now, because it imports DeepSpeed, which looks for an accelerator at once.
    from step_build import step_of

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step = step_of(case)
    times = step_times(step, warmup + steps, device)[warmup:]
    memory = peak_memory_gb(device)
    profiled.write_text(operations(step), encoding="utf-8")
    return Measured(times, memory, matmul_ceiling(device))


def step_times(step: Callable[[], object], count: int, device: torch.device) -> list[float]:
    """Returns the seconds from the start of each step to the start of the next.

    On a GPU, events in its queue measure them: the host keeps filling the queue and does not wait.
    """
    if device.type != "cuda":
        return [timed(step) for _ in range(count)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in pairwise(marks)]


def timed(call: Callable[[], object]) -> float:
    """Returns the seconds a call takes."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def operations(step: Callable[[], object]) -> str:
    """Returns a table of the operations of three steps, sorted by their own time."""
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities) as found:
        for _ in range(3):
            step()
    order = f"self_{'cuda' if on_gpu else 'cpu'}_time_total"
    return found.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=70)


def matmul_ceiling(device: torch.device) -> float:
    """Returns the operations per second of large products, in the faster of bf16 and fp32."""
    size, probe = (8192, 8192) if device.type == "cuda" else (1536, 256)
    # Processors without bf16 would take minutes for a large product.
    dtype = max((torch.bfloat16, torch.float32), key=lambda d: matmul_rate(probe, d, device))
    return matmul_rate(size, dtype, device)


def matmul_rate(size: int, dtype: torch.dtype, device: torch.device) -> float:
    """Returns the operations per second of the fastest of seven square products."""
    left = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / min(step_times(lambda: left @ left, 7, device))
