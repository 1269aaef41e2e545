"""One rank's share of a checkpoint: copied to host memory first, then written to a file.

The file is a safetensors file: a length, a JSON header and the bytes of all tensors in turn. The
safetensors library could write it too, but it would make a second copy of everything and block
other threads in the meantime.
"""

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from srepa_ds.checkpoint.manifest import FileEntry
from srepa_ds.documents.safetensors_writer import TensorEntry, safetensors_header

log = logging.getLogger("srepa_ds")

# 64 MiB. Page-locked memory comes in powers of two, so this wastes none.
CHUNK_NUMEL = 1 << 24


@dataclass(frozen=True)
class Piece:
    """A run of one flattened tensor, as stored."""

    kind: str
    """The kind of value: master, exp_avg, exp_avg_sq, or an average such as ema."""

    name: str
    shape: tuple[int, ...]
    start: int
    values: Float[Tensor, " numel"]

    @property
    def key(self) -> str:
        """The tensor's name in the fragment file."""
        return key_of(self.kind, self.name, self.start)


def key_of(kind: str, name: str, start: int) -> str:
    """Returns the name, in a fragment file, of a run of the weight `name` from `start` on."""
    return f"{kind}/{name}@{start}"


@dataclass(frozen=True)
class Snapshot:
    """A copy of the pieces at one moment, in host memory."""

    shapes: dict[str, tuple[int, ...]]
    """The shapes of the whole weights, by name, in the model's order."""

    header: bytes
    """The file's beginning, up to the first tensor."""

    chunks: tuple[Tensor, ...]
    """All values in turn, flat and in float32, split wherever a chunk is full."""

    copied: torch.cuda.Event | None
    """Occurs when the values of a GPU have arrived."""


def snapshot_of(pieces: Iterable[Piece], *, label: str, chunk_numel: int = CHUNK_NUMEL) -> Snapshot:
    """Returns a copy of `pieces` in float32; later changes to their values do not reach it.

    A copy from a GPU is made on the current CUDA stream, in which the next step queues behind it,
    and the host does not wait. `label` goes into the file.
    """
    pieces = list(pieces)
    pinned = any(piece.values.is_cuda for piece in pieces)
    total = sum(piece.values.numel() for piece in pieces)
    sizes = [min(chunk_numel, total - start) for start in range(0, total, chunk_numel)]
    chunks = tuple(room_for(sizes, pinned=pinned))
    _copy([piece.values for piece in pieces], chunks, chunk_numel)
    copied = None
    if pinned:
        copied = torch.cuda.Event()
        copied.record()
    shapes = {piece.name: piece.shape for piece in pieces}
    return Snapshot(shapes, _header(pieces, label), chunks, copied)


def room_for(sizes: Iterable[int], *, pinned: bool) -> Iterator[Float[Tensor, " numel"]]:
    """Yields host memory, page-locked if `pinned` and as long as that is available.

    Copies to ordinary memory make the host wait.
    """
    for size in sizes:
        try:
            yield torch.empty(size, dtype=torch.float32, pin_memory=pinned)
        except RuntimeError as error:
            if not pinned:
                raise
            log.warning(
                "no page-locked memory for the checkpoint, so copying takes longer: %s", error
            )
            pinned = False
            yield torch.empty(size, dtype=torch.float32)


def _copy(sources: Iterable[Tensor], chunks: tuple[Tensor, ...], chunk_numel: int) -> None:
    position = 0
    for source in sources:
        rest = source.detach().reshape(-1)
        while len(rest):
            number, offset = divmod(position, chunk_numel)
            room = chunks[number][offset : offset + len(rest)]
            room.copy_(rest[: len(room)], non_blocking=True)
            rest = rest[len(room) :]
            position += len(room)


def _header(pieces: list[Piece], label: str) -> bytes:
    entries = [TensorEntry(p.key, torch.float32, (p.values.numel(),)) for p in pieces]
    return safetensors_header(entries, {"format": label})


def write_snapshot(path: Path, snapshot: Snapshot) -> FileEntry:
    """Writes the file, waits until it is on disk, and returns its size and sha256.

    May run in a thread, since it waits without the interpreter's lock. Raises OSError.
    """
    if snapshot.copied is not None:
        snapshot.copied.synchronize()
    digest, size = hashlib.sha256(snapshot.header), len(snapshot.header)
    with path.open("wb") as file:
        file.write(snapshot.header)
        for chunk in snapshot.chunks:
            content = chunk.view(torch.uint8).numpy().data
            file.write(content)
            digest.update(content)
            size += len(content)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}
