"""`srepa-ds prepare EXPERIMENT --teacher`: stores teachers' tokens beside the shards.

A frozen teacher's tokens are a function of the image alone, so a small student need not wait for
them in every epoch.
"""

import itertools
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from srepa_ds.alignment.alignment import AlignmentConfig
from srepa_ds.config.experiment import Config
from srepa_ds.console import steps_shown
from srepa_ds.data.contents import check_contents
from srepa_ds.data.shards import Parts, ShardDataset
from srepa_ds.data.stored_tokens import StoredTokens, as_stored
from srepa_ds.data.token_index import TokenDescription, TokenFileEntry, is_finished
from srepa_ds.data.token_writer import TokenStoreWriter, claimed
from srepa_ds.distributed import ranks
from srepa_ds.distributed.heartbeat import moved
from srepa_ds.distributed.ranks import Rank
from srepa_ds.encoders.teacher import Teacher, load_teacher
from srepa_ds.errors import ConfigError, DataError, Fault, OutputError
from srepa_ds.training.stored_teachers import open_store, store_folder, teacher_identity

log = logging.getLogger("srepa_ds")

_SHOWN_IDS = 5
_GB = 1e9


def store_tokens(config: Config, *, batch_size: int = 64) -> tuple[Path, ...]:
    """Returns the stores of all alignments with `stored_tokens`, written now or found finished.

    Runs on every rank; the ranks share the shards. A store that an interrupted run began is
    completed. `batch_size` images pass through a teacher at a time. The log says first how much
    will be written. Raises SRepaError on all ranks: ConfigError if there is no such alignment,
    OutputError for too little disk or another process that writes the same store, DataError for
    tokens that are not finite or a damaged shard.
    """
    rank = ranks.initialize()
    dataset = ranks.together(ShardDataset, config.data.folder, parts=Parts(moments=False))
    ranks.together(dataset.require_images, "the teacher looks at images")
    wanted = _stores_wanted(config, dataset)
    unfinished = _unfinished(wanted, dataset)
    with ExitStack() as claims:
        _claim(unfinished, claims)
        jobs = _jobs({folder: wanted[folder] for folder in unfinished}, dataset, rank)
        missing = _announce(jobs, dataset)
        for job, numbers in zip(jobs, missing, strict=True):
            entries = ranks.gather(_write_files(job, numbers, dataset, rank, batch_size))
            ranks.on_main(job.writer.finish, itertools.chain(*entries))
            log.info("%s: finished", job.writer.folder)
    return tuple(wanted)


@dataclass(frozen=True)
class _Wanted:
    """A store that the experiment asks for."""

    alignment: AlignmentConfig
    identity: dict[str, Any]


class _Job(NamedTuple):
    """A store to write, and the teacher whose tokens it takes."""

    writer: TokenStoreWriter
    teacher: Teacher


class _Piece(NamedTuple):
    """Samples of one shard that pass through the teacher together."""

    shard: int
    samples: range


@ranks.collective
def _stores_wanted(config: Config, dataset: ShardDataset) -> dict[Path, _Wanted]:
    """Returns the stores that the experiment asks for, by folder, each once."""
    height, width = dataset.image_shape[1:]
    wanted = {}
    for alignment in config.alignments:
        if alignment.stored_tokens is not None:
            identity = teacher_identity(alignment.teacher, image_size=(height, width))
            folder = store_folder(dataset.folder, alignment, identity)
            wanted[folder] = _Wanted(alignment, identity)
    if not wanted:
        reason = (
            "none has stored_tokens, so there is nothing to store; set "
            "alignments.0.stored_tokens=bf16 (or int8, half the size)"
            if config.alignments
            else "is empty, so there is no teacher whose tokens could be stored"
        )
        raise ConfigError("configuration", [Fault("alignments", reason)])
    return wanted


@ranks.main_rank_only
def _unfinished(wanted: Mapping[Path, _Wanted], dataset: ShardDataset) -> list[Path]:
    """Returns the folders still to be written; raises DataError for a damaged store."""
    for folder in filter(is_finished, wanted):
        open_store(folder, wanted[folder].identity, dataset)
        log.info("%s: already there, nothing to do", folder)
    return [folder for folder in wanted if not is_finished(folder)]


@ranks.main_rank_only
def _claim(folders: Sequence[Path], claims: ExitStack) -> None:
    """Keeps other processes out of `folders` until `claims` is left."""
    for folder in folders:
        claims.enter_context(claimed(folder))


@ranks.collective
def _jobs(stores: Mapping[Path, _Wanted], dataset: ShardDataset, rank: Rank) -> list[_Job]:
    return [_job(folder, wanted, dataset, rank) for folder, wanted in stores.items()]


