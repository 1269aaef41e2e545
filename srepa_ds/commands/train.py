"""`srepa-ds train`: from shards to checkpoints; the same command resumes."""

import json
import logging
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch

from srepa_ds.alignment.alignment import TeacherShape
from srepa_ds.checkpoint.folder import restore_names
from srepa_ds.checkpoint.reader import CheckpointReader
from srepa_ds.checkpoint.writer import CheckpointWriter
from srepa_ds.config.experiment import Config
from srepa_ds.config.machine_checks import check_machine
from srepa_ds.config.yaml_text import to_yaml
from srepa_ds.data.loader import BatchLoader
from srepa_ds.data.shards import ShardDataset
from srepa_ds.distributed import ranks
from srepa_ds.distributed.ranks import Rank
from srepa_ds.distributed.signals import stop_requested
from srepa_ds.encoders.teacher import Teacher
from srepa_ds.engine import Engine, deepspeed_settings
from srepa_ds.files import write_aside
from srepa_ds.model.precision import PRECISIONS
from srepa_ds.objective import Objective
from srepa_ds.run_folder import RunFolder
from srepa_ds.schema import to_tree
from srepa_ds.telemetry.environment import environment
from srepa_ds.telemetry.metrics_log import Telemetry
from srepa_ds.training.claim import check_shared, claimed
from srepa_ds.training.content_watch import ContentWatch
from srepa_ds.training.feed import Feed
from srepa_ds.training.history import clear_history, rollbacks_after
from srepa_ds.training.inputs import RunInputs, Target, open_inputs
from srepa_ds.training.loop import TrainingLoop
from srepa_ds.training.records import Records
from srepa_ds.training.resume import checkpoint_to_resume
from srepa_ds.training.rollbacks import Rollbacks
from srepa_ds.training.side_stream import side_stream
from srepa_ds.trees import leaves
from srepa_ds.weights.initial import initialise_from
from srepa_ds.zero.settings import micro_batch_size

log = logging.getLogger("srepa_ds")


def train(config: Config, *, allow_config_change: bool = False) -> bool:
    """Returns whether training is finished; False if a signal ended it early, after saving.

    Runs on every rank. Resumes from the newest valid checkpoint of the run's folder. Raises
    SRepaError, on all ranks alike, for whatever the user can mend.
    """
    rank, run = ranks.initialize(), config.run_folder
    deepspeed = ranks.together(deepspeed_settings, config, rank.world_size)
    ranks.together(check_machine, config, rank)
    inputs = open_inputs(config, rank)
    _check_same_files(inputs, deepspeed)
    with ExitStack() as stack:
        claim = ranks.together(stack.enter_context, claimed(run, is_main=rank.is_main))
        check_shared(run)
        source = checkpoint_to_resume(config, inputs.identity, allow_change=allow_config_change)
        objective = _build_objective(config, inputs.targets, rank, is_new=source is None)
        engine = stack.enter_context(closing(Engine(objective, config, rank)))
        if source is None:
            clear_history(run)
        else:
            _resume(engine, source, run)
        _describe(config, deepspeed)
        telemetry = stack.enter_context(_open_telemetry(config, engine, rank))
        stop = stack.enter_context(stop_requested())
        loader = stack.enter_context(_loader(config, inputs.dataset, engine, rank))
        feed = _feed(config, inputs, loader, engine, rank)
        writer = stack.enter_context(closing(_writer(config, inputs.identity, engine, rank)))
        loop = TrainingLoop(
            config.train,
            config.optimizer,
            engine,
            feed,
            _records(config, telemetry, rank),
            inputs.monitor,
            writer,
            Rollbacks(config, engine, feed, writer, is_main=rank.is_main),
            stack.enter_context(_content_watch(config, inputs, engine)),
            claim,
            stop,
        )
        return loop.run()


def _check_same_files(inputs: RunInputs, deepspeed: Mapping[str, Any]) -> None:
    """Checks that all ranks see the same files behind equal paths; raises ConfigError."""
    ranks.check_same(
        {**inputs.identity, **dict(leaves(deepspeed, "engine.deepspeed"))},
        what="ranks see different files behind the same paths; give all of them the same",
    )


def _build_objective(
    config: Config, targets: tuple[Target, ...], rank: Rank, *, is_new: bool
) -> Objective:
    """Returns the module to train; that of a new run with its initial weights."""
    objective = Objective(
        config.model,
        config.objective,
        config.alignments,
        teachers=tuple(TeacherShape(target.width, target.grid) for target in targets),
        generator=torch.Generator().manual_seed(config.run.seed),
    )
    if is_new and config.train.init_from is not None:
        ranks.together(initialise_from, objective, config.train.init_from)
    objective.sit.set_activation_checkpointing(config.engine.activation_checkpointing)
    if config.engine.compile:
        objective.sit.compile_blocks()
    dtype = PRECISIONS[config.engine.precision].products
    ranks.together(objective.sit.choose_attention, device=rank.device, dtype=dtype)
    return objective


def _resume(engine: Engine, source: Path, run: RunFolder) -> None:
    """Restores the checkpoint `source`, and the position in the data after failed samples."""
    reader = ranks.together(CheckpointReader, source)
    ranks.together(engine.check, reader)
    engine.restore(reader)
    log.info("resuming from %s", source)
    ranks.on_main(restore_names, run.checkpoints)
    # A rollback to this checkpoint, or past it, continued after samples that would fail again.
    past = rollbacks_after(run, engine.step_count)
    engine.samples_seen = max(engine.samples_seen, past.samples_seen)


@ranks.main_rank_only
def _describe(config: Config, deepspeed: Mapping[str, Any]) -> None:
    """Writes the configuration, DeepSpeed's, and the environment; raises OutputError."""
    run = config.run_folder
    documents = {
        run.config: to_yaml(config),
        run.deepspeed_config: json.dumps(deepspeed, indent=2),
        run.environment: json.dumps(environment(), indent=2),
    }
    with run.writing():
        for path, text in documents.items():
            write_aside(path, lambda aside, text=text: aside.write_text(text, encoding="utf-8"))


@ranks.collective
def _open_telemetry(config: Config, engine: Engine, rank: Rank) -> Telemetry:
    with config.run_folder.writing():
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


def _feed(
    config: Config, inputs: RunInputs, loader: BatchLoader, engine: Engine, rank: Rank
) -> Feed:
    return Feed(
        config,
        loader,
        inputs.codec,
        tuple(target if isinstance(target, Teacher) else None for target in inputs.targets),
        device=rank.device,
        first_step=engine.step_count,
        ahead_on=side_stream(rank.device, overlaps=config.engine.overlap_teachers),
    )


def _content_watch(config: Config, inputs: RunInputs, engine: Engine) -> ContentWatch:
    return ContentWatch(
        inputs.content_check,
        inputs.dataset,
        engine,
        seed=config.run.seed,
        batch_size=config.train.batch_size,
    )


def _writer(
    config: Config, identity: Mapping[str, Any], engine: Engine, rank: Rank
) -> CheckpointWriter:
    return CheckpointWriter(
        config.run_folder.checkpoints,
        config.checkpoint,
        rank=rank.number,
        step=engine.step_count,
        extra={"identity": identity, "config": to_tree(config)},
    )


def _records(config: Config, telemetry: Telemetry, rank: Rank) -> Records:
    return Records(
        telemetry,
        model=config.model,
        batch_size=config.train.batch_size,
        is_aligned=any(alignment.pointwise for alignment in config.alignments),
        rank=rank,
    )
