"""Opens weights of another program: finds the state_dicts in a file, and converts them."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from srepa_ds.errors import CheckpointError, listed
from srepa_ds.weight_file import plain_tensors, read_weight_file, without_wrappers
from srepa_ds.weights.fit import check_finite
from srepa_ds.weights.foreign.layouts import LAYOUTS, Converted, layout_of
from srepa_ds.weights.foreign.model import ForeignModel, OptimizerState
from srepa_ds.weights.foreign.trainer import read_optimizer, steps_taken

_OFFICIAL_PARTS = frozenset(
    {
        "pos_embed", "x_embedder", "t_embedder", "y_embedder", "blocks", "decoder_blocks",
        "final_layer", "projectors", "cls_projectors2", "wg_norm",
    }
)  # fmt: skip
_WRAPPERS = ("state_dict", "ema", "model", "module", "model_state_dict", "net")
# A file can hold a mapping that holds itself.
_MOST_NESTED = 8


PLAIN = "model"
"""The kind of a state_dict that is not named."""


@dataclass(frozen=True)
class ForeignFile:
    """A file of weights, opened; its state_dicts are not yet looked at."""

    path: Path

    states: Mapping[str, Mapping[str, Any]]
    """The state_dicts by kind: `ema`, `model`, both, or one without a name under `PLAIN`."""

    is_plain: bool
    """Whether the one state_dict has no name, so that it may be of either kind."""

    content: Mapping[str, Any]
    """All that the file holds."""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that a trainer has kept with its weights."""
        args = self.content.get("args")
        if isinstance(args, argparse.Namespace):
            return dict(vars(args))
        return dict(args) if isinstance(args, Mapping) else {}


def open_foreign(
    path: Path,
    *,
    layout: str | None = None,
    with_optimizer: bool = False,
    setting: str = "the path",
) -> ForeignModel:
    """Returns the model in a file, with all kinds of weights that it holds.

    `layout` is a row of `LAYOUTS`; None recognises it. Raises CheckpointError, which tells the user
    to correct `setting`, if the file cannot be read, holds no state_dict, or NaN, or if the state
    of its optimizer is damaged.
    """
    file = open_file(path, setting=setting)
    first = plain_state(file, next(iter(file.states)))
    layout = layout or layout_of(first, file.settings)
    converted = {kind: convert(file, kind, layout=layout) for kind in file.states}
    weights = {kind: found.weights for kind, found in converted.items()}
    notes = dict.fromkeys(note for found in converted.values() for note in found.notes)
    return ForeignModel(
        path,
        layout,
        weights,
        optimizer=_optimizer(file, layout) if with_optimizer else None,
        step=steps_taken(path, file.content),
        positions=_positions(first),
        settings=file.settings,
        notes=tuple(notes),
    )


def _optimizer(file: ForeignFile, layout: str) -> OptimizerState | None:
    """Returns Adam's state, which is in the order of the file's own weights."""
    row, found = LAYOUTS[layout], file.content.get("opt")
    if found is None or "model" not in file.states or not row.keeps_moments:
        return None
    own = plain_state(file, "model")
    return read_optimizer(
        found, own, file.path, renamed=lambda t: row.convert(t, file.path).weights
    )


def _positions(state: Mapping[str, Tensor]) -> Tensor | None:
    table = state.get("pos_embed")
    return table if table is not None and table.ndim == 3 else None


def open_file(path: Path, *, setting: str) -> ForeignFile:
    """Returns a file of safetensors or torch.save, with its state_dicts found, however deep.

    Raises CheckpointError, which tells the user to correct `setting`.
    """
    content = read_weight_file(path, named=str(path), setting=setting, fault=CheckpointError)
    state: Mapping[str, Any] = content
    for _ in range(_MOST_NESTED):
        inner = [key for key in _WRAPPERS if isinstance(state.get(key), Mapping)]
        if not inner:
            return ForeignFile(path, {PLAIN: state}, True, content)
        if {"ema", "model"} & {*inner}:
            states = {"ema": state["ema"]} if "ema" in inner else {}
            # Beside an average, a plain state_dict is the model's.
            if others := [key for key in ("model", *inner) if key in inner and key != "ema"]:
                states["model"] = state[others[0]]
            return ForeignFile(path, states, False, content)
        state = state[inner[0]]
    return ForeignFile(path, {PLAIN: state}, True, content)


def convert(file: ForeignFile, kind: str, *, layout: str | None = None) -> Converted:
    """Returns the weights of one kind under official names, without `pos_embed`.

    `layout` is a row of `LAYOUTS`; None recognises it. Prefixes of wrappers (`module.`,
    `_orig_mod.`) are removed. Raises CheckpointError for weights that are not finite, or that no
    model here can hold.
    """
    state = plain_state(file, kind)
    layout = layout or layout_of(state, file.settings)
    converted = LAYOUTS[layout].convert(state, file.path)
    # Not a weight but a function of the model's sizes, and so of the resolution.
    own = {name: value for name, value in converted.weights.items() if name != "pos_embed"}
    check_finite(own, file.path)
    return Converted(own, converted.notes)


def plain_state(file: ForeignFile, kind: str) -> Mapping[str, Tensor]:
    """Returns a state_dict without the prefixes of wrappers; raises CheckpointError."""
    state = file.states[kind]
    for _ in range(_MOST_NESTED):
        inner = [key for key in _WRAPPERS if isinstance(state.get(key), Mapping)]
        if not inner:
            break
        state = state[inner[0]]
    other = [str(key) for key, value in state.items() if not isinstance(value, Tensor)]
    if other or not state:
        reason = f"{listed(other)} are not tensors" if other else "it is empty"
        raise CheckpointError(f"{file.path} does not hold a state_dict: {reason}")
    tensors = {str(key): value for key, value in state.items()}
    ordinary = plain_tensors(tensors, file.path, named=str(file.path), fault=CheckpointError)
    return without_wrappers(ordinary, lambda name: name.partition(".")[0] in _OFFICIAL_PARTS)
