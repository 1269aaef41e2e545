"""Memory-mapped safetensors files, addressed as one array of samples."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Int64
from safetensors import safe_open
from torch import Tensor


class MappedFiles:
    """Files of one form whose samples are numbered consecutively; each is mapped on first use."""

    def __init__(self, paths: Sequence[Path], counts: Sequence[int]):
        """Takes the number of samples in each file as `counts`."""
        self._paths = tuple(paths)
        self._starts = (0, *torch.tensor(counts).cumsum(0).tolist())
        self._ends = torch.tensor(self._starts[1:])
        self._opened: dict[int, Mapping[str, Tensor]] = {}

    def __getstate__(self) -> dict[str, object]:
        # A worker process maps the files itself instead of receiving their contents.
        return {**self.__dict__, "_opened": {}}

    def file(self, number: int) -> Mapping[str, Tensor]:
        """Returns the tensors of one file."""
        if number not in self._opened:
            with safe_open(self._paths[number], framework="pt") as file:
                self._opened[number] = {name: file.get_tensor(name) for name in file.keys()}
        return self._opened[number]

    def gather(self, indices: Int64[Tensor, " batch"]) -> dict[str, Tensor]:
        """Returns copies of the samples `indices`, in their order; raises IndexError."""
        total = self._starts[-1]
        if len(indices) and not (0 <= int(indices.min()) and int(indices.max()) < total):
            raise IndexError(f"sample index outside [0, {total})")
        gathered = {
            name: torch.empty((len(indices), *tensor.shape[1:]), dtype=tensor.dtype)
            for name, tensor in self.file(0).items()
        }
        file_of = torch.searchsorted(self._ends, indices, right=True).tolist()
        # Sample by sample is plain copying. Indexing by a tensor took ten times as long for 32
        # images' tokens of 393 KB: 9 ms on one core instead of 0.8 ms.
        for row, (number, index) in enumerate(zip(file_of, indices.tolist(), strict=True)):
            inside = index - self._starts[number]
            for name, tensor in self.file(number).items():
                gathered[name][row] = tensor[inside]
        return gathered
