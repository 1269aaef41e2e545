"""Any ZeRO stage as one thing: the fragments of the weights that this rank owns.

A fragment is a run of one flattened weight, with a view of its fp32 master and of Adam's moments.
Everything that must not depend on the topology (EMA, checkpoints, export) is written over
fragments. This module alone knows DeepSpeed's inside; 0.19.8 is what it was read from.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups
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


def use_group(make: Callable[[], torch.distributed.ProcessGroup]) -> None:
    """Has every engine built from now on communicate in the group that `make` returns.

    Otherwise DeepSpeed makes one of all ranks, with torch's timeout instead of ours.
    """
    if groups._WORLD_GROUP is None:
        groups._WORLD_GROUP = make()


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


def gradient_norm(engine: deepspeed.DeepSpeedEngine) -> Tensor | None:
    """Returns the global norm of the accumulated gradients, of plain stage 0 only.

    DeepSpeed measures none there; everywhere else `engine.get_global_grad_norm()` has it. To be
    called between the last backward and the step; the gradients are already averaged over ranks.
    """
    if isinstance(engine.optimizer, torch.optim.Optimizer):
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)
    return None


def drop_unless_finite(engine: deepspeed.DeepSpeedEngine, norm: Tensor | None) -> bool:
    """Returns whether the gradients of plain stage 0 are finite, and drops them if they are not.

    Every other optimizer of DeepSpeed looks itself, and skips the step on all ranks. Without
    gradients Adam's step changes nothing. `norm` is that of `gradient_norm`, equal on all ranks.
    """
    # The step's one wait for the device, as under every stage. Without it whether the step was
    # applied would be known to the device alone, which counter, EMA and rollback depend on.
    if norm is None or torch.isfinite(norm):
        return True

    # Not before: DeepSpeed's clipping fails where no weight has a gradient.
    def drop(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        optimizer.zero_grad()
        hook.remove()

    hook = engine.optimizer.register_step_pre_hook(drop)
    return False


def judge_by_norm(engine: deepspeed.DeepSpeedEngine) -> None:
    """Keeps DeepSpeed from asking every gradient what it then asks their norm.

    The norm, the same on all ranks, is not finite if one of them is not. To ask each costs stage 2
    with bf16 weights a pass over all of them, and stage 0 and offload a wait for the device per
    weight, offload in the midst of the backward pass.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        optimizer.overflow_checker.check = lambda: False
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        optimizer.check_overflow = lambda **_: None
        optimizer.update_offload_overflow_tracker = lambda _: None


def keep_gradients_of_one_rank(engine: deepspeed.DeepSpeedEngine) -> None:
    """Keeps DeepSpeed, under stage 0, from reducing over ranks where there is but one.

    It would copy all gradients into a buffer and back.
    """
    if engine.zero_optimization_stage() == 0 and torch.distributed.get_world_size() == 1:
        engine.enable_backward_allreduce = False


def forget_gradients(engine: deepspeed.DeepSpeedEngine) -> None:
    """Drops the gradients of a skipped step where DeepSpeed does not.

    Under stage 2 with offload and bf16 weights it would add the next step's to them, so that one
    gradient that is not finite would make all later steps be skipped.
    """
    if getattr(engine.optimizer, "cpu_offload", False):
        for group in engine.optimizer.averaged_gradients:
            engine.optimizer.averaged_gradients[group] = None


def hide_gathering(engine: deepspeed.DeepSpeedEngine) -> None:
    """Hides what stage 3 does around each module from selective activation checkpointing.

    That compares the operations of a block with those of its repetition; but which weights are
    gathered together, and when, differs between the two.
    """
    if not isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
        return
    hooks = engine.optimizer.parameter_offload
    for when, direction in product(("pre", "post"), ("forward", "backward")):
        name = f"{when}_sub_module_{direction}_function"
        setattr(hooks, name, _hidden(getattr(hooks, name)))


def _hidden(function: Callable[[Any], None]) -> Callable[[Any], None]:
    def call(module: Any) -> None:
        with torch._C._DisableTorchDispatch():
            function(module)

    return call
