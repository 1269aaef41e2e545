"""Resumes imported runs through the real engine, and takes the steps of their stored inputs.

Usage: continued.py DEEPSPEED_JSON OUTPUT FOLDER; FOLDER/NAME/run are the runs.
"""

import sys
from pathlib import Path

import torch
from builders import objective_of
from safetensors.torch import load_file, save_file

from srepa_ds.checkpoint.reader import CheckpointReader
from srepa_ds.checkpoint.saving import save
from srepa_ds.config.experiment import load_config
from srepa_ds.distributed import ranks
from srepa_ds.engine import Engine
from srepa_ds.objective import TrainingInputs, official_name
from srepa_ds.training.resume import checkpoint_to_resume


def main(deepspeed: str, output: Path, folder: Path) -> None:
    """Writes the log of each run, and the state after it, to `output`."""
    rank = ranks.initialize()
    result = {}
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        config = load_config(place / "run" / "config.yaml", [f"engine.deepspeed={deepspeed}"])
        engine = Engine(objective_of(config), config, rank)
        source = checkpoint_to_resume(config, {"data": "any"}, allow_change=False)
        reader = CheckpointReader(source)
        engine.check(reader)
        engine.restore(reader)
        data = load_file(place / "inputs.safetensors")
        log = []
        for step in range(len(data["x"])):
            inputs = _inputs(data, step, rank, aligned=bool(config.alignments))
            report = engine.step([inputs], learning_rate=config.optimizer.learning_rate)
            losses = report.losses
            row = torch.stack([losses.flow, losses.pointwise, losses.structural, losses.total])
            log.append(torch.cat([ranks.averaged(row), report.gradient_norm.view(1)]))
        result[f"{place.name}/log"] = torch.stack(log)
        saved = save(
            output.parent / f"saved-{place.name}",
            step=engine.step_count,
            pieces=engine.pieces(),
            state=engine.state(),
            rank=rank.number,
        )
        reader = CheckpointReader(saved)
        for kind in reader.kinds():
            for name in reader.names(kind):
                result[f"{place.name}/{kind}/{official_name(name)}"] = reader.tensor(kind, name)
        engine.close()
    if rank.is_main:
        save_file(result, output)
    ranks.leave(0)


def _inputs(data: dict[str, torch.Tensor], step: int, rank: ranks.Rank, *, aligned: bool):
    share = data["x"].shape[1] // rank.world_size
    mine = slice(rank.number * share, (rank.number + 1) * share)
    own = {key: value[step, mine] for key, value in data.items()}
    request = TrainingInputs(*(own[key] for key in ("x", "y", "t", "eps")))
    if aligned:
        cls = (own.get("cls"),)
        request = request._replace(teacher_patches=(own["z0"],), teacher_cls=cls)
    return request._replace(cls_noise=own.get("cls_eps"))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
