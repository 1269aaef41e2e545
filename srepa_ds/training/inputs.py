"""What a run reads: data, codec, teachers and monitor, opened and checked to fit together."""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

from srepa_ds.alignment.gram_algorithms.triton import unavailable as triton_unavailable
from srepa_ds.codec.latent_codec import LatentCodec
from srepa_ds.codec.table import build_codec
from srepa_ds.config.experiment import Config
from srepa_ds.data.shards import ShardDataset
from srepa_ds.data.token_store import TokenStore
from srepa_ds.distributed import ranks
from srepa_ds.distributed.ranks import Rank
from srepa_ds.encoders.teacher import Teacher, load_teacher
from srepa_ds.errors import ConfigError, DataError, Fault
from srepa_ds.files import sha256_of
from srepa_ds.model.attention_backends import choose_backend
from srepa_ds.training.monitor import Monitor
from srepa_ds.training.stored_teachers import open_stores

Target = Teacher | TokenStore
"""Where the tokens of an alignment come from."""


class RunInputs(NamedTuple):
    """What a run reads and does not change."""

    dataset: ShardDataset
    codec: LatentCodec
    targets: tuple[Target, ...]
    monitor: Monitor
    identity: dict[str, str | None]
    """Hashes of what lies behind the configuration's paths."""


def open_inputs(config: Config, rank: Rank) -> RunInputs:
    """Returns what the run reads, all of it there and fitting together. Collective."""
    ranks.together(lambda: _check_attention(config, rank))
    images = ranks.together(lambda: ShardDataset(config.data.folder))
    codec = build_codec(config.codec)
    ranks.together(lambda: _check_data(config, images, codec))
    targets = ranks.together(lambda: _open_targets(config, images, rank))
    stores = [target for target in targets if isinstance(target, TokenStore)]
    dataset = ranks.together(lambda: ShardDataset(config.data.folder, stores))
    monitor = ranks.together(lambda: Monitor(config, codec, rank))
    return RunInputs(dataset, codec, targets, monitor, _identity(config, dataset))


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


def products_dtype(config: Config) -> torch.dtype:
    """Returns the dtype of the matrix products in attention and MLP."""
    return torch.float32 if config.engine.precision == "fp32" else torch.bfloat16


def _check_attention(config: Config, rank: Rank) -> None:
    """Raises ConfigError for an attention that cannot run here, before anything is built."""
    try:
        choose_backend(
            config.model.attention,
            device=rank.device,
            head_dim=config.model.head_dim,
            dtype=products_dtype(config),
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


def _open_targets(config: Config, dataset: ShardDataset, rank: Rank) -> tuple[Target, ...]:
    """Returns where each alignment's tokens come from; raises if their grids do not fit."""
    _, height, width = dataset.image_shape
    stores = open_stores(config, dataset)
    targets = tuple(
        store or load_teacher(alignment.teacher, resolution=(height, width), device=rank.device)
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
    faults += _triton_faults(config, rank.device)
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
