"""The layouts of weights that other programs write, one row of a table each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from srepa_ds.errors import CheckpointError
from srepa_ds.weights.foreign.converted import Converted
from srepa_ds.weights.foreign.names import has_names_of_irepa, official_names
from srepa_ds.weights.foreign.sit import is_of_diffusers, is_sit, of_sit
from srepa_ds.weights.lazy import shapes_of

UNSCALED = (
    "projectors as iREPA's, which scales each channel of its latents by statistics that are in no "
    "model: codec.scale and codec.shift must be those it was trained with"
)
"""Of latents that iREPA's trainer may have scaled."""
_CHANNELS_OF_LATENTS = 4


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


def _of_repa(weights: Mapping[str, Tensor], path: Path) -> Converted:
    """Returns `weights` under the current names of the official REPA code."""
    try:
        names = official_names(weights)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; keep one of them") from error
    found = {new: weights[old] for old, new in names.items()}
    patches = shapes_of(found).get("x_embedder.proj.weight", ())
    is_of_latents = patches[1:2] == (_CHANNELS_OF_LATENTS,)
    return Converted(found, (UNSCALED,) if is_of_latents and has_names_of_irepa(weights) else ())


LAYOUTS: Mapping[str, Layout] = {
    "diffusers": Layout(is_of_diffusers, of_sit),
    "sit": Layout(is_sit, of_sit),
    "repa": Layout(lambda weights, settings: True, _of_repa, keeps_moments=True),
}
