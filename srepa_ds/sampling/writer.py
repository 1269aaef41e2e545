"""Writes the folder of a sample set so that kills lose little: part files, then its outputs.

Any number of processes, which need not know of each other, write parts into the same folder. One
of them, under the folder's lock, makes the outputs of all parts.
"""

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from srepa_ds.errors import DataError, OutputError, listed
from srepa_ds.files import (
    PARTIAL,
    flush_to_disk,
    is_of_the_system,
    locked,
    make_folder,
    own_aside,
    remove_empty,
    write_aside,
    writing,
)
from srepa_ds.sampling.claims import claim_seconds, is_left_over
from srepa_ds.sampling.generate import Chunk, ImageBatch
from srepa_ds.sampling.outputs.content import Content, Output, PartsContent, SetFacts
from srepa_ds.sampling.outputs.table import OUTPUTS
from srepa_ds.sampling.parts import PARTS, Parts
from srepa_ds.sampling.provenance import DEVICES, Provenance, differences
from srepa_ds.sampling.sample_set import CONTACT_SHEET, PROVENANCE, SAMPLES, read_provenance
from srepa_ds.sampling.sheet import SheetBuilder

CURE = "choose a writable output folder with room for the samples"

_WRITTEN_ASIDE = (PROVENANCE, CONTACT_SHEET, SAMPLES)


