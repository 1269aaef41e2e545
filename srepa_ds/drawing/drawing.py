"""What a set of images is drawn with: a model, its decoder, and everything that decides pixels."""

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from srepa_ds.codec.config import CodecConfig
from srepa_ds.codec.latent_codec import LatentCodec
from srepa_ds.codec.table import build_codec
from srepa_ds.config.experiment import Config
from srepa_ds.config.sections import SampleConfig
from srepa_ds.distributed import ranks
from srepa_ds.distributed.ranks import Rank
from srepa_ds.errors import ConfigError, DataError, Fault, listed
from srepa_ds.interpolant import INTERPOLANTS, Interpolant
from srepa_ds.objective import ObjectiveConfig
from srepa_ds.sampling.config import SamplerConfig
from srepa_ds.sampling.generate import Chunk, ImageBatch, generate, plan_chunks
from srepa_ds.sampling.provenance import Provenance, describe
from srepa_ds.sampling.state import SamplingModel
from srepa_ds.telemetry.environment import environment
from srepa_ds.weights.exported import ExportedModel, read_model

log = logging.getLogger("srepa_ds")


@dataclass(frozen=True)
class Drawing:
    """A set of images that can be drawn: each one a function of this and of its index."""

    model: SamplingModel
    codec: LatentCodec
    interpolant: Interpolant
    sampler: SamplerConfig
    provenance: Provenance
    """Everything that decides the pixels; paths and the number of ranks do not."""
    device: torch.device

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image, found by decoding one latent of zeros."""
        latents = torch.zeros(1, *self.model.config.latent_shape, device=self.device)
        height, width, channels = self.codec.decode(latents).shape[1:]
        return channels, height, width

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """The units of the whole set."""
        return plan_chunks(self.sampler)

    def batches(self, chunks: Iterable[Chunk]) -> Iterator[ImageBatch]:
        """Yields the images of `chunks`, one batch per chunk. Does not communicate."""
        return generate(
            self.model,
            self.codec,
            self.interpolant,
            self.sampler,
            chunks=chunks,
            device=self.device,
        )


def open_drawing(config: Config, rank: Rank) -> Drawing:
    """Returns what the section `sample` draws, on the device of `rank`. Collective.

    Raises SRepaError on all ranks alike.
    """
    exported = _read_model(config)
    codec = _codec(config, exported, rank)
    objective = exported.document.section(ObjectiveConfig, "objective")
    return Drawing(
        model=exported.model.to(rank.device),
        codec=codec,
        interpolant=INTERPOLANTS[objective.interpolant.path],
        sampler=_sampler(config.sample),
        provenance=_provenance(_sampler(config.sample), exported, codec),
        device=rank.device,
    )


def _sampler(config: SampleConfig) -> SamplerConfig:
    return SamplerConfig(**{name: getattr(config, name) for name in SamplerConfig.model_fields})


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


def _provenance(sampler: SamplerConfig, exported: ExportedModel, codec: LatentCodec) -> Provenance:
    """Returns everything that decides the pixels; paths and the number of ranks do not."""
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
