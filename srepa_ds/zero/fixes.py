"""The table of what this package changes in DeepSpeed: a row for each change, and why."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import deepspeed
import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups
from torch import Tensor

from srepa_ds.distributed import ranks
from srepa_ds.distributed.ranks import Rank
from srepa_ds.zero.private import private


@dataclass(frozen=True)
class Fix:
    """One change to DeepSpeed. The attributes it relies on are checked before it is applied."""

    name: str
    """Its effect, quoted in the message about a missing attribute."""

    changes: str
    why: str

    upstream: str
    """The issue or pull request, or the file and function of DeepSpeed that show the cause."""

    read_in: str
    """The version of DeepSpeed in which the cause was read."""

    phase: Literal["before", "built", "step"]
    """Applied before `deepspeed.initialize`, to the engine it built, or by `Engine.step`."""

    applies: Callable[[Any], bool]
    """Whether this rank (phase `before`) or this engine (other phases) needs it."""

    function: Callable[..., Any]

    relies_on: tuple[str, ...] = ()
    """Private attributes: `module:name` in phase `before`, else their path from the engine."""


def prepare(rank: Rank) -> None:
    """Applies the fixes that `deepspeed.initialize` must find applied. Collective."""
    for fix in FIXES:
        if fix.phase == "before" and fix.applies(rank):
            check_attributes(fix)
            fix.function()


def apply(engine: deepspeed.DeepSpeedEngine) -> None:
    """Applies the fixes to a new engine, and checks the attributes that its steps rely on."""
    for fix in FIXES:
        if fix.phase != "before" and fix.applies(engine):
            check_attributes(fix, engine)
            if fix.phase == "built":
                fix.function(engine)


def check_attributes(fix: Fix, engine: Any = None) -> None:
    """Raises SRepaError if the installed DeepSpeed lacks an attribute that `fix` relies on."""
    for path in fix.relies_on:
        module, _, names = path.rpartition(":")
        owner: Any = importlib.import_module(module) if module else engine
        for name in names.split("."):
            owner = private(owner, name, needed_for=fix.name)


def use_our_group() -> None:
    """Makes all engines built from now on communicate in a group with our timeout."""
    group = groups._WORLD_GROUP
    # That of an earlier training in this process has gone with its ranks.
    if group is None or not ranks.is_open(group):
        groups._WORLD_GROUP = ranks.another_group()


def build_no_kernel() -> None:
    """Replaces the function that compiles DeepSpeed's shared-memory kernel."""
    # `deepspeed.comm.torch` as an attribute is torch itself.
    module: Any = importlib.import_module("deepspeed.comm.torch")
    module.build_shm_op = lambda: None


def hide_gathering(engine: deepspeed.DeepSpeedEngine) -> None:
    """Hides the work of stage 3 around each module from selective activation checkpointing."""
    hooks = engine.optimizer.parameter_offload
    for name in GATHERING:
        setattr(hooks, name, _hidden(getattr(hooks, name)))


def _hidden(function: Callable[[Any], None]) -> Callable[[Any], None]:
    def call(module: Any) -> None:
        with torch._C._DisableTorchDispatch():
            function(module)

    return call


def judge_stage_0_by_norm(engine: deepspeed.DeepSpeedEngine) -> None:
    """Removes the check of each gradient from stage 0 with bf16 weights."""
    engine.optimizer.overflow_checker.check = lambda: False


def judge_stages_1_and_2_by_norm(engine: deepspeed.DeepSpeedEngine) -> None:
    """Removes the check of each gradient from stages 1 and 2."""
    engine.optimizer.check_overflow = lambda **_: None
    engine.optimizer.update_offload_overflow_tracker = lambda _: None


def keep_gradients_of_one_rank(engine: deepspeed.DeepSpeedEngine) -> None:
    """Turns off the reduction over ranks."""
    engine.enable_backward_allreduce = False


def gradient_norm(engine: deepspeed.DeepSpeedEngine) -> Tensor | None:
    """Returns the global norm of the accumulated gradients under plain stage 0, else None.

    Elsewhere `engine.get_global_grad_norm()` has it. Call it between the last backward pass and
    the step; the gradients are already averaged over ranks.
    """
    if _is_plain(engine):
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)
    return None


def drop_unless_finite(engine: deepspeed.DeepSpeedEngine, norm: Tensor | None) -> bool:
    """Returns whether the gradients of plain stage 0 are finite; drops them if they are not.

    Without gradients Adam's step changes nothing. `norm` is that of `gradient_norm`, equal on all
    ranks.
    """
    # The step's one wait for the device, as under every stage. Without it only the device would
    # know whether the step was applied, on which counter, EMA and rollback depend.
    if norm is None or torch.isfinite(norm):
        return True

    # Not earlier: DeepSpeed's clipping fails if no weight has a gradient.
    def drop(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        optimizer.zero_grad()
        hook.remove()

    hook = engine.optimizer.register_step_pre_hook(drop)
    return False


def forget_gradients(engine: deepspeed.DeepSpeedEngine) -> None:
    """Drops the gradients of a skipped step where DeepSpeed keeps them."""
    if _offloads_stage_2(engine):
        for group in engine.optimizer.averaged_gradients:
            engine.optimizer.averaged_gradients[group] = None


def _is_plain(engine: deepspeed.DeepSpeedEngine) -> bool:
    """Returns whether torch's own optimizer steps the weights: stage 0 with fp32 weights."""
    return isinstance(engine.optimizer, torch.optim.Optimizer)


def _is_stage_0_with_bf16_weights(engine: deepspeed.DeepSpeedEngine) -> bool:
    return isinstance(engine.optimizer, FP16_UnfusedOptimizer)


def _is_stage_1_or_2(engine: deepspeed.DeepSpeedEngine) -> bool:
    return isinstance(engine.optimizer, DeepSpeedZeroOptimizer)


def _offloads_stage_2(engine: deepspeed.DeepSpeedEngine) -> bool:
    reason = "dropping the gradients of a skipped step"
    return _is_stage_1_or_2(engine) and private(engine.optimizer, "cpu_offload", needed_for=reason)


def _is_stage_3(engine: deepspeed.DeepSpeedEngine) -> bool:
    return isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3)


