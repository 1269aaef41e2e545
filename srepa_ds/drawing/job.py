"""A set of images, drawn into a folder by the ranks of this command and by other commands."""

import logging
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from srepa_ds.console import Progress
from srepa_ds.distributed import ranks
from srepa_ds.distributed.heartbeat import moved
from srepa_ds.distributed.ranks import Rank
from srepa_ds.distributed.tally import Tally
from srepa_ds.drawing.drawing import Drawing
from srepa_ds.errors import OutputError
from srepa_ds.files import locked, writing
from srepa_ds.preparation.estimate import size_text
from srepa_ds.preparation.share import EVERYTHING, Share
from srepa_ds.sampling.claims import Claims
from srepa_ds.sampling.generate import Chunk
from srepa_ds.sampling.outputs.table import OUTPUTS
from srepa_ds.sampling.parts import PARTS, Parts
from srepa_ds.sampling.provenance import DEVICES
from srepa_ds.sampling.units import Units
from srepa_ds.sampling.writer import CURE, ChunkWriter

log = logging.getLogger("srepa_ds")

_SECONDS_BETWEEN_LOOKS = 2.0
_SECONDS_BETWEEN_SHEETS = 60.0
_SECONDS_BETWEEN_POLLS = 0.1
# For a process that only removes what a finished set does not need.
_TRIES_FOR_LOCK = 20


def draw_set(
    drawing: Drawing,
    folder: Path,
    outputs: Iterable[str],
    *,
    share: Share = EVERYTHING,
    rank: Rank,
) -> bool:
    """Draws what is missing of `share`, and returns whether the set is finished. Collective.

    Takes chunks beside other commands that draw the same set into `folder`. If all parts are
    there, makes `outputs`, unless another command is doing so. Raises SRepaError on all ranks
    alike.
    """
    outputs = tuple(outputs)
    ranks.on_main(check_space, drawing, folder, outputs, share)
    job = SetJob(drawing, _open_writer(drawing, folder, outputs), share, rank)
    ranks.on_main(job.begin)
    job.run()
    return ranks.on_main(job.finish)


@ranks.collective
def _open_writer(drawing: Drawing, folder: Path, outputs: tuple[str, ...]) -> ChunkWriter:
    """Returns the writer of this rank; raises OutputError or DataError as `ChunkWriter` does."""
    return ChunkWriter(folder, drawing.provenance, outputs)


def check_space(
    drawing: Drawing, folder: Path, outputs: tuple[str, ...], share: Share = EVERYTHING
) -> None:
    """Checks that what is missing of a set fits on the disk; raises OutputError.

    A command that draws one share of several needs room for its own parts.
    """
    lacking = [OUTPUTS[name] for name in outputs if not OUTPUTS[name].is_there(folder)]
    if not lacking:
        return
    values, needed = prod(drawing.image_shape), 0
    if not any(output.is_there(folder) for output in OUTPUTS.values()):
        with writing(folder, cure=CURE):
            present = Parts(folder / PARTS, digest=drawing.provenance.digest()).present()
        chunks = _of_share(drawing.chunks, share)
        needed += values * _num_images(chunk for chunk in chunks if chunk.index not in present)
    if share.total == 1:
        num_values = drawing.sampler.num_samples * values
        needed += sum(output.bytes_of(num_values) for output in lacking)
    with writing(folder, cure=CURE):
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free
    if needed > free:
        raise OutputError(
            f"{folder}: parts and outputs need about {size_text(needed)}, and {size_text(free)} "
            f"are free; {CURE}"
        )


