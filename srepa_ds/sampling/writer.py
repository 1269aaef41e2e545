"""Writes a sample set so that kills lose little: part files, then one ADM `samples.npz`."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from srepa_ds.errors import OutputError, listed
from srepa_ds.files import (
    PARTIAL,
    is_of_the_system,
    make_folder,
    remove_empty,
    write_aside,
    writing,
)
from srepa_ds.sampling.generate import Chunk, ImageBatch
from srepa_ds.sampling.npz import NpzMember, write_npz
from srepa_ds.sampling.provenance import Provenance, differences
from srepa_ds.sampling.sample_set import CONTACT_SHEET, PROVENANCE, SAMPLES, read_provenance
from srepa_ds.sampling.sheet import SheetBuilder

PARTS = "parts"
CURE = "choose a writable output folder with room for the samples"


def remove_leftovers(folder: Path) -> None:
    """Removes what killed commands left half-written in the folder of a sample set.

    Call it while no other command draws into the folder. Raises OutputError.
    """
    with writing(folder, cure=CURE):
        for name in (PROVENANCE, SAMPLES, CONTACT_SHEET):
            for left in folder.glob(f"{name}*{PARTIAL}"):
                left.unlink(missing_ok=True)


class ChunkWriter:
    """Writes the folder of a sample set, one writer per rank.

    Every rank writes its own chunks; when all have, one rank assembles them. Whole chunks and
    assembled sets are not drawn again.
    """

    def __init__(self, folder: Path, provenance: Provenance):
        """Creates the folder and marks it with `provenance`.

        Raises OutputError, leaving nothing behind, if it cannot be written to or holds samples of
        another provenance, and DataError if their provenance cannot be read.
        """
        self.folder = folder
        self.provenance = provenance
        self._digest = provenance.digest()
        with writing(folder, cure=CURE):
            self._refuse_foreign()
            made = make_folder(folder)
            try:
                # Before the parts: ranks open the folder at once, and parts alone are foreign.
                _write(folder / PROVENANCE, provenance.text().encode())
                (folder / PARTS).mkdir(exist_ok=True)
            except OSError:
                remove_empty(made)
                raise

    def is_complete(self) -> bool:
        """Returns whether the set is assembled already."""
        return (self.folder / SAMPLES).is_file()

    def missing(self, chunks: Iterable[Chunk]) -> tuple[Chunk, ...]:
        """Returns the chunks among `chunks` that still have to be drawn."""
        if self.is_complete():
            return ()
        return tuple(chunk for chunk in chunks if not self._is_whole(chunk))

    def write(self, batch: ImageBatch) -> None:
        """Writes one chunk, which is then either whole or absent; raises OutputError."""
        tensors = {"images": batch.images, "labels": batch.labels, "sample_ids": batch.sample_ids}
        content = save(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            metadata={"provenance": self._digest},
        )
        with writing(self.folder, cure=CURE):
            _write(self._part(batch.chunk), content)

    def assemble(self, chunks: Iterable[Chunk]) -> Path:
        """Writes `samples.npz` from all `chunks` of the set and returns its path.

        Also writes the contact sheet, and removes the parts; holds one chunk in memory at a time.
        Call it on one rank, after every rank has written. Raises OutputError if chunks are missing.
        """
        target = self.folder / SAMPLES
        if self.is_complete():
            self._remove_parts()
            return target
        chunks = sorted(chunks, key=lambda chunk: chunk.index)
        missing = self.missing(chunks)
        if missing:
            raise OutputError(
                f"{self.folder}: {len(missing)} of {len(chunks)} chunks are missing, the first "
                f"is {self._part(missing[0]).name}; run the same command again to draw them"
            )
        with writing(self.folder, cure=CURE):
            self._assemble(chunks, target)
        self._remove_parts()
        return target

    def _assemble(self, chunks: list[Chunk], target: Path) -> None:
        labels = torch.cat([self._tensor(chunk, "labels") for chunk in chunks])
        sheet = SheetBuilder(labels)

        def image_blocks() -> Iterator[np.ndarray]:
            for chunk in chunks:
                images = self._tensor(chunk, "images")
                sheet.add(images, labels[chunk.start : chunk.stop])
                yield images.numpy()

        shape = (len(labels), *self._tensor(chunks[0], "images").shape[1:])
        members = (
            NpzMember("arr_0", shape, np.dtype(np.uint8), image_blocks()),
            NpzMember("arr_1", (len(labels),), np.dtype(np.int64), iter([labels.numpy()])),
        )

        def write_both(temporary: Path) -> None:
            write_npz(temporary, members)
            # The sheet comes before the rename: a set that counts as complete has one.
            write_aside(
                self.folder / CONTACT_SHEET,
                lambda picture: sheet.image().save(picture, format="PNG"),
            )

        write_aside(target, write_both)

    def _part(self, chunk: Chunk) -> Path:
        return self.folder / PARTS / f"chunk-{chunk.index:06d}.safetensors"

    def _tensor(self, chunk: Chunk, name: str) -> Tensor:
        with safe_open(self._part(chunk), framework="pt") as part:
            return part.get_tensor(name)

    def _is_whole(self, chunk: Chunk) -> bool:
        try:
            with safe_open(self._part(chunk), framework="pt") as part:
                marked = (part.metadata() or {}).get("provenance") == self._digest
                return marked and torch.equal(part.get_tensor("sample_ids"), chunk.sample_ids())
        except (OSError, SafetensorError):
            return False

    def _refuse_foreign(self) -> None:
        path = self.folder / PROVENANCE
        # Looked at first: meanwhile another rank may write the provenance and then parts.
        names = {found.name for found in self.folder.iterdir()} if self.folder.exists() else set()
        if not path.exists():
            if names & {SAMPLES, PARTS}:
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

    def _remove_parts(self) -> None:
        parts = self.folder / PARTS
        if parts.is_dir():
            for path in parts.iterdir():
                path.unlink(missing_ok=True)
            parts.rmdir()


def _write(target: Path, content: bytes) -> None:
    write_aside(target, lambda temporary: temporary.write_bytes(content), concurrent=True)
