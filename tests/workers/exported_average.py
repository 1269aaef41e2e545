"""Trains under several ZeRO stages, and exports; computes the average of the weights plainly.

Usage: exported_average.py FOLDER STAGE...

FOLDER/shards holds the images. FOLDER/RANKS-STAGE gets the run with its export, and in
`average.safetensors` what an unsharded average of all its steps is.
"""

import sys
from contextlib import closing
from pathlib import Path

import torch
from elastic import engine_of, experiment, inputs_of, loader_of
from safetensors.torch import save_file
from torch import Tensor

from srepa_ds.checkpoint.saving import save
from srepa_ds.commands.export import export
from srepa_ds.config.experiment import Config
from srepa_ds.distributed import ranks
from srepa_ds.distributed.ranks import Rank
from srepa_ds.engine import Engine
from srepa_ds.objective import official_name
from srepa_ds.schema import replaced, to_tree

STEPS = 5


def masters_of(engine: Engine) -> dict[str, Tensor]:
    """Returns all masters whole, under official names. Collective."""
    own = [
        (piece.name, piece.shape, piece.start, piece.values.clone())
        for piece in engine.pieces()
        if piece.kind == "master"
    ]
    whole: dict[str, Tensor] = {}
    for name, shape, start, values in [piece for part in ranks.gather(own) for piece in part]:
        target = whole.setdefault(official_name(name), torch.full(shape, torch.nan))
        target.view(-1)[start : start + len(values)] = values
    return whole


def train(config: Config, engine: Engine, rank: Rank) -> dict[str, Tensor]:
    """Takes all steps and returns the average of the weights, in double precision."""
    average = {name: value.double() for name, value in masters_of(engine).items()}
    with loader_of(config, engine, rank) as batches:
        while engine.step_count < STEPS:
            engine.step([inputs_of(config, next(batches))], learning_rate=1e-2)
            for name, value in masters_of(engine).items():
                average[name].mul_(config.ema.decay).add_(value, alpha=1 - config.ema.decay)
    return average


def main(folder: Path, stages: list[str]) -> None:
    torch.set_num_threads(1)
    rank = ranks.initialize()
    for stage in stages:
        config = experiment(folder, int(stage))
        place = folder / f"{rank.world_size}-{stage}"
        config = replaced(config, run=replaced(config.run, folder=place))
        with closing(engine_of(config, rank, seed=0)) as engine:
            average = train(config, engine, rank)
            state = {**engine.state(), "config": to_tree(config)}
            root = config.run_folder.checkpoints
            save(root, step=STEPS, pieces=engine.pieces(), state=state, rank=rank.number)
        if rank.is_main:
            export(config)
            save_file(
                {name: v.float() for name, v in average.items()}, place / "average.safetensors"
            )
    ranks.leave(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
