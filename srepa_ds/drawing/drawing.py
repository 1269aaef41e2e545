"""What a set of images is drawn with: a model, its decoder, and everything that decides pixels."""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from srepa_ds.codec.latent_codec import LatentCodec
from srepa_ds.codec.table import build_codec
from srepa_ds.config.experiment import Config
from srepa_ds.config.sections import SampleConfig
from srepa_ds.distributed import ranks
from srepa_ds.distributed.ranks import Rank
from srepa_ds.drawing.compiled import CompiledModel, check_compiler, check_cuda_graphs
from srepa_ds.drawing.decoder import as_drawn, check_decoder, decoder_name
from srepa_ds.drawing.model import Models, open_models
from srepa_ds.errors import DataError
from srepa_ds.interpolant import INTERPOLANTS, Interpolant
from srepa_ds.objective import ObjectiveConfig
from srepa_ds.sampling.config import Evaluations, SamplerConfig, count_evaluations
from srepa_ds.sampling.generate import Chunk, ImageBatch, generate, plan_chunks
from srepa_ds.sampling.labels import hash_of_labels, labels_of_set
from srepa_ds.sampling.provenance import Further, Provenance, describe
from srepa_ds.sampling.state import SamplingModel
from srepa_ds.telemetry.environment import device_name, environment
from srepa_ds.weights.exported import ExportedModel

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
    folder: Path
    """Where the set belongs: `sample.folder`, or the folder of the model's step in the run's."""
    guide: SamplingModel | None = None
    """The weaker model of autoguidance."""
    labels: Tensor | None = None
    """The class of each image, int64 (num_samples), where a file lists them."""

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

    @property
    def evaluations(self) -> Evaluations:
        """Function evaluations per image."""
        return count_evaluations(self.sampler, autoguided=self.guide is not None)

    def batches(self, chunks: Iterable[Chunk]) -> Iterator[ImageBatch]:
        """Yields the images of `chunks`, one batch per chunk. Does not communicate.

        Raises DataError that names the first image with NaN or infinite values.
        """
        return generate(
            self.model,
            self.codec,
            self.interpolant,
            self.sampler,
            chunks=chunks,
            device=self.device,
            guide=self.guide,
            labels=self.labels,
            refuse_broken=True,
        )


def open_drawing(config: Config, rank: Rank) -> Drawing:
    """Returns what the section `sample` draws, on the device of `rank`. Collective.

    Raises SRepaError on all ranks alike.
    """
    ranks.together(check_compiler, config.sample.compile, rank.device)
    ranks.together(check_cuda_graphs, config.sample.cuda_graphs, rank.device)
    models = open_models(config)
    codec = ranks.together(_codec, config, models, rank)
    labels = ranks.together(_labels, config.sample, models.model)
    devices = ranks.gather(device_name(rank.device))
    objective = models.model.document.section(ObjectiveConfig, "objective")
    return Drawing(
        model=_on_device(models.model, config.sample, rank),
        codec=codec,
        interpolant=INTERPOLANTS[objective.interpolant.path],
        sampler=_sampler(config.sample),
        provenance=_provenance(config, models, codec, labels, devices),
        device=rank.device,
        folder=config.sample.folder or config.run_folder.samples(models.step),
        guide=None if models.guide is None else _on_device(models.guide, config.sample, rank),
        labels=labels,
    )


def _sampler(config: SampleConfig) -> SamplerConfig:
    return SamplerConfig(**{name: getattr(config, name) for name in SamplerConfig.model_fields})


def _on_device(found: ExportedModel, config: SampleConfig, rank: Rank) -> SamplingModel:
    """Returns a model on the device of `rank`, compiled if that is asked for."""
    model = found.model.to(rank.device)
    if not config.compile:
        return model
    # No chunk is larger than the set.
    size = min(config.batch_size, config.num_samples)
    return CompiledModel(model, batch_size=size, cuda_graphs=config.cuda_graphs)


def _labels(config: SampleConfig, model: ExportedModel) -> Tensor | None:
    """Returns the labels that a file lists; raises ConfigError as `labels_of_set` does."""
    if config.label_file is None:
        return None
    return labels_of_set(
        config.label_file,
        num_samples=config.num_samples,
        num_classes=model.model.config.num_classes,
    )


def _codec(config: Config, models: Models, rank: Rank) -> LatentCodec:
    """Returns the codec that the model was trained with, with the decoder that is to draw.

    Raises DataError, and ConfigError for a decoder where none is of use.
    """
    drawn = as_drawn(config, models.model)
    check_decoder(config)
    codec = build_codec(drawn, device=rank.device)
    _check_space(config, models.place, models.model, codec)
    if models.guide is not None and config.sample.guide is not None:
        _check_space(config, config.sample.guide, models.guide, codec)
    return codec


def _check_space(config: Config, place: Path, model: ExportedModel, codec: LatentCodec) -> None:
    """Raises DataError if latents mean something else than in training; warns of another encoder.

    Another decoder is welcome, and the encoder in its file may differ in the last bits.
    """
    noted = model.document.provenance.get("codec")
    trained_in = json.loads(noted) if isinstance(noted, str) else {}
    space = json.loads(json.dumps(codec.space))
    given = config.sample.decoder or config.codec.weights
    for name in ("kind", "scale", "shift"):
        if name in trained_in and trained_in[name] != space.get(name):
            raise DataError(
                f"{place}: was trained with codec.{name} {trained_in[name]}, and "
                f"{given or 'this codec'} has {space.get(name)}; give the VAE it "
                "was trained with, or one with another decoder for the same latents"
            )
    if trained_in and trained_in.get("encoder_sha256") != space.get("encoder_sha256"):
        log.warning(
            "%s: was trained on latents of an encoder other than that in %s",
            place,
            given,
        )


def _provenance(
    config: Config,
    models: Models,
    codec: LatentCodec,
    labels: Tensor | None,
    devices: Sequence[str],
) -> Provenance:
    """Returns everything that decides the pixels; paths and the number of ranks do not."""
    versions = environment()
    document = models.model.document
    return describe(
        _sampler(config.sample),
        checkpoint_sha256=models.model.sha256,
        ema=document.weights,
        path=document.section(ObjectiveConfig, "objective").interpolant.path,
        codec=codec.decoding,
        class_token=models.model.model.config.class_token_width is not None,
        versions={name: versions[name] for name in ("srepa_ds", "torch")},
        further=Further(
            guide_sha256=None if models.guide is None else models.guide.sha256,
            model=models.model.described,
            guide={} if models.guide is None else models.guide.described,
            labels_sha256=None if labels is None else hash_of_labels(labels),
            compiled=config.sample.compile,
        ),
        decoder=decoder_name(as_drawn(config, models.model)),
        devices=devices,
    )