class ChunkWriter:
    """Writes the folder of a sample set, one writer per process.

    Every process writes chunks; when all are there, one assembles them. Whole chunks and assembled
    sets are not drawn again.
    """

    def __init__(self, folder: Path, provenance: Provenance, outputs: Iterable[str] = ("npz",)):
        """Creates the folder, unless it is there, and marks it with `provenance`.

        `outputs` are names in `OUTPUTS`. Raises OutputError, leaving nothing behind, if the folder
        cannot be written to or holds samples of another provenance, and DataError if their
        provenance cannot be read.
        """
        self.folder = folder
        self.provenance = provenance
        self.outputs = [output for name, output in OUTPUTS.items() if name in set(outputs)]
        self.parts = Parts(folder / PARTS, digest=provenance.digest())
        with writing(folder, cure=CURE):
            self._refuse_foreign()
            made = make_folder(folder)
            try:
                # Before the parts: others open the folder at once, and parts alone are foreign.
                _write_first(folder / PROVENANCE, provenance.text().encode())
                # Another process may have been faster, with other settings.
                self._refuse_foreign()
                self._renew_notes()
                self.make_room()
            except OSError:
                remove_empty(made)
                raise

    def is_complete(self) -> bool:
        """Returns whether all outputs are there."""
        return all(output.is_there(self.folder) for output in self.outputs)

    def missing_outputs(self) -> list[Output]:
        """Returns the outputs that still have to be made."""
        return [output for output in self.outputs if not output.is_there(self.folder)]

    def stored(self) -> Content | None:
        """Returns the set as a finished output holds it, whichever was asked for; else None."""
        found = (output for output in OUTPUTS.values() if output.is_there(self.folder))
        output = next(found, None)
        return output.read(self.folder) if output is not None else None

    def missing(self, chunks: Iterable[Chunk]) -> tuple[Chunk, ...]:
        """Returns the chunks among `chunks` that have no part; none if an output is there."""
        present = self.parts.present()
        missing = tuple(chunk for chunk in chunks if chunk.index not in present)
        # Looked at after the parts, which are removed when the outputs are there.
        return missing if missing and self.stored() is None else ()

    def remove_damaged(self, chunks: Iterable[Chunk]) -> int:
        """Removes the parts of `chunks` that are not whole, and returns their number."""
        with writing(self.folder, cure=CURE):
            damaged = list(self.parts.damaged(chunks))
            for chunk in damaged:
                self.parts.remove(chunk)
        return len(damaged)

    def make_room(self) -> bool:
        """Makes the folder of the parts and returns True, unless an output is there already.

        Raises OSError.
        """
        if self.stored() is not None:
            return False
        self.parts.folder.mkdir(exist_ok=True)
        return True

    def write(self, batch: ImageBatch) -> None:
        """Writes one chunk, which is then either whole or absent; raises OutputError."""
        with writing(self.folder, cure=CURE):
            try:
                self.parts.write(batch)
            except FileNotFoundError:
                # The parts of a finished set are removed: another process drew this one too.
                if self.make_room():
                    self.parts.write(batch)

    def write_sheet(self, chunks: Sequence[Chunk]) -> None:
        """Writes a contact sheet of the parts that are there; raises OutputError."""
        present = self.parts.present()
        found = [chunk for chunk in chunks if chunk.index in present]
        with writing(self.folder, cure=CURE), suppress(FileNotFoundError):
            # Suppressed, because another process may be finishing the set, and remove the parts.
            if found and self.stored() is None:
                self._write_sheet(self._sheet_of(found))

    def assemble(self, chunks: Sequence[Chunk], *, num_classes: int) -> None:
        """Makes the missing outputs from all `chunks` of the set, or from a finished output.

        Also writes the contact sheet, and removes the parts; holds a block of images in memory at a
        time. Call it under the folder's lock. Raises OutputError if chunks are missing.
        """
        num_images = sum(chunk.stop - chunk.start for chunk in chunks)
        stored = self.stored()
        if stored is not None:
            self._make_outputs(stored, num_images=num_images, num_classes=num_classes)
            self._tidy_up()
            return
        chunks = sorted(chunks, key=lambda chunk: chunk.index)
        if missing := self.missing(chunks):
            raise OutputError(
                f"{self.folder}: {len(missing)} of {len(chunks)} chunks are missing, the first "
                f"is {self.parts.name(missing[0])}; run the same command again to draw them"
            )
        with writing(self.folder, cure=CURE):
            # The sheet comes before the outputs: a set that counts as complete has one.
            sheet = self._sheet_of(chunks)
            self._write_sheet(sheet)
        content = PartsContent(self.parts, chunks)
        self._make_outputs(content, num_images=num_images, num_classes=num_classes)
        with writing(self.folder, cure=CURE):
            # Again: meanwhile a process that still draws may have written that of fewer parts.
            self._write_sheet(sheet)
        self._tidy_up()

    def tidy_up(self) -> None:
        """Removes the parts of a complete set, and what killed processes left half-written.

        Leaves that to a process that holds the folder's lock, and all of it in a folder that cannot
        be written to.
        """
        if self.is_complete():
            with suppress(OSError), locked(self.folder):
                self._tidy_up()

    def note_devices(self) -> list[str]:
        """Notes the devices of this drawing beside those that drew before, which it returns.

        Raises OutputError or DataError.
        """
        stored = dict(read_provenance(self.folder))
        before, own = (_devices_in(notes) for notes in (stored, self.provenance.notes))
        if set(own) - set(before):
            with writing(self.folder, cure=CURE):
                self._rewrite({**stored, DEVICES: sorted({*before, *own})})
        return before

    def _renew_notes(self) -> None:
        """Replaces the notes of a set with the same facts; whoever draws adds its device.

        A finished set in a folder that cannot be written to keeps its notes.
        """
        stored = dict(read_provenance(self.folder))
        notes = {name: value for name, value in self.provenance.notes.items() if name != DEVICES}
        kept = {DEVICES: stored[DEVICES]} if DEVICES in stored else {}
        wanted = {**self.provenance.facts, **notes, **kept}
        if wanted != stored:
            with suppress(OSError) if self.is_complete() else nullcontext():
                self._rewrite(wanted)

    def _rewrite(self, document: Mapping[str, Any]) -> None:
        text = Provenance(document).text()
        write_aside(self.folder / PROVENANCE, lambda to: to.write_text(text), concurrent=True)

    def _make_outputs(self, content: Content, *, num_images: int, num_classes: int) -> None:
        facts = SetFacts(self.provenance, num_classes)
        if self.missing_outputs() and len(content.labels) != num_images:
            raise DataError(
                f"{self.folder}: holds {len(content.labels)} labels for {num_images} images; "
                "remove the outputs there and run the same command to draw them again"
            )
        with writing(self.folder, cure=CURE):
            for output in self.missing_outputs():
                output.write(self.folder, content, facts)

    def _sheet_of(self, chunks: Sequence[Chunk]) -> bytes:
        labels = [self.parts.read(chunk, "labels") for chunk in chunks]
        sheet = SheetBuilder(torch.cat(labels))
        for chunk, own in zip(chunks, labels, strict=True):
            for row in range(len(own)):
                if sheet.wants(own[row : row + 1]):
                    sheet.add(self.parts.image(chunk, row), own[row : row + 1])
        picture = io.BytesIO()
        sheet.image().save(picture, format="PNG")
        return picture.getvalue()

    def _write_sheet(self, picture: bytes) -> None:
        path = self.folder / CONTACT_SHEET
        if not path.is_file() or path.read_bytes() != picture:
            write_aside(path, lambda aside: aside.write_bytes(picture), concurrent=True)

    def _refuse_foreign(self) -> None:
        path = self.folder / PROVENANCE
        # Looked at first: meanwhile another process may write the provenance and then parts.
        names = {found.name for found in self.folder.iterdir()} if self.folder.exists() else set()
        if not path.exists():
            if names & {PARTS, SAMPLES}:
                raise OutputError(
                    f"{self.folder}: holds samples without {PROVENANCE}, so their origin is "
                    "unknown; give another output folder or remove them"
                )
            # By default, the sets of other steps lie in folders of a run's `samples`.
            other = sorted(
                name
                for name in names
                if not (name.startswith("step-") or name.endswith(PARTIAL))
                and not is_of_the_system(name)
            )
            if other:
                raise OutputError(
                    f"{self.folder}: holds other files ({listed(other, most=3)}); give an empty "
                    "output folder, or one that does not exist"
                )
            return
        lines = differences(read_provenance(self.folder), self.provenance.facts)
        if lines:
            raise OutputError(
                "\n  ".join([f"{self.folder}: holds samples made differently:", *lines])
                + "\ngive another output folder, or remove this one to draw them again"
            )

    def _tidy_up(self) -> None:
        with suppress(OSError, DataError):
            for output in self.outputs:
                output.tidy_up(self.folder)
            for name in _WRITTEN_ASIDE:
                for left in self.folder.glob(f"{name}*{PARTIAL}"):
                    if is_left_over(left, after_seconds=claim_seconds()):
                        left.unlink(missing_ok=True)
            for path in self.parts.folder.iterdir():
                path.unlink(missing_ok=True)
            # Not empty if a process that was overtaken has just written into it; it looks again.
            self.parts.folder.rmdir()


def _devices_in(document: Mapping[str, Any]) -> list[str]:
    found = document.get(DEVICES)
    return [str(name) for name in found] if isinstance(found, list) else []


def _write_first(target: Path, content: bytes) -> None:
    """Writes `target` unless it is there; of several processes at once, one writes it.

    Raises OSError.
    """
    if target.exists():
        return
    aside = own_aside(target)
    try:
        aside.write_bytes(content)
        flush_to_disk(aside)
        try:
            os.link(aside, target)
        except FileExistsError:
            return
        except OSError:
            # Some file systems have no links. Then two that start at the same moment may both win.
            os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)
