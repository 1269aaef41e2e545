"""`srepa-ds train`: from shards to checkpoints; the same command resumes."""

import json
import logging
import math
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType

import torch

from srepa_ds import checkpoint, distributed
from srepa_ds.alignment.teachers import Teacher, load_teacher
from srepa_ds.checkpoint import CheckpointReader
from srepa_ds.config import Config, unsafe_changes
from srepa_ds.data.batch import Batch
from srepa_ds.data.loader import BatchLoader
from srepa_ds.data.shards import ShardDataset
from srepa_ds.distributed import Ranks
from srepa_ds.engine import Engine, StepReport, deepspeed_config, micro_batch_size
from srepa_ds.errors import ConfigError, DataError, Fault, OutputError
from srepa_ds.latent_codec import LatentCodec, build_codec
from srepa_ds.objective import Objective, TrainingInputs, draw_inputs
from srepa_ds.optim import learning_rate
from srepa_ds.schema import to_yaml
from srepa_ds.telemetry import Telemetry, Window, environment

log = logging.getLogger("srepa_ds")

# Asking all ranks costs a collective and, on a GPU, a wait for the device.
_STOP_CHECK_STEPS = 5
_SAME_SIGNAL_SECONDS = 3.0


def train(config: Config, *, allow_config_change: bool = False) -> bool:
    """Returns whether training is finished; False if a signal ended it early, after saving.

    Runs on every rank. Resumes from the newest valid checkpoint of the run's folder. Raises
    SRepaError, on all ranks alike, for whatever the user can mend.
    """
    ranks = distributed.initialize()
    dataset = distributed.together(lambda: ShardDataset(config.data.folder))
    codec = build_codec(config.codec)
    distributed.together(lambda: _check_data(config, dataset, codec, ranks))
    teachers = distributed.together(lambda: _load_teachers(config, dataset, ranks))
    source = distributed.broadcast(
        distributed.together(lambda: _open_run(config, ranks, allow_config_change))
    )
    with closing(_build_engine(config, teachers, ranks)) as engine:
        if source is not None:
            _resume(engine, source)
        distributed.together(lambda: _describe_run(config, ranks) if ranks.is_main else None)
        with (
            stop_requested() as stop,
            _loader(config, dataset, engine, ranks) as batches,
            _telemetry(config, engine, ranks) as telemetry,
        ):
            inputs = _inputs(config, batches, codec, teachers, ranks)
            return _run(config, engine, inputs, telemetry, stop)


def _resume(engine: Engine, source: Path) -> None:
    reader = distributed.together(lambda: CheckpointReader(source))
    distributed.together(lambda: engine.check(reader))
    engine.restore(reader)
    log.info("resuming from %s", source)


def _run(
    config: Config,
    engine: Engine,
    inputs: Iterator[TrainingInputs],
    telemetry: Telemetry,
    stop: list[int],
) -> bool:
    """Steps until the end or a stop; logs and saves on the way."""
    window = Window()
    saved_at = engine.step_count
    while engine.step_count < config.train.steps:
        rate = learning_rate(config.optimizer, engine.step_count)
        micro_batches = (next(inputs) for _ in range(config.train.accumulation_steps))
        report = engine.step(micro_batches, learning_rate=rate)
        step = engine.step_count
        window.add(_scalars(report))
        if step % config.train.log_every_steps == 0 or step == config.train.steps:
            telemetry.record(step, _derived(window.close(), config, rate))
        if step % config.checkpoint.every_steps == 0 or step == config.train.steps:
            saved_at = _save(config, engine)
        if step % _STOP_CHECK_STEPS == 0 and distributed.any_rank(bool(stop)):
            break
    finished = engine.step_count >= config.train.steps
    if saved_at != engine.step_count:
        _save(config, engine)
    if not finished:
        log.warning(
            "stopped by a signal at step %d; run the same command to go on", engine.step_count
        )
    return finished


def _scalars(report: StepReport) -> dict[str, torch.Tensor]:
    device = report.losses.total.device
    norm = report.gradient_norm.to(device)
    return {
        **{f"loss_{name}": value for name, value in report.losses._asdict().items()},
        "gradient_norm": norm,
        "skipped": torch.full_like(report.losses.total, float(not report.applied)),
    }


def _derived(means: dict[str, float], config: Config, rate: float) -> dict[str, float]:
    """Returns one line of the record; JSON has no infinities, so a skipped norm is left out."""
    images_per_second = config.train.batch_size / means["step_seconds"]
    values = {**means, "learning_rate": rate, "images_per_second": images_per_second}
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _save(config: Config, engine: Engine) -> int:
    folder = checkpoint.save(
        config.checkpoints,
        step=engine.step_count,
        pieces=engine.pieces(),
        state={**engine.state(), "config": json.loads(config.model_dump_json())},
        rank=distributed.rank(),
    )
    if distributed.rank() == 0:
        checkpoint.prune(config.checkpoints, config.checkpoint, newest=engine.step_count)
        log.info("saved %s", folder)
    return engine.step_count


