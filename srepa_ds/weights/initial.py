"""Initialises a training from existing weights: an exported model or a REPA checkpoint."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from srepa_ds.errors import CheckpointError, listed
from srepa_ds.objective import Objective, official_name
from srepa_ds.schema import Section
from srepa_ds.weight_file import plain_tensors, read_weight_file, without_wrappers
from srepa_ds.weights.exported import WEIGHTS, checked_document, read_document

log = logging.getLogger("srepa_ds")

WeightsKind = Literal["ema", "model"]

_OFFICIAL_PARTS = frozenset(
    {
        "pos_embed", "x_embedder", "t_embedder", "y_embedder", "blocks", "decoder_blocks",
        "final_layer", "projectors", "cls_projectors2", "wg_norm",
    }
)  # fmt: skip
_WRAPPERS = ("state_dict", "ema", "model", "module", "model_state_dict", "net")
# A file can hold a mapping that holds itself.
_MOST_NESTED = 8

_PROJECTOR = re.compile(r"projectors\.\d+\.")


class InitialWeightsConfig(Section):
    """Initial weights instead of random ones; optimizer state and averages start from scratch."""

    path: Path
    """A folder written by `srepa-ds export`, or a `.pt` or `.safetensors` file with weights under
    the names of the official REPA code."""

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
    CheckpointError if the file cannot be read or is of a different model.
    """
    tensors = read_initial_weights(config.path, which=config.weights)
    _check_heads(config.path, objective)
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
    file = path / WEIGHTS if path.is_dir() else path
    found = read_weight_file(file, named=str(file), setting=setting, fault=CheckpointError)
    state = _state_of(found, path, which, choice)
    tensors = _renamed(plain_tensors(state, file, named=str(file), fault=CheckpointError))
    # Not a weight but a function of the model's sizes, and so of the resolution.
    tensors.pop("pos_embed", None)
    _refuse_learn_sigma(tensors, path)
    broken = [name for name, value in tensors.items() if not value.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"{path}: not finite: {listed(broken)}; choose weights from before the run diverged"
        )
    return tensors


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


def _state_of(
    found: Mapping[str, Any], path: Path, which: WeightsKind, choice: str
) -> dict[str, Tensor]:
    """Returns the state_dict in a file, below `which` if it has both kinds, however deep."""
    state, chosen = found, False
    for _ in range(_MOST_NESTED):
        inner = [key for key in _WRAPPERS if isinstance(state.get(key), Mapping)]
        kinds = {"ema", "model"} & {*inner}
        if not inner:
            break
        if chosen or not kinds:
            state = state[inner[0]]
        elif which in kinds:
            state, chosen = state[which], True
        elif which == "model" and (plain := [key for key in inner if key != "ema"]):
            # Beside an average, a plain state_dict is the model's.
            state, chosen = state[plain[0]], True
        else:
            raise CheckpointError(
                f"{path} does not hold '{which}', but {listed(map(str, state))}; set "
                f"{choice} to match"
            )
    other = [str(key) for key, value in state.items() if not isinstance(value, Tensor)]
    if other or not state:
        reason = f"{listed(other)} are not tensors" if other else "it is empty"
        raise CheckpointError(f"{path} does not hold a state_dict: {reason}")
    return {str(key): value for key, value in state.items()}


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns `state` under the current names of the official REPA code."""
    plain = without_wrappers(state, lambda name: name.partition(".")[0] in _OFFICIAL_PARTS)
    numbers = [re.match(r"blocks\.(\d+)\.", name) for name in plain]
    # Blocks after the alignment once had numbers of their own.
    first = len({match[1] for match in numbers if match})

    def today(name: str) -> str:
        name = re.sub(
            r"^decoder_blocks\.(\d+)\.", lambda match: f"blocks.{int(match[1]) + first}.", name
        )
        return re.sub(r"^(projectors\.\d+\.)projection_layer\.(?=\d)", r"\1", name)

    return {today(name): tensor for name, tensor in plain.items()}


def _refuse_learn_sigma(tensors: Mapping[str, Tensor], path: Path) -> None:
    first, last = tensors.get("x_embedder.proj.weight"), tensors.get("final_layer.linear.weight")
    if first is None or last is None or first.ndim != 4 or last.ndim != 2:
        return
    if len(last) == 2 * first[0].numel():
        raise CheckpointError(
            f"{path} is of the original SiT or DiT: it predicts twice the channels (learn_sigma), "
            "with time in the other direction; only weights in REPA's convention can be continued"
        )
