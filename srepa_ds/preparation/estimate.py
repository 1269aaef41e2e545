"""What a preparation will take: space on disk and memory, of which the first is checked before."""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from srepa_ds.data.pixels import BYTES_PER_VALUE
from srepa_ds.data.shard_index import CURE, DatasetDescription, LatentDescription
from srepa_ds.errors import ConfigError, Fault, OutputError
from srepa_ds.files import writing
from srepa_ds.preparation.config import PrepareConfig
from srepa_ds.preparation.image_pass import READ_PER_THREAD
from srepa_ds.preparation.job import Job
from srepa_ds.preparation.machine_memory import usable_memory

log = logging.getLogger("srepa_ds")

_COPIES = 1.2
"""A shard's bytes in memory: its samples, and what a list of them and the decoder take."""
_SURELY = 0.5
"""Of an estimate for encoded images: drawings take less than photographs, but rarely half."""
_LATENT_BYTES = {"fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Remaining:
    """What is missing of one part."""

    num_shards: int
    num_images: int
    image_bytes: int
    """Estimated for encoded images, exact for raw ones."""
    num_latent_files: int
    num_latents: int
    """Images whose latents are missing."""
    latent_bytes: int

    @property
    def num_bytes(self) -> int:
        """The bytes still to be written."""
        return self.image_bytes + self.latent_bytes


def remaining(job: Job, *, share_alone: bool = False) -> Remaining:
    """Returns what is missing of a part, or of the job's share of it alone; not collective.

    Raises OutputError if its folder holds another data set.
    """
    index = job.index()
    if job.is_finished(index):
        return Remaining(0, 0, 0, 0, 0, 0)
    images = [] if index is not None else job.missing_images()
    latents: list[int] = []
    if job.latents is not None:
        with_latents = set(job.shards()) - set(job.missing_latents(job.shards()))
        numbers = range(job.num_pieces) if index is None else job.shards()
        latents = [number for number in numbers if number not in with_latents]
    if share_alone:
        images, latents = job.of_share(images), job.of_share(latents)
    num_images = sum(map(job.part.num_images, images))
    num_latents = sum(map(job.part.num_images, latents))
    return Remaining(
        len(images),
        num_images,
        num_images * image_bytes(job.part.description),
        len(latents),
        num_latents,
        num_latents * latent_bytes(job.latents),
    )


def image_bytes(described: DatasetDescription) -> int:
    """Returns what the image of one sample takes on disk, estimated for encoded ones."""
    if described.pixels is None:
        return 0
    return int(prod(described.image_shape) * BYTES_PER_VALUE[described.pixels])


def latent_bytes(described: LatentDescription | None) -> int:
    """Returns what the latents of one sample take on disk."""
    if described is None:
        return 0
    values = prod(described.stored_shape) * (2 if described.mirrored else 1)
    return values * _LATENT_BYTES[described.dtype]


def memory_per_rank(job: Job, *, ranks_here: int) -> int:
    """Returns the memory that each of `ranks_here` ranks of a machine needs for a part.

    That is its largest shard and the images that wait to be encoded, the codec's own memory aside.
    """
    return _shard_memory(job) + _waiting_memory(job, ranks_here)


def _shard_memory(job: Job) -> int:
    largest = min(job.config.images_per_shard, len(job.part.indices))
    images, latents = image_bytes(job.part.description), latent_bytes(job.latents)
    one_sample = max(images, latents) if job.encodes else images + latents
    return int(_COPIES * largest * one_sample)


def _waiting_memory(job: Job, ranks_here: int) -> int:
    """Returns what images take that are read and not yet encoded; they are raw."""
    wanted, image = job.config.latents, prod(job.part.description.image_shape)
    if wanted is None or job.source.latents is not None:
        return 0
    # One batch is encoded while the next one is read.
    waiting = 2 * wanted.batch_size
    if not job.encodes:
        waiting += READ_PER_THREAD * job.config.threads_for(ranks_here)
    return waiting * image


def free_bytes(folder: Path) -> int:
    """Returns the free space where `folder` is or will be; raises OutputError."""
    with writing(folder, cure=CURE):
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        return shutil.disk_usage(there).free


def check_memory(config: PrepareConfig, jobs: Sequence[Job], *, ranks_here: int) -> None:
    """Checks that one shard for each rank of this machine fits into memory; raises ConfigError."""
    memory = usable_memory()
    needed = ranks_here * max(memory_per_rank(job, ranks_here=ranks_here) for job in jobs)
    if needed <= memory:
        return
    largest = min(config.images_per_shard, max(len(job.part.indices) for job in jobs))
    shard, waiting = max((_shard_memory(job), _waiting_memory(job, ranks_here)) for job in jobs)
    fit = int(largest * (memory / ranks_here - waiting) / (2 * shard))
    on_ranks = f" on each of {ranks_here} ranks" if ranks_here > 1 else ""
    reason = (
        f"a shard of {largest} images of {config.image_size} px takes "
        f"{size_text(needed // ranks_here)} of memory{on_ranks}, and this machine has "
        f"{size_text(memory)}; "
    )
    cure = f"set it to at most {fit}" if fit > 0 else "choose a smaller image_size"
    raise ConfigError("prepare", [Fault("samples_per_shard", reason + cure)])


def check_space(config: PrepareConfig, missing: Sequence[Remaining]) -> None:
    """Checks that the shards can fit on the disk; raises OutputError, and warns if it is close."""
    needed, free = sum(one.num_bytes for one in missing), free_bytes(config.output)
    about = "" if config.pixels in ("raw", None) else "about "
    text = f"{config.output}: needs {about}{size_text(needed)}, and {size_text(free)} are free"
    images = sum(one.image_bytes for one in missing)
    at_least = needed if config.pixels in ("raw", None) else needed - int(images * (1 - _SURELY))
    if at_least > free:
        raise OutputError(f"{text}; {CURE}, or a smaller image_size")
    if needed > free:
        log.warning("%s; finished shards stay if it does not suffice", text)


def size_text(num_bytes: int) -> str:
    """Returns a size for people, such as `1.2 GB`."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= 0.995 * size:
            return f"{num_bytes / size:,.{1 if num_bytes < 100 * size else 0}f} {unit}"
    return f"{num_bytes / 1e3:,.0f} KB"
