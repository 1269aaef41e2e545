"""The part files of a sample set that is being drawn: one per chunk, whole or absent."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from srepa_ds.files import write_aside
from srepa_ds.sampling.generate import Chunk, ImageBatch

PARTS = "parts"
"""The folder of the parts, inside that of the set."""

_NAME = re.compile(r"chunk-(\d{6,})\.safetensors")


class Parts:
    """The parts in `folder` that belong to the set with a provenance of this `digest`."""

    def __init__(self, folder: Path, *, digest: str):
        self.folder = folder
        self._digest = digest

    def name(self, chunk: Chunk) -> str:
        """Returns the name of a part's file."""
        return f"chunk-{chunk.index:06d}.safetensors"

    def present(self) -> set[int]:
        """Returns the numbers of the chunks that have a part; empty if the folder is gone."""
        try:
            found = [_NAME.fullmatch(path.name) for path in self.folder.iterdir()]
        except FileNotFoundError:
            return set()
        return {int(match[1]) for match in found if match is not None}

    def has(self, chunk: Chunk) -> bool:
        """Returns whether the chunk has a part."""
        return (self.folder / self.name(chunk)).exists()

    def write(self, batch: ImageBatch) -> None:
        """Writes the part of a chunk; several processes may write the same one. Raises OSError."""
        tensors = {"images": batch.images, "labels": batch.labels, "sample_ids": batch.sample_ids}
        content = save(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            metadata={"provenance": self._digest},
        )
        target = self.folder / self.name(batch.chunk)
        write_aside(target, lambda aside: aside.write_bytes(content), concurrent=True)

    def read(self, chunk: Chunk, name: str) -> Tensor:
        """Returns the `images` or `labels` of a chunk; raises OSError or SafetensorError."""
        with safe_open(self.folder / self.name(chunk), framework="pt") as part:
            # A copy: the tensor itself would keep the mapped file, about 2 MB of each, in memory.
            return part.get_tensor(name).clone()

    def image(self, chunk: Chunk, row: int) -> Tensor:
        """Returns one image of a chunk, of shape (1, height, width, 3).

        Alone: of images kept from whole chunks, each held 10 MB of freed memory between them.
        Raises OSError or SafetensorError.
        """
        with safe_open(self.folder / self.name(chunk), framework="pt") as part:
            return part.get_slice("images")[row : row + 1].clone()

    def damaged(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        """Yields the chunks whose part is there, but not whole or of another set."""
        present = self.present()
        return (chunk for chunk in chunks if chunk.index in present and not self._is_whole(chunk))

    def remove(self, chunk: Chunk) -> None:
        """Removes the part of a chunk, if there is one; raises OSError."""
        (self.folder / self.name(chunk)).unlink(missing_ok=True)

    def _is_whole(self, chunk: Chunk) -> bool:
        try:
            with safe_open(self.folder / self.name(chunk), framework="pt") as part:
                marked = (part.metadata() or {}).get("provenance") == self._digest
                return marked and torch.equal(part.get_tensor("sample_ids"), chunk.sample_ids())
        except (OSError, SafetensorError):
            return False
