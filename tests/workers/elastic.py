"""Trains and saves under one topology, or resumes under another, and records the results.

Usage: elastic.py FOLDER save STAGE...          (a source: FOLDER/RANKS-STAGE)
       elastic.py FOLDER resume STAGE:SOURCE... (a target: FOLDER/RANKS-STAGE-from-SOURCE)

FOLDER/shards holds the images. Each folder gets the checkpoint and, in `facts.safetensors`, the
losses and samples of the steps after it.
"""

import sys
from contextlib import closing
from pathlib import Path

import torch
from builders import objective_of, odd_sizes, randomised, write_deepspeed_json
from safetensors.torch import save_file
from torch import Tensor

from srepa_ds import noise
from srepa_ds.checkpoint.folder import step_folder
from srepa_ds.checkpoint.reader import CheckpointReader
from srepa_ds.checkpoint.saving import save
from srepa_ds.codec.table import build_codec
from srepa_ds.config.experiment import Config, config_from
from srepa_ds.data.batch import Batch
from srepa_ds.data.loader import BatchLoader
from srepa_ds.data.shards import ShardDataset
from srepa_ds.distributed import ranks
from srepa_ds.distributed.ranks import Rank
from srepa_ds.engine import Engine
from srepa_ds.objective import TrainingInputs, draw_inputs
from srepa_ds.optim.learning_rate import learning_rate
from srepa_ds.zero.settings import micro_batch_size

TEACHER_WIDTH = 10
SAVED_STEP, LAST_STEP = 4, 7
TERMS = ("total", "flow", "pointwise", "structural")


def experiment(folder: Path, stage: int) -> Config:
    """Returns an experiment with the tests' odd sizes and three averages."""
    deepspeed = ranks.on_main(write_deepspeed_json, folder, str(stage))
    return config_from(
        {
            "run": {"folder": "unused", "seed": 3},
            "data": {"folder": str(folder / "shards")},
            **odd_sizes(),
            "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.1, "epsilon": 1e-3},
            "ema": {"decay": 0.7, "more_decays": [0.3], "power_sigmas": [0.1]},
            "train": {"steps": LAST_STEP, "batch_size": 8},
            "engine": {"precision": "fp32", "deepspeed": str(deepspeed)},
        },
        source="elastic",
    )


def engine_of(config: Config, rank: Rank, *, seed: int) -> Engine:
    """Returns an engine whose objective has random weights."""
    return Engine(randomised(objective_of(config), seed=seed), config, rank)


def loader_of(config: Config, engine: Engine, rank: Rank) -> BatchLoader:
    """Returns a loader that continues at the engine's position in the data."""
    return BatchLoader(
        ShardDataset(config.data.folder),
        config.data,
        seed=config.run.seed,
        micro_batch_size=micro_batch_size(config.train.batch_size, 1, rank.world_size),
        rank=rank.number,
        world_size=rank.world_size,
        start_position=engine.samples_seen,
    )


def inputs_of(config: Config, batch: Batch) -> TrainingInputs:
    """Returns inputs with teacher tokens that are noise, addressed by sample."""
    latents = build_codec(config.codec).encode(batch, seed=config.run.seed)
    drawn = draw_inputs(
        config.objective,
        config.model,
        latents,
        batch.labels,
        positions=batch.positions,
        seed=config.run.seed,
    )
    tokens = noise.normal(99, noise.NoiseStream.NOISE, batch.sample_ids, (4, TEACHER_WIDTH))
    return drawn._replace(teacher_patches=(tokens,))


def train(config: Config, engine: Engine, rank: Rank, *, until: int) -> dict[str, Tensor]:
    """Takes steps; returns the losses of each, and the samples in the order of their positions."""
    losses, samples = [], []
    with loader_of(config, engine, rank) as batches:
        while engine.step_count < until:
            batch = next(batches)
            rate = learning_rate(config.optimizer, engine.step_count)
            report = engine.step([inputs_of(config, batch)], learning_rate=rate)
            terms = [getattr(report.losses, term) for term in TERMS]
            losses.append(ranks.averaged(torch.stack(terms).detach()))
            rows = torch.stack([batch.positions, batch.sample_ids], 1)
            whole = torch.cat(ranks.gather(rows))
            samples.append(whole[whole[:, 0].argsort()])
    return {"losses": torch.stack(losses), "samples": torch.cat(samples)}


def write(place: Path, config: Config, engine: Engine, rank: Rank) -> None:
    """Saves the state, takes the remaining steps, and saves again."""
    save(
        place,
        step=engine.step_count,
        pieces=engine.pieces(),
        state=engine.state(),
        rank=rank.number,
    )
    facts = train(config, engine, rank, until=LAST_STEP)
    save(place, step=LAST_STEP, pieces=engine.pieces(), state=engine.state(), rank=rank.number)
    if rank.is_main:
        save_file(facts, place / "facts.safetensors")


def save_under(folder: Path, stage: int, rank: Rank) -> None:
    """Trains a run that saves and goes on without interruption."""
    config = experiment(folder, stage)
    with closing(engine_of(config, rank, seed=0)) as engine:
        train(config, engine, rank, until=SAVED_STEP)
        write(folder / f"{rank.world_size}-{stage}", config, engine, rank)


def resume_under(folder: Path, case: str, rank: Rank) -> None:
    """Restores a checkpoint in a run that starts from other weights."""
    stage, source = case.split(":")
    config = experiment(folder, int(stage))
    with closing(engine_of(config, rank, seed=1)) as engine:
        # Creates what the checkpoint replaces: moments, averages, a position.
        train(config, engine, rank, until=1)
        reader = CheckpointReader(step_folder(folder / source, SAVED_STEP))
        engine.check(reader)
        engine.restore(reader)
        write(folder / f"{rank.world_size}-{stage}-from-{source}", config, engine, rank)


def main(folder: Path, mode: str, cases: list[str]) -> None:
    torch.set_num_threads(1)
    rank = ranks.initialize()
    for case in cases:
        if mode == "save":
            save_under(folder, int(case), rank)
        else:
            resume_under(folder, case, rank)
    ranks.leave(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