def _job(folder: Path, wanted: _Wanted, dataset: ShardDataset, rank: Rank) -> _Job:
    height, width = dataset.image_shape[1:]
    teacher = load_teacher(wanted.alignment.teacher, resolution=(height, width), device=rank.device)
    storage = wanted.alignment.stored_tokens
    assert storage is not None
    description = TokenDescription(
        dataset_id=dataset.index.dataset_id,
        teacher=wanted.identity,
        storage=storage,
        grid=teacher.grid,
        width=teacher.width,
        has_cls=teacher.spec.has_cls,
    )
    return _Job(TokenStoreWriter(folder, description, dataset.index.shards), teacher)


@ranks.main_rank_only
def _announce(jobs: Sequence[_Job], dataset: ShardDataset) -> list[tuple[int, ...]]:
    """Logs how much will be written; returns the shards that each job still has to do.

    Raises OutputError if the disk has no room for it, DataError if a file holds the tokens of other
    images.
    """
    missing = [job.writer.missing() for job in jobs]
    for job, numbers in zip(jobs, missing, strict=True):
        _log_size(job.writer, numbers, num_images=len(dataset))
    needed = sum(_bytes_of(job.writer, numbers) for job, numbers in zip(jobs, missing, strict=True))
    free = shutil.disk_usage(dataset.folder).free
    if needed > free:
        wide = any(job.writer.description.storage == "bf16" for job in jobs)
        raise OutputError(
            f"{dataset.folder}: the tokens need {_gigabytes(needed)} GB and {_gigabytes(free)} GB "
            f"are free; make room, {'set stored_tokens=int8 instead of bf16, ' if wide else ''}"
            "or set stored_tokens=null"
        )
    return missing


def _log_size(writer: TokenStoreWriter, missing: Sequence[int], *, num_images: int) -> None:
    described, count = writer.description, len(writer.shards)
    done = count - len(missing)
    log.info(
        "%s: %d images x %d tokens x %d channels x %s, %s GB in all; writing %s GB%s",
        writer.folder,
        num_images,
        described.num_tokens,
        described.width,
        "2 bytes" if described.storage == "bf16" else "1 byte",
        _gigabytes(_bytes_of(writer, range(count))),
        _gigabytes(_bytes_of(writer, missing)),
        f", {done} of {count} files are there" if done else "",
    )


def _bytes_of(writer: TokenStoreWriter, numbers: Iterable[int]) -> int:
    return sum(map(writer.num_bytes, numbers))


def _gigabytes(size: int) -> str:
    return f"{size / _GB:,.1f}" if size >= _GB else f"{size / _GB:.2g}"


@ranks.collective
def _write_files(
    job: _Job, missing: Sequence[int], dataset: ShardDataset, rank: Rank, batch_size: int
) -> list[TokenFileEntry]:
    """Writes this rank's part of the missing files; returns its entries, of old and new files."""
    writer, left = job.writer, set(missing)
    done = [number for number in range(len(writer.shards)) if number not in left]
    entries = [writer.entry(number) for number in done[rank.number :: rank.world_size]]
    pieces = _pieces(dataset, missing[rank.number :: rank.world_size], batch_size)
    shown = steps_shown(pieces, total=len(pieces), what="batch", is_main=rank.is_main)
    for number, of_shard in itertools.groupby(shown, key=lambda piece: piece.shard):
        # The file will say that it holds the tokens of these contents.
        check_contents(dataset.indexed_files[number])
        tokens = (_tokens(job, dataset, piece.samples, rank.device) for piece in of_shard)
        writer.write(number, tokens)
        # Now, while the system still has the file in memory.
        entries.append(writer.entry(number))
    return entries


def _pieces(dataset: ShardDataset, numbers: Sequence[int], batch_size: int) -> list[_Piece]:
    """Returns the batches of some shards, the same whichever rank a shard falls to."""
    counts = [entry.num_samples for entry in dataset.index.shards]
    ends = list(itertools.accumulate(counts))
    return [
        _Piece(number, range(start, min(start + batch_size, ends[number])))
        for number in numbers
        for start in range(ends[number] - counts[number], ends[number], batch_size)
    ]


def _tokens(job: _Job, dataset: ShardDataset, samples: range, device: torch.device) -> StoredTokens:
    """Returns the tokens to store for some samples; raises DataError if they are not finite."""
    moved()
    described = job.writer.description
    batch = dataset.read(torch.arange(samples.start, samples.stop))
    found = job.teacher.tokens(batch.pixels.to(device))
    cls = found.cls if described.has_cls else None
    stored = as_stored(found.patches, cls, storage=described.storage)
    bad = [samples.start + row for row in (~stored.finite()).nonzero()[:, 0].tolist()]
    if bad:
        more = f" and {len(bad) - _SHOWN_IDS} more" if len(bad) > _SHOWN_IDS else ""
        raise DataError(
            f"{job.writer.folder.name}: the teacher's tokens of sample "
            f"{', '.join(map(str, bad[:_SHOWN_IDS]))}{more} are not finite; look at these "
            "images and at teacher.weights, or set teacher.dtype=fp32"
        )
    return stored.to("cpu")
