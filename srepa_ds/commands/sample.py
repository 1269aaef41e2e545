"""`srepa-ds sample`: images from an exported model, on any number of ranks, resumable."""

import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from srepa_ds.codec.config import CodecConfig
from srepa_ds.codec.latent_codec import LatentCodec
from srepa_ds.codec.table import build_codec
from srepa_ds.config.experiment import Config, samples_folder
from srepa_ds.config.sections import SampleConfig
from srepa_ds.console import steps_shown
from srepa_ds.distributed import ranks
from srepa_ds.distributed.ranks import Rank
from srepa_ds.errors import ConfigError, DataError, Fault, listed
from srepa_ds.files import claimed
from srepa_ds.interpolant import INTERPOLANTS
from srepa_ds.objective import ObjectiveConfig
from srepa_ds.sampling.generate import Chunk, check_rank_count, generate, plan_chunks
from srepa_ds.sampling.provenance import Provenance, describe
from srepa_ds.sampling.solvers import SamplerConfig, count_evaluations
from srepa_ds.sampling.writer import CURE, ChunkWriter, remove_leftovers
from srepa_ds.telemetry.environment import environment
from srepa_ds.weights.exported import ExportedModel, read_model

log = logging.getLogger("srepa_ds")


def sample(config: Config) -> Path:
    """Returns the folder with `samples.npz`, `contact_sheet.png` and `provenance.json`.

    Runs on every rank. Chunks of an interrupted run are kept, and a finished set with the same
    provenance is left alone. Raises SRepaError on all ranks alike.
    """
    rank = ranks.initialize()
    exported = _read_model(config)
    ranks.together(check_rank_count, config.sample, rank.world_size)
    codec = _codec(config, exported, rank)
    chunks, folder = plan_chunks(config.sample), samples_folder(config)
    with ExitStack() as stack:
        ranks.together(stack.enter_context, _claimed(folder, is_main=rank.is_main))
        writer = _open_writer(config, folder, exported, codec)
        # One rank looks, and the missing chunks are shared evenly: all agree and do equal work.
        missing = ranks.on_main(writer.missing, chunks)
        _log_plan(config.sample, len(chunks), len(missing))
        _draw(config, exported, codec, writer, missing[rank.number :: rank.world_size], rank)
        ranks.on_main(writer.assemble, chunks)
    log.info("%d images in %s", config.sample.num_samples, folder)
    return folder


@contextmanager
def _claimed(folder: Path, *, is_main: bool) -> Iterator[None]:
    """Keeps other processes from drawing into `folder` while the block runs, on the main rank.

    Raises OutputError if one does, or the folder cannot be written to.
    """
    if not is_main:
        yield
        return
    otherwise = ", or choose another sample.folder"
    with claimed(folder, doing="drawing samples into", cure=CURE, otherwise=otherwise):
        remove_leftovers(folder)
        yield


@ranks.collective
def _read_model(config: Config) -> ExportedModel:
    """Returns the model to draw from; raises ConfigError for settings that do not suit it."""
    exported = read_model(config.weights_folder)
    for schema, name in ((ObjectiveConfig, "objective"), (CodecConfig, "codec")):
        # Only these two: others name files that may be absent where the model is used.
        exported.document.section(schema, name)
    _check_labels(config, exported)
    if config.sample.cls_cfg_scale and exported.model.config.class_token_width is None:
        reason = f"guides a class token, but the model in {config.weights_folder} has none; set 0"
        raise ConfigError("configuration", [Fault("sample.cls_cfg_scale", reason)])
    return exported


def _check_labels(config: Config, exported: ExportedModel) -> None:
    """Raises ConfigError if classes are asked for that the model does not have."""
    classes = exported.model.config.num_classes
    unknown = sorted({label for label in config.sample.labels or () if label >= classes})
    if unknown:
        reason = (
            f"{listed(map(str, unknown))}: the model in {config.weights_folder} has {classes} "
            f"classes, 0 to {classes - 1}"
        )
        raise ConfigError("configuration", [Fault("sample.labels", reason)])


@ranks.collective
def _codec(config: Config, exported: ExportedModel, rank: Rank) -> LatentCodec:
    """Returns the codec that the model was trained with; raises DataError."""
    trained_with = exported.document.section(CodecConfig, "codec")
    codec = build_codec(trained_with.as_used_here(config.codec), device=rank.device)
    _check_space(config, exported, codec)
    return codec


def _check_space(config: Config, exported: ExportedModel, codec: LatentCodec) -> None:
    """Raises DataError if latents mean something else than in training; warns of another encoder.

    Another decoder is welcome, and the encoder in its file may differ in the last bits.
    """
    noted = exported.document.provenance.get("codec")
    trained_in = json.loads(noted) if isinstance(noted, str) else {}
    space = json.loads(json.dumps(codec.space))
    for name in ("kind", "scale", "shift"):
        if name in trained_in and trained_in[name] != space.get(name):
            raise DataError(
                f"{config.weights_folder}: was trained with codec.{name} {trained_in[name]}, and "
                f"{config.codec.weights or 'this codec'} has {space.get(name)}; give the VAE it "
                "was trained with, or one with another decoder for the same latents"
            )
    if trained_in and trained_in.get("encoder_sha256") != space.get("encoder_sha256"):
        log.warning(
            "%s: was trained on latents of an encoder other than that in %s",
            config.weights_folder,
            config.codec.weights,
        )


@ranks.collective
def _open_writer(
    config: Config, folder: Path, exported: ExportedModel, codec: LatentCodec
) -> ChunkWriter:
    """Returns the writer of this rank; raises OutputError or DataError as `ChunkWriter` does."""
    return ChunkWriter(folder, _provenance(config.sample, exported, codec))


@ranks.collective
def _draw(
    config: Config,
    exported: ExportedModel,
    codec: LatentCodec,
    writer: ChunkWriter,
    chunks: tuple[Chunk, ...],
    rank: Rank,
) -> None:
    """Draws and writes this rank's `chunks`; raises OutputError."""
    objective = exported.document.section(ObjectiveConfig, "objective")
    batches = generate(
        exported.model.to(rank.device),
        codec,
        INTERPOLANTS[objective.interpolant.path],
        config.sample,
        chunks=chunks,
        device=rank.device,
    )
    for batch in steps_shown(batches, total=len(chunks), what="chunk", is_main=rank.is_main):
        writer.write(batch)


def _provenance(config: SampleConfig, exported: ExportedModel, codec: LatentCodec) -> Provenance:
    """Returns everything that decides the pixels; paths and the number of ranks do not."""
    sampler = SamplerConfig(**{name: getattr(config, name) for name in SamplerConfig.model_fields})
    versions = environment()
    document = exported.document
    return describe(
        sampler,
        checkpoint_sha256=exported.sha256,
        ema=document.weights,
        path=document.section(ObjectiveConfig, "objective").interpolant.path,
        codec=codec.decoding,
        class_token=exported.model.config.class_token_width is not None,
        versions={name: versions[name] for name in ("srepa_ds", "torch")},
    )


def _log_plan(config: SamplerConfig, num_chunks: int, num_missing: int) -> None:
    if num_missing == 0:
        log.info("all images are already drawn")
        return
    evaluations = count_evaluations(config)
    log.info(
        "drawing %d images with %s, %d steps: %d model calls each, %d of them guided%s",
        config.num_samples,
        config.solver,
        config.num_steps,
        evaluations.total,
        evaluations.guided,
        ""
        if num_missing == num_chunks
        else f"; {num_chunks - num_missing} of {num_chunks} chunks are already drawn",
    )
