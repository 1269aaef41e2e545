"""Measures time and peak extra memory of a structural loss, forward and backward."""

import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from algorithm_one import algorithm_one
from torch import Tensor

from srepa_ds.alignment.gram import ALGORITHMS, structural_kl, structural_mse

PRINTED = "Algorithm 1"
PROBES = (1024, 2048)

Loss = Callable[[Tensor, Tensor], Tensor]


def losses(kind: str, device: str) -> dict[str, Loss]:
    """Returns Algorithm 1 and each algorithm of the package, all giving the same number."""
    names = [name for name in ALGORITHMS[kind] if device == "cuda" or name != "triton"]
    ours = structural_mse if kind == "mse" else partial(structural_kl, reduction="batch_mean")
    table: dict[str, Loss] = {PRINTED: partial(algorithm_one, kind=kind)}
    return table | {name: partial(ours, algorithm=name) for name in names}


def tokens(images: int, count: int, width: int, device: str) -> tuple[Tensor, Tensor]:
    """Returns student and teacher tokens that share a direction, as real ones do."""
    generator = torch.Generator().manual_seed(0)
    common, student, teacher = (
        torch.randn(images, n, width, generator=generator) for n in (1, count, count)
    )
    return ((student + 0.7 * common).to(device).requires_grad_(), (teacher + common).to(device))


def seconds(loss: Loss, student: Tensor, teacher: Tensor) -> float:
    """Returns the wall-clock time of one forward and backward."""
    wait = torch.cuda.synchronize if student.is_cuda else lambda: None
    wait()
    begin = time.perf_counter()
    torch.autograd.grad(loss(student, teacher), student)
    wait()
    return time.perf_counter() - begin


def traced(loss: Loss, student: Tensor, teacher: Tensor) -> tuple[float, int]:
    """Returns the time, and the peak that torch allocates beyond the inputs, gradient included.

    The trace costs microseconds per operation, which does not matter from milliseconds on.
    """
    if student.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        elapsed = seconds(loss, student, teacher)
        return elapsed, torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        elapsed = seconds(loss, student, teacher)
    events = sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return elapsed, max(accumulate(changes, initial=0))


def predicted_bytes(loss: Loss, *, images: int, count: int, width: int, device: str) -> float:
    """Returns the peak at `count` tokens: a parabola through zero and two smaller runs.

    Too high if those runs are small enough that several images are processed together.
    """
    few, many = PROBES
    a, b = (traced(loss, *tokens(images, n, width, device))[1] for n in PROBES)
    quadratic = (b / many - a / few) / (many - few)
    return max(quadratic, 0) * count**2 + (a / few - quadratic * few) * count


def free_bytes(device: str) -> int:
    """Returns the memory that is still available."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
