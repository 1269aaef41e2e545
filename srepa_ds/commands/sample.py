"""`srepa-ds sample`: images from an exported model, on any number of ranks, resumable."""

import logging
from pathlib import Path

from srepa_ds.codec.table import CodecConfig, build_codec
from srepa_ds.config.experiment import Config
from srepa_ds.config.sections import SampleConfig
from srepa_ds.console import steps_shown
from srepa_ds.distributed import ranks
from srepa_ds.distributed.ranks import Rank
from srepa_ds.errors import ConfigError, Fault
from srepa_ds.interpolant import INTERPOLANTS
from srepa_ds.objective import ObjectiveConfig
from srepa_ds.sampling.generate import Chunk, generate, plan_chunks
from srepa_ds.sampling.provenance import Provenance, describe
from srepa_ds.sampling.solvers import SamplerConfig, count_evaluations
from srepa_ds.sampling.writer import ChunkWriter
from srepa_ds.schema import validated
from srepa_ds.telemetry.environment import environment
from srepa_ds.weights.exported import ExportedModel, read_model

log = logging.getLogger("srepa_ds")


def sample(config: Config) -> Path:
    """Returns the folder with `samples.npz`, `contact_sheet.png` and `provenance.json`.

    Runs on every rank. Chunks drawn by an interrupted run are kept, and a finished set with the
    same provenance is left alone. Raises SRepaError on all ranks alike.
    """
    rank = ranks.initialize()
    exported = ranks.together(lambda: _read_model(config))
    everything = ranks.together(lambda: _all_chunks(config.sample, rank))
    provenance = _provenance(config.sample, exported)
    writer = ranks.together(lambda: ChunkWriter(config.samples_folder, provenance))
    # One rank looks, and what is left is dealt anew: so all agree, and have as much to do.
    missing = ranks.broadcast(
        ranks.together(lambda: writer.missing(everything) if rank.is_main else ())
    )
    _say_what_is_ahead(config.sample, len(everything), len(missing))
    mine = missing[rank.number :: rank.world_size]
    ranks.together(lambda: _draw(config, exported, writer, mine, rank))
    ranks.together(lambda: writer.assemble(everything) if rank.is_main else None)
    log.info("%d images in %s", config.sample.num_samples, writer.folder)
    return writer.folder


def _read_model(config: Config) -> ExportedModel:
    """Returns the model to draw from; raises ConfigError for settings it has no use for."""
    exported = read_model(config.weights_folder)
    if config.sample.cls_cfg_scale and exported.model.config.class_token_width is None:
        reason = f"guides a class token, and the model in {config.weights_folder} has none; set 0"
        raise ConfigError("configuration", [Fault("sample.cls_cfg_scale", reason)])
    return exported


def _all_chunks(config: SamplerConfig, rank: Rank) -> tuple[Chunk, ...]:
    """Returns the chunks of the whole set; raises TopologyError for more ranks than images."""
    plan_chunks(config, rank=rank.number, world_size=rank.world_size)
    return plan_chunks(config, rank=0, world_size=1)


def _draw(
    config: Config,
    exported: ExportedModel,
    writer: ChunkWriter,
    chunks: tuple[Chunk, ...],
    rank: Rank,
) -> None:
    """Draws and stores this rank's chunks."""
    # These sections alone: the others name files that may be absent where the model came to.
    source, tree = str(config.weights_folder), exported.config
    objective = validated(ObjectiveConfig, tree["objective"], source=source)
    batches = generate(
        exported.model.to(rank.device),
        build_codec(validated(CodecConfig, tree["codec"], source=source)),
        INTERPOLANTS[objective.interpolant.path],
        config.sample,
        chunks=chunks,
        device=rank.device,
    )
    for batch in steps_shown(batches, total=len(chunks), what="chunk", is_main=rank.is_main):
        writer.write(batch)


def _provenance(config: SampleConfig, exported: ExportedModel) -> Provenance:
    """Returns what decides the pixels; paths and the number of ranks do not."""
    sampler = SamplerConfig(**{name: getattr(config, name) for name in SamplerConfig.model_fields})
    versions = environment()
    tree = exported.config
    return describe(
        sampler,
        checkpoint_sha256=exported.sha256,
        ema=str(exported.provenance["weights"]),
        path=tree["objective"]["interpolant"]["path"],
        codec=tree["codec"]["kind"],
        class_token=exported.model.config.class_token_width is not None,
        versions={name: versions[name] for name in ("srepa_ds", "torch")},
    )


def _say_what_is_ahead(config: SamplerConfig, num_chunks: int, num_missing: int) -> None:
    if num_missing == 0:
        log.info("all images are there already")
        return
    evaluations = count_evaluations(config)
    log.info(
        "drawing %d images by %s, %d steps: %d model calls each, %d of them guided%s",
        config.num_samples,
        config.solver,
        config.num_steps,
        evaluations.total,
        evaluations.guided,
        "" if num_missing == num_chunks else f"; {num_chunks - num_missing} chunks are there",
    )
