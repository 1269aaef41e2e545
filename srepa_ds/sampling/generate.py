"""Generated images as an iterable: each one a function of the seed and its index alone."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from srepa_ds.codec.latent_codec import LatentCodec
from srepa_ds.codec.quantised import BrokenImagesError, refuse_broken_rows
from srepa_ds.distributed.devices import tensor_float32
from srepa_ds.distributed.heartbeat import moved
from srepa_ds.errors import DataError
from srepa_ds.interpolant import Interpolant
from srepa_ds.noise import NoiseStream
from srepa_ds.sampling.config import SamplerConfig
from srepa_ds.sampling.guidance import GuidedModel, VelocityModel
from srepa_ds.sampling.labels import draw_labels
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


@dataclass(frozen=True)
class _Task:
    """Everything that decides the images of a set."""

    model: SamplingModel
    guide: SamplingModel | None
    codec: LatentCodec
    interpolant: Interpolant
    config: SamplerConfig
    labels: Tensor | None
    device: torch.device
    refuse_broken: bool


def generate(
    model: SamplingModel,
    codec: LatentCodec,
    interpolant: Interpolant,
    config: SamplerConfig,
    *,
    chunks: Iterable[Chunk],
    device: torch.device | str,
    guide: SamplingModel | None = None,
    labels: Int64[Tensor, " samples"] | None = None,
    refuse_broken: bool = False,
) -> Iterator[ImageBatch]:
    """Yields the images of `chunks`, one batch per chunk.

    `model`, and `guide` for autoguidance, are on `device`; they are called without gradient, in the
    arithmetic that `config.precision` names. `labels` gives every image of the set its class,
    instead of `config`. Nothing here communicates between ranks.

    With `refuse_broken`, raises DataError that names the first image with NaN or infinite values;
    without it, such values become any pixel.
    """
    task = _Task(
        model, guide, codec, interpolant, config, labels, torch.device(device), refuse_broken
    )
    for chunk in chunks:
        moved()
        with _arithmetic(task.device, config.precision):
            batch = _generate_chunk(task, chunk)
        yield batch


@contextmanager
def _arithmetic(device: torch.device, precision: str) -> Iterator[None]:
    """Sets whether float32 products may use TF32 while the block runs."""
    with tensor_float32(precision == "tf32") if device.type == "cuda" else nullcontext():
        yield


@torch.no_grad()
def _generate_chunk(task: _Task, chunk: Chunk) -> ImageBatch:
    config, sample_ids = task.config, chunk.sample_ids(task.device)
    model = task.model.config
    layout = StateLayout.of(model)
    labels = draw_labels(config, sample_ids, num_classes=model.num_classes, listed=task.labels)
    start = layout.normal(config.seed, _START_STREAMS, sample_ids)

    def step_noise(step: int) -> Float[Tensor, "batch elements"]:
        return layout.normal(config.seed, _STEP_STREAMS, sample_ids, draw=step, dtype=torch.float64)

    guided = GuidedModel(
        _in_precision(task.model, task),
        labels,
        model.null_label,
        config.guidance,
        scales=layout.guidance_scales(config.guidance, task.device),
        guide=None if task.guide is None else _in_precision(task.guide, task),
    )
    dynamics = Dynamics(guided, task.interpolant.score, step_noise)
    state = integrate(dynamics, start, solver=config.solver, num_steps=config.num_steps)
    # The class token only steered the image; it is not decoded.
    latents, _ = layout.unpack(state)
    images = _decoded(task, latents.float(), chunk)
    return ImageBatch(images.cpu(), labels.cpu(), sample_ids.cpu(), chunk)


def _in_precision(model: SamplingModel, task: _Task) -> VelocityModel:
    """Returns the velocity of a model under bf16 autocast, if that is asked for."""
    velocity, halves = state_velocity(model), task.config.precision == "bf16"

    def call(state: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(task.device.type, torch.bfloat16, enabled=halves):
            return velocity(state, t, labels)

    return call


def _decoded(
    task: _Task, latents: Float[Tensor, "batch channels height width"], chunk: Chunk
) -> UInt8[Tensor, "batch H W 3"]:
    """Returns the images of the latents of a chunk; raises DataError as `generate` does."""
    options = {"rounding": task.config.rounding}
    if not task.refuse_broken:
        return task.codec.decode(latents, **options)
    try:
        # Once per chunk: each look makes the host wait for the device.
        refuse_broken_rows(latents, "latents")
        return task.codec.decode(latents, **options, refuse_broken=True)
    except BrokenImagesError as error:
        first = chunk.start + error.rows[0]
        raise DataError(
            f"image {first} of the set: its {error.what} are NaN or infinite; "
            f"{len(error.rows)} of the {len(latents)} images of its chunk; draw with "
            "sample.precision=fp32 and codec.precision=fp32, or with weights from before the run "
            "diverged. Images that are already drawn stay"
        ) from error
