"""The layouts of weights that other programs write, one row of a table each."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from srepa_ds.errors import CheckpointError


@dataclass(frozen=True)
class Converted:
    """Weights under official names, in REPA's convention."""

    weights: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()
    """What was changed or left out."""


@dataclass(frozen=True)
class Layout:
    """One layout: how it is recognised, and what becomes of its weights."""

    recognises: Callable[[Mapping[str, Tensor], Mapping[str, Any]], bool]
    """Whether weights, without wrappers around their names, are of this layout; the second are the
    settings beside them."""

    convert: Callable[[Mapping[str, Tensor], Path], Converted]
    """Raises CheckpointError about the path for weights that no model here can hold."""

    keeps_moments: bool = False
    """Whether Adam's moments can be converted by the names alone."""


def layout_of(weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> str:
    """Returns the first row of `LAYOUTS` that recognises the weights; the last takes all."""
    return next(name for name, row in LAYOUTS.items() if row.recognises(weights, settings))


def _has_learned_sigma(weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> bool:
    first, last = weights.get("x_embedder.proj.weight"), weights.get("final_layer.linear.weight")
    if first is None or last is None or first.ndim != 4 or last.ndim != 2:
        return False
    return len(last) == 2 * first[0].numel()


def _refuse_learn_sigma(weights: Mapping[str, Tensor], path: Path) -> Converted:
    raise CheckpointError(
        f"{path} is of the original SiT or DiT: it predicts twice the channels (learn_sigma), "
        "with time in the other direction; only weights in REPA's convention can be continued"
    )


def _of_repa(weights: Mapping[str, Tensor], path: Path) -> Converted:
    """Returns `weights` under the current names of the official REPA code."""
    numbers = [re.match(r"blocks\.(\d+)\.", name) for name in weights]
    # Blocks after the alignment once had numbers of their own.
    first = len({match[1] for match in numbers if match})

    def today(name: str) -> str:
        name = re.sub(
            r"^decoder_blocks\.(\d+)\.", lambda match: f"blocks.{int(match[1]) + first}.", name
        )
        return re.sub(r"^(projectors\.\d+\.)projection_layer\.(?=\d)", r"\1", name)

    return Converted({today(name): tensor for name, tensor in weights.items()})


LAYOUTS: Mapping[str, Layout] = {
    "sit": Layout(_has_learned_sigma, _refuse_learn_sigma),
    "repa": Layout(lambda weights, settings: True, _of_repa, keeps_moments=True),
}
