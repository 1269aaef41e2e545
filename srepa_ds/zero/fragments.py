"""Any ZeRO stage as one thing: the fragments of the weights that this rank owns.

A fragment is a run of one flattened weight, with a view of its fp32 master and of Adam's moments.
Everything that must not depend on the topology (EMA, checkpoints, export) is written over
fragments.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """This rank's run of one weight: where it lies, and where the optimizer keeps it."""

    name: str
    """Name of the weight in the engine's module."""

    shape: tuple[int, ...]
    """Shape of the whole weight."""

    start: int
    """Where the run begins in the flattened weight."""

    numel: int
    """How many elements it has."""

    holder: Tensor
    """The tensor the torch optimizer steps: the key of its state."""

    offset: int
    """Where the run begins in the flattened holder."""

    @property
    def master(self) -> Float[Tensor, " numel"]:
        """A view of the fp32 master weights."""
        return self.holder.detach().view(-1).narrow(0, self.offset, self.numel)


def fragments(engine: deepspeed.DeepSpeedEngine, *, whole: bool = False) -> list[Fragment]:
    """Returns the fragments this rank owns, ordered by weight; all ranks' cover each weight once.

    With `whole`, under stage 0, where every rank holds all masters, returns the entire weights:
    what a restore has to fill. Holders may be replaced between steps: fetch fragments anew.
    """
    weights = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
        located = (_locate_stage_3(engine, *weight) for weight in weights)
    elif hasattr(weights[0][1], "_hp_mapping"):
        located = (_locate_stage_1_2(engine, *weight) for weight in weights)
    else:
        holders = _stage_0_holders(engine)
        located = (_locate_stage_0(name, p, holders.get(p, p), whole) for name, p in weights)
    return [fragment for fragment in located if fragment is not None]


def _locate_stage_0(
    name: str, parameter: Parameter, holder: Tensor, whole: bool
) -> Fragment | None:
    """Every rank holds everything; ownership is dealt out in equal runs."""
    share = math.ceil(parameter.numel() / torch.distributed.get_world_size())
    rank = torch.distributed.get_rank()
    start = 0 if whole else min(rank * share, parameter.numel())
    stop = parameter.numel() if whole else min(start + share, parameter.numel())
    if stop <= start:
        return None
    return Fragment(name, tuple(parameter.shape), start, stop - start, holder, start)


def _stage_0_holders(engine: deepspeed.DeepSpeedEngine) -> dict[Parameter, Tensor]:
    optimizer = engine.optimizer
    if not isinstance(optimizer, FP16_UnfusedOptimizer):
        return {}
    pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return {low: high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}


def _locate_stage_1_2(
    engine: deepspeed.DeepSpeedEngine, name: str, parameter: Any
) -> Fragment | None:
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    (holder,) = engine.optimizer.optimizer.param_groups[mapping.param_group_index]["params"]
    address = mapping.hp_fragment_address
    start = mapping.lp_fragment_address.start
    return Fragment(name, tuple(parameter.shape), start, address.numel, holder, address.start)


def _locate_stage_3(
    engine: deepspeed.DeepSpeedEngine, name: str, parameter: Any
) -> Fragment | None:
    optimizer = engine.optimizer
    group, offset, padded_numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
    rank = torch.distributed.get_rank()
    start = rank * padded_numel
    # The last ranks' shards end in padding, or are nothing but padding.
    numel = min(padded_numel, parameter.ds_numel - start)
    if numel <= 0:
        return None
    holder = optimizer.fp32_partitioned_groups_flat[group]
    return Fragment(name, tuple(parameter.ds_shape), start, numel, holder, offset)


def moment(engine: deepspeed.DeepSpeedEngine, fragment: Fragment, key: str) -> Tensor:
    """Returns a view of Adam's moment `key` over `fragment`, creating zero state where none is."""
    state = _adam_state(engine, fragment.holder)
    return state[key].view(-1).narrow(0, fragment.offset, fragment.numel)


def adam_step(engine: deepspeed.DeepSpeedEngine) -> int:
    """Returns how many steps Adam has applied."""
    steps = [state.get("step", 0) for state in _torch_optimizer(engine).state.values()]
    return int(steps[0]) if steps else 0


def set_adam_step(engine: deepspeed.DeepSpeedEngine, step: int) -> None:
    """Sets the number of applied steps that Adam's bias correction uses."""
    for fragment in fragments(engine, whole=True):
        state = _adam_state(engine, fragment.holder)
        # A tensor of torch's AdamW, a plain number of DeepSpeedCPUAdam.
        state["step"] = torch.full_like(state["step"], step) if _is_torchs(engine) else step


def _adam_state(engine: deepspeed.DeepSpeedEngine, holder: Tensor) -> dict[str, Any]:
    """Returns the optimizer's state of `holder`, made as its first step would make it."""
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
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


@torch.no_grad()
def publish_masters(engine: deepspeed.DeepSpeedEngine) -> None:
    """Copies the fp32 masters into the weights the model computes with. Collective."""
    optimizer = engine.optimizer
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        for low, high in _stage_0_holders(engine).items():
            low.copy_(high)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        _publish_stage_3(optimizer)
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()


def _publish_stage_3(optimizer: DeepSpeedZeroOptimizer_Stage3) -> None:
    # Whole weights that a rank holds go stale now: small ones, which it always does, and what a
    # forward pass without a backward one has left gathered, for the next to compute with.
    persistent = optimizer.persistent_parameters
    if persistent:
        persistent[0].partition(persistent)
    optimizer.empty_partition_cache()
    lows, highs = optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat
    for low, high in zip(lows, highs, strict=True):
        low.copy_(high)
    if persistent:
        persistent[0].all_gather(persistent)


@torch.no_grad()
def set_masters(engine: deepspeed.DeepSpeedEngine, values: Callable[[Fragment], Tensor]) -> None:
    """Fills every master fragment with `values(fragment)` and publishes them. Collective."""
    for fragment in fragments(engine, whole=True):
        fragment.master.copy_(values(fragment))
    publish_masters(engine)
