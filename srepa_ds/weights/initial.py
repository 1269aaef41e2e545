"""Initialises a training from existing weights: an exported model, or one of another program."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from srepa_ds.encoders.published import local_model
from srepa_ds.errors import CheckpointError, listed
from srepa_ds.objective import Objective, official_name
from srepa_ds.schema import Section
from srepa_ds.weights.exported import checked_document, stored_tensors
from srepa_ds.weights.fit import check_finite
from srepa_ds.weights.foreign.folders import is_foreign_folder
from srepa_ds.weights.foreign.opening import PLAIN, convert, open_file
from srepa_ds.weights.heads import heads_in

log = logging.getLogger("srepa_ds")

WeightsKind = Literal["ema", "model"]

_PROJECTOR = re.compile(r"projectors\.\d+\.")


class InitialWeightsConfig(Section):
    """Initial weights instead of random ones; optimizer state and averages start from scratch."""

    path: Path
    """A folder written by `srepa-ds export`; a `.pt` or `.safetensors` file of REPA, iREPA, REG or
    the original SiT; a folder of SiT as diffusers saves it; or a repository on the Hugging Face Hub
    (`owner/name`, `owner/name@revision`), which `srepa-ds fetch` downloads."""

    weights: WeightsKind = Field(default="ema")
    """If the file holds both: the moving average, or the weights themselves (`model`)."""


@dataclass(frozen=True)
class FillReport:
    """The weights that `fill` loaded, and those it did not."""

    loaded: tuple[str, ...]
    """Names of the weights that were replaced."""

    initialised: tuple[str, ...]
    """Names of projector weights that keep their random initialisation."""

    unused: tuple[str, ...]
    """Names of given projector weights that fit no projector."""


def initialise_from(objective: Objective, config: InitialWeightsConfig) -> FillReport:
    """Loads a file's weights into `objective`, logs and returns what was loaded.

    Call it before the engine is built, so that the masters start from these exact values. Raises
    CheckpointError if the file cannot be read or is of a different model, DataError for a
    repository that was not fetched.
    """
    place = local_model(config.path, setting="train.init_from.path")
    tensors = read_initial_weights(place, which=config.weights)
    _check_heads(place, objective)
    try:
        report = fill(objective, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{config.path} {error}") from error
    log.info("initialised %d weights from %s", len(report.loaded), config.path)
    if report.initialised:
        unused = f"; the file's {listed(report.unused)} do not fit" if report.unused else ""
        log.info("initialised at random: %s%s", listed(report.initialised), unused)
    elif report.unused:
        log.info("not used: %s", listed(report.unused))
    return report


def read_initial_weights(
    path: Path,
    *,
    which: WeightsKind,
    setting: str = "train.init_from.path",
    choice: str = "train.init_from.weights",
) -> dict[str, Tensor]:
    """Returns the weights of `path` under their official names, on the CPU, without `pos_embed`.

    `path` is an exported folder, or whatever `open_file` reads: a file with a state_dict, alone or
    under keys such as `state_dict`, `model` and `ema`, or a folder of diffusers. `which` chooses
    between the latter two; an exported folder must hold that kind. All come in REPA's convention:
    of the original SiT the learned sigma is dropped, and time reversed. Logs what was changed.
    Raises CheckpointError, which tells the user to correct `setting`, or `choice` for the kind of
    weights.
    """
    if path.is_dir() and not is_foreign_folder(path):
        return _weights_in_folder(path, which, choice)
    file = open_file(path, setting=setting)
    if not file.is_plain and which not in file.states:
        raise CheckpointError(
            f"{path} does not hold '{which}', but {listed(map(str, file.content))}; set "
            f"{choice} to match"
        )
    kind = PLAIN if file.is_plain else which
    converted = convert(file, kind)
    for note in converted.notes:
        log.info("%s: %s", path, note)
    return dict(converted.weights)


@torch.no_grad()
def fill(objective: Objective, tensors: Mapping[str, Tensor]) -> FillReport:
    """Loads `tensors`, under official names, into `objective` and reports what was loaded.

    Every weight of the model itself must be given and fit. A projector is loaded if all its weights
    fit, and is left as it is otherwise. Raises CheckpointError naming the differences; nothing is
    changed then.
    """
    own = {official_name(name): weight for name, weight in objective.named_parameters()}
    fitting = {
        name for name, weight in own.items()
        if name in tensors and tensors[name].shape == weight.shape
    }  # fmt: skip
    names = list(dict.fromkeys([*own, *tensors]))
    faults = [
        f"{name}: {_shape(tensors.get(name))} in the file, {_shape(own.get(name))} in the model"
        for name in names
        if name not in fitting and not _PROJECTOR.match(name)
    ]
    if faults:
        raise CheckpointError(
            f"does not fit the model: {listed(faults, '; ')}; set the section `model` to "
            "the one these weights were trained with"
        )
    partly = {_projector_of(name) for name in names if name not in fitting}
    loaded = [name for name in own if name in fitting and _projector_of(name) not in partly]
    for name in loaded:
        own[name].copy_(tensors[name])
    left = tuple(name for name in own if name not in loaded)
    return FillReport(tuple(loaded), left, tuple(n for n in tensors if n not in loaded))


def _projector_of(name: str) -> str | None:
    match = _PROJECTOR.match(name)
    return match[0] if match else None


def _shape(tensor: Tensor | None) -> str:
    return "none" if tensor is None else str(tuple(tensor.shape))


def _weights_in_folder(path: Path, which: WeightsKind, choice: str) -> dict[str, Tensor]:
    """Returns a whole exported model of the kind `which`; raises CheckpointError for others."""
    document, _ = checked_document(path)
    kind = "model" if document.weights == "master" else "ema"
    if kind != which:
        raise CheckpointError(
            f"{path} holds the weights '{document.weights}'; set {choice} to {kind}, or export "
            "again with "
            f"export.weights={'master' if which == 'model' else 'ema'}"
        )
    tensors = stored_tensors(document)
    check_finite(tensors, path)
    return {name: value for name, value in tensors.items() if name != "pos_embed"}


def _check_heads(path: Path, objective: Objective) -> None:
    """Raises CheckpointError if the number of heads differs, which no weight's shape shows."""
    own = objective.sit.config.shape.num_heads
    there = heads_in(path)
    if there not in (None, own):
        raise CheckpointError(
            f"{path} is of another model: it has {there} attention heads, this one has {own}; set "
            "model.num_heads to match"
        )