def _inputs(
    config: Config,
    batches: Iterator[Batch],
    codec: LatentCodec,
    teachers: tuple[Teacher, ...],
    ranks: Ranks,
) -> Iterator[TrainingInputs]:
    """Yields what the objective needs of each micro batch, on the device."""
    for cpu_batch in batches:
        batch = cpu_batch.to(ranks.device, non_blocking=True)
        latents = codec.encode(batch, seed=config.run.seed)
        patches = tuple(teacher.tokens(batch.pixels).patches for teacher in teachers)
        yield draw_inputs(
            config.objective,
            latents,
            batch.labels,
            patches,
            positions=batch.positions,
            seed=config.run.seed,
            null_label=config.model.null_label,
        )


def _telemetry(config: Config, engine: Engine, ranks: Ranks) -> Telemetry:
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
        # The position in the data is a function of the step: every step takes one global batch.
        start_position=engine.step_count * config.train.batch_size,
    )


def _build_engine(config: Config, teachers: tuple[Teacher, ...], ranks: Ranks) -> Engine:
    objective = Objective(
        config.model,
        config.objective,
        config.alignments,
        teacher_widths=tuple(teacher.width for teacher in teachers),
        generator=torch.Generator().manual_seed(config.run.seed),
    )
    return Engine(objective, config, ranks)


def _check_data(config: Config, dataset: ShardDataset, codec: LatentCodec, ranks: Ranks) -> None:
    """Raises for data, model and ranks that do not fit together, before anything is built."""
    micro_batch_size(config.train.batch_size, config.train.accumulation_steps, ranks.world_size)
    latent_shape = codec.latent_shape(dataset.image_shape)
    if latent_shape != config.model.latent_shape:
        raise DataError(
            f"{config.data.folder} gives latents of shape {latent_shape}, but the model takes "
            f"{config.model.latent_shape}; set model.in_channels and model.input_size to match"
        )
    if dataset.num_classes != config.model.num_classes:
        raise DataError(
            f"{config.data.folder} has {dataset.num_classes} classes, but model.num_classes is "
            f"{config.model.num_classes}"
        )


def _load_teachers(config: Config, dataset: ShardDataset, ranks: Ranks) -> tuple[Teacher, ...]:
    resolution = dataset.image_shape[-1]
    teachers = tuple(
        load_teacher(alignment.teacher, resolution=resolution, device=ranks.device)
        for alignment in config.alignments
    )
    faults = [
        Fault(
            f"alignments.{number}.teacher",
            f"gives a grid of {teacher.grid} tokens at {resolution} px, the model has "
            f"{config.model.grid}; choose a matching patch size or input size",
        )
        for number, teacher in enumerate(teachers)
        if teacher.grid != config.model.grid
    ]
    if faults:
        raise ConfigError("configuration", faults)
    return teachers


def _open_run(config: Config, ranks: Ranks, allow_config_change: bool) -> Path | None:
    """Returns the checkpoint to resume from, chosen by the main rank for all.

    Raises OutputError if the folder cannot be made, CheckpointError if there are checkpoints and
    none is valid, and ConfigError if they are of another configuration.
    """
    if not ranks.is_main:
        return None
    with _writing(config.run.folder):
        config.run.folder.mkdir(parents=True, exist_ok=True)
    source = checkpoint.newest_valid(config.checkpoints)
    if source is not None and not allow_config_change:
        _refuse_changes(config, source)
    return source


def _refuse_changes(config: Config, source: Path) -> None:
    stored = json.loads((source / "state.json").read_text())["config"]
    changes = unsafe_changes(stored, config)
    if changes:
        raise ConfigError(
            f"{config.run.folder} holds a run of another configuration",
            [
                *(Fault(*change.split(": ", 1)) for change in changes),
                Fault("run.folder", "choose another, or pass --allow-config-change to go on"),
            ],
        )


def _describe_run(config: Config, ranks: Ranks) -> None:
    """Writes what the run is into its folder; raises OutputError if that cannot be written to."""
    folder = config.run.folder
    documents = {
        "config.yaml": to_yaml(config),
        "ds_config.json": json.dumps(deepspeed_config(config, ranks.world_size), indent=2),
        "environment.json": json.dumps(environment(), indent=2),
    }
    with _writing(folder):
        for name, text in documents.items():
            (folder / name).write_text(text, encoding="utf-8")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write to the run's folder {folder}: {error.strerror}; choose another "
            "run.folder or mend its permissions"
        ) from error


@contextmanager
def stop_requested() -> Iterator[list[int]]:
    """Yields a list that holds the signal once SIGINT or SIGTERM has come.

    The first signal asks for a save at one of the next steps. Another one some seconds later ends
    the process at once; sooner, it is taken for the same request: a scheduler that signals every
    process reaches a rank twice, directly and by way of its launcher.
    """
    received: list[int] = []
    first_came: list[float] = []

    def note(number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if received and now - first_came[0] > _SAME_SIGNAL_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        received.append(number)
        first_came.append(now)

    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, note) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
