"""`srepa-ds prepare EXPERIMENT --teacher`: teachers' tokens stored beside the shards.

A frozen teacher's tokens are a function of the image alone, so a small student need not wait for
them in every epoch.
"""

import itertools
import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from srepa_ds.alignment.alignment import AlignmentConfig
from srepa_ds.config.experiment import Config
from srepa_ds.console import steps_shown
from srepa_ds.data.shards import ShardDataset
from srepa_ds.data.stored_tokens import StoredTokens, as_stored
from srepa_ds.data.token_index import (
    TokenDescription,
    TokenFileEntry,
    is_finished,
    token_file_name,
)
from srepa_ds.data.token_writer import (
    entry_of,
    file_bytes,
    is_written,
    write_token_index,
    write_tokens,
)
from srepa_ds.distributed import ranks
from srepa_ds.distributed.ranks import Rank
from srepa_ds.encoders.teacher import Teacher, load_teacher
from srepa_ds.errors import ConfigError, DataError, Fault, OutputError
from srepa_ds.files import locked, make_folder, remove_empty
from srepa_ds.training.stored_teachers import open_store, store_folder, teacher_identity

log = logging.getLogger("srepa_ds")

_SHOWN_IDS = 5
_GB = 1e9


def store_tokens(config: Config, *, batch_size: int = 64) -> tuple[Path, ...]:
    """Returns the folders with the tokens of every alignment that asks for stored ones.

    Runs on every rank; shards are dealt out among them. Finished stores are left alone, and what
    an interrupted run finished is kept. `batch_size` images pass through a teacher at a time. Says
    first how much it will write. Raises SRepaError on all ranks alike: ConfigError without such an
    alignment, OutputError for too little disk or another process that stores the same tokens,
    DataError for tokens that are not finite.
    """
    rank = ranks.initialize()
    dataset = ranks.together(lambda: ShardDataset(config.data.folder))
    wanted = ranks.together(lambda: _wanted(config, dataset))
    unfinished = ranks.on_main(lambda: _unfinished(wanted, dataset))
    with ExitStack() as stack:
        ranks.on_main(lambda: _claim(unfinished, stack))
        jobs = ranks.together(
            lambda: [_job(folder, wanted[folder], dataset, rank) for folder in unfinished]
        )
        missing = ranks.on_main(lambda: _announced(jobs, dataset))
        for job, numbers in zip(jobs, missing, strict=True):
            _write_store(job, numbers, dataset, rank, batch_size)
    return tuple(wanted)


@dataclass(frozen=True)
class _Wanted:
    """What one store is of."""

    alignment: AlignmentConfig
    identity: dict[str, Any]


@dataclass(frozen=True)
class _Job:
    """One store to write."""

    folder: Path
    teacher: Teacher
    described: TokenDescription

    def path(self, number: int) -> Path:
        """Returns the file that goes with shard `number`."""
        return self.folder / token_file_name(number)

    def tokens(self, dataset: ShardDataset, samples: range, device: torch.device) -> StoredTokens:
        """Returns what is stored of some samples; raises DataError if it is not finite."""
        batch = dataset.read(torch.arange(samples.start, samples.stop))
        found = self.teacher.tokens(batch.pixels.to(device))
        cls = found.cls if self.described.has_cls else None
        stored = as_stored(found.patches, cls, storage=self.described.storage)
        self._check_finite(stored, samples)
        return stored.to("cpu")

    def _check_finite(self, stored: StoredTokens, samples: range) -> None:
        finite = stored.patches_float32().isfinite().flatten(1).all(1)
        if stored.cls is not None:
            finite = finite & stored.cls.isfinite().all(1)
        bad = [samples.start + row for row in (~finite).nonzero()[:, 0].tolist()]
        if bad:
            more = f" and {len(bad) - _SHOWN_IDS} more" if len(bad) > _SHOWN_IDS else ""
            raise DataError(
                f"{self.folder.name}: the teacher's tokens of sample "
                f"{', '.join(map(str, bad[:_SHOWN_IDS]))}{more} are not finite; look at these "
                "images and at teacher.weights, or set teacher.dtype=fp32"
            )


class _Piece(NamedTuple):
    """Samples of one shard that pass through the teacher together."""

    shard: int
    samples: range


def _wanted(config: Config, dataset: ShardDataset) -> dict[Path, _Wanted]:
    """Returns the stores that the experiment asks for, by folder, none twice."""
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


def _unfinished(wanted: Mapping[Path, _Wanted], dataset: ShardDataset) -> list[Path]:
    """Returns the folders that are still to be written; raises DataError for a damaged one."""
    for folder in filter(is_finished, wanted):
        open_store(folder, wanted[folder].identity, dataset)
        log.info("%s: already there, nothing to do", folder)
    return [folder for folder in wanted if not is_finished(folder)]


