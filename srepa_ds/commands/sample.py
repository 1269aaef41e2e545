"""`srepa-ds sample`: images from a model, on any number of ranks, resumable."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from srepa_ds.config.experiment import Config, samples_folder
from srepa_ds.console import steps_shown
from srepa_ds.distributed import ranks
from srepa_ds.distributed.ranks import Rank
from srepa_ds.drawing.drawing import Drawing, open_drawing
from srepa_ds.files import claimed
from srepa_ds.sampling.config import SamplerConfig, count_evaluations
from srepa_ds.sampling.generate import Chunk, check_rank_count
from srepa_ds.sampling.provenance import Provenance
from srepa_ds.sampling.writer import CURE, ChunkWriter, remove_leftovers

log = logging.getLogger("srepa_ds")


def sample(config: Config) -> Path:
    """Returns the folder with `samples.npz`, `contact_sheet.png` and `provenance.json`.

    Runs on every rank. Chunks of an interrupted run are kept, and a finished set with the same
    provenance is left alone. Raises SRepaError on all ranks alike.
    """
    rank = ranks.initialize()
    drawing = open_drawing(config, rank)
    ranks.together(check_rank_count, config.sample, rank.world_size)
    chunks, folder = drawing.chunks, samples_folder(config)
    with ExitStack() as stack:
        ranks.together(stack.enter_context, _claimed(folder, is_main=rank.is_main))
        writer = _open_writer(folder, drawing.provenance)
        # One rank looks, and the missing chunks are shared evenly: all agree and do equal work.
        missing = ranks.on_main(writer.missing, chunks)
        _log_plan(config.sample, len(chunks), len(missing))
        _draw(drawing, writer, missing[rank.number :: rank.world_size], rank)
        ranks.on_main(writer.assemble, chunks)
    log.info("%d images in %s", config.sample.num_samples, folder)
    return folder


@contextmanager
def _claimed(folder: Path, *, is_main: bool) -> Iterator[None]:
    """Keeps other processes from drawing into `folder` while the block runs, on the main rank.

    Raises OutputError if one does, or the folder cannot be written to.
    """
    if not is_main:
        yield
        return
    otherwise = ", or choose another sample.folder"
    with claimed(folder, doing="drawing samples into", cure=CURE, otherwise=otherwise):
        remove_leftovers(folder)
        yield


@ranks.collective
def _open_writer(folder: Path, provenance: Provenance) -> ChunkWriter:
    """Returns the writer of this rank; raises OutputError or DataError as `ChunkWriter` does."""
    return ChunkWriter(folder, provenance)


@ranks.collective
def _draw(drawing: Drawing, writer: ChunkWriter, chunks: tuple[Chunk, ...], rank: Rank) -> None:
    """Draws and writes this rank's `chunks`; raises OutputError."""
    batches = drawing.batches(chunks)
    for batch in steps_shown(batches, total=len(chunks), what="chunk", is_main=rank.is_main):
        writer.write(batch)


def _log_plan(config: SamplerConfig, num_chunks: int, num_missing: int) -> None:
    if num_missing == 0:
        log.info("all images are already drawn")
        return
    evaluations = count_evaluations(config)
    log.info(
        "drawing %d images with %s, %d steps: %d model calls each, %d of them guided%s",
        config.num_samples,
        config.solver,
        config.num_steps,
        evaluations.total,
        evaluations.guided,
        ""
        if num_missing == num_chunks
        else f"; {num_chunks - num_missing} of {num_chunks} chunks are already drawn",
    )
