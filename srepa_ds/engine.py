"""The training engine: DeepSpeed composed, never subclassed.

It is built from the configuration, takes one optimizer step over micro batches, and hands its
state to checkpoints as fragments that do not depend on the topology.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from torch import Tensor

from srepa_ds.checkpoint.fragment_file import Piece
from srepa_ds.checkpoint.reader import CheckpointReader
from srepa_ds.config.experiment import Config
from srepa_ds.distributed import ranks
from srepa_ds.distributed.ranks import Rank
from srepa_ds.errors import CheckpointError
from srepa_ds.model.precision import PRECISIONS
from srepa_ds.model.sit import SiTOutput
from srepa_ds.objective import Losses, Objective, SamplingInputs, TrainingInputs
from srepa_ds.optim.ema import MAIN_EMA, ShardedEma
from srepa_ds.zero import fixes
from srepa_ds.zero.fragments import (
    MOMENTS,
    Fragment,
    adam_step,
    fragments,
    gathered,
    moment,
    publish_masters,
    set_adam_step,
    set_masters,
)
from srepa_ds.zero.settings import build_optimizer_for, deepspeed_config


@dataclass(frozen=True)
class StepReport:
    """The result of one optimizer step; its tensors stay on the device until they are logged."""

    losses: Losses
    """Means over this rank's micro batches."""

    gradient_norm: Tensor
    """Global norm before clipping; not finite if that made the ranks skip the step."""

    applied: bool
    """False if gradients that are not finite made all ranks skip the step."""


def deepspeed_settings(config: Config, world_size: int) -> dict[str, Any]:
    """Returns DeepSpeed's configuration for an experiment on `world_size` ranks.

    Raises ConfigError for a JSON with faults, TopologyError for a batch that cannot be split.
    """
    return deepspeed_config(
        config.engine.deepspeed,
        precision=config.engine.precision,
        batch_size=config.train.batch_size,
        accumulation_steps=config.train.accumulation_steps,
        gradient_clipping=config.optimizer.gradient_clipping,
        world_size=world_size,
    )


