"""`srepa-ds teacher CONFIG`: trains a small ViT classifier to be a teacher.

`encoders.teacher` loads its weights like those of any published encoder.
"""

import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from jaxtyping import Float, Int64
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW

from srepa_ds.data.augment import NUM_CHOICES, distorted
from srepa_ds.data.loader import DataOrder
from srepa_ds.data.shards import Parts, ShardDataset
from srepa_ds.encoders.teacher import TEACHERS, Teacher, TeacherSpec, build_encoder
from srepa_ds.encoders.teacher_folder import claimed, finished_accuracy, save
from srepa_ds.errors import ConfigError, DataError, Fault, SRepaError
from srepa_ds.noise import NoiseStream, normal, uniform
from srepa_ds.schema import Section, one_of, to_tree

_BETAS = (0.9, 0.98)
_EVALUATION_BATCH = 256
_LOG_EVERY_STEPS = 50
log = logging.getLogger("srepa_ds")


class AugmentationConfig(Section):
    """Bounds on the distortion of training images, in both directions."""

    rotation: float = Field(default=0.1, ge=0)
    """Radians."""
    resize: float = Field(default=0.05, ge=0, lt=1)
    """Relative change of size."""
    slant: float = Field(default=0.08, ge=0)
    """Relative shear."""
    shift: float = Field(default=1.0, ge=0)
    """Pixels."""
    noise: float = Field(default=0.1, ge=0)
    """Standard deviation of the noise added to the normalised image."""


class EncoderConfig(Section):
    """The timm ViT to train; an alignment names its teacher in the same way."""

    name: Annotated[str, one_of("teacher", TEACHERS)] | None = None
    """A known teacher, or null if `spec` describes one."""
    spec: TeacherSpec | None = None
    """Any other timm ViT with as many classes as the data has, or null."""

    @model_validator(mode="after")
    def _one_teacher(self) -> "EncoderConfig":
        if (self.name is None) == (self.spec is None):
            raise ValueError("give exactly one of name and spec")
        return self

    @property
    def resolved(self) -> TeacherSpec:
        """The inline spec, or the row of `TEACHERS` that `name` stands for."""
        return TEACHERS[self.name] if self.name is not None else cast(TeacherSpec, self.spec)


class TeacherTrainingConfig(Section):
    """A small ViT, and its training as a classifier of shards."""

    kind: Literal["teacher"]
    """Tells this file from other configurations."""
    train: Path
    """Shards to train on."""
    heldout: Path
    """Shards to measure the accuracy on."""
    output: Path
    """Folder that receives `model.safetensors` and `teacher.json`."""
    encoder: EncoderConfig
    """The ViT to train."""
    steps: int = Field(ge=1)
    """Optimizer steps."""
    batch_size: int = Field(default=64, ge=1)
    """Images per step."""
    learning_rate: float = Field(default=3e-3, gt=0)
    """Peak learning rate: reached after warmup, then decays to zero as a cosine."""
    warmup_steps: int = Field(default=30, ge=0)
    """Steps over which the learning rate rises."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Decoupled weight decay."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Probability spread over all classes."""
    augmentation: AugmentationConfig = AugmentationConfig()
    """Distortion of the training images."""
    required_accuracy: float = Field(default=0.95, ge=0, le=1)
    """Held-out accuracy below which the teacher is not saved."""
    seed: int = Field(default=0, ge=0, lt=1 << 64)
    """Decides initial weights, order and augmentation."""


def train_teacher(config: TeacherTrainingConfig) -> float:
    """Returns the held-out accuracy of the teacher, trained now or found finished.

    Raises DataError, ConfigError or OutputError before training if something does not fit, and
    SRepaError if the teacher stays below the required accuracy; leaves nothing behind then.
    """
    only_images = Parts(moments=False)
    train = ShardDataset(config.train, parts=only_images)
    heldout = ShardDataset(config.heldout, parts=only_images)
    for dataset in (train, heldout):
        dataset.require_images("a teacher learns from images")
    _check_fit(config.encoder.resolved, train, heldout)
    identity = _identity(config, train, heldout)
    found = finished_accuracy(config.output, identity)
    if found is None:
        train.compare_if_small()
        heldout.compare_if_small()
    else:
        message = "%s: already trained with these settings, held-out accuracy %.1f %%"
        log.info(message, config.output, 100 * found)
        return found
    with claimed(config.output), _all_cores():
        started = time.perf_counter()
        teacher = _trained(config, train)
        accuracy = _accuracy(teacher, heldout)
        log.info("%s: held-out accuracy %.1f %%", config.output, 100 * accuracy)
        if accuracy < config.required_accuracy:
            raise SRepaError(
                f"the teacher recognises {100 * accuracy:.1f} % of {config.heldout}, less than "
                f"the required {100 * config.required_accuracy:.1f} %, and was not saved; "
                "train it longer (steps) or ask for less (required_accuracy)"
            )
        facts = {
            "heldout_accuracy": accuracy,
            "seconds": round(time.perf_counter() - started, 1),
            "identity": identity,
        }
        save(config.output, teacher.encoder, facts)
    return accuracy


