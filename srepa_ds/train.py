"""`srepa-ds train`: from shards to checkpoints; the same command resumes."""

import hashlib
import logging
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

import torch

from srepa_ds import distributed, run_folder, setbacks
from srepa_ds.alignment.alignment import TeacherShape
from srepa_ds.alignment.gram_triton import unavailable as triton_unavailable
from srepa_ds.alignment.teachers import Teacher, load_teacher
from srepa_ds.arrangement import deepspeed_config, micro_batch_size
from srepa_ds.checkpoint import CheckpointReader, put_back
from srepa_ds.checkpoint_writer import CheckpointWriter
from srepa_ds.config import Config
from srepa_ds.data.loader import BatchLoader
from srepa_ds.data.shards import ShardDataset
from srepa_ds.data.token_store import TokenStore
from srepa_ds.distributed import Ranks
from srepa_ds.engine import Engine
from srepa_ds.errors import ConfigError, DataError, Fault
from srepa_ds.feed import Feed, side_stream
from srepa_ds.files import sha256_of
from srepa_ds.initial_weights import initialise_from
from srepa_ds.latent_codec import LatentCodec, build_codec
from srepa_ds.launcher import stop_requested
from srepa_ds.model.attention import choose_backend
from srepa_ds.monitor import Monitor
from srepa_ds.objective import Objective
from srepa_ds.telemetry import Telemetry
from srepa_ds.token_stores import open_stores
from srepa_ds.training_loop import TrainingLoop

log = logging.getLogger("srepa_ds")

Target = Teacher | TokenStore
"""Where the tokens of an alignment come from."""


class _Inputs(NamedTuple):
    """What a run reads and does not change."""

    dataset: ShardDataset
    codec: LatentCodec
    targets: tuple[Target, ...]
    monitor: Monitor
    identity: dict[str, str | None]
    """Hashes of what lies behind the configuration's paths."""


def train(config: Config, *, allow_config_change: bool = False) -> bool:
    """Returns whether training is finished; False if a signal ended it early, after saving.

    Runs on every rank. Resumes from the newest valid checkpoint of the run's folder. Raises
    SRepaError, on all ranks alike, for whatever the user can mend.
    """
    ranks = distributed.initialize()
    arrangement = distributed.together(lambda: deepspeed_config(config, ranks.world_size))
    inputs = _open_inputs(config, ranks)
    monitor, identity = inputs.monitor, inputs.identity
    distributed.check_same(
        {**identity, **dict(run_folder.leaves(arrangement, "engine.deepspeed"))},
        what="ranks see different files behind the same paths; give all of them the same",
    )
    with ExitStack() as stack:
        claim = run_folder.claimed(config.run.folder, is_main=ranks.is_main)
        distributed.together(lambda: stack.enter_context(claim))
        run_folder.check_shared(config.run.folder)
        source = distributed.on_main(
            lambda: run_folder.checkpoint_to_resume(
                config, identity, allow_change=allow_config_change
            )
        )
        objective = _build_objective(config, inputs.targets, ranks, begins=source is None)
        engine = stack.enter_context(closing(Engine(objective, config, ranks)))
        _begin_or_resume(engine, source, config)
        distributed.on_main(lambda: run_folder.describe(config, arrangement))
        telemetry = distributed.together(lambda: _telemetry(config, engine, ranks))
        stack.enter_context(telemetry)
        stop = stack.enter_context(stop_requested())
        feed = _feed(config, inputs, engine, ranks, stack)
        writer = CheckpointWriter(config.checkpoints, config.checkpoint, rank=ranks.rank)
        stack.enter_context(closing(writer))
        loop = TrainingLoop(config, ranks, engine, feed, telemetry, monitor, writer, identity, stop)
        return loop.run()


def _open_inputs(config: Config, ranks: Ranks) -> _Inputs:
    """Returns what the run reads, all of it there and fitting together. Collective."""
    distributed.together(lambda: _check_attention(config, ranks))
    images = distributed.together(lambda: ShardDataset(config.data.folder))
    codec = build_codec(config.codec)
    distributed.together(lambda: _check_data(config, images, codec))
    targets = distributed.together(lambda: _open_targets(config, images, ranks))
    stores = [target for target in targets if isinstance(target, TokenStore)]
    dataset = distributed.together(lambda: ShardDataset(config.data.folder, stores))
    monitor = distributed.together(lambda: Monitor(config, codec, ranks))
    return _Inputs(dataset, codec, targets, monitor, _identity(config, dataset))


def _feed(config: Config, inputs: _Inputs, engine: Engine, ranks: Ranks, stack: ExitStack) -> Feed:
    """Returns the micro batches from where the engine is; their reader is closed with `stack`."""
    return Feed(
        config,
        stack.enter_context(_loader(config, inputs.dataset, engine, ranks)),
        inputs.codec,
        tuple(target if isinstance(target, Teacher) else None for target in inputs.targets),
        device=ranks.device,
        first_step=engine.step_count,
        ahead_on=side_stream(config, ranks.device),
    )


