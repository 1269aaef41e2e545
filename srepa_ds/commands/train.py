"""`srepa-ds train`: from shards to checkpoints; the same command resumes."""

import logging
from contextlib import ExitStack, closing
from pathlib import Path

import torch

from srepa_ds.alignment.alignment import TeacherShape
from srepa_ds.checkpoint.folder import put_back
from srepa_ds.checkpoint.reader import CheckpointReader
from srepa_ds.checkpoint.writer import CheckpointWriter
from srepa_ds.config.experiment import Config
from srepa_ds.data.loader import BatchLoader
from srepa_ds.data.shards import ShardDataset
from srepa_ds.distributed import ranks
from srepa_ds.distributed.launcher import stop_requested
from srepa_ds.distributed.ranks import Rank
from srepa_ds.encoders.teacher import Teacher
from srepa_ds.engine import Engine, deepspeed_settings
from srepa_ds.objective import Objective
from srepa_ds.telemetry.metrics_log import Telemetry
from srepa_ds.training import rollbacks, run_folder
from srepa_ds.training.feed import Feed
from srepa_ds.training.inputs import RunInputs, Target, open_inputs, products_dtype
from srepa_ds.training.loop import TrainingLoop
from srepa_ds.training.side_stream import side_stream
from srepa_ds.weights.initial import initialise_from
from srepa_ds.zero.settings import micro_batch_size

log = logging.getLogger("srepa_ds")


def train(config: Config, *, allow_config_change: bool = False) -> bool:
    """Returns whether training is finished; False if a signal ended it early, after saving.

    Runs on every rank. Resumes from the newest valid checkpoint of the run's folder. Raises
    SRepaError, on all ranks alike, for whatever the user can mend.
    """
    rank = ranks.initialize()
    arrangement = ranks.together(lambda: deepspeed_settings(config, rank.world_size))
    inputs = open_inputs(config, rank)
    monitor, identity = inputs.monitor, inputs.identity
    ranks.check_same(
        {**identity, **dict(run_folder.leaves(arrangement, "engine.deepspeed"))},
        what="ranks see different files behind the same paths; give all of them the same",
    )
    with ExitStack() as stack:
        claim = run_folder.claimed(config.run.folder, is_main=rank.is_main)
        ranks.together(lambda: stack.enter_context(claim))
        run_folder.check_shared(config.run.folder)
        source = ranks.on_main(
            lambda: run_folder.checkpoint_to_resume(
                config, identity, allow_change=allow_config_change
            )
        )
        objective = _build_objective(config, inputs.targets, rank, begins=source is None)
        engine = stack.enter_context(closing(Engine(objective, config, rank)))
        _begin_or_resume(engine, source, config)
        ranks.on_main(lambda: run_folder.describe(config, arrangement))
        telemetry = ranks.together(lambda: _telemetry(config, engine, rank))
        stack.enter_context(telemetry)
        stop = stack.enter_context(stop_requested())
        feed = _feed(config, inputs, engine, rank, stack)
        writer = CheckpointWriter(config.checkpoints, config.checkpoint, rank=rank.number)
        stack.enter_context(closing(writer))
        loop = TrainingLoop(config, rank, engine, feed, telemetry, monitor, writer, identity, stop)
        return loop.run()


def _feed(config: Config, inputs: RunInputs, engine: Engine, rank: Rank, stack: ExitStack) -> Feed:
    """Returns the micro batches from where the engine is; their reader is closed with `stack`."""
    return Feed(
        config,
        stack.enter_context(_loader(config, inputs.dataset, engine, rank)),
        inputs.codec,
        tuple(target if isinstance(target, Teacher) else None for target in inputs.targets),
        device=rank.device,
        first_step=engine.step_count,
        ahead_on=side_stream(rank.device, overlaps=config.engine.overlap_teachers),
    )


def _begin_or_resume(engine: Engine, source: Path | None, config: Config) -> None:
    folder = config.run.folder
    if source is None:
        ranks.on_main(lambda: rollbacks.begin_anew(folder))
        return
    reader = ranks.together(lambda: CheckpointReader(source))
    ranks.together(lambda: engine.check(reader))
    engine.restore(reader)
    log.info("resuming from %s", source)
    ranks.on_main(lambda: put_back(config.checkpoints))
    failed = ranks.on_main(lambda: rollbacks.setbacks_after(folder, engine.step_count))
    # Where a rollback to it, or past it, went on: the samples before would only fail again.
    engine.samples_seen = max(engine.samples_seen, failed.samples_seen)


def _telemetry(config: Config, engine: Engine, rank: Rank) -> Telemetry:
    with run_folder.writing(config.run.folder):
        return Telemetry(
            config.run.folder,
            first_step=engine.step_count,
            total_steps=config.train.steps,
            is_main=rank.is_main,
        )


def _loader(config: Config, dataset: ShardDataset, engine: Engine, rank: Rank) -> BatchLoader:
    accumulation = config.train.accumulation_steps
    return BatchLoader(
        dataset,
        config.data,
        seed=config.run.seed,
        micro_batch_size=micro_batch_size(config.train.batch_size, accumulation, rank.world_size),
        rank=rank.number,
        world_size=rank.world_size,
        accumulation=accumulation,
        start_position=engine.samples_seen,
    )


def _build_objective(
    config: Config, targets: tuple[Target, ...], rank: Rank, *, begins: bool
) -> Objective:
    """Returns what is trained, with the weights that a run begins with if it `begins`."""
    objective = Objective(
        config.model,
        config.objective,
        config.alignments,
        teachers=tuple(TeacherShape(target.width, target.grid) for target in targets),
        generator=torch.Generator().manual_seed(config.run.seed),
    )
    if begins and config.train.init_from is not None:
        settings = config.train.init_from
        ranks.together(lambda: initialise_from(objective, settings))
    objective.sit.set_remat(config.engine.remat)
    if config.engine.compile:
        objective.sit.compile_blocks()
    ranks.together(
        lambda: objective.sit.choose_attention(device=rank.device, dtype=products_dtype(config))
    )
    return objective
