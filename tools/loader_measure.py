"""Measures one case of the loader's benchmark in this process."""

import multiprocessing
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from loader_case import BATCH, PREFETCH, Case

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Measured:
    """What one run of a case gave."""

    per_second: float
    """Samples per second."""
    per_cpu_second: float
    """Samples per second of processor time, of this process and its workers."""
    worker_mib: float
    """Memory of the largest reading process, shared pages divided by their users (PSS)."""


def measured(case: Case, data: Path, *, samples: int, seconds: float) -> Measured:
    """Reads for `seconds`, or every sample once if the case is cold."""
    torch.set_num_threads(1)
    files = [path for path in case.folder(data).rglob("*") if path.is_file()]
    forget(files) if case.is_cold else remember(files)
    batches = case.batches(data)
    # Afterwards the queue of batches read ahead is as full as it stays.
    for _ in islice(batches, 1 + PREFETCH * case.workers):
        pass
    last = samples // BATCH - 1 - 2 * PREFETCH * case.workers if case.is_cold else None
    if last is not None and last < 1:
        sys.exit(f"{samples} samples are too few for {case.workers} workers; raise --samples")
    began, before = time.perf_counter(), cpu_seconds()
    count = 0
    for size in islice(batches, last):
        count += size
        if not case.is_cold and time.perf_counter() - began > seconds:
            break
    took, used = time.perf_counter() - began, cpu_seconds() - before
    memory = max(pss_mib(process) for process in readers())
    return Measured(count / took, count / used, memory)


def forget(files: Iterable[Path]) -> None:
    """Drops files from the page cache, as far as the system follows the advice."""
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def remember(files: Iterable[Path]) -> None:
    """Reads files into the page cache."""
    for path in files:
        path.read_bytes()


def readers() -> list[int]:
    """Returns the processes that read: the workers, or this process without any."""
    return [child.pid for child in multiprocessing.active_children() if child.pid] or [os.getpid()]


def cpu_seconds() -> float:
    """Returns the processor time of this process and its workers so far."""
    used = time.process_time()
    for process in set(readers()) - {os.getpid()}:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        used += (int(fields[11]) + int(fields[12])) / _TICKS
    return used


def pss_mib(process: int) -> float:
    """Returns the proportional memory of a process."""
    rollup = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    (line,) = [line for line in rollup if line.startswith("Pss:")]
    return int(line.split()[1]) / 1024
