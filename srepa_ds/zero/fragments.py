"""The fragments of the weights that this rank owns, in one form for all ZeRO stages.

A fragment is a run of one flattened weight, with a view of its fp32 master and of Adam's moments.
Code that must not depend on the topology (EMA, checkpoints, export) works on fragments.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter

from srepa_ds.distributed import ranks
from srepa_ds.zero.private import private

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """This rank's run of one weight: its place in the weight, and in the optimizer's tensor."""

    name: str
    """Name of the weight in the engine's module."""

    shape: tuple[int, ...]
    """Shape of the whole weight."""

    start: int
    """Index of its first element in the flattened weight."""

    numel: int
    """Number of its elements."""

    holder: Tensor
    """The tensor that the torch optimizer steps: the key of its state."""

    offset: int
    """Index of its first element in the flattened holder."""

    @property
    def master(self) -> Float[Tensor, " numel"]:
        """A view of the fp32 master weights."""
        return self.holder.detach().view(-1).narrow(0, self.offset, self.numel)


def fragments(engine: deepspeed.DeepSpeedEngine, *, whole: bool = False) -> list[Fragment]:
    """Returns the fragments this rank owns, ordered by weight; all ranks' cover each weight once.

    Under stage 0, where every rank holds all masters, `whole` returns the entire weights: a
    restore has to fill them all. Holders may be replaced between steps: fetch fragments again.
    """
    weights = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    stage = engine.zero_optimization_stage()
    if stage == 3:
        located = (_locate_stage_3(engine, *weight) for weight in weights)
    elif stage > 0:
        located = (_locate_stage_1_2(engine, *weight) for weight in weights)
    else:
        holders = _stage_0_holders(engine)
        located = (_locate_stage_0(name, p, holders.get(p, p), whole) for name, p in weights)
    return [fragment for fragment in located if fragment is not None]


@torch.no_grad()
def gathered(engine: deepspeed.DeepSpeedEngine, values: Sequence[Tensor]) -> list[Tensor]:
    """Returns values over the `whole` fragments, given this rank's over those it owns. Collective.

    The two differ only under stage 0 on several ranks: there the ranks' values are put together.
    """
    if engine.zero_optimization_stage() > 0 or ranks.world_size() == 1:
        return list(values)
    own = {f.name: (f, value) for f, value in zip(fragments(engine), values, strict=True)}
    result = []
    for fragment in fragments(engine, whole=True):
        total = torch.zeros_like(fragment.master)
        if fragment.name in own:
            part, value = own[fragment.name]
            total.narrow(0, part.start, part.numel).copy_(value)
        result.append(ranks.summed(total))
    return result


def _locate_stage_0(
    name: str, parameter: Parameter, holder: Tensor, whole: bool
) -> Fragment | None:
    """Returns an equal share of the weight, which every rank holds."""
    share = math.ceil(parameter.numel() / ranks.world_size())
    start = 0 if whole else min(ranks.rank() * share, parameter.numel())
    stop = parameter.numel() if whole else min(start + share, parameter.numel())
    if stop <= start:
        return None
    return Fragment(name, tuple(parameter.shape), start, stop - start, holder, start)


def _stage_0_holders(engine: deepspeed.DeepSpeedEngine) -> dict[Parameter, Tensor]:
    """Returns the fp32 master of each bf16 weight; fp32 weights are their own masters."""
    optimizer = engine.optimizer
    if not isinstance(optimizer, FP16_UnfusedOptimizer):
        return {}
    reason = "finding the fp32 masters under stage 0"
    lows = private(optimizer, "fp16_groups", needed_for=reason)
    highs = private(optimizer, "fp32_groups", needed_for=reason)
    pairs = zip(lows, highs, strict=True)
    return {low: high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}


def _locate_stage_1_2(
    engine: deepspeed.DeepSpeedEngine, name: str, parameter: Any
) -> Fragment | None:
    reason = "finding the fp32 masters under stages 1 and 2"
    mapping = private(parameter, "_hp_mapping", needed_for=reason)
    if mapping is None:
        return None
    group = private(mapping, "param_group_index", needed_for=reason)
    (holder,) = _torch_optimizer(engine).param_groups[group]["params"]
    address = private(mapping, "hp_fragment_address", needed_for=reason)
    start = private(mapping, "lp_fragment_address", needed_for=reason).start
    return Fragment(name, tuple(parameter.shape), start, address.numel, holder, address.start)


