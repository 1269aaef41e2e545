"""Safetensors files of one form, addressed as one array of samples."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from srepa_ds.data.reading import DEFAULT_READING, Reading
from srepa_ds.data.stored_files import OpenFiles, Request, StoredFile


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


class _Run(NamedTuple):
    """Samples asked for one after another that also lie so in a file: one read."""

    file: int
    first: int
    """The first sample's number in the file."""
    place: int
    """The first sample's place among those asked for."""
    count: int


class SampleFiles:
    """Files of one form whose samples are numbered consecutively; see `OpenFiles`."""

    def __init__(
        self,
        files: Sequence[StoredFile],
        counts: Sequence[int],
        rows: Mapping[str, Row],
        *,
        reading: Reading = DEFAULT_READING,
    ):
        """Takes the number of samples in each file as `counts`."""
        self._files = OpenFiles(files, reading)
        self._counts = tuple(counts)
        self._starts = torch.tensor((0, *counts)).cumsum(0)
        self._rows = dict(rows)
        self._kept: dict[str, Tensor] = {}
        self._are_kept: dict[str, set[int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}, "_are_kept": {}}

    def read_by(self, reading: Reading) -> "SampleFiles":
        """Returns the same samples, read in another way."""
        return SampleFiles(self._files.files, self._counts, self._rows, reading=reading)

    def gather(
        self, indices: Int64[Tensor, " batch"], *, names: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        """Returns the samples `indices`, in their order: the tensors `names`, by default all.

        Raises IndexError, and DataError for a file that cannot be read, is shorter than it was, or
        was replaced.
        """
        rows = {name: row for name, row in self._rows.items() if names is None or name in names}
        gathered = {name: row.empty(len(indices)) for name, row in rows.items()}
        runs, requests = self._runs(indices), []
        for name, row in rows.items():
            size, room = row.num_bytes, _bytes_of(gathered[name])
            for file, first, place, count in runs:
                offset = self._files.start(file, name) + first * size
                requests.append(Request(file, offset, room[place * size : (place + count) * size]))
        self._files.read(requests)
        return gathered

    def kept(self, indices: Int64[Tensor, " batch"], name: str) -> Tensor:
        """Returns the rows `indices` of a small tensor.

        It stays in memory, from the first use of each file on. Raises as `gather` does.
        """
        self._keep(name, self._file_of(indices).unique().tolist())
        return self._kept[name][indices]

    def keep(self, *names: str) -> None:
        """Reads small tensors of all files into memory; raises DataError.

        Processes forked afterwards share them.
        """
        for name in names:
            self._keep(name, range(len(self._counts)))

    def blobs(self, indices: Int64[Tensor, " batch"], name: str) -> list[UInt8[Tensor, " bytes"]]:
        """Returns what each of the samples `indices` has of the bytes `<name>_bytes`.

        `<name>_ends` are the places behind each sample's bytes in its file. Raises IndexError and
        DataError as `gather` does.
        """
        runs = self._runs(indices)
        ends = self.kept(indices, f"{name}_ends")
        before = self._kept[f"{name}_ends"][(indices - 1).clamp(min=0)]
        begins = torch.where(torch.isin(indices, self._starts), 0, before)
        sizes = ends - begins
        room = torch.empty(int(sizes.sum()), dtype=torch.uint8)
        view, begin, start, requests = _bytes_of(room), begins.tolist(), 0, []
        run_sizes = [int(sizes[place : place + count].sum()) for _, _, place, count in runs]
        for (file, _, place, _), size in zip(runs, run_sizes, strict=True):
            offset = self._files.start(file, f"{name}_bytes") + begin[place]
            requests.append(Request(file, offset, view[start : start + size]))
            start += size
        self._files.read(requests)
        return list(room.split(sizes.tolist()))

    def tensor(self, name: str, *, file: int | None = None) -> Tensor:
        """Returns one tensor of all samples, or of those in one file; raises DataError."""
        numbers = range(len(self._counts)) if file is None else (file,)
        row = self._rows[name]
        whole = row.empty(sum(self._counts[number] for number in numbers))
        room, start, requests = _bytes_of(whole), 0, []
        for number in numbers:
            end = start + self._counts[number] * row.num_bytes
            requests.append(Request(number, self._files.start(number, name), room[start:end]))
            start = end
        self._files.read(requests)
        return whole

    def _keep(self, name: str, files: Collection[int]) -> None:
        known, row = self._are_kept.setdefault(name, set()), self._rows[name]
        if name not in self._kept:
            self._kept[name] = row.empty(sum(self._counts))
        missing = [file for file in files if file not in known]
        starts, room, requests = self._starts.tolist(), _bytes_of(self._kept[name]), []
        for file in missing:
            place = slice(starts[file] * row.num_bytes, starts[file + 1] * row.num_bytes)
            requests.append(Request(file, self._files.start(file, name), room[place]))
        self._files.read(requests)
        if name.endswith("_ends"):
            for file in missing:
                self._check_ends(file, self._kept[name][starts[file] : starts[file + 1]], name)
        known.update(missing)

    def _check_ends(self, file: int, ends: Int64[Tensor, " samples"], name: str) -> None:
        size = self._files.files[file].identity.size
        rises = ends.diff(prepend=ends.new_zeros(1)) >= 0
        if not (bool(rises.all()) and int(ends[-1]) <= size):
            raise self._files.damaged(file, f"its {name} do not rise within its {size} bytes")

    def _file_of(self, indices: Int64[Tensor, " batch"]) -> Int64[Tensor, " batch"]:
        """Returns the file of each of `indices`; raises IndexError."""
        total = int(self._starts[-1])
        if len(indices) and not (0 <= int(indices.min()) and int(indices.max()) < total):
            raise IndexError(f"sample index outside [0, {total})")
        return torch.searchsorted(self._starts[1:], indices, right=True)

    def _runs(self, indices: Int64[Tensor, " batch"]) -> list[_Run]:
        """Returns `indices` as few runs; raises IndexError."""
        files = self._file_of(indices)
        if not len(indices):
            return []
        is_next = (indices.diff() == 1) & (files.diff() == 0)
        places = torch.cat((torch.zeros(1, dtype=torch.int64), (~is_next).nonzero()[:, 0] + 1))
        counts = places.diff(append=torch.tensor([len(indices)]))
        first = (indices - self._starts[files])[places]
        columns = (files[places], first, places, counts)
        return [_Run(*row) for row in torch.stack(columns, dim=1).tolist()]


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
