"""The state of a trainer of REPA's family: AdamW's moments, and the steps it has taken."""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srepa_ds.errors import CheckpointError, listed
from srepa_ds.weight_file import plain_tensors
from srepa_ds.weights.foreign.model import OptimizerState
from srepa_ds.weights.lazy import LazyTensors, shapes_of

_MOMENTS = ("exp_avg", "exp_avg_sq")
_SETTINGS = ("lr", "betas", "eps", "weight_decay")
# Computed, not trained: it is among the optimizer's parameters, but has no state.
_NOT_TRAINED = "pos_embed"
_CURE = "to import its weights alone, add train.init_from.weights=ema (or model)"
_MOST_STEPS = 10**9


def read_optimizer(
    found: Any,
    own: Mapping[str, Tensor],
    path: Path,
    *,
    renamed: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
) -> OptimizerState | None:
    """Returns AdamW's state by official names, or None if it has not taken a step.

    `found` is what `AdamW.state_dict()` gives, `own` the model's weights under the file's names:
    entry i belongs to the i-th of them. `renamed` gives moments, which have the file's names, the
    official ones. Moments are read when they are used; one that is not finite raises
    CheckpointError then, everything else that is wrong raises it at once.
    """
    states, group = _parts_of(found, path)
    if not states:
        return None
    names = list(own)
    _check_group(group, len(names), path)
    by_name = {names[index]: state for index, state in _indexed(states, len(names), path)}
    by_name.pop(_NOT_TRAINED, None)
    if not by_name:
        return None
    steps = {_checked(name, state, own[name], path) for name, state in by_name.items()}
    if len(steps) != 1:
        raise _fault(
            path, f"its weights have taken different numbers of steps, {listed(_shown(steps))}"
        )
    step = steps.pop()
    if not step.is_integer() or not 0 < step <= _MOST_STEPS:
        raise _fault(path, f"it has taken {step:g} steps")
    first, second = (
        _finite(renamed(_plain({name: s[key] for name, s in by_name.items()}, path)), key, path)
        for key in _MOMENTS
    )
    settings = {key: group[key] for key in _SETTINGS if key in group}
    return OptimizerState(first, second, int(step), settings)


def steps_taken(path: Path, content: Mapping[str, Any]) -> int | None:
    """Returns the optimizer steps that a trainer has taken, if its file or the name tells them.

    REPA's trainer keeps `steps`; that of SiT only names its files so. Raises CheckpointError.
    """
    steps = content.get("steps")
    if steps is None:
        match = re.fullmatch(r"\d{7}", path.stem)
        return int(match[0]) if match else None
    if isinstance(steps, bool) or not isinstance(steps, int) or not 0 <= steps <= _MOST_STEPS:
        raise CheckpointError(f"{path}: 'steps' is {str(steps)[:80]}, which is no number of steps")
    return steps


def _parts_of(found: Any, path: Path) -> tuple[Mapping[Any, Any], Mapping[str, Any]]:
    """Returns the states of an optimizer by index, and its only group."""
    parts = found if isinstance(found, Mapping) else {}
    states, groups = parts.get("state"), parts.get("param_groups")
    if not isinstance(states, Mapping) or not isinstance(groups, list):
        raise _fault(path, "it is not what AdamW.state_dict() returns")
    if len(groups) != 1 or not isinstance(groups[0], Mapping):
        raise _fault(path, f"it has {len(groups)} groups of weights, and one is expected")
    return states, groups[0]


def _check_group(group: Mapping[str, Any], num_weights: int, path: Path) -> None:
    params = group.get("params")
    # Not compared before their types are known: one may be a tensor of many.
    is_plain = isinstance(params, list) and all(isinstance(index, int) for index in params)
    if not is_plain or params != list(range(num_weights)):
        raise _fault(path, f"its group does not name the model's {num_weights} weights in order")
    for name in ("amsgrad", "maximize"):
        # Not by its truth: it may be a tensor of many.
        if (used := group.get(name)) is not None and used is not False:
            raise _fault(path, f"it uses {name}, which is not here")
    decay = group.get("weight_decay", 0.0)
    if not isinstance(decay, int | float):
        raise _fault(path, f"its weight_decay is a {type(decay).__name__}, not a number")
    if group.get("decoupled_weight_decay") is False and decay:
        raise _fault(path, "it is Adam's, whose weight decay is not AdamW's")


def _indexed(
    states: Mapping[Any, Any], num_weights: int, path: Path
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for index, state in states.items():
        if not isinstance(index, int) or not 0 <= index < num_weights:
            raise _fault(
                path, f"it has a state {str(index)[:20]}, and the model {num_weights} weights"
            )
        if not isinstance(state, Mapping):
            raise _fault(path, f"its state {index} is a {type(state).__name__}")
        yield index, state


def _checked(name: str, state: Mapping[str, Any], weight: Tensor, path: Path) -> float:
    """Returns the steps that a weight has taken; raises CheckpointError for a state of another."""
    if lacking := [key for key in ("step", *_MOMENTS) if key not in state]:
        raise _fault(path, f"that of '{name}' lacks {listed(lacking)}")
    for key in _MOMENTS:
        moment = state[key]
        shape = tuple(moment.shape) if isinstance(moment, Tensor) else "no tensor"
        if shape != tuple(weight.shape):
            raise _fault(path, f"{key} of '{name}' is {shape}, the weight {tuple(weight.shape)}")
    try:
        return float(state["step"])
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise _fault(path, f"the step of '{name}' is no number") from error


def _plain(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    return plain_tensors(tensors, path, named=f"{path}: opt", fault=CheckpointError)


def _finite(tensors: Mapping[str, Tensor], key: str, path: Path) -> LazyTensors:
    """Returns tensors that are checked when they are read: all of them can be twice the model."""

    def read(name: str) -> Tensor:
        value = tensors[name].to(torch.float32)
        if not value.isfinite().all():
            raise _fault(path, f"{key} of '{name}' is not finite")
        return value

    return LazyTensors(shapes_of(tensors), read)


def _shown(steps: set[float]) -> list[str]:
    return [f"{step:g}" for step in sorted(steps)]


def _fault(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path}: the optimizer's state cannot be taken over: {reason}; {_CURE}")
