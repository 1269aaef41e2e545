"""`srepa-ds prepare CONFIG`: makes a data set of source images, a training and a held-out part.

Two passes, each shard by shard: the images, then their latents. Ranks share the shards. A finished
shard is kept whatever happens afterwards, and the same command writes the others.
"""

import logging
import os
from collections.abc import Sequence

from srepa_ds.codec.latent_codec import LatentCodec
from srepa_ds.codec.table import build_codec
from srepa_ds.data.pixels import BYTES_PER_VALUE
from srepa_ds.data.shards import ShardDataset
from srepa_ds.distributed import ranks
from srepa_ds.distributed.ranks import Rank
from srepa_ds.errors import ConfigError, Fault
from srepa_ds.preparation.agreement import check_source_latents
from srepa_ds.preparation.checks import check_wanted
from srepa_ds.preparation.config import PrepareConfig
from srepa_ds.preparation.job import Job
from srepa_ds.preparation.latents import as_codec, described_latents
from srepa_ds.preparation.parts import parts_of
from srepa_ds.preparation.share import EVERYTHING, Share

log = logging.getLogger("srepa_ds")

_COPIES = 3
"""A shard is in memory as images, as tensors, and as what safetensors writes."""


def prepare(config: PrepareConfig, *, share: Share = EVERYTHING) -> dict[str, ShardDataset]:
    """Returns the finished parts by name, written now or found prepared with these settings.

    Runs on every rank. A part that other shares have not finished yet is left out. Raises, on all
    ranks, ConfigError for settings that cannot work, DataError for a source that cannot be read,
    OutputError for a folder that cannot be written to or holds something else.
    """
    jobs = _jobs(config, share, ranks.initialize())
    # All parts are checked first, so that a conflict in one leaves the others unwritten.
    ranks.on_main(_check, jobs)
    finished = [job for job in jobs if job.run()]
    _advise(jobs[0])
    return {job.part.name: ranks.together(ShardDataset, job.folder.folder) for job in finished}


@ranks.collective
def _jobs(config: PrepareConfig, share: Share, rank: Rank) -> list[Job]:
    source = config.source.opened()
    check_wanted(config, source.latents)
    parts = parts_of(config, source)
    codec = _codec(config, rank)
    image_shape = (3, config.image_size, config.image_size)
    latents = described_latents(config.latents, codec, source.latents, image_shape=image_shape)
    return [Job(config, source, part, codec, latents, share, rank) for part in parts]


def _check(jobs: Sequence[Job]) -> None:
    unfinished = [job for job in jobs if not job.is_finished(job.index())]
    for job in unfinished:
        _check_memory(job.config, len(job.part.indices))
    if unfinished:
        _check_codec(unfinished[0])


def _check_codec(job: Job) -> None:
    """Checks that the codec is that of the source's latents, as far as it can be known."""
    if job.source.latents is None or job.latents is None or job.codec is None:
        return
    if not job.codec.identity:
        return
    size = job.config.image_size
    if not check_source_latents(job.source, job.codec, job.latents, image_size=size):
        log.warning("latents.codec: not compared with the source's latents, which have no images")


def _advise(job: Job) -> None:
    """Says how to train on latents whose codec is not known here."""
    facts = job.source.latents.facts if job.source.latents is not None else {}
    codec = as_codec(facts)
    if codec is not None and not (job.codec and job.codec.identity):
        log.info("train on these latents with\n%s", codec)


def _check_memory(config: PrepareConfig, num_images: int) -> None:
    """Checks that one shard of a part fits into memory; raises ConfigError."""
    image_bytes = int(3 * config.image_size**2 * BYTES_PER_VALUE[config.pixels or "raw"])
    largest = min(config.images_per_shard, num_images)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if _COPIES * largest * image_bytes > memory:
        fit = memory // (2 * _COPIES * image_bytes)
        reason = (
            f"a shard of {largest} images of {config.image_size} px takes "
            f"{largest * image_bytes / 1e9:,.0f} GB, and this machine has {memory / 1e9:,.0f} GB; "
        )
        cure = f"set it to at most {fit}" if fit else "choose a smaller image_size"
        raise ConfigError("prepare", [Fault("samples_per_shard", reason + cure)])


def _codec(config: PrepareConfig, rank: Rank) -> LatentCodec | None:
    if config.latents is None:
        return None
    return build_codec(config.latents.codec, device=rank.device)
