"""Reads a checkpoint: its state, and any run of any stored tensor, whatever topology wrote it."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from srepa_ds.checkpoint.folder import STATE
from srepa_ds.checkpoint.manifest import MANIFEST
from srepa_ds.documents.json_reader import read_json
from srepa_ds.errors import CheckpointError
from srepa_ds.files import sha256_of

_STATE_KINDS = {
    **dict.fromkeys(("step", "adam_step", "samples_seen"), int),
    **dict.fromkeys(("config", "identity", "shapes"), dict),
}


def read_state(folder: Path, *, needed: tuple[str, ...] = ()) -> dict[str, Any]:
    """Returns what a checkpoint holds besides the fragments.

    Raises CheckpointError if it cannot be read, lacks what is `needed`, or has it in another type.
    """
    try:
        return _state(folder, needed)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder / STATE} cannot be read ({error}); restore it, or move {folder} away"
        ) from error


def _state(folder: Path, needed: tuple[str, ...]) -> dict[str, Any]:
    """Returns the state, as `read_state` does; raises OSError or ValueError."""
    state = read_json(folder / STATE)
    if not isinstance(state, dict):
        raise ValueError("it is not a JSON object")
    for name, kind in _STATE_KINDS.items():
        if name in state and not isinstance(state[name], kind):
            raise ValueError(f"'{name}' is of another type")
    if lacking := [name for name in needed if name not in state]:
        raise ValueError(f"it lacks '{lacking[0]}'")
    return state


class CheckpointReader:
    """Reads any run of any stored tensor, whatever number of ranks wrote it."""

    def __init__(self, folder: Path):
        """Opens a valid checkpoint; raises CheckpointError if this rank cannot read it."""
        try:
            self._open(folder)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise CheckpointError(
                f"{folder} cannot be read on this rank: {error}; every rank needs the run's folder"
            ) from error

    def _open(self, folder: Path) -> None:
        self.folder = folder
        self.state = _state(folder, needed=("shapes",))
        self._shapes: dict[str, list[int]] = self.state["shapes"]
        self._files = {}
        self._pieces: dict[tuple[str, str], list[tuple[int, str, str]]] = {}
        for path in sorted(folder.glob("fragments-*.safetensors")):
            file = self._files[path.name] = safe_open(path, framework="pt")
            for key in file.keys():
                kind, _, rest = key.partition("/")
                name, _, start = rest.rpartition("@")
                self._pieces.setdefault((kind, name), []).append((int(start), path.name, key))

    def kinds(self) -> list[str]:
        """Returns the kinds stored of the weights: master, moments and averages."""
        return sorted({kind for kind, _ in self._pieces})

    def names(self, kind: str) -> list[str]:
        """Returns the weights stored under `kind`, in the model's order."""
        return [name for name in self._shapes if (kind, name) in self._pieces]

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of the whole weight `name`."""
        return tuple(self._shapes[name])

    def run(self, kind: str, name: str, *, start: int, numel: int) -> Float[Tensor, " numel"]:
        """Returns `numel` elements of the flattened tensor, from `start` on.

        Raises CheckpointError unless the stored pieces cover every one of them.
        """
        result = torch.empty(numel, dtype=torch.float32)
        reached, stop = start, start + numel
        for piece_start, file, key in sorted(self._pieces.get((kind, name), [])):
            piece = self._files[file].get_slice(key)
            (length,) = piece.get_shape()
            last = min(stop, piece_start + length)
            if piece_start <= reached < last:
                run = piece[reached - piece_start : last - piece_start]
                result[reached - start : last - start] = run
                reached = last
        if reached != stop:
            raise CheckpointError(
                f"{self.folder}: {kind} of '{name}' is missing elements {reached} to {stop - 1}"
                f"; the checkpoint is incomplete, resume from an earlier one"
            )
        return result

    def tensor(self, kind: str, name: str) -> Tensor:
        """Returns the whole tensor in its own shape."""
        shape = self.shape(name)
        return self.run(kind, name, start=0, numel=torch.Size(shape).numel()).reshape(shape)

    def fingerprint(self) -> str:
        """Returns a short hash of the manifest, which identifies the checkpoint."""
        return sha256_of(self.folder / MANIFEST)[:16]
