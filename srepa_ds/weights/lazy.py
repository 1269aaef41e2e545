"""Tensors that are read when they are asked for, so that a model need not fit in memory."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from srepa_ds.documents.safetensors_writer import TensorEntry
from srepa_ds.errors import CheckpointError

DTYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""The numbers of exported weights, by the names of `export.dtype`."""


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each read or computed anew whenever it is asked for; none is kept."""

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor]
    ) -> None:
        """`shapes` has all names, in the order of the model; `read` returns one tensor."""
        self.shapes: Mapping[str, tuple[int, ...]] = dict(shapes)
        self._read = read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def only(self, wanted: Callable[[str], bool]) -> "LazyTensors":
        """Returns those whose names are wanted."""
        return LazyTensors({n: s for n, s in self.shapes.items() if wanted(n)}, self._read)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of tensors by name, without reading those that are lazy."""
    if isinstance(tensors, LazyTensors):
        return dict(tensors.shapes)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def entries_of(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> list[TensorEntry]:
    """Returns the entries of a file that holds `tensors` in `dtype`, the position embedding not."""
    return [
        TensorEntry(name, _dtype_of(name, dtype), shape)
        for name, shape in shapes_of(tensors).items()
    ]


def rounded(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> LazyTensors:
    """Returns `tensors` in `dtype`, each when it is asked for; the position embedding stays fp32.

    Reading one raises CheckpointError if a finite value becomes infinite.
    """

    def read(name: str) -> Tensor:
        value = tensors[name]
        result = value.to(_dtype_of(name, dtype))
        if result.dtype != value.dtype and (result.isinf() & value.isfinite()).any():
            raise CheckpointError(
                f"{name} has values up to {value.abs().max():.3g}, beyond the range of "
                f"{str(dtype).removeprefix('torch.')}; choose another export.dtype"
            )
        return result

    return LazyTensors(shapes_of(tensors), read)


def _dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    # No weight but a function of the model's sizes, which others compute in fp32.
    return torch.float32 if name == "pos_embed" else dtype
