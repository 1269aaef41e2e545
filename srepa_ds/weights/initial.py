"""Begins a training with what another one has learnt: an exported model, or a file of REPA's."""

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from srepa_ds.errors import CheckpointError
from srepa_ds.objective import Objective, official_name
from srepa_ds.schema import Section
from srepa_ds.weight_file import read_weight_file
from srepa_ds.weights.exported import DOCUMENT, WEIGHTS

log = logging.getLogger("srepa_ds")

Which = Literal["ema", "model"]

_SHOWN = 5
_PROJECTOR = re.compile(r"projectors\.\d+\.")


class InitialWeightsConfig(Section):
    """Weights to begin with instead of random ones; optimizer and averages begin anew."""

    path: Path
    """A folder that `srepa-ds export` wrote, or a `.pt` or `.safetensors` file with weights under
    the names of the official REPA code."""

    weights: Which = Field(default="ema")
    """Of a file that holds both: the moving average, or the weights themselves (`model`)."""


@dataclass(frozen=True)
class FillReport:
    """What `fill` took over, and what it left."""

    loaded: tuple[str, ...]
    """Names of the weights that were replaced."""

    initialised: tuple[str, ...]
    """Names of projectors' weights that stay as they were initialised."""

    unused: tuple[str, ...]
    """Names of projectors' weights that were given and fit none."""


def initialise_from(objective: Objective, config: InitialWeightsConfig) -> FillReport:
    """Returns what was loaded from a file into `objective`, having logged it.

    Call it before the engine is built, whose masters then begin with these bits. Raises
    CheckpointError if the file cannot be read or its model is another.
    """
    tensors = read_initial_weights(config.path, which=config.weights)
    _check_heads(config.path, objective)
    try:
        report = fill(objective, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{config.path} {error}") from error
    log.info("beginning with %d weights of %s", len(report.loaded), config.path)
    if report.initialised:
        unused = f"; the file's {_some(report.unused)} fit none" if report.unused else ""
        log.info("these begin at random: %s%s", _some(report.initialised), unused)
    elif report.unused:
        log.info("not used: %s", _some(report.unused))
    return report


def read_initial_weights(path: Path, *, which: Which) -> dict[str, Tensor]:
    """Returns the weights of `path` under their official names, on the CPU, without `pos_embed`.

    `path` is an exported folder, a bare state_dict, or a training's file with `model` and `ema`;
    `which` chooses of the latter and must be what the former holds. Prefixes of wrappers are taken
    off, and REPA's early names (`decoder_blocks`) and iREPA's (`projection_layer`) made today's.
    Raises CheckpointError.
    """
    if path.is_dir():
        _check_folder(path, which)
    file = path / WEIGHTS if path.is_dir() else path
    found = read_weight_file(
        file, named=str(file), setting="train.init_from.path", fault=CheckpointError
    )
    state = _state_of(found, path, which)
    tensors = _renamed(state)
    # No weight but a function of the model's sizes, and so of the resolution.
    tensors.pop("pos_embed", None)
    _refuse_learn_sigma(tensors, path)
    broken = [name for name, value in tensors.items() if not value.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"{path}: {_some(broken)} not finite; choose weights from before the run diverged"
        )
    return tensors


@torch.no_grad()
def fill(objective: Objective, tensors: Mapping[str, Tensor]) -> FillReport:
    """Returns what became of `tensors`, which go by official names, in `objective`.

    Every weight of the model itself must be there and fit. A projector is taken over if all its
    weights are, and else stays as it is. Raises CheckpointError naming what differs; then nothing
    was changed.
    """
    own = {official_name(name): weight for name, weight in objective.named_parameters()}
    fitting = {
        name for name, weight in own.items()
        if name in tensors and tensors[name].shape == weight.shape
    }  # fmt: skip
    names = list(dict.fromkeys([*own, *tensors]))
    faults = [
        f"{name}: {_shape(tensors.get(name))} there, {_shape(own.get(name))} in the model"
        for name in names
        if name not in fitting and not _PROJECTOR.match(name)
    ]
    if faults:
        raise CheckpointError(
            f"does not fit the model: {_some(faults, '; ')}; choose the `model` it was trained as"
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


def _some(words: Iterable[str], separator: str = ", ") -> str:
    words = list(words)
    more = f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else ""
    return separator.join(words[:_SHOWN]) + more


def _check_folder(path: Path, which: Which) -> None:
    """Raises CheckpointError unless `path` is an exported model of the kind that is asked for."""
    try:
        label = json.loads((path / DOCUMENT).read_text(encoding="utf-8"))["provenance"]["weights"]
        kind = "model" if label == "master" else "ema"
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path} holds no exported model; make one with `srepa-ds export CONFIG`"
        ) from error
    if kind != which:
        raise CheckpointError(
            f"{path} holds the weights '{label}'; set train.init_from.weights to {kind}, or export "
            f"again with export.weights={'master' if which == 'model' else 'ema'}"
        )


