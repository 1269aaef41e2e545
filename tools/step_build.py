"""Training steps to be timed: the package's engine, and a plain loop as research code runs it."""

from collections.abc import Callable
from copy import deepcopy

import torch
import torch.nn.functional as F
import yaml
from algorithm_one import algorithm_one
from step_case import MODES, PLAIN, Case

from srepa_ds import distributed
from srepa_ds.alignment.alignment import TeacherShape
from srepa_ds.alignment.teachers import Teacher, TeacherConfig, build_encoder
from srepa_ds.config import Config, config_from
from srepa_ds.engine import Engine
from srepa_ds.objective import Objective, draw_inputs

EMA_DECAY, LEARNING_RATE = 0.9999, 1e-4


def step_of(case: Case) -> Callable[[], float]:
    """Returns a function that takes one training step and says its loss; everything is built."""
    ranks = distributed.initialize()
    config = _config(case)
    generator = torch.Generator().manual_seed(0)
    pixels = (case.batch, 3, case.pixels, case.pixels)
    images = torch.randint(0, 256, pixels, generator=generator, dtype=torch.uint8).to(ranks.device)
    latents = torch.randn(case.batch, *config.model.latent_shape, generator=generator)
    labels = torch.randint(0, 1000, (case.batch,), generator=generator)
    latents, labels = latents.to(ranks.device), labels.to(ranks.device)
    teacher = _teacher(case, ranks.device) if config.alignments else None
    shapes = (TeacherShape(teacher.width, teacher.grid),) if teacher else ()
    weights = torch.Generator().manual_seed(0)
    objective = Objective(
        config.model, config.objective, config.alignments, teachers=shapes, generator=weights
    )
    if case.arrangement == PLAIN:
        return _plain_step(objective.to(ranks.device), config, teacher, images, latents, labels)
    objective.sit.set_remat(config.engine.remat)
    if config.engine.compile:
        objective.sit.compile_blocks()
    engine = Engine(objective, config, ranks)

    def step() -> float:
        positions = torch.arange(case.batch, device=ranks.device)
        inputs = draw_inputs(
            config.objective, config.model, latents, labels, positions=positions, seed=0
        )
        patches = () if teacher is None else (teacher.tokens(images).patches,)
        report = engine.step(
            [inputs._replace(teacher_patches=patches)], learning_rate=LEARNING_RATE
        )
        return report.losses.total.item()

    return step


def _plain_step(objective, config: Config, teacher: Teacher | None, images, latents, labels):
    """fp32 weights, bf16 autocast, eager, a full EMA copy, a loss loop over images."""
    average = deepcopy(objective)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    device = latents.device.type
    structural = config.alignments[0].structural if config.alignments else None

    def step() -> float:
        tokens = None if teacher is None else teacher.tokens(images).patches
        t = torch.rand(len(latents), device=device)
        noise = torch.randn_like(latents)
        at = t[:, None, None, None]
        depths = tuple(alignment.depth for alignment in config.alignments)
        with torch.autocast(device, torch.bfloat16):
            output = objective.sit((1 - at) * latents + at * noise, t, labels, depths=depths)
            projected = [p(h) for p, h in zip(objective.projectors, output.hidden, strict=True)]
        loss = (output.velocity.float() - (noise - latents)).square().mean(dim=(1, 2, 3)).mean()
        for student in (one.float() for one in projected):
            for own, theirs in zip(student, tokens, strict=True):
                cosine = (F.normalize(own, dim=-1) * F.normalize(theirs, dim=-1)).sum(-1)
                loss = loss - config.alignments[0].pointwise_weight * cosine.mean() / len(student)
            if structural is not None:
                term = algorithm_one(student, tokens, kind=structural.kind)
                loss = loss + structural.weight * term
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for kept, new in zip(average.parameters(), objective.parameters(), strict=True):
                kept.mul_(EMA_DECAY).add_(new, alpha=1 - EMA_DECAY)
        return loss.item()

    return step


def _config(case: Case) -> Config:
    engine = {"deepspeed": "ds_configs/zero1.json", "precision": "bf16"}
    settings = [] if case.arrangement == PLAIN else case.arrangement.split()
    tree: dict = {
        "run": {"folder": "unused"},
        "data": {"folder": "unused"},
        "model": {
            "variant": case.model,
            "input_size": case.pixels // 8,
            "in_channels": 4,
            "num_classes": 1000,
        },
        "train": {"steps": 1, "batch_size": case.batch},
        "engine": engine,
    }
    for setting in settings:
        path, _, value = setting.partition("=")
        *sections, last = path.split(".")
        branch = tree["engine"] if path != "attention" else tree["model"]
        for section in sections:
            branch = branch.setdefault(section, {})
        branch[last] = yaml.safe_load(value)
    if MODES[case.mode]:
        # Nothing is read from it: the teacher has random weights.
        teacher = {"name": case.teacher, "weights": "unused.safetensors"}
        depth = 4 if case.model.startswith(("SiT-S", "SiT-B")) else 8
        tree["alignments"] = [{"teacher": teacher, "depth": depth, **MODES[case.mode]}]
    return config_from(tree, source="bench")


def _teacher(case: Case, device: torch.device) -> Teacher:
    spec = TeacherConfig(name=case.teacher).resolved
    encoder = build_encoder(spec, resolution=case.pixels)
    return Teacher(encoder, spec, resolution=case.pixels, dtype=torch.bfloat16).to(device)
