"""Saves under one topology, or goes on under another, and writes down what came of it.

Usage: elastic.py FOLDER save STAGE...          (a source: FOLDER/RANKS-STAGE)
       elastic.py FOLDER resume STAGE:SOURCE... (a target: FOLDER/RANKS-STAGE-from-SOURCE)

FOLDER/shards holds the images. Each folder gets the checkpoint and, in `facts.safetensors`, the
losses and samples of the steps after it.
"""

import json
import sys
from contextlib import closing
from pathlib import Path

import torch
from places import ROOT
from safetensors.torch import save_file
from torch import Tensor

from srepa_ds import noise
from srepa_ds.alignment.alignment import TeacherShape
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
from srepa_ds.objective import Objective, TrainingInputs, draw_inputs
from srepa_ds.optim.adamw import learning_rate
from srepa_ds.zero.settings import micro_batch_size

TEACHER = TeacherShape(10, (2, 2))
SAVED_STEP, LAST_STEP = 4, 7
TERMS = ("total", "flow", "pointwise", "structural")


def experiment(folder: Path, stage: int) -> Config:
    """A model whose odd sizes make ranks' shares begin and end inside weights; three averages."""
    document = json.loads((ROOT / f"ds_configs/zero{stage}.json").read_text())
    settings = document["zero_optimization"]
    if stage > 0:
        # Several buckets, as a large model has.
        settings["reduce_bucket_size"] = 5_000
    if stage == 3:
        # As in a large model: some weights stay gathered, others are fetched little by little and
        # released after the forward pass.
        settings["stage3_param_persistence_threshold"] = 500
        settings["stage3_prefetch_bucket_size"] = 2_000
        settings["stage3_max_reuse_distance"] = 1_000
    deepspeed = folder / f"zero{stage}.json"
    ranks.on_main(lambda: deepspeed.write_text(json.dumps(document)))
    spec = {"architecture": "vit_tiny_patch16_224", "width": TEACHER.width}
    alignment = {
        "teacher": {"spec": {**spec, "patch_size": 2, "input_size": 4}, "weights": "unused.pt"},
        "depth": 2,
        "projector": {"hidden_width": 13},
        "pointwise": {"weight": 1.0},
        "structural": {"kind": "mse", "weight": 2.0},
    }
    model = {"variant": "SiT-S/2", "input_size": 4, "in_channels": 3, "num_classes": 6}
    return config_from(
        {
            "run": {"folder": "unused", "seed": 3},
            "data": {"folder": str(folder / "shards")},
            "model": {**model, "depth": 3, "hidden_size": 20, "num_heads": 5},
            "alignments": [alignment],
            "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.1, "epsilon": 1e-3},
            "ema": {"decay": 0.7, "more_decays": [0.3], "power_sigmas": [0.1]},
            "train": {"steps": LAST_STEP, "batch_size": 8},
            "engine": {"precision": "fp32", "deepspeed": str(deepspeed)},
        },
        source="elastic",
    )


def engine_of(config: Config, rank: Rank, *, seed: int) -> Engine:
    """All weights random, also those a run starts from zero."""
    objective = Objective(config.model, config.objective, config.alignments, teachers=(TEACHER,))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return Engine(objective, config, rank)


def loader_of(config: Config, engine: Engine, rank: Rank) -> BatchLoader:
    """Goes on where the engine's state says."""
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
    """With a teacher whose tokens are noise that belongs to the sample."""
    latents = build_codec(config.codec).encode(batch, seed=config.run.seed)
    drawn = draw_inputs(
        config.objective,
        config.model,
        latents,
        batch.labels,
        positions=batch.positions,
        seed=config.run.seed,
    )
    tokens = noise.normal(99, noise.Stream.NOISE, batch.sample_ids, (4, TEACHER.width))
    return drawn._replace(teacher_patches=(tokens,))


def train(config: Config, engine: Engine, rank: Rank, *, until: int) -> dict[str, Tensor]:
    """Takes steps; returns each one's losses, and the samples in the order of their positions."""
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
    """The state of now as a checkpoint, and the steps after it, with the masters they lead to."""
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
    """A run that is saved and goes on, uninterrupted."""
    config = experiment(folder, stage)
    with closing(engine_of(config, rank, seed=0)) as engine:
        train(config, engine, rank, until=SAVED_STEP)
        write(folder / f"{rank.world_size}-{stage}", config, engine, rank)


def resume_under(folder: Path, case: str, rank: Rank) -> None:
    """A run with other weights that takes over a checkpoint."""
    stage, source = case.split(":")
    config = experiment(folder, int(stage))
    with closing(engine_of(config, rank, seed=1)) as engine:
        # So that what is to be replaced is there: moments, averages, a position.
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
