"""Tensors on their way into a file of torch.save, which wants all of them at once."""

import mmap
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from srepa_ds.documents.safetensors_writer import TensorEntry, values_of


@contextmanager
def staged(
    folder: Path, entries: Iterable[TensorEntry], read: Callable[[str], Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Yields the tensors of `entries`, mapped from a nameless file in `folder`.

    Each is read once, when its turn comes. Each has a storage of its own, so that torch.save writes
    no more than its values. The file has no name, so a kill leaves nothing of it. Raises OSError.
    """
    entries = list(entries)
    with tempfile.TemporaryFile(dir=folder) as file:
        for entry in entries:
            file.write(values_of(read(entry.name), entry))
        file.flush()
        yield _mapped(file.fileno(), entries)


def _mapped(descriptor: int, entries: Iterable[TensorEntry]) -> dict[str, Tensor]:
    # A mapping that may be written to counts as memory, of which there may be less.
    content = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    tensors, offset = {}, 0
    for entry in entries:
        numel = entry.num_bytes // entry.dtype.itemsize
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            flat = torch.frombuffer(content, dtype=entry.dtype, count=numel, offset=offset)
        tensors[entry.name] = flat.reshape(entry.shape)
        offset += entry.num_bytes
    return tensors
