"""How long a preparation will take, measured on a few images of its source."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from srepa_ds.codec.latent_codec import LatentCodec
from srepa_ds.console import duration
from srepa_ds.data.decoding import decoded
from srepa_ds.data.images import center_crop
from srepa_ds.data.pixels import Pixels
from srepa_ds.data.shard_writer import as_stored
from srepa_ds.distributed import ranks
from srepa_ds.errors import DataError
from srepa_ds.preparation.estimate import Remaining
from srepa_ds.preparation.job import Job

_FEWEST = 1000
"""For fewer images nothing is measured: they are done before anybody has read the time."""
_MEASURED = 16
_MOST_SECONDS = 0.7
"""Of each measurement; large images and slow encoders are judged by fewer images, at least one."""


@dataclass(frozen=True)
class Workers:
    """The processes that share the work."""

    num_ranks: int
    """Of all machines."""
    threads: int
    """Images that each rank decodes at once."""
    ranks_here: int
    """Ranks that share the cores of this machine."""

    @property
    def busy_threads(self) -> float:
        """Threads that work at once: no more than there are cores."""
        cores = len(os.sched_getaffinity(0)) / self.ranks_here
        return self.num_ranks * min(float(self.threads), cores)

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.num_ranks} rank{'s' if self.num_ranks > 1 else ''} of {threads}"


def expected_time(
    jobs: Sequence[Job], missing: Sequence[Remaining], workers: Workers
) -> str | None:
    """Returns how long it will take: `about 12 min for the images, on 8 ranks of 2 threads`.

    None for fewer than 1,000 images, and where those that would be measured cannot be read. It
    supposes that the disk keeps up with all threads. Not collective.
    """
    num_images = sum(one.num_images for one in missing)
    num_latents = sum(one.num_latents for one in missing)
    if max(num_images, num_latents) < _FEWEST:
        return None
    try:
        per_image, pixels = _measured_images(jobs[0])
    except (DataError, MemoryError):
        # The preparation itself says which image it is, or leaves it out.
        return None
    texts = []
    if num_images:
        seconds = per_image * num_images / workers.busy_threads
        texts.append(f"{duration(seconds)} for the images")
    job = jobs[0]
    if num_latents and pixels and job.codec is not None and job.source.latents is None:
        seconds = _seconds_per_latent(job, job.codec, pixels) * num_latents
        texts.append(f"{duration(seconds / _encoders(job, workers))} for the latents")
    return f"about {', '.join(texts)}, on {workers}" if texts else None


def _measured_images(job: Job) -> tuple[float, list[Pixels]]:
    """Returns the seconds that one thread needs for an image, and the images that were measured.

    Raises DataError if one of them cannot be read.
    """
    total = len(job.part.indices)
    chosen = [number * total // _MEASURED for number in range(_MEASURED)]
    # The first one pays for what is loaded once.
    _prepared(job, int(job.part.indices[chosen[0]]))
    began, found = time.perf_counter(), []
    for place in chosen:
        found.append(_prepared(job, int(job.part.indices[place])))
        if time.perf_counter() - began > _MOST_SECONDS:
            break
    seconds = (time.perf_counter() - began) / len(found)
    return seconds, [pixels for pixels in found if pixels is not None]


def _prepared(job: Job, index: int) -> Pixels | None:
    """Does what the first pass does with an image, and returns its crop; raises DataError."""
    item, described = job.source.item(index), job.part.description
    if item.image is None or (described.pixels is None and job.source.latents is not None):
        return None
    image = decoded(item.image) if isinstance(item.image, bytes) else item.image
    pixels = center_crop(image, described.image_shape[1])
    as_stored(pixels, described)
    return pixels


def _seconds_per_latent(job: Job, codec: LatentCodec, pixels: Sequence[Pixels]) -> float:
    """Returns the seconds that a rank needs to encode an image, and the mirrored one if wanted."""
    assert job.config.latents is not None
    wanted = job.config.latents
    is_gpu = job.rank.device.type == "cuda"
    per_image = _seconds_to_encode(codec, pixels[:1])
    if is_gpu or per_image < _MOST_SECONDS:
        # The first one has paid for what is loaded once.
        per_image = _seconds_to_encode(codec, pixels[:1])
    if is_gpu or per_image * wanted.batch_size < _MOST_SECONDS:
        batch = [pixels[number % len(pixels)] for number in range(wanted.batch_size)]
        per_image = _seconds_to_encode(codec, batch) / len(batch)
    return per_image * (2 if wanted.mirrored else 1)


def _seconds_to_encode(codec: LatentCodec, pixels: Sequence[Pixels]) -> float:
    images = torch.stack([torch.from_numpy(one).permute(2, 0, 1) for one in pixels])
    began = time.perf_counter()
    # A GPU is waited for.
    codec.moments(images).cpu()
    return time.perf_counter() - began


def _encoders(job: Job, workers: Workers) -> int:
    """Returns how many encoders like the measured one work at once.

    In a dry run, one process measures for all ranks; on CPUs it has all cores for itself.
    """
    if job.rank.device.type == "cuda":
        return workers.num_ranks
    return min(workers.num_ranks, ranks.world_size())
