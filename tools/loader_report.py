"""Formats the table of the loader's benchmark."""

from collections.abc import Mapping
from dataclasses import replace

from loader_case import Case
from loader_data import REPA
from loader_measure import Measured

_COLUMNS = "px | parts | cache | workers | reader | samples/s | vs REPA | per CPU second | vs REPA"
HEADER = f"| {_COLUMNS} | MiB/worker |\n|--:|---|---|--:|---|--:|--:|--:|--:|--:|\n"


def table(rounds: Mapping[Case, list[Measured]]) -> str:
    """Returns a row for each case that was measured: the fastest of its rounds."""
    best = {case: _best(found) for case, found in rounds.items() if found}
    return HEADER + "".join(_row(case, best) for case in best)


def _best(found: list[Measured]) -> Measured:
    return Measured(
        max(one.per_second for one in found),
        max(one.per_cpu_second for one in found),
        max(one.worker_mib for one in found),
    )


def _row(case: Case, best: Mapping[Case, Measured]) -> str:
    own, repa = best[case], best.get(replace(case, reader=REPA))
    wall = f"{own.per_second / repa.per_second:.2f}x" if repa else ""
    cpu = f"{own.per_cpu_second / repa.per_cpu_second:.2f}x" if repa else ""
    cells = (case.size, case.parts, "cold" if case.is_cold else "warm", case.workers, case.reader)
    shown = " | ".join(map(str, cells))
    speed = f"{own.per_second:,.0f} | {wall} | {own.per_cpu_second:,.0f} | {cpu}"
    return f"| {shown} | {speed} | {own.worker_mib:,.0f} |\n"
