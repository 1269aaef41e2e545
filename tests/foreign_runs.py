"""A run of REPA's trainer on the small world, to be imported."""

import json
from pathlib import Path

import torch
from builders import TEACHER, objective_of, randomised
from repa_trainer import PlainTrainer, in_order

from srepa_ds.cli import run as command
from srepa_ds.config.experiment import load_config


def repa_run(config_file: Path, *, steps: int = 1) -> PlainTrainer:
    """Returns a plain loop of the small world's model after some steps; none was zero before."""
    config = load_config(config_file)
    objective = randomised(objective_of(config), seed=4)
    state = {name.removeprefix("sit."): value for name, value in objective.state_dict().items()}
    arguments = {
        "enc_type": "dinov2-vit-b",
        "resolution": 16,
        "batch_size": 16,
        "max_train_steps": 4,
    }
    loop = PlainTrainer(
        in_order(state), config.model, pointwise=0.5, ema_decay=0.9, arguments=arguments
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x, eps = torch.randn(2, 2, 3, 16, 16, generator=generator)
        z0 = torch.randn(2, 64, 32, generator=generator)
        labels, t = torch.tensor([3, 10]), torch.rand(2, generator=generator)
        loop.step({"x": x, "eps": eps, "t": t, "y": labels, "z0": z0})
    return loop


def overrides_for(folder: Path) -> list[str]:
    """Returns what no file of that run tells: where its data and its teacher are."""
    weights = str(folder / "teacher.safetensors")
    teacher = {"spec": TEACHER, "weights": weights, "dtype": "fp32"}
    return [
        f"data.folder={folder / 'shards'}",
        f"alignments.0.teacher={json.dumps(teacher)}",
        "model.num_heads=3",
        "ema.decay=0.9",
        "sample={num_steps: 2, num_samples: 4, batch_size: 4, source: checkpoint}",
    ]


def exported_as_repa(config: Path, folder: Path) -> Path:
    """Returns the file of REPA's trainer that `srepa-ds export` makes of a run."""
    settings = ["export.format=repa", f"export.folder={folder}"]
    assert command(["export", str(config), *settings]) == 0
    (file,) = folder.glob("*.pt")
    return file