def _is_stage_0_on_one_rank(engine: deepspeed.DeepSpeedEngine) -> bool:
    return engine.zero_optimization_stage() == 0 and torch.distributed.get_world_size() == 1


GATHERING = tuple(
    f"{when}_sub_module_{direction}_function"
    for when, direction in product(("pre", "post"), ("forward", "backward"))
)

_CHECKS_EACH_GRADIENT = (
    "The norm, which is the same on all ranks, is not finite if one gradient is not. "
)

FIXES = (
    Fix(
        name="collectives with the timeout of the run",
        changes="The group in which engines communicate.",
        why="DeepSpeed makes a group of all ranks with torch's timeout instead of the run's.",
        upstream="deepspeed/utils/groups.py, _clone_world_group",
        read_in="0.19.8",
        phase="before",
        applies=lambda rank: True,
        function=use_our_group,
        relies_on=("deepspeed.utils.groups:_WORLD_GROUP",),
    ),
    Fix(
        name="starting on a CPU without a compiler",
        changes="Nothing is compiled when DeepSpeed joins the group on a CPU.",
        why="It compiles a C++ kernel that only its inference uses (27 s and more).",
        upstream="deepspeed/comm/torch.py, TorchBackend.__init__; #7108, where it does not compile",
        read_in="0.19.8",
        phase="before",
        applies=lambda rank: rank.device.type == "cpu",
        function=build_no_kernel,
        relies_on=("deepspeed.comm.torch:build_shm_op",),
    ),
    Fix(
        name="selective activation checkpointing under stage 3",
        changes="The hooks around each module run where torch's dispatch modes do not see them.",
        why="Checkpointing compares the operations of a block with those of its repetition, but "
        "which weights are gathered together, and when, differs between the two.",
        upstream="deepspeed/runtime/zero/parameter_offload.py, _register_deepspeed_module",
        read_in="0.19.8",
        phase="built",
        applies=_is_stage_3,
        function=hide_gathering,
        relies_on=tuple(f"optimizer.parameter_offload.{name}" for name in GATHERING),
    ),
    Fix(
        name="one check for finite gradients under stage 0",
        changes="Gradients are not checked one by one.",
        why=f"{_CHECKS_EACH_GRADIENT}Each check waits for the device, once per weight.",
        upstream="deepspeed/runtime/fp16/unfused_optimizer.py, FP16_UnfusedOptimizer.step",
        read_in="0.19.8",
        phase="built",
        applies=_is_stage_0_with_bf16_weights,
        function=judge_stage_0_by_norm,
        relies_on=("optimizer.overflow_checker.check",),
    ),
    Fix(
        name="one check for finite gradients under stages 1 and 2",
        changes="Gradients are not checked one by one.",
        why=f"{_CHECKS_EACH_GRADIENT}The checks cost stage 2 with bf16 weights a pass over all "
        "gradients, and offload a wait for the device per weight in the midst of the backward "
        "pass.",
        upstream="#8035 made them the default for bf16; #4512 names their cost",
        read_in="0.19.8",
        phase="built",
        applies=_is_stage_1_or_2,
        function=judge_stages_1_and_2_by_norm,
        relies_on=("optimizer.check_overflow", "optimizer.update_offload_overflow_tracker"),
    ),
    Fix(
        name="stage 0 on one rank without copies",
        changes="Gradients are not reduced over ranks if there is only one.",
        why="DeepSpeed would copy all gradients into a buffer and back.",
        upstream="deepspeed/runtime/engine.py, buffered_allreduce_fallback",
        read_in="0.19.8",
        phase="built",
        applies=_is_stage_0_on_one_rank,
        function=keep_gradients_of_one_rank,
        relies_on=("enable_backward_allreduce",),
    ),
    Fix(
        name="the gradient norm under plain stage 0",
        changes="The norm is measured before the step.",
        why="DeepSpeed measures none there.",
        upstream="#7255",
        read_in="0.19.8",
        phase="step",
        applies=_is_plain,
        function=gradient_norm,
    ),
    Fix(
        name="skipping steps under plain stage 0",
        changes="Gradients that are not finite are dropped just before the optimizer's step.",
        why="All other optimizers of DeepSpeed check, and skip the step on all ranks; this one "
        "would make the weights not finite.",
        upstream="deepspeed/runtime/engine.py, _take_model_step",
        read_in="0.19.8",
        phase="step",
        applies=_is_plain,
        function=drop_unless_finite,
    ),
    Fix(
        name="dropping the gradients of a skipped step",
        changes="They are dropped after a step that was not applied.",
        why="Under stage 2 with offload and bf16 weights DeepSpeed adds the gradients of the next "
        "step to them, so one that is not finite would make it skip all later steps.",
        upstream="deepspeed/runtime/zero/stage_1_and_2.py, DeepSpeedZeroOptimizer.step",
        read_in="0.19.8",
        phase="step",
        applies=_offloads_stage_2,
        function=forget_gradients,
        relies_on=("optimizer.averaged_gradients",),
    ),
)
"""Every change to DeepSpeed. Numbers are issues and pull requests of deepspeedai/DeepSpeed."""
