"""The training engine: DeepSpeed composed, never subclassed.

Builds it from the configuration, takes one optimizer step over micro batches, and hands its state
to checkpoints as fragments that know no topology.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import deepspeed
import deepspeed.ops
import torch
from torch import Tensor

from srepa_ds import zero
from srepa_ds.checkpoint import CheckpointReader, Piece
from srepa_ds.config import Config
from srepa_ds.deepspeed_json import load_deepspeed_json
from srepa_ds.distributed import Ranks
from srepa_ds.ema import ShardedEma
from srepa_ds.errors import CheckpointError, ConfigError, TopologyError
from srepa_ds.objective import Losses, Objective, TrainingInputs
from srepa_ds.optim import build_optimizer


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did; tensors stay on the device until somebody logs them."""

    losses: Losses
    """Means over this rank's micro batches."""

    gradient_norm: Tensor
    """Global norm before clipping; infinite when the step was skipped for it."""

    applied: bool
    """False when gradients that are not finite made all ranks skip the step."""


def micro_batch_size(batch_size: int, accumulation_steps: int, world_size: int) -> int:
    """Returns the samples per rank and micro step; raises TopologyError if not a whole number."""
    parts = accumulation_steps * world_size
    if batch_size % parts:
        raise TopologyError(
            f"train.batch_size {batch_size} cannot be split over {world_size} ranks x "
            f"{accumulation_steps} accumulation steps; choose a multiple of {parts}"
        )
    return batch_size // parts


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """Returns DeepSpeed's configuration: the JSON named by the config plus what the YAML owns.

    Raises ConfigError for settings of ZeRO that DeepSpeed does not know.
    """
    document = load_deepspeed_json(config.engine.deepspeed)
    faults = list(zero.faults_in(document.get("zero_optimization", {})))
    if faults:
        raise ConfigError(str(config.engine.deepspeed), faults)
    stage = document.get("zero_optimization", {}).get("stage", 0)
    document |= {
        "train_micro_batch_size_per_gpu": micro_batch_size(
            config.train.batch_size, config.train.accumulation_steps, world_size
        ),
        "gradient_accumulation_steps": config.train.accumulation_steps,
        "gradient_clipping": config.optimizer.gradient_clipping,
        # DeepSpeed's own printing and its monitors stay silent; telemetry is ours.
        "steps_per_print": 1_000_000_000,
    }
    if config.engine.precision == "bf16":
        document["bf16"] = {"enabled": True, "check_grad_overflow": True}
        if stage > 0:
            # Otherwise micro batches are summed in bf16; stage 0 refuses the combination.
            document["data_types"] = {"grad_accum_dtype": "fp32"}
    return document


class Engine:
    """One DeepSpeed engine around an `Objective`, with its sharded EMA."""

    def __init__(self, objective: Objective, config: Config, ranks: Ranks):
        _quieten(ranks)
        objective.to(ranks.device)
        initial = {name: p.detach().clone() for name, p in objective.named_parameters()}
        parameters = [p for p in objective.parameters() if p.requires_grad]
        self._deepspeed, *_ = deepspeed.initialize(
            model=objective,
            model_parameters=parameters,
            optimizer=build_optimizer(config.optimizer, parameters),
            config=deepspeed_config(config, ranks.world_size),
            dist_init_required=False,
        )
        if config.engine.precision == "bf16":
            # DeepSpeed casts the module before it clones the masters; give them back their bits.
            zero.set_masters(self._deepspeed, lambda f: _run_of(initial[f.name], f))
            # Building the bf16 optimizer of stage 0 takes a step with zero gradients.
            zero.set_adam_step(self._deepspeed, 0)
        self._shapes = {name: tuple(value.shape) for name, value in initial.items()}
        self.ema = ShardedEma(config.ema, self._masters())
        self.step_count = 0
        self.samples_seen = 0
        self._batch_size = config.train.batch_size

    def step(self, micro_batches: Iterable[TrainingInputs], *, learning_rate: float) -> StepReport:
        """Returns the report of one optimizer step over `micro_batches` (one per accumulation)."""
        self._deepspeed.train()
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        reports, norm, finite = [], None, True
        for inputs in micro_batches:
            losses = self._deepspeed(*inputs)
            self._deepspeed.backward(losses.total)
            if self._deepspeed.is_gradient_accumulation_boundary():
                norm = zero.gradient_norm(self._deepspeed)
                finite = zero.drop_unless_finite(self._deepspeed, norm)
            self._deepspeed.step()
            reports.append(torch.stack([value.detach() for value in losses]))
        self.step_count += 1
        self.samples_seen += self._batch_size
        applied = finite and self._deepspeed.was_step_applied()
        if applied:
            self.ema.update(self._masters(), step=self.step_count)
        norm = self._deepspeed.get_global_grad_norm() if norm is None else norm
        norm = torch.as_tensor(norm, dtype=torch.float32)
        return StepReport(Losses(*torch.stack(reports).mean(0)), norm, applied)

    def pieces(self) -> Iterator[Piece]:
        """Yields this rank's share of the state: masters, Adam's moments and the averages."""
        for number, fragment in enumerate(zero.fragments(self._deepspeed)):
            place = (fragment.name, fragment.shape, fragment.start)
            yield Piece("master", *place, fragment.master)
            for kind, averages in self.ema.averages.items():
                yield Piece(kind, *place, averages[number])
            for key in zero.MOMENTS:
                yield Piece(key, *place, zero.moment(self._deepspeed, fragment, key))

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint holds besides the fragments, as JSON."""
        return {
            "step": self.step_count,
            "samples_seen": self.samples_seen,
            "adam_step": zero.adam_step(self._deepspeed),
        }

    def check(self, reader: CheckpointReader) -> None:
        """Raises CheckpointError, naming the weights, if a checkpoint is of another model."""
        _check_shapes(reader, self._shapes)

    def restore(self, reader: CheckpointReader) -> None:
        """Takes over the state of a checkpoint, whatever topology wrote it. Collective.

        Raises CheckpointError if pieces are missing; `check` first.
        """
        for fragment in zero.fragments(self._deepspeed, whole=True):
            for key in zero.MOMENTS:
                target = zero.moment(self._deepspeed, fragment, key)
                target.copy_(_stored(reader, key, fragment))
        zero.set_masters(self._deepspeed, lambda f: _stored(reader, "master", f))
        zero.set_adam_step(self._deepspeed, reader.state["adam_step"])
        for kind, averages in self.ema.averages.items():
            # An average that was not kept so far begins with the weights of today.
            source = kind if reader.names(kind) else "master"
            for fragment, average in zip(zero.fragments(self._deepspeed), averages, strict=True):
                average.copy_(_stored(reader, source, fragment))
        self.step_count = reader.state["step"]
        self.samples_seen = reader.state["samples_seen"]

    def close(self) -> None:
        """Releases DeepSpeed's hooks and buffers."""
        self._deepspeed.destroy()

    def _masters(self) -> list[Tensor]:
        return [fragment.master for fragment in zero.fragments(self._deepspeed)]


def _run_of(tensor: Tensor, fragment: zero.Fragment) -> Tensor:
    return tensor.reshape(-1).narrow(0, fragment.start, fragment.numel)


def _stored(reader: CheckpointReader, kind: str, fragment: zero.Fragment) -> Tensor:
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


def _quieten(ranks: Ranks) -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if ranks.device.type == "cpu":
        # Otherwise DeepSpeed compiles a C++ kernel that only its inference uses (27 s and more).
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
