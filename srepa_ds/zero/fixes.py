"""All that bends DeepSpeed, read from version 0.19.8."""

from collections.abc import Callable
from itertools import product
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups
from torch import Tensor


def use_group(make: Callable[[], torch.distributed.ProcessGroup]) -> None:
    """Has every engine built from now on communicate in the group that `make` returns.

    Otherwise DeepSpeed makes one of all ranks, with torch's timeout instead of ours.
    """
    if groups._WORLD_GROUP is None:
        groups._WORLD_GROUP = make()


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
