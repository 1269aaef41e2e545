"""Formats one row of the table of training steps."""

import statistics
from collections.abc import Mapping

from step_case import Case
from step_measure import Measured

from srepa_ds.model.flops import training_flops

HEADER = "| model | px | mode | arrangement | ms/step | fastest | img/s | vs plain | GB | MFU |\n"
HEADER += "|---" * 10 + "|"


def row(case: Case, rounds: Mapping[Case, list[Measured]], fault: str | None) -> str:
    """Returns the row of `case` among the compared cases, or `fault` if it was not measured.

    MFU relates the model's products, without recomputation, projectors and teacher, to the fastest
    large product in any of the runs.
    """
    shown = f"| {case.model} | {case.pixels} | {case.mode} | {case.arrangement} |"
    own = rounds[case]
    if not own:
        return f"{shown} {fault} ||||||"
    if fault:
        shown = shown.removesuffix(" |") + f" (turns measured: {len(own)}; {fault}) |"
    plain = next((found for other, found in rounds.items() if other.is_plain and found), None)
    against = "" if plain is None else f"{_median(plain) / _median(own):.2f}x"
    ceiling = max(found.ceiling for every in rounds.values() for found in every)
    mfu = training_flops(case.config.model) * case.batch / _median(own) / ceiling
    fastest = min(min(found.times) for found in own)
    memory = max(found.gb for found in own)
    shown += f" {1e3 * _median(own):,.0f} | {1e3 * fastest:,.0f} | {case.batch / _median(own):,.2f}"
    return f"{shown} | {against} | {memory:.1f} | {mfu:.0%} |"


def _median(rounds: list[Measured]) -> float:
    return statistics.median(time for found in rounds for time in found.times)