def _claim(folders: Sequence[Path], stack: ExitStack) -> None:
    """Makes the folders, and keeps other processes out of them until `stack` is left.

    What is empty then is removed. Raises OutputError.
    """
    for folder in folders:
        try:
            made = make_folder(folder)
            stack.enter_context(locked(folder))
        except BlockingIOError as error:
            raise OutputError(
                f"{folder}: another process is storing these tokens; wait for it or end it, then "
                "run the same command again"
            ) from error
        except OSError as error:
            raise _unwritable(folder, error) from error
        stack.callback(remove_empty, made)


def _job(folder: Path, wanted: _Wanted, dataset: ShardDataset, rank: Rank) -> _Job:
    height, width = dataset.image_shape[1:]
    teacher = load_teacher(wanted.alignment.teacher, resolution=(height, width), device=rank.device)
    storage = wanted.alignment.stored_tokens
    assert storage is not None
    described = TokenDescription(
        dataset_id=dataset.index.dataset_id,
        teacher=wanted.identity,
        storage=storage,
        grid=teacher.grid,
        width=teacher.width,
        has_cls=teacher.spec.has_cls,
    )
    return _Job(folder, teacher, described)


def _announced(jobs: Sequence[_Job], dataset: ShardDataset) -> list[tuple[int, ...]]:
    """Returns the shards whose tokens are missing, for each job, having said how much that is.

    Raises OutputError if the disk has no room for it, DataError if some are of other images.
    """
    shards = dataset.index.shards
    missing, needed = [], 0
    for job in jobs:
        numbers = tuple(
            number
            for number, shard in enumerate(shards)
            if not is_written(job.path(number), job.described, shard)
        )
        sizes = [file_bytes(job.described, shard) for shard in shards]
        size = sum(sizes[number] for number in numbers)
        kept = len(shards) - len(numbers)
        log.info(
            "%s: %d images x %d tokens x %d channels x %s, %s GB in all; writing %s GB%s",
            job.folder,
            len(dataset),
            job.described.num_tokens,
            job.described.width,
            "2 bytes" if job.described.storage == "bf16" else "1 byte",
            _gigabytes(sum(sizes)),
            _gigabytes(size),
            f", {kept} of {len(shards)} files are there" if kept else "",
        )
        missing.append(numbers)
        needed += size
    free = shutil.disk_usage(dataset.folder).free
    if needed > free:
        wide = any(job.described.storage == "bf16" for job in jobs)
        raise OutputError(
            f"{dataset.folder}: the tokens need {_gigabytes(needed)} GB and {_gigabytes(free)} GB "
            f"are free; make room, {'set stored_tokens=int8 instead of bf16, ' if wide else ''}"
            "or set stored_tokens=null"
        )
    return missing


def _gigabytes(size: int) -> str:
    return f"{size / _GB:,.1f}" if size >= _GB else f"{size / _GB:.2g}"


def _write_store(
    job: _Job, missing: tuple[int, ...], dataset: ShardDataset, rank: Rank, batch_size: int
) -> None:
    """Writes what is missing of a store, and its index when every file is there."""
    entries = ranks.together(lambda: _write_files(job, missing, dataset, rank, batch_size))
    files = sorted(itertools.chain(*ranks.gather(entries)), key=lambda entry: entry.file)
    ranks.on_main(lambda: _write_index(job, files))
    log.info("%s: finished", job.folder)


def _write_files(
    job: _Job, missing: tuple[int, ...], dataset: ShardDataset, rank: Rank, batch_size: int
) -> list[TokenFileEntry]:
    """Returns the entries of this rank's files, old and new."""
    shards = dataset.index.shards
    kept = [number for number in range(len(shards)) if number not in set(missing)]
    mine = kept[rank.number :: rank.world_size]
    entries = [entry_of(job.path(number), shards[number]) for number in mine]
    pieces = _pieces(dataset, missing[rank.number :: rank.world_size], batch_size)
    shown = steps_shown(pieces, total=len(pieces), what="batch", is_main=rank.is_main)
    for number, of_shard in itertools.groupby(shown, key=lambda piece: piece.shard):
        path, shard = job.path(number), shards[number]
        tokens = (job.tokens(dataset, piece.samples, rank.device) for piece in of_shard)
        try:
            write_tokens(path, job.described, shard, tokens)
            # Now, while the system still has it in memory.
            entries.append(entry_of(path, shard))
        except OSError as error:
            raise _unwritable(path, error) from error
    return entries


def _pieces(dataset: ShardDataset, numbers: Sequence[int], batch_size: int) -> list[_Piece]:
    """Returns the batches of some shards; the same ones whichever rank a shard falls to."""
    counts = [entry.num_samples for entry in dataset.index.shards]
    ends = list(itertools.accumulate(counts))
    return [
        _Piece(number, range(start, min(start + batch_size, ends[number])))
        for number in numbers
        for start in range(ends[number] - counts[number], ends[number], batch_size)
    ]


def _write_index(job: _Job, files: Sequence[TokenFileEntry]) -> None:
    try:
        write_token_index(job.folder, job.described, files)
    except OSError as error:
        raise _unwritable(job.folder, error) from error


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{path}: cannot be written ({error.strerror or error}); make room or correct its "
        "permissions, then run the same command again"
    )
