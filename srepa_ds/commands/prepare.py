"""`srepa-ds prepare CONFIG`: makes a data set of source images, a training and a held-out part.

Two passes, each shard by shard: the images, then their latents. Ranks share the shards. A finished
shard is kept whatever happens afterwards, and the same command writes the others.
"""

import logging
import os
from collections.abc import Sequence

from srepa_ds.codec.latent_codec import LatentCodec
from srepa_ds.codec.table import build_codec
from srepa_ds.data.shards import ShardDataset
from srepa_ds.distributed import ranks
from srepa_ds.distributed.ranks import Rank
from srepa_ds.preparation.agreement import check_source_latents
from srepa_ds.preparation.checks import check_wanted
from srepa_ds.preparation.config import PrepareConfig
from srepa_ds.preparation.estimate import Remaining, check_memory, check_space, remaining, size_text
from srepa_ds.preparation.job import Job
from srepa_ds.preparation.latents import as_codec, described_latents
from srepa_ds.preparation.outlook import outlook
from srepa_ds.preparation.parts import parts_of
from srepa_ds.preparation.share import EVERYTHING, Share
from srepa_ds.preparation.timing import Workers, expected_time

log = logging.getLogger("srepa_ds")


def prepare(config: PrepareConfig, *, share: Share = EVERYTHING) -> dict[str, ShardDataset]:
    """Returns the finished parts by name, written now or found prepared with these settings.

    Runs on every rank. A part that other shares have not finished yet is left out. Raises, on all
    ranks, ConfigError for settings that cannot work, DataError for a source that cannot be read,
    OutputError for a folder that cannot be written to or holds something else, or is too small.
    """
    jobs = _jobs(config, share, ranks.initialize())
    _check_same_source(jobs)
    # All parts are checked first, so that a conflict in one leaves the others unwritten.
    ranks.on_main(_check, config, jobs)
    finished = [job for job in jobs if job.run()]
    _advise(jobs[0])
    return {job.part.name: ranks.together(ShardDataset, job.folder.folder) for job in finished}


def dry_run(config: PrepareConfig, *, ranks_here: int = 1) -> str:
    """Returns what `prepare` would do on `ranks_here` ranks of this machine; writes nothing.

    Raises what `prepare` raises before it writes.
    """
    jobs = _jobs(config, EVERYTHING, ranks.initialize())
    _check_before(config, jobs, ranks_here=ranks_here)
    return outlook(config, jobs, ranks_here=ranks_here)


@ranks.collective
def _jobs(config: PrepareConfig, share: Share, rank: Rank) -> list[Job]:
    source = config.source.opened()
    check_wanted(config, source.latents)
    parts = parts_of(config, source)
    codec = _codec(config, rank)
    image_shape = (3, config.image_size, config.image_size)
    latents = described_latents(config.latents, codec, source.latents, image_shape=image_shape)
    return [Job(config, source, part, codec, latents, share, rank) for part in parts]


def _check_same_source(jobs: Sequence[Job]) -> None:
    """Checks that all ranks would write the same data set; raises ConfigError on all otherwise."""
    ranks.check_same(
        {job.part.name: job.part.description.dataset_id for job in jobs},
        what="ranks see different files in the source; give all of them the same copy",
    )


def _check(config: PrepareConfig, jobs: Sequence[Job]) -> None:
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    missing = _check_before(config, jobs, ranks_here=ranks_here)
    if num_bytes := sum(one.num_bytes for one in missing):
        log.info(
            "%s: %s images and %s files of latents to write, about %s",
            config.output,
            f"{sum(one.num_images for one in missing):,}",
            f"{sum(one.num_latent_files for one in missing):,}",
            size_text(num_bytes),
        )
        own = missing
        if jobs[0].share.total > 1:
            own = [remaining(job, share_alone=True) for job in jobs]
        workers = Workers(ranks.world_size(), config.threads_for(ranks_here), ranks_here)
        if time := expected_time(jobs, own, workers):
            log.info("%s", time)


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


def _check_before(
    config: PrepareConfig, jobs: Sequence[Job], *, ranks_here: int
) -> list[Remaining]:
    missing = [remaining(job) for job in jobs]
    unfinished = [
        job
        for job, one in zip(jobs, missing, strict=True)
        if one.num_shards or one.num_latent_files
    ]
    if unfinished:
        check_memory(config, unfinished, ranks_here=ranks_here)
        check_space(config, missing)
        _check_codec(unfinished[0])
    return missing


def _codec(config: PrepareConfig, rank: Rank) -> LatentCodec | None:
    if config.latents is None:
        return None
    return build_codec(config.latents.codec, device=rank.device)
