"""Opens the inputs of a run (data, codec, teachers, monitor) and checks that they fit together."""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from srepa_ds.alignment.gram_algorithms.triton import unavailable as triton_unavailable
from srepa_ds.codec.latent_codec import LatentCodec
from srepa_ds.codec.table import build_codec
from srepa_ds.config.experiment import Config
from srepa_ds.data.contents import (
    CHECKED_NAME,
    ContentCheck,
    IndexedFile,
    are_small,
    check_contents,
)
from srepa_ds.data.mirror import check_mirror
from srepa_ds.data.shards import Parts, ShardDataset
from srepa_ds.data.token_store import TokenStore
from srepa_ds.distributed import ranks
from srepa_ds.distributed.ranks import Rank
from srepa_ds.encoders.teacher import Teacher, load_teacher
from srepa_ds.errors import ConfigError, DataError, Fault
from srepa_ds.interpolant import INTERPOLANTS
from srepa_ds.model.attention_backends import choose_backend
from srepa_ds.model.precision import PRECISIONS
from srepa_ds.training.content_watch import is_first_on_machine
from srepa_ds.training.heldout import HeldoutLoss
from srepa_ds.training.latent_fit import fitting_latent_shape
from srepa_ds.training.monitor import Monitor
from srepa_ds.training.stored_teachers import open_stores, weights_hash

log = logging.getLogger("srepa_ds")

Target = Teacher | TokenStore
"""The source of the tokens of an alignment."""


class RunInputs(NamedTuple):
    """The inputs of a run, which it only reads."""

    dataset: ShardDataset
    codec: LatentCodec
    targets: tuple[Target, ...]
    monitor: Monitor
    identity: dict[str, str | None]
    """Hashes of the files behind the configuration's paths."""
    content_check: ContentCheck | None
    """To start beside the training; None if the data are small and were compared at once."""


def open_inputs(config: Config, rank: Rank) -> RunInputs:
    """Returns the inputs of a run. Collective: an error on one rank is raised on all."""
    _check_attention(config, rank)
    codec = ranks.together(build_codec, config.codec, device=rank.device)
    samples = _open_samples(config, codec)
    targets = _open_targets(config, samples, rank)
    stores = [target if isinstance(target, TokenStore) else None for target in targets]
    dataset = _open_parts(config, samples, codec, targets, stores)
    monitor = _build_monitor(config, codec, rank)
    check = _check_contents(dataset, stores, monitor)
    return RunInputs(dataset, codec, targets, monitor, _identity(config, dataset, codec), check)


def _check_contents(
    dataset: ShardDataset, stores: Sequence[TokenStore | None], monitor: Monitor
) -> ContentCheck | None:
    """Compares small data with their index at once; returns the check of large data.

    Collective. Raises DataError for a damaged file.
    """
    of_stores = (file for store in stores if store is not None for file in store.indexed_files)
    files = tuple(dict.fromkeys((*dataset.indexed_files, *of_stores, *monitor.indexed_files)))
    # Agreed, because machines may hold copies of other sizes; that is found out later.
    if ranks.any_rank(not are_small(files)):
        return ContentCheck(files, remembered_in=dataset.folder / CHECKED_NAME)
    ranks.together(_compare, files)
    return None


def _compare(files: Iterable[IndexedFile]) -> None:
    """Checks the files on one rank of each machine, which may have its own copies."""
    if is_first_on_machine():
        for file in files:
            check_contents(file)


@ranks.collective
def _identity(config: Config, dataset: ShardDataset, codec: LatentCodec) -> dict[str, str | None]:
    """Returns hashes of the files behind the configuration's paths; a run resumes on equal ones."""
    return {
        "data": dataset.index.dataset_id,
        "data.shards": _contents(entry.sha256 for entry in dataset.index.shards),
        "data.latents": _latents(dataset, codec),
        "codec": json.dumps(codec.space, sort_keys=True),
        **{
            f"alignments.{number}.teacher": weights_hash(alignment.teacher)
            for number, alignment in enumerate(config.alignments)
        },
    }