def _locate_stage_3(
    engine: deepspeed.DeepSpeedEngine, name: str, parameter: Any
) -> Fragment | None:
    optimizer, reason = engine.optimizer, "finding the fp32 masters under stage 3"
    number = private(optimizer, "get_param_id", needed_for=reason)(parameter)
    positions = private(optimizer, "grad_position", needed_for=reason)
    group, offset, padded_numel = positions[number]
    start = ranks.rank() * padded_numel
    # The last ranks' shards end in padding, or consist of padding only.
    numel = min(padded_numel, private(parameter, "ds_numel", needed_for=reason) - start)
    if numel <= 0:
        return None
    holder = private(optimizer, "fp32_partitioned_groups_flat", needed_for=reason)[group]
    shape = private(parameter, "ds_shape", needed_for=reason)
    return Fragment(name, tuple(shape), start, numel, holder, offset)


def moment(engine: deepspeed.DeepSpeedEngine, fragment: Fragment, key: str) -> Tensor:
    """Returns a view of Adam's moment `key` over `fragment`, created as zeros if it is missing."""
    state = _adam_state(engine, fragment.holder)
    return state[key].view(-1).narrow(0, fragment.offset, fragment.numel)


def adam_step(engine: deepspeed.DeepSpeedEngine) -> int:
    """Returns the number of steps that Adam has applied."""
    steps = [state.get("step", 0) for state in _torch_optimizer(engine).state.values()]
    return int(steps[0]) if steps else 0


def set_adam_step(engine: deepspeed.DeepSpeedEngine, step: int) -> None:
    """Sets the number of applied steps that Adam's bias correction uses."""
    for fragment in fragments(engine, whole=True):
        state = _adam_state(engine, fragment.holder)
        # A tensor in torch's AdamW, a plain number in DeepSpeedCPUAdam.
        state["step"] = torch.full_like(state["step"], step) if _is_torchs(engine) else step


def _adam_state(engine: deepspeed.DeepSpeedEngine, holder: Tensor) -> dict[str, Any]:
    """Returns the optimizer's state of `holder`, created as its first step would create it."""
    optimizer = _torch_optimizer(engine)
    state = optimizer.state[holder]
    if not state:
        zero = torch.zeros((), dtype=torch.float32, device=holder.device)
        state["step"] = zero if _is_torchs(engine) else 0
        for key in MOMENTS:
            state[key] = torch.zeros_like(holder, memory_format=torch.preserve_format)
    return state


def _is_torchs(engine: deepspeed.DeepSpeedEngine) -> bool:
    return isinstance(_torch_optimizer(engine), torch.optim.AdamW)


def _torch_optimizer(engine: deepspeed.DeepSpeedEngine) -> torch.optim.Optimizer:
    if isinstance(engine.optimizer, torch.optim.Optimizer):
        return engine.optimizer
    return private(engine.optimizer, "optimizer", needed_for="reading Adam's moments")


@torch.no_grad()
def publish_masters(engine: deepspeed.DeepSpeedEngine) -> None:
    """Copies the fp32 masters into the weights the model computes with. Collective."""
    stage = engine.zero_optimization_stage()
    if stage == 3:
        _publish_stage_3(engine.optimizer)
    elif stage > 0:
        private(engine.optimizer, "update_lp_params", needed_for=_PUBLISHING)()
    else:
        for low, high in _stage_0_holders(engine).items():
            low.copy_(high)


_PUBLISHING = "copying the fp32 masters into the model's weights"


def _publish_stage_3(optimizer: DeepSpeedZeroOptimizer_Stage3) -> None:
    # Whole weights that a rank holds go stale now: small ones, which it always holds, and those
    # that a forward pass without a backward pass has left gathered for the next one.
    persistent = private(optimizer, "persistent_parameters", needed_for=_PUBLISHING)
    if persistent:
        persistent[0].partition(persistent)
    private(optimizer, "empty_partition_cache", needed_for=_PUBLISHING)()
    lows = private(optimizer, "fp16_partitioned_groups_flat", needed_for=_PUBLISHING)
    highs = private(optimizer, "fp32_partitioned_groups_flat", needed_for=_PUBLISHING)
    for low, high in zip(lows, highs, strict=True):
        low.copy_(high)
    if persistent:
        persistent[0].all_gather(persistent)


@torch.no_grad()
def set_masters(engine: deepspeed.DeepSpeedEngine, values: Sequence[Tensor]) -> None:
    """Fills the `whole` fragments of the masters with `values` and publishes them. Collective."""
    for fragment, value in zip(fragments(engine, whole=True), values, strict=True):
        fragment.master.copy_(value)
    publish_masters(engine)