@dataclass(frozen=True)
class SetJob:
    """What one command does for a set. Not collective, where a method does not say so."""

    drawing: Drawing
    writer: ChunkWriter
    share: Share
    rank: Rank

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """The chunks of the share."""
        return _of_share(self.drawing.chunks, self.share)

    def begin(self) -> None:
        """Removes damaged parts and says what is to be done; raises OutputError."""
        if damaged := self.writer.remove_damaged(self.chunks):
            log.warning("%s: damaged parts, which are drawn again: %d", self.writer.folder, damaged)
        for sentence in _deviations(self.drawing.provenance.notes):
            log.info("%s", sentence)
        missing, sampler = len(self.writer.missing(self.chunks)), self.drawing.sampler
        if not missing:
            log.info("all images are already drawn")
            return
        self._note_devices()
        there = len(self.chunks) - missing
        log.info(
            "drawing %d images with %s, %d steps; function evaluations per image: %s%s",
            _num_images(self.chunks),
            sampler.solver,
            sampler.num_steps,
            self.drawing.evaluations,
            f"; {there} of {len(self.chunks)} chunks are already drawn" if there else "",
        )

    def _note_devices(self) -> None:
        """Warns if others have drawn on another device, which rounds otherwise."""
        own = self.drawing.provenance.notes.get(DEVICES, [])
        before = self.writer.note_devices()
        if before and (others := sorted(set(before) ^ set(own))):
            log.warning(
                "%s: drawn on several kinds of devices (%s), which round otherwise: the same set "
                "drawn on one kind may differ in single levels of pixels",
                self.writer.folder,
                ", ".join(sorted({*before, *others})),
            )

    def run(self) -> None:
        """Draws chunks until all are drawn, and assembles the set. Collective.

        A rank that fails ends the others at their next chunk, and all raise its error.
        """
        tally, ended = ranks.tally(), ranks.tally()

        def go() -> None:
            with tally.failing():
                if self.rank.is_main:
                    self._draw_and_assemble(tally)
                else:
                    self._draw(tally)
                ended.add(1)
            # By looking: a collective has a limit, and another rank may draw for hours.
            while ended.add(0) < self.rank.world_size and not tally.has_failed():
                moved()
                time.sleep(_SECONDS_BETWEEN_POLLS)

        ranks.together(go)

    def finish(self) -> bool:
        """Returns whether the set is finished; removes what it does not need any more."""
        self.writer.tidy_up()
        return self.writer.is_complete()

    def _draw(self, tally: Tally) -> None:
        outlook = _Outlook(self.writer, self.chunks, is_main=self.rank.is_main)
        with outlook.progress, Claims(self.writer.parts.folder) as claims:
            units = Units(self.writer, self.chunks, claims, goes_on=lambda: not tally.has_failed())
            for run in units.runs(outlook.look):
                for batch in self.drawing.batches(run):
                    self.writer.write(batch)
                    units.done(batch.chunk)
                    outlook.look()
            outlook.look(at_once=True)

    def _draw_and_assemble(self, tally: Tally) -> None:
        """Makes the outputs if all parts are there and no other command is doing so."""
        chunks, folder = self.drawing.chunks, self.writer.folder
        # Again only if a part turns out to be damaged.
        while not self.writer.is_complete():
            self._draw(tally)
            if tally.has_failed():
                return
            if missing := self.writer.missing(chunks):
                log.info(
                    "%s: this share is drawn, %d of %d chunks of others are not; the command that "
                    "finds all parts in its folder makes the outputs",
                    folder,
                    len(missing),
                    len(chunks),
                )
                return
            if not self._assemble_if_free(chunks):
                log.info("%s: another process assembles it", folder)
                return

    def _assemble_if_free(self, chunks: tuple[Chunk, ...]) -> bool:
        """Returns False if another process holds the folder; raises OutputError."""
        for _ in range(_TRIES_FOR_LOCK):
            try:
                with locked(self.writer.folder):
                    if not self.writer.remove_damaged(chunks):
                        log.info("%s: writing the outputs", self.writer.folder)
                        num_classes = self.drawing.model.config.num_classes
                        self.writer.assemble(chunks, num_classes=num_classes)
                    return True
            except BlockingIOError:
                moved()
                time.sleep(_SECONDS_BETWEEN_POLLS)
        return False


class _Outlook:
    """What the main rank shows while everybody draws: progress, and a contact sheet."""

    def __init__(self, writer: ChunkWriter, chunks: tuple[Chunk, ...], *, is_main: bool):
        self._writer = writer
        self._chunks = chunks
        self._is_main = is_main
        missing = writer.missing(chunks) if is_main else ()
        self._total = _num_images(missing)
        self.progress = Progress("images", total=self._total, is_main=is_main and bool(missing))
        self._looked_at = self._sheet_at = time.monotonic()
        self._next_sheet = len(chunks) - len(missing) + 1

    def look(self, *, at_once: bool = False) -> None:
        """Looks at the folder if that is due: it shows what others have drawn too."""
        now = time.monotonic()
        if not self._is_main or not self._total:
            return
        if not at_once and now - self._looked_at < _SECONDS_BETWEEN_LOOKS:
            return
        self._looked_at = now
        missing = self._writer.missing(self._chunks)
        self.progress.at(self._total - _num_images(missing))
        there = len(self._chunks) - len(missing)
        # Often at the beginning, when each image is news.
        if there >= self._next_sheet or now - self._sheet_at >= _SECONDS_BETWEEN_SHEETS:
            self._writer.write_sheet(self._chunks)
            self._next_sheet, self._sheet_at = 2 * there, now


def _deviations(notes: Mapping[str, Any]) -> Iterator[str]:
    """Yields what is set otherwise than by the preset, as one sentence."""
    found = notes.get("deviations")
    if found:
        words = [
            f"{name} {values['here']}, not {values['preset']}" for name, values in found.items()
        ]
        yield f"deviates from {notes['preset']}: {'; '.join(words)}"


def _of_share(chunks: Iterable[Chunk], share: Share) -> tuple[Chunk, ...]:
    return tuple(chunk for chunk in chunks if chunk.index % share.total == share.number)


def _num_images(chunks: Iterable[Chunk]) -> int:
    return sum(chunk.stop - chunk.start for chunk in chunks)