def _begin_or_resume(engine: Engine, source: Path | None, config: Config) -> None:
    folder = config.run.folder
    if source is None:
        distributed.on_main(lambda: setbacks.begin_anew(folder))
        return
    reader = distributed.together(lambda: CheckpointReader(source))
    distributed.together(lambda: engine.check(reader))
    engine.restore(reader)
    log.info("resuming from %s", source)
    distributed.on_main(lambda: put_back(config.checkpoints))
    failed = distributed.on_main(lambda: setbacks.setbacks_after(folder, engine.step_count))
    # Where a rollback to it, or past it, went on: the samples before would only fail again.
    engine.samples_seen = max(engine.samples_seen, failed.samples_seen)


def _identity(config: Config, dataset: ShardDataset) -> dict[str, str | None]:
    """Returns what lies behind the configuration's paths, so that a run resumes on the same."""
    weights = [alignment.teacher.weights for alignment in config.alignments]
    return {
        "data": dataset.index.dataset_id,
        "data.shards": _contents(dataset),
        **{
            f"alignments.{number}.teacher": sha256_of(path) if path else None
            for number, path in enumerate(weights)
        },
    }


def _contents(dataset: ShardDataset) -> str:
    """Returns a hash over those of the shards: other pictures may be prepared by equal settings."""
    hashes = "".join(entry.sha256 for entry in dataset.index.shards)
    return hashlib.sha256(hashes.encode()).hexdigest()[:16]


def _telemetry(config: Config, engine: Engine, ranks: Ranks) -> Telemetry:
    with run_folder.writing(config.run.folder):
        return Telemetry(
            config.run.folder,
            first_step=engine.step_count,
            total_steps=config.train.steps,
            is_main=ranks.is_main,
        )


def _loader(config: Config, dataset: ShardDataset, engine: Engine, ranks: Ranks) -> BatchLoader:
    accumulation = config.train.accumulation_steps
    return BatchLoader(
        dataset,
        config.data,
        seed=config.run.seed,
        micro_batch_size=micro_batch_size(config.train.batch_size, accumulation, ranks.world_size),
        rank=ranks.rank,
        world_size=ranks.world_size,
        accumulation=accumulation,
        start_position=engine.samples_seen,
    )


def _build_objective(
    config: Config, targets: tuple[Target, ...], ranks: Ranks, *, begins: bool
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
        distributed.together(lambda: initialise_from(objective, settings))
    objective.sit.set_remat(config.engine.remat)
    if config.engine.compile:
        objective.sit.compile_blocks()
    distributed.together(
        lambda: objective.sit.choose_attention(device=ranks.device, dtype=_products_dtype(config))
    )
    return objective


def _products_dtype(config: Config) -> torch.dtype:
    return torch.float32 if config.engine.precision == "fp32" else torch.bfloat16


def _check_attention(config: Config, ranks: Ranks) -> None:
    """Raises ConfigError for an attention that cannot run here, before anything is built."""
    try:
        choose_backend(
            config.model.attention,
            device=ranks.device,
            head_dim=config.model.head_dim,
            dtype=_products_dtype(config),
        )
    except ConfigError as error:
        raise ConfigError("configuration", error.faults) from error


def _check_data(config: Config, dataset: ShardDataset, codec: LatentCodec) -> None:
    """Raises for data and model that do not fit together, before anything is built."""
    latent_shape = codec.latent_shape(dataset.image_shape)
    if latent_shape != config.model.latent_shape:
        raise DataError(
            f"{config.data.folder} gives latents of shape {latent_shape}, but the model takes "
            f"{config.model.latent_shape}; set model.in_channels and model.input_size to match"
        )
    classes = config.model.num_classes
    if dataset.num_classes != classes:
        raise DataError(
            f"{config.data.folder} has {dataset.num_classes} classes, but model.num_classes is "
            f"{classes}"
        )
    wrong = ((dataset.labels < 0) | (dataset.labels >= classes)).nonzero()[:, 0]
    if len(wrong):
        # The null label is a row of the model's table, so it would train without a word.
        raise DataError(
            f"{config.data.folder}: sample {int(wrong[0])} and {len(wrong) - 1} others have labels "
            f"outside 0 to {classes - 1}; prepare the data again"
        )


def _open_targets(config: Config, dataset: ShardDataset, ranks: Ranks) -> tuple[Target, ...]:
    """Returns where each alignment's tokens come from; raises if their grids do not fit."""
    _, height, width = dataset.image_shape
    stores = open_stores(config, dataset)
    targets = tuple(
        store or load_teacher(alignment.teacher, resolution=(height, width), device=ranks.device)
        for alignment, store in zip(config.alignments, stores, strict=True)
    )
    faults = [
        Fault(
            f"alignments.{number}.teacher",
            f"gives a grid of {target.grid} tokens at {height}x{width} px, the model has "
            f"{config.model.grid}; set resampling, e.g. {{direction: teacher_to_student, mode: "
            "bilinear}, or choose a matching patch size or input size",
        )
        for number, (target, alignment) in enumerate(zip(targets, config.alignments, strict=True))
        if target.grid != config.model.grid and alignment.resampling is None
    ]
    faults += _triton_faults(config, ranks.device)
    if faults:
        raise ConfigError("configuration", faults)
    return targets


def _triton_faults(config: Config, device: torch.device) -> Iterator[Fault]:
    for number, alignment in enumerate(config.alignments):
        if alignment.structural is not None and alignment.structural.algorithm == "triton":
            reason = triton_unavailable(device)
            if reason is not None:
                path = f"alignments.{number}.structural.algorithm"
                yield Fault(path, f"'triton' cannot run here: {reason}; choose auto")
