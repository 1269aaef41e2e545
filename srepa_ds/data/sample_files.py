"""Safetensors files of one form, addressed as one array of samples."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from srepa_ds.data.stored_files import OpenFiles, StoredFile


@dataclass(frozen=True)
class Row:
    """One sample's part of a tensor, of the same form in all files."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """The size of a row."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def empty(self, count: int) -> Tensor:
        """Returns room for `count` rows."""
        return torch.empty((count, *self.shape), dtype=self.dtype)


class SampleFiles:
    """Files of one form whose samples are numbered consecutively; see `OpenFiles`."""

    def __init__(self, files: Sequence[StoredFile], counts: Sequence[int], rows: Mapping[str, Row]):
        """Takes the number of samples in each file as `counts`."""
        self._files = OpenFiles(files)
        self._starts = (0, *torch.tensor(counts).cumsum(0).tolist())
        self._ends = torch.tensor(self._starts[1:])
        self._rows = dict(rows)
        self._blob_ends: dict[str, list[int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_blob_ends": {}}

    def gather(
        self, indices: Int64[Tensor, " batch"], *, names: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        """Returns the samples `indices`, in their order: the tensors `names`, by default all.

        Raises IndexError, and DataError for a file that cannot be read, is shorter than it was, or
        was replaced.
        """
        rows = {name: row for name, row in self._rows.items() if names is None or name in names}
        gathered = {name: row.empty(len(indices)) for name, row in rows.items()}
        into = [(name, row.num_bytes, _bytes_of(gathered[name])) for name, row in rows.items()]
        for place, (number, index) in enumerate(self._places(indices)):
            inside = index - self._starts[number]
            for name, size, room in into:
                self._files.read(
                    number, name, inside * size, room[place * size : (place + 1) * size]
                )
        return gathered

    def blobs(self, indices: Int64[Tensor, " batch"], name: str) -> list[bytearray]:
        """Returns what each of the samples `indices` has of the bytes `<name>_bytes`.

        `<name>_ends` are the places behind each sample's bytes in its file. Raises IndexError and
        DataError as `gather` does.
        """
        if name not in self._blob_ends:
            self._blob_ends[name] = self.tensor(f"{name}_ends").tolist()
        ends, found = self._blob_ends[name], []
        for number, index in self._places(indices):
            start = ends[index - 1] if index > self._starts[number] else 0
            if not 0 <= start <= ends[index]:
                raise self._files.damaged(number, f"the ends of its {name} bytes do not rise")
            room = bytearray(ends[index] - start)
            self._files.read(number, f"{name}_bytes", start, memoryview(room))
            found.append(room)
        return found

    def _places(self, indices: Int64[Tensor, " batch"]) -> Iterator[tuple[int, int]]:
        """Yields the file and the sample of each of `indices`; raises IndexError."""
        total = self._starts[-1]
        if len(indices) and not (0 <= int(indices.min()) and int(indices.max()) < total):
            raise IndexError(f"sample index outside [0, {total})")
        files = torch.searchsorted(self._ends, indices, right=True).tolist()
        return zip(files, indices.tolist(), strict=True)

    def tensor(self, name: str, *, file: int | None = None) -> Tensor:
        """Returns one tensor of all samples, or of those in one file; raises DataError."""
        numbers = range(len(self._starts) - 1) if file is None else (file,)
        counts = [self._starts[number + 1] - self._starts[number] for number in numbers]
        row = self._rows[name]
        whole = row.empty(sum(counts))
        room, start = _bytes_of(whole), 0
        for number, count in zip(numbers, counts, strict=True):
            self._files.read(number, name, 0, room[start : start + count * row.num_bytes])
            start += count * row.num_bytes
        return whole


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
