"""Says what a preparation would do: the text of `srepa-ds prepare CONFIG --dry-run`."""

from collections.abc import Sequence

from srepa_ds.errors import listed
from srepa_ds.preparation.config import PrepareConfig
from srepa_ds.preparation.estimate import (
    Remaining,
    free_bytes,
    memory_per_rank,
    remaining,
    size_text,
)
from srepa_ds.preparation.job import Job
from srepa_ds.preparation.timing import Workers, expected_time

_CLASSES_NAMED = 3


def outlook(config: PrepareConfig, jobs: Sequence[Job], *, ranks_here: int) -> str:
    """Returns what is there, what is missing, and what it takes; writes nothing.

    Raises OutputError if a part's folder holds another data set.
    """
    missing = [remaining(job) for job in jobs]
    needed = sum(one.num_bytes for one in missing)
    about = "" if config.pixels in ("raw", None) else "about "
    to_write = f"{about}{size_text(needed)} to write" if needed else "nothing to write"
    memory = max(memory_per_rank(job, ranks_here=ranks_here) for job in jobs)
    threads = config.threads_for(ranks_here)
    ranks = f"{ranks_here} ranks" if ranks_here > 1 else "1 rank"
    lines = [
        f"source   {config.source.kind}: {_source(jobs[0])}",
        f"images   {config.image_size} x {config.image_size} px, {config.pixels or 'not stored'}",
        f"latents  {_latents(jobs[0])}",
        *(_part(job, one) for job, one in zip(jobs, missing, strict=True)),
        f"disk     {to_write}, {size_text(free_bytes(config.output))} free",
        f"memory   {size_text(memory)} for a shard in each rank; {ranks}, {threads} threads each",
    ]
    workers = Workers(ranks_here, threads, ranks_here)
    if time := expected_time(jobs, missing, workers):
        lines.append(f"time     {time}")
    return "\n".join(lines)


def _source(job: Job) -> str:
    names = job.source.class_names
    classes = listed(names, most=_CLASSES_NAMED)
    return f"{len(job.source.labels):,} images in {len(names):,} classes ({classes})"


def _latents(job: Job) -> str:
    described = job.latents
    if described is None:
        return "none"
    encoded = f"by codec {described.codec.get('kind', 'stored')}"
    origin = encoded if job.source.latents is None else "of the source"
    mirrored = ", mirrored ones too" if described.mirrored else ""
    shape = " x ".join(map(str, described.latent_shape))
    return f"{described.values} of {shape}, {described.dtype}, {origin}{mirrored}"


def _part(job: Job, missing: Remaining) -> str:
    place = job.folder.folder
    shards = f"{job.num_pieces:,} shard{'s' if job.num_pieces > 1 else ''}"
    text = f"{job.part.name:8} {place}: {len(job.part.indices):,} images, {shards}"
    if not missing.num_shards and not missing.num_latent_files:
        return f"{text}; finished"
    counts = {"shard": missing.num_shards, "file of latents": missing.num_latent_files}
    todo = [_counted(count, what) for what, count in counts.items() if count]
    return f"{text}; {' and '.join(todo)} missing, {size_text(missing.num_bytes)}"


def _counted(count: int, what: str) -> str:
    noun, *rest = what.split(" ")
    return " ".join([f"{count:,}", noun + "s" * (count != 1), *rest])
