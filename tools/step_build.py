"""Builds the training step of a case: models with random weights, images, and a step over them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from plain_loop import plain_step
from step_case import Case
from torch import Tensor

from srepa_ds.alignment.alignment import TeacherShape
from srepa_ds.config.experiment import Config
from srepa_ds.distributed import ranks
from srepa_ds.distributed.ranks import Rank
from srepa_ds.encoders.teacher import Teacher, TeacherConfig, build_encoder
from srepa_ds.engine import Engine
from srepa_ds.objective import Objective, draw_inputs


@dataclass(frozen=True)
class Inputs:
    """One batch, the same in every step."""

    images: Tensor
    latents: Tensor
    labels: Tensor


def step_of(case: Case) -> Callable[[], Tensor]:
    """Returns a function that takes one training step and returns its loss, left on the device."""
    rank = ranks.initialize()
    config = case.config
    inputs = _inputs(config, case, rank.device)
    teacher = _teacher(config, case, rank.device) if config.alignments else None
    objective = Objective(
        config.model,
        config.objective,
        config.alignments,
        teachers=(TeacherShape(teacher.width, teacher.grid),) if teacher else (),
        generator=torch.Generator().manual_seed(0),
    )
    if case.is_plain:
        return plain_step(
            objective.to(rank.device),
            alignment=config.alignments[0] if config.alignments else None,
            tokens=lambda: None if teacher is None else teacher.tokens(inputs.images).patches,
            latents=inputs.latents,
            labels=inputs.labels,
            precision=config.engine.precision,
        )
    return _engine_step(config, rank, objective, teacher, inputs)


def _engine_step(
    config: Config, rank: Rank, objective: Objective, teacher: Teacher | None, inputs: Inputs
) -> Callable[[], Tensor]:
    objective.sit.set_activation_checkpointing(config.engine.activation_checkpointing)
    if config.engine.compile:
        objective.sit.compile_blocks()
    engine = Engine(objective, config, rank)

    def step() -> Tensor:
        drawn = draw_inputs(
            config.objective,
            config.model,
            inputs.latents,
            inputs.labels,
            positions=torch.arange(len(inputs.latents), device=rank.device) + engine.samples_seen,
            seed=config.run.seed,
        )
        patches = () if teacher is None else (teacher.tokens(inputs.images).patches,)
        report = engine.step(
            [drawn._replace(teacher_patches=patches)], learning_rate=config.optimizer.learning_rate
        )
        return report.losses.total

    return step


def _inputs(config: Config, case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    pixels = (case.batch, 3, case.pixels, case.pixels)
    return Inputs(
        images=torch.randint(0, 256, pixels, generator=generator, dtype=torch.uint8).to(device),
        latents=torch.randn(case.batch, *config.model.latent_shape, generator=generator).to(device),
        labels=torch.randint(0, 1000, (case.batch,), generator=generator).to(device),
    )


def _teacher(config: Config, case: Case, device: torch.device) -> Teacher:
    settings = config.alignments[0].teacher
    spec = TeacherConfig(name=case.teacher).resolved
    encoder = build_encoder(spec, resolution=case.pixels)
    dtype = torch.float32 if settings.dtype == "fp32" else torch.bfloat16
    return Teacher(encoder, spec, resolution=case.pixels, dtype=dtype).to(device)
