"""Takes six steps of every mode from the golden weights, through the real engine.

Usage: trajectory.py DEEPSPEED_JSON OUTPUT
"""

import sys
from pathlib import Path

import torch
from builders import objective_of
from golden_sit import GOLDEN_CONFIG, golden_weights
from places import GOLDEN
from safetensors.torch import load_file, save_file

from srepa_ds.checkpoint.reader import CheckpointReader
from srepa_ds.checkpoint.saving import save
from srepa_ds.config.experiment import Config, config_from
from srepa_ds.distributed import ranks
from srepa_ds.engine import Engine
from srepa_ds.objective import TrainingInputs, official_name

MODES = {
    "sit": None,
    "repa": {"pointwise": {"weight": 0.5}},
    "srepa_mse": {"pointwise": {"weight": 1.0}, "structural": {"kind": "mse", "weight": 2.0}},
    "srepa_kl": {"pointwise": {"weight": 1.0}, "structural": {"kind": "kl", "weight": 0.5}},
}
BATCH = 4


def experiment(mode: str, deepspeed: str) -> Config:
    """Returns the golden experiment of `mode`."""
    teacher = {
        "spec": {
            "architecture": "vit_tiny_patch16_224",
            "width": 48,
            "patch_size": 16,
            "input_size": 64,
        },
        "weights": "unused.safetensors",
    }
    terms = MODES[mode]
    alignment = {"teacher": teacher, "depth": 2, "projector": {"hidden_width": 96}, **(terms or {})}
    return config_from(
        {
            "run": {"folder": "unused"},
            "data": {"folder": "unused"},
            "model": GOLDEN_CONFIG,
            "alignments": [alignment] if terms else [],
            "optimizer": {"learning_rate": 1e-3},
            "ema": {"decay": 0.99},
            "train": {"steps": 6, "batch_size": BATCH},
            "engine": {"precision": "fp32", "deepspeed": deepspeed},
        },
        source="golden",
    )


def main(deepspeed: str, output: Path) -> None:
    """Writes the log and the final masters and EMAs of all modes to `output`."""
    rank = ranks.initialize()
    data = load_file(GOLDEN / "trajectory.safetensors")
    weights = golden_weights("sit_qknorm0")
    share = BATCH // rank.world_size
    mine = slice(rank.number * share, (rank.number + 1) * share)
    result = {}
    for mode in MODES:
        config = experiment(mode, deepspeed)
        objective = objective_of(config)
        with torch.no_grad():
            for name, parameter in objective.named_parameters():
                parameter.copy_(weights[official_name(name)])
        engine = Engine(objective, config, rank)
        log = []
        for step in range(6):
            patches = tuple(data["in.z0"][step, mine] for _ in config.alignments)
            inputs = TrainingInputs(
                *(data[f"in.{key}"][step, mine] for key in ("x", "y", "t", "eps")), patches
            )
            report = engine.step([inputs], learning_rate=1e-3)
            losses = report.losses
            row = torch.stack([losses.flow, losses.pointwise, losses.structural, losses.total])
            log.append(torch.cat([ranks.averaged(row), report.gradient_norm.view(1)]))
        result[f"{mode}.log"] = torch.stack(log)
        folder = save(
            output.parent / mode,
            step=6,
            pieces=engine.pieces(),
            state=engine.state(),
            rank=rank.number,
        )
        reader = CheckpointReader(folder)
        for kind, label in (("master", "param"), ("ema", "ema")):
            for name in reader.names(kind):
                result[f"{mode}.{label}.{official_name(name)}"] = reader.tensor(kind, name)
        engine.close()
    if rank.is_main:
        save_file(result, output)
    ranks.leave(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
