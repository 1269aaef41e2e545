"""Times the steps of a case, alone in its process, and says where the time goes."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from step_case import Case
from torch.profiler import ProfilerActivity, profile

from srepa_ds.devices import choose_accelerator
from srepa_ds.throughput import peak_memory_gb


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
    """Returns `steps` steps of a case, timed.

    The file `profiled` gets the operations of three more, the longest first.
    """
    choose_accelerator()
    # After that, because it imports DeepSpeed, which looks for an accelerator at once.
    from step_build import step_of

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step = step_of(case)
    # Reading the loss waits for the device, so every step is timed whole.
    times = [timed(step) for _ in range(warmup + steps)][warmup:]
    memory = peak_memory_gb(device)
    profiled.write_text(operations(step), encoding="utf-8")
    return Measured(times, memory, matmul_ceiling(device))


def timed(step: Callable[[], float]) -> float:
    """Returns the seconds a call takes."""
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def operations(step: Callable[[], float]) -> str:
    """Returns a table of three steps' operations, those that take longest themselves first."""
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities) as found:
        for _ in range(3):
            step()
    order = f"self_{'cuda' if on_gpu else 'cpu'}_time_total"
    return found.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=70)


def matmul_ceiling(device: torch.device) -> float:
    """Returns the operations per second of large products, in the faster of bf16 and fp32."""
    size = 8192 if device.type == "cuda" else 1536
    # Small ones first: processors without bf16 would take minutes for a large one.
    dtype = max((torch.bfloat16, torch.float32), key=lambda dtype: matmul_rate(256, dtype, device))
    return matmul_rate(size, dtype, device)


def matmul_rate(size: int, dtype: torch.dtype, device: torch.device) -> float:
    """Returns the operations per second of the fastest of seven square products."""
    left = torch.randn(size, size, device=device, dtype=dtype)
    times = [timed(lambda: (left @ left)[0, 0].item()) for _ in range(7)]
    return 2 * size**3 / min(times)
