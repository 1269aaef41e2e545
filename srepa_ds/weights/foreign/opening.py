"""Opens weights of another program: finds the state_dicts, and converts them."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from srepa_ds.errors import CheckpointError, listed
from srepa_ds.weight_file import plain_tensors, read_weight_file, without_wrappers
from srepa_ds.weights.fit import check_finite
from srepa_ds.weights.foreign.converted import Converted
from srepa_ds.weights.foreign.folders import read_folder, weight_files_in
from srepa_ds.weights.foreign.layouts import LAYOUTS, layout_of
from srepa_ds.weights.foreign.model import ForeignModel, OptimizerState
from srepa_ds.weights.foreign.names import is_official
from srepa_ds.weights.foreign.positions import NAME as POSITIONS
from srepa_ds.weights.foreign.positions import check_own_positions
from srepa_ds.weights.foreign.refusals import check_is_sit
from srepa_ds.weights.foreign.sit import SCALED, UNNAMED, is_lightning
from srepa_ds.weights.foreign.trainer import read_optimizer, steps_taken
from srepa_ds.weights.lazy import LazyTensors, shapes_of

_WRAPPERS = ("state_dict", "ema", "model", "module", "model_state_dict", "net")
# A file can hold a mapping that holds itself.
_MOST_NESTED = 8

_MOMENTS = "the optimizer's state is left out: reversed time changes its second moments"


PLAIN = "model"
"""The kind of a state_dict that is not named."""


@dataclass(frozen=True)
class ForeignFile:
    """A file or folder of weights, opened; its state_dicts are not yet looked at."""

    path: Path

    states: Mapping[str, Mapping[str, Any]]
    """The state_dicts by kind: `ema`, `model`, both, or one without a name under `PLAIN`."""

    is_plain: bool
    """Whether the one state_dict has no name, so that it may be of either kind."""

    content: Mapping[str, Any]
    """All that the file holds; of a folder, its `config`."""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that a trainer has kept with its weights, or the folder's `config.json`."""
        found = self.content.get("args", self.content.get("config"))
        if isinstance(found, argparse.Namespace):
            found = vars(found)
        if not isinstance(found, Mapping):
            return {}
        return {str(key): value for key, value in found.items()}


def open_foreign(
    path: Path,
    *,
    layout: str | None = None,
    with_optimizer: bool = False,
    setting: str = "the path",
) -> ForeignModel:
    """Returns the model in a file or folder, with all kinds of weights that it holds.

    `layout` is a row of `LAYOUTS`; None recognises it. Raises CheckpointError, which tells the user
    to correct `setting`, if it cannot be read, holds no state_dict, or NaN, is of no SiT, or if the
    state of its optimizer is damaged.
    """
    file = open_file(path, setting=setting)
    first = plain_state(file, next(iter(file.states)))
    layout = layout or layout_of(first, file.settings)
    converted = {kind: convert(file, kind, layout=layout) for kind in file.states}
    weights = {kind: found.weights for kind, found in converted.items()}
    notes = dict.fromkeys(note for found in converted.values() for note in found.notes)
    if "opt" in file.content and not LAYOUTS[layout].keeps_moments:
        notes[_MOMENTS] = None
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
    table = state.get(POSITIONS)
    return table if table is not None and table.ndim == 3 else None


def open_file(path: Path, *, setting: str) -> ForeignFile:
    """Returns a file of safetensors or torch.save, with its state_dicts found, however deep.

    Or a folder with weights under the names that diffusers and the Hub's libraries give them.
    Raises CheckpointError, which tells the user to correct `setting`.
    """
    if path.is_dir():
        state, settings = read_folder(path, setting=setting)
        return ForeignFile(path, {PLAIN: state}, True, {"config": settings})
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
    check_is_sit(shapes_of(state), file.settings, file.path)
    layout = layout or layout_of(state, file.settings)
    check_own_positions(state, file.path)
    converted = LAYOUTS[layout].convert(state, file.path)
    # Not a weight but a function of the model's sizes, and so of the resolution.
    own = LazyTensors(shapes_of(converted.weights), converted.weights.__getitem__).only(
        lambda name: name != POSITIONS
    )
    check_finite(own, file.path)
    notes = {
        UNNAMED: layout == "sit" and not file.settings,
        SCALED: is_lightning(file.settings),
    }
    applying = (note for note, applies in notes.items() if applies)
    return Converted(own, (*converted.notes, *applying))


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
    files = weight_files_in(file.path) if file.path.is_dir() else [file.path]
    ordinary = plain_tensors(tensors, *files, named=str(file.path), fault=CheckpointError)
    return without_wrappers(ordinary, is_official)