def _check_fit(spec: TeacherSpec, train: ShardDataset, heldout: ShardDataset) -> None:
    channels, height, width = train.image_shape
    if train.image_shape != heldout.image_shape or train.num_classes != heldout.num_classes:
        raise DataError(
            f"{train.folder} holds {train.num_classes} classes of {train.image_shape} images and "
            f"{heldout.folder} {heldout.num_classes} of {heldout.image_shape}; "
            "give two parts of one data set"
        )
    if channels != 3 or height != width:
        raise DataError(f"{train.folder}: expected square RGB images, found {train.image_shape}")
    if spec.num_classes != train.num_classes:
        fault = f"is {spec.num_classes}, but {train.folder} holds {train.num_classes} classes"
        raise ConfigError("teacher", [Fault("encoder.spec.num_classes", fault)])


def _identity(
    config: TeacherTrainingConfig, train: ShardDataset, heldout: ShardDataset
) -> dict[str, Any]:
    """Returns everything that decides the weights, and no paths."""
    places = {"output", "train", "heldout", "encoder"}
    settings = {name: value for name, value in to_tree(config).items() if name not in places}
    ids = {"train_id": train.index.dataset_id, "heldout_id": heldout.index.dataset_id}
    return {**settings, "spec": to_tree(config.encoder.resolved), **ids}


def _trained(config: TeacherTrainingConfig, train: ShardDataset) -> Teacher:
    resolution = train.image_shape[1]
    encoder = build_encoder(config.encoder.resolved, resolution=resolution)
    teacher = Teacher(encoder, config.encoder.resolved, resolution=resolution, dtype=torch.float32)
    initialise(encoder, grid=teacher.grid, seed=config.seed)
    encoder.requires_grad_(True).train()
    optimizer = AdamW(encoder.parameters(), betas=_BETAS, weight_decay=config.weight_decay)
    order = DataOrder(seed=config.seed, num_samples=len(train))
    for step in range(config.steps):
        positions = torch.arange(step * config.batch_size, (step + 1) * config.batch_size)
        batch = train.read(order.sample_at(positions), positions=positions)
        images = _augmented(teacher.preprocess(batch.pixels), config, positions)
        loss = F.cross_entropy(
            encoder(images), batch.labels, label_smoothing=config.label_smoothing
        )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % _LOG_EVERY_STEPS == 0 or step + 1 == config.steps:
            log.info("step %d/%d  loss %.3f", step + 1, config.steps, loss.item())
    encoder.requires_grad_(False).eval()
    return teacher


def initialise(encoder: nn.Module, *, grid: tuple[int, int], seed: int) -> None:
    """Initialises a timm ViT as a function of `seed`, not of the process's random state.

    The position embedding starts as sines and cosines: learned from noise, it costs a small
    training several times its steps. The classifier starts at zero.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(encoder.named_parameters())
    for name, parameter in parameters.items():
        if parameter.ndim >= 2:
            nn.init.xavier_uniform_(parameter.data.flatten(1), generator=generator)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    nn.init.zeros_(parameters["head.weight"])
    if "pos_embed" in parameters:
        table = parameters["pos_embed"].data
        places = _sincos(*grid, table.shape[-1])
        table.zero_()
        table[:, -len(places) :] = places


def _sincos(rows: int, columns: int, width: int) -> Float[Tensor, "tokens width"]:
    """Returns waves of amplitude 1/2, 2 pi to 20 pi tokens long, because grids are small."""
    omega = 10.0 ** -(torch.arange(width // 4) / (width // 4))
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = torch.cat((x.flatten()[:, None] * omega, y.flatten()[:, None] * omega), dim=1)
    return 0.5 * torch.cat((torch.sin(angles), torch.cos(angles)), dim=1)


def learning_rate(config: TeacherTrainingConfig, step: int) -> float:
    """Returns the learning rate of a step (counted from 0): linear warmup, then half a cosine."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    left = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * left))


def _augmented(
    images: Float[Tensor, "batch 3 height width"],
    config: TeacherTrainingConfig,
    positions: Int64[Tensor, " batch"],
) -> Float[Tensor, "batch 3 height width"]:
    amount = config.augmentation
    choices = uniform(config.seed, NoiseStream.AUGMENTATION, positions, (NUM_CHOICES,))
    noise = normal(config.seed, NoiseStream.AUGMENTATION, positions, (1, *images.shape[2:]), draw=1)
    images = distorted(
        images,
        choices,
        rotation=amount.rotation,
        resize=amount.resize,
        slant=amount.slant,
        shift=amount.shift,
    )
    return images + amount.noise * noise


def _accuracy(teacher: Teacher, dataset: ShardDataset) -> float:
    correct = 0
    for indices in torch.arange(len(dataset)).split(_EVALUATION_BATCH):
        batch = dataset.read(indices)
        logits = teacher.features(batch.pixels).logits
        assert logits is not None
        correct += int((logits.argmax(dim=1) == batch.labels).sum())
    return correct / len(dataset)


@contextmanager
def _all_cores() -> Iterator[None]:
    """Uses every core this process may run on, unless the user has set OMP_NUM_THREADS."""
    before = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ and hasattr(os, "sched_getaffinity"):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