def _latents(dataset: ShardDataset, codec: LatentCodec) -> str | None:
    """Returns a hash of the hashes of the latents that are read, None if none are."""
    if dataset.latents is None or not codec.reads_moments:
        return None
    return _contents(entry.sha256 for entry in dataset.latents.files)


def _contents(hashes: Iterable[str]) -> str:
    """Returns a hash of files' hashes: equal settings may have prepared other pictures.

    Small data were compared with these hashes by now. For large data they are the index's word,
    until `ContentCheck` has compared them; a run on other contents stops.
    """
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]


@ranks.collective
def _check_attention(config: Config, rank: Rank) -> None:
    """Checks that the attention backend can run here, before anything is built.

    Raises ConfigError.
    """
    try:
        choose_backend(
            config.model.attention,
            device=rank.device,
            head_dim=config.model.head_dim,
            dtype=PRECISIONS[config.engine.precision].products,
        )
    except ConfigError as error:
        raise ConfigError("configuration", error.faults) from error


@ranks.collective
def _open_samples(config: Config, codec: LatentCodec) -> ShardDataset:
    """Returns the data to train on; raises DataError unless they fit the codec and the model."""
    dataset = ShardDataset(config.data.folder)
    if config.data.mirror and codec.reads_moments:
        check_mirror(dataset)
    latent_shape = fitting_latent_shape(dataset, codec)
    if codec.reads_moments and dataset.latents is None:
        log.info(
            "%s holds no latents: images are encoded in every step; `srepa-ds prepare` with a "
            "section `latents` does it once",
            dataset.folder,
        )
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
        # The null label is a row of the model's table, so training on it would raise no error.
        raise DataError(
            f"{config.data.folder}: sample {int(wrong[0])} and {len(wrong) - 1} others have labels "
            f"outside 0 to {classes - 1}; prepare the data again"
        )
    return dataset


@ranks.collective
def _open_parts(
    config: Config,
    samples: ShardDataset,
    codec: LatentCodec,
    targets: Sequence[Target],
    stores: Sequence[TokenStore | None],
) -> ShardDataset:
    """Returns the data, of which only those parts are read that training needs.

    Raises DataError if a teacher needs images and the data hold none.
    """
    reads_moments = codec.reads_moments and samples.latents is not None
    needs_images = [isinstance(target, Teacher) for target in targets]
    if any(needs_images):
        number = needs_images.index(True)
        samples.require_images(f"the teacher of alignments.{number} looks at images")
    parts = Parts(images=any(needs_images) or not reads_moments, moments=reads_moments)
    return ShardDataset(config.data.folder, stores, parts=parts)


@ranks.collective
def _build_monitor(config: Config, codec: LatentCodec, rank: Rank) -> Monitor:
    return Monitor(
        config.monitor,
        model=config.model,
        codec=codec,
        interpolant=INTERPOLANTS[config.objective.interpolant.path],
        sampler=config.sample,
        evaluate=config.evaluate,
        heldout=_heldout_loss(config, codec, rank) if config.monitor.heldout_every_steps else None,
        rank=rank,
    )


def _heldout_loss(config: Config, codec: LatentCodec, rank: Rank) -> HeldoutLoss:
    assert config.monitor.heldout is not None
    teacher = None
    if config.model.class_token_width is not None:
        pixels = ShardDataset(config.monitor.heldout).image_shape[1:]
        teacher = load_teacher(config.alignments[0].teacher, resolution=pixels, device=rank.device)
    return HeldoutLoss(
        config.monitor,
        config.monitor.heldout,
        model=config.model,
        codec=codec,
        interpolant=INTERPOLANTS[config.objective.interpolant.path],
        teacher=teacher,
        rank=rank,
    )


@ranks.collective
def _open_targets(config: Config, dataset: ShardDataset, rank: Rank) -> tuple[Target, ...]:
    """Returns each alignment's teacher or store; raises ConfigError if a grid does not fit."""
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