def _check_heads(path: Path, objective: Objective) -> None:
    """Raises CheckpointError for another number of heads, which no weight's shape shows."""
    if not path.is_dir():
        return
    tree = json.loads((path / DOCUMENT).read_text(encoding="utf-8"))["config"]["model"]
    own = objective.sit.config
    try:
        there = type(own).model_validate_json(json.dumps(tree)).shape.num_heads
    except ValueError as error:
        raise CheckpointError(f"{path / DOCUMENT} describes no model of today: {error}") from error
    if there != own.shape.num_heads:
        raise CheckpointError(
            f"{path} is of another model: {there} attention heads there, {own.shape.num_heads} in "
            "the model; set model.num_heads to match"
        )


def _state_of(found: Mapping[str, Any], path: Path, which: Which) -> dict[str, Tensor]:
    state: Any = found
    if any(isinstance(found.get(key), Mapping) for key in ("ema", "model")):
        state = found.get(which)
        if not isinstance(state, Mapping):
            raise CheckpointError(
                f"{path} holds no '{which}', but {_some(found)}; set "
                "train.init_from.weights to match"
            )
    other = [str(key) for key, value in state.items() if not isinstance(value, Tensor)]
    if other or not state:
        reason = f"{_some(other)} are no tensors" if other else "it is empty"
        raise CheckpointError(f"{path} holds no state_dict: {reason}")
    return {str(key): value for key, value in state.items()}


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns `state` under the names that the official REPA code gives today."""
    plain = {_unwrapped(name): tensor for name, tensor in state.items()}
    numbers = [re.match(r"blocks\.(\d+)\.", name) for name in plain]
    # Blocks behind the alignment were once counted anew.
    first = len({match[1] for match in numbers if match})

    def today(name: str) -> str:
        name = re.sub(
            r"^decoder_blocks\.(\d+)\.", lambda match: f"blocks.{int(match[1]) + first}.", name
        )
        return re.sub(r"^(projectors\.\d+\.)projection_layer\.(?=\d)", r"\1", name)

    return {today(name): tensor for name, tensor in plain.items()}


def _unwrapped(name: str) -> str:
    # What torch.compile and data parallelism put before names, in whatever order.
    name = name.replace("_orig_mod.", "")
    return name.removeprefix("module.")


def _refuse_learn_sigma(tensors: Mapping[str, Tensor], path: Path) -> None:
    first, last = tensors.get("x_embedder.proj.weight"), tensors.get("final_layer.linear.weight")
    if first is None or last is None or first.ndim != 4 or last.ndim != 2:
        return
    if len(last) == 2 * first[0].numel():
        raise CheckpointError(
            f"{path} is of the original SiT or DiT: it predicts twice the channels (learn_sigma), "
            "and with another direction of time; only weights of REPA's kind can be continued"
        )