class Engine:
    """One DeepSpeed engine around an `Objective`, with its sharded EMA."""

    def __init__(self, objective: Objective, config: Config, rank: Rank):
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self._device = rank.device
        self._shapes = {name: tuple(p.shape) for name, p in objective.named_parameters()}
        # DeepSpeed casts the module before it clones the masters; these give them back their bits.
        # Casting and moving make new tensors, so these need not be copies.
        is_rounded = PRECISIONS[config.engine.precision].weights != torch.float32
        named = objective.named_parameters() if is_rounded else ()
        initial = {name: parameter.detach() for name, parameter in named}
        objective.to(rank.device)
        parameters = [p for p in objective.parameters() if p.requires_grad]
        document = deepspeed_settings(config, rank.world_size)
        # Before DeepSpeed's first collective: one rank alone may be unable to build the kernel.
        optimizer = ranks.together(
            lambda: build_optimizer_for(document, config.optimizer, parameters)
        )
        fixes.prepare(rank)
        self._deepspeed, *_ = deepspeed.initialize(
            model=objective,
            model_parameters=parameters,
            optimizer=optimizer,
            config=document,
            dist_init_required=False,
        )
        fixes.apply(self._deepspeed)
        if initial:
            values = [_run_of(initial[f.name], f) for f in fragments(self._deepspeed, whole=True)]
            set_masters(self._deepspeed, values)
            # Building the bf16 optimizer of stage 0 takes a step with zero gradients.
            set_adam_step(self._deepspeed, 0)
        self.ema = ShardedEma(config.ema, self._masters())
        self.step_count = 0
        self.samples_seen = 0
        self._batch_size = config.train.batch_size

    def step(self, micro_batches: Iterable[TrainingInputs], *, learning_rate: float) -> StepReport:
        """Takes one optimizer step over `micro_batches` (one per accumulation) and reports it."""
        self._deepspeed.train()
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        reports, norm, finite = [], None, True
        for inputs in micro_batches:
            losses = self._deepspeed(inputs)
            self._deepspeed.backward(losses.total)
            if self._deepspeed.is_gradient_accumulation_boundary():
                norm = fixes.gradient_norm(self._deepspeed)
                finite = fixes.drop_unless_finite(self._deepspeed, norm)
            self._deepspeed.step()
            reports.append([value.detach() for value in losses])
        self.step_count += 1
        self.samples_seen += self._batch_size
        applied = finite and self._deepspeed.was_step_applied()
        if applied:
            self.ema.update(self._masters(), step=self.step_count)
        else:
            fixes.forget_gradients(self._deepspeed)
        norm = self._deepspeed.get_global_grad_norm() if norm is None else norm
        norm = torch.as_tensor(norm, dtype=torch.float32)
        means = [torch.stack(values).mean(0) for values in zip(*reports, strict=True)]
        return StepReport(Losses(*means), norm, applied)

    def untake_step(self) -> None:
        """Counts the last step, which was skipped and changed nothing, as not taken."""
        self.step_count -= 1
        self.samples_seen -= self._batch_size

    def pieces(self) -> Iterator[Piece]:
        """Yields this rank's share of the state: masters, Adam's moments and the averages."""
        for number, fragment in enumerate(fragments(self._deepspeed)):
            place = (fragment.name, fragment.shape, fragment.start)
            yield Piece("master", *place, fragment.master)
            for kind, averages in self.ema.averages.items():
                yield Piece(kind, *place, averages[number])
            for key in MOMENTS:
                yield Piece(key, *place, moment(self._deepspeed, fragment, key))

    def state(self) -> dict[str, Any]:
        """Returns the JSON that a checkpoint holds in addition to the fragments."""
        return {
            "step": self.step_count,
            "samples_seen": self.samples_seen,
            "adam_step": adam_step(self._deepspeed),
        }

    def check(self, reader: CheckpointReader) -> None:
        """Raises CheckpointError, naming the weights, if the checkpoint is of another model."""
        _check_shapes(reader, self._shapes)

    def restore(self, reader: CheckpointReader) -> None:
        """Takes over the state of a checkpoint written by any topology. Collective.

        Raises CheckpointError if pieces are missing; `check` first.
        """
        ranks.together(lambda: self._read_own(reader))
        publish_masters(self._deepspeed)
        set_adam_step(self._deepspeed, reader.state["adam_step"])
        self.step_count = reader.state["step"]
        self.samples_seen = reader.state["samples_seen"]

    @torch.no_grad()
    def _read_own(self, reader: CheckpointReader) -> None:
        for fragment in fragments(self._deepspeed, whole=True):
            for key in MOMENTS:
                target = moment(self._deepspeed, fragment, key)
                target.copy_(_stored(reader, key, fragment))
            fragment.master.copy_(_stored(reader, "master", fragment))
        for kind, averages in self.ema.averages.items():
            # An average that was not kept before starts from the current weights.
            source = kind if reader.names(kind) else "master"
            for fragment, average in zip(fragments(self._deepspeed), averages, strict=True):
                average.copy_(_stored(reader, source, fragment))

    def ema_distance(self) -> Tensor:
        """Returns |average - masters| / |masters| over all weights, of the main EMA. Collective."""
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        for average, master in zip(self.ema.averages[MAIN_EMA], self._masters(), strict=True):
            parts = torch.stack(((average - master).norm(), master.norm()))
            sums += parts.to(self._device).double().square()
        distance, length = ranks.summed(sums).sqrt()
        return distance / length

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Lets the module compute with its EMA while the block runs. Collective.

        Fragments are swapped, so no second model is needed; afterwards every bit is back.
        """
        masters = [f.master.clone() for f in fragments(self._deepspeed, whole=True)]
        set_masters(self._deepspeed, gathered(self._deepspeed, self.ema.averages[MAIN_EMA]))
        # Not in a `finally`: restoring them is collective, and after an error on one rank the
        # others may be anywhere. The run is over then; its checkpoints are untouched.
        yield
        set_masters(self._deepspeed, masters)

    @torch.no_grad()
    def predict(self, inputs: SamplingInputs) -> SiTOutput:
        """Returns the model's output for this rank's inputs.

        Collective under stage 3, where all ranks must call it equally often.
        """
        self._deepspeed.eval()
        return self._deepspeed(inputs)

    def close(self) -> None:
        """Releases DeepSpeed's hooks and buffers."""
        self._deepspeed.destroy()

    def _masters(self) -> list[Tensor]:
        return [fragment.master for fragment in fragments(self._deepspeed)]


def _run_of(tensor: Tensor, fragment: Fragment) -> Tensor:
    return tensor.reshape(-1).narrow(0, fragment.start, fragment.numel)


def _stored(reader: CheckpointReader, kind: str, fragment: Fragment) -> Tensor:
    return reader.run(kind, fragment.name, start=fragment.start, numel=fragment.numel)


def _check_shapes(reader: CheckpointReader, shapes: Mapping[str, tuple[int, ...]]) -> None:
    stored = {name: reader.shape(name) for name in reader.names("master")}
    differing = [name for name in {**shapes, **stored} if shapes.get(name) != stored.get(name)]
    if differing:
        lines = [
            f"{name}: {stored.get(name, 'none')} there, {shapes.get(name, 'none')} in the model"
            for name in differing[:5]
        ]
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise CheckpointError(
            f"{reader.folder} is of another model: {'; '.join(lines)}{more}; resume with the "
            "configuration it was written with, or use another run.folder"
        )
