"""Generated images as an iterable: each one a function of the seed and its index alone."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from srepa_ds import noise
from srepa_ds.codec.latent_codec import LatentCodec
from srepa_ds.distributed.heartbeat import moved
from srepa_ds.interpolant import Interpolant
from srepa_ds.noise import NoiseStream
from srepa_ds.sampling.config import SamplerConfig
from srepa_ds.sampling.guidance import GuidedModel
from srepa_ds.sampling.solvers import Dynamics, integrate
from srepa_ds.sampling.state import SamplingModel, StateLayout, state_velocity

# Of the latents, and of the class token if the model has one.
_START_STREAMS = (NoiseStream.SAMPLE_START, NoiseStream.SAMPLE_CLS_START)
_STEP_STREAMS = (NoiseStream.SAMPLE_STEP, NoiseStream.SAMPLE_CLS_STEP)


@dataclass(frozen=True)
class Chunk:
    """Images [start, stop) of a set, drawn together and stored together."""

    index: int
    start: int
    stop: int

    def sample_ids(self, device: torch.device | str = "cpu") -> Int64[Tensor, " batch"]:
        """Returns the indices of the chunk's images."""
        return torch.arange(self.start, self.stop, dtype=torch.int64, device=device)


@dataclass(frozen=True)
class ImageBatch:
    """The generated images of one chunk, with their labels and indices; on the CPU."""

    images: UInt8[Tensor, "batch height width 3"]
    labels: Int64[Tensor, " batch"]
    sample_ids: Int64[Tensor, " batch"]
    chunk: Chunk


def plan_chunks(config: SamplerConfig) -> tuple[Chunk, ...]:
    """Returns the chunks of the whole set, cut by index alone.

    The cut does not depend on the number of ranks, so every image is computed in the same batch
    for any number of them, and is the same to the bit.
    """
    starts = range(0, config.num_samples, config.batch_size)
    return tuple(
        Chunk(index, start, min(start + config.batch_size, config.num_samples))
        for index, start in enumerate(starts)
    )


def even_chunks(
    num_samples: int, *, batch_size: int, rank: int, world_size: int
) -> tuple[Chunk, ...]:
    """Returns rank `rank`'s chunks of at least `num_samples` images, equal in number and size.

    For models that all ranks must call equally often.
    """
    rounds = -(-num_samples // (batch_size * world_size))
    indices = (number * world_size + rank for number in range(rounds))
    return tuple(Chunk(i, i * batch_size, (i + 1) * batch_size) for i in indices)


def draw_labels(
    config: SamplerConfig, sample_ids: Int64[Tensor, " batch"], *, num_classes: int
) -> Int64[Tensor, " batch"]:
    """Returns the label of each image, by `config.labels` or else by `config.label_mode`."""
    if config.labels is not None:
        return _chosen_labels(config.labels, sample_ids)
    if config.label_mode == "balanced":
        return sample_ids % num_classes
    return noise.integers(config.seed, NoiseStream.SAMPLE_LABEL, sample_ids, num_classes)


def _chosen_labels(
    labels: tuple[int, ...] | dict[int, int], sample_ids: Int64[Tensor, " batch"]
) -> Int64[Tensor, " batch"]:
    """Returns the label of each image: `labels` in turn, or as many of each class as it says."""
    if isinstance(labels, tuple):
        return sample_ids.new_tensor(labels)[sample_ids % len(labels)]
    classes = sorted(labels)
    ends = sample_ids.new_tensor([labels[number] for number in classes]).cumsum(0)
    return sample_ids.new_tensor(classes)[torch.searchsorted(ends, sample_ids, right=True)]


def generate(
    model: SamplingModel,
    codec: LatentCodec,
    interpolant: Interpolant,
    config: SamplerConfig,
    *,
    chunks: Iterable[Chunk],
    device: torch.device | str,
) -> Iterator[ImageBatch]:
    """Yields the images of `chunks`, one batch per chunk.

    `model` is on `device`; it is called without gradient, under bf16 autocast if
    `config.precision` says so. Nothing here communicates between ranks.
    """
    for chunk in chunks:
        moved()
        yield _generate_chunk(model, codec, interpolant, config, chunk, torch.device(device))


@torch.no_grad()
def _generate_chunk(
    model: SamplingModel,
    codec: LatentCodec,
    interpolant: Interpolant,
    config: SamplerConfig,
    chunk: Chunk,
    device: torch.device,
) -> ImageBatch:
    sample_ids = chunk.sample_ids(device)
    layout = StateLayout.of(model.config)
    labels = draw_labels(config, sample_ids, num_classes=model.config.num_classes)
    start = layout.normal(config.seed, _START_STREAMS, sample_ids)
    velocity = state_velocity(model)

    def step_noise(step: int) -> Float[Tensor, "batch elements"]:
        return layout.normal(config.seed, _STEP_STREAMS, sample_ids, draw=step, dtype=torch.float64)

    def in_precision(state: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            return velocity(state, t, labels)

    guided = GuidedModel(
        in_precision,
        labels,
        model.config.null_label,
        config.guidance,
        scales=layout.guidance_scales(config.guidance, device),
    )
    dynamics = Dynamics(guided, interpolant.score, step_noise)
    state = integrate(dynamics, start, solver=config.solver, num_steps=config.num_steps)
    # The class token only steered the image; it is not decoded.
    latents, _ = layout.unpack(state)
    images = codec.decode(latents.float(), rounding=config.rounding)
    return ImageBatch(images.cpu(), labels.cpu(), sample_ids.cpu(), chunk)
