"""Initialises a training from existing weights: an exported model or a REPA checkpoint."""

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
from srepa_ds.weights.exported import WEIGHTS, checked_document, read_document
from srepa_ds.weights.foreign.opening import PLAIN, convert, open_file

log = logging.getLogger("srepa_ds")

WeightsKind = Literal["ema", "model"]

_PROJECTOR = re.compile(r"projectors\.\d+\.")


class InitialWeightsConfig(Section):
    """Initial weights instead of random ones; optimizer state and averages start from scratch."""

    path: Path
    """A folder written by `srepa-ds export`, or a `.pt` or `.safetensors` file with weights under
    the names of the official REPA code; or a repository on the Hugging Face Hub (`owner/name`,
    `owner/name@revision`), which `srepa-ds fetch` downloads."""

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

    `path` is an exported folder, or a file with a state_dict, alone or under keys such as
    `state_dict`, `model` and `ema`. `which` chooses between the latter two; an exported folder must
    hold that kind. Prefixes of wrappers are removed; REPA's early names (`decoder_blocks`) and
    iREPA's (`projection_layer`) become the current ones. Raises CheckpointError, which tells the
    user to correct `setting`, or `choice` for the kind of weights.
    """
    if path.is_dir():
        _check_folder(path, which)
    file = open_file(path / WEIGHTS if path.is_dir() else path, setting=setting)
    if not file.is_plain and which not in file.states:
        raise CheckpointError(
            f"{path} does not hold '{which}', but {listed(map(str, file.content))}; set "
            f"{choice} to match"
        )
    return dict(convert(file, PLAIN if file.is_plain else which).weights)


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


def _check_folder(path: Path, which: WeightsKind) -> None:
    """Raises CheckpointError unless `path` is a whole exported model of the kind `which`."""
    document, _ = checked_document(path)
    kind = "model" if document.weights == "master" else "ema"
    if kind != which:
        raise CheckpointError(
            f"{path} holds the weights '{document.weights}'; set train.init_from.weights to "
            f"{kind}, or export again with "
            f"export.weights={'master' if which == 'model' else 'ema'}"
        )


def _check_heads(path: Path, objective: Objective) -> None:
    """Raises CheckpointError if the number of heads differs, which no weight's shape shows."""
    if not path.is_dir():
        return
    own = objective.sit.config
    there = read_document(path).section(type(own), "model").shape.num_heads
    if there != own.shape.num_heads:
        raise CheckpointError(
            f"{path} is of another model: it has {there} attention heads, this one has "
            f"{own.shape.num_heads}; set model.num_heads to match"
        )
