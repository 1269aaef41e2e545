"""A run's checkpoints: safetensors fragments and JSON, whole or absent, free of topology.

`step-0000500/` holds one fragment file per rank, `state.json`, and `manifest.json` with the size
and sha256 of both. It is written aside, flushed, and renamed, so a kill at any byte leaves the
previous checkpoint as the newest valid one. Nothing in it is a pickle.
"""

import contextlib
import copy
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from srepa_ds import distributed
from srepa_ds.errors import CheckpointError, OutputError
from srepa_ds.files import flush_to_disk, sha256_of, write_aside
from srepa_ds.fragment_file import Piece, snapshot_of, write_snapshot
from srepa_ds.manifest import FOREIGN, MANIFEST, FileEntry, entry_of, fault_in, write_manifest

FORMAT = "srepa_ds.checkpoint"
VERSION = 1
_STATE = "state.json"
_LATEST = "latest"
_PREFIX = "step-"
_ASIDE = ".writing-"
_REPLACED = f"{_ASIDE}replaced-"

log = logging.getLogger("srepa_ds")


class CheckpointReader:
    """Reads any run of any stored tensor, whatever ranks it was written by."""

    def __init__(self, folder: Path):
        """Opens a checkpoint that was found valid; raises CheckpointError if it cannot be read."""
        try:
            self._open(folder)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise CheckpointError(
                f"{folder} cannot be read on this rank: {error}; every rank needs the run's folder"
            ) from error

    def _open(self, folder: Path) -> None:
        self.folder = folder
        self.state: dict[str, Any] = json.loads((folder / _STATE).read_text())
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
        """Returns what is stored of the weights: master, moments and averages."""
        return sorted({kind for kind, _ in self._pieces})

    def names(self, kind: str) -> list[str]:
        """Returns the weights stored under `kind`, in the model's order."""
        return [name for name in self._shapes if (kind, name) in self._pieces]

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of the whole weight `name`."""
        return tuple(self._shapes[name])

    def run(self, kind: str, name: str, *, start: int, numel: int) -> Float[Tensor, " numel"]:
        """Returns elements start .. start + numel of the flattened tensor.

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
                f"{self.folder}: {kind} of '{name}' has no elements from {reached} on, but they "
                f"are needed up to {stop}; the checkpoint is incomplete, resume from an earlier one"
            )
        return result

    def tensor(self, kind: str, name: str) -> Tensor:
        """Returns the whole tensor in its own shape."""
        shape = self.shape(name)
        return self.run(kind, name, start=0, numel=torch.Size(shape).numel()).reshape(shape)

    def fingerprint(self) -> str:
        """Returns a short hash that identifies the checkpoint: of its manifest."""
        return sha256_of(self.folder / MANIFEST)[:16]


def step_folder(root: Path, step: int) -> Path:
    """Returns where the checkpoint of `step` lies."""
    return root / f"{_PREFIX}{step:07d}"


class UnfinishedCheckpoint:
    """A checkpoint from its first byte to its name.

    To build it is collective, and it holds what the run was at that moment. Raises OutputError on
    every rank if it cannot be begun, and RankError if one has no memory for the copy.
    """

    def __init__(
        self, root: Path, *, step: int, pieces: Iterable[Piece], state: dict[str, Any], rank: int
    ):
        self.step = step
        self.folder = step_folder(root, step)
        self._root, self._rank = root, rank
        self._file = f"fragments-{rank:05d}.safetensors"
        self._aside = root / f"{_ASIDE}{self.folder.name}"
        distributed.on_main(lambda: _make_aside(root, self._aside))
        with self._nothing_left():
            self._snapshot = distributed.together(
                lambda: snapshot_of(pieces, label=f"{FORMAT} {VERSION}")
            )
        # A copy, because the run goes on while this is written.
        self._document = copy.deepcopy(state)

    def write(self) -> FileEntry:
        """Returns this rank's entry of the manifest once its fragments are on disk.

        No collective: may run in any thread. Raises OutputError.
        """
        with writing(self._aside):
            return write_snapshot(self._aside / self._file, self._snapshot)

    def finish(self, written: Callable[[], FileEntry]) -> Path:
        """Returns the finished checkpoint's folder. Collective.

        `written` gives what `write` returned, or raises what it raised. Raises OutputError on every
        rank if any could not write; then nothing is left of it.
        """
        with self._nothing_left():
            entry = distributed.together(written)
            parts = distributed.gather((self._file, entry, self._snapshot.shapes))
            entries = {file: entry for file, entry, _ in parts}
            # In the model's order, as far as any rank knows it.
            shapes = {name: shape for *_, part in parts for name, shape in part.items()}
            mark = {"format": FORMAT, "version": VERSION}
            document = self._document | mark | {"step": self.step, "shapes": shapes}
            distributed.on_main(
                lambda: _finish(self._root, self._aside, self.folder, document, entries)
            )
        return self.folder

    @contextlib.contextmanager
    def _nothing_left(self) -> Iterator[None]:
        """Removes what was begun if the block fails."""
        try:
            yield
        except Exception:
            if self._rank == 0:
                shutil.rmtree(self._aside, ignore_errors=True)
            raise


def save(
    root: Path, *, step: int, pieces: Iterable[Piece], state: dict[str, Any], rank: int
) -> Path:
    """Writes one checkpoint and returns its folder. Collective: every rank gives its own pieces.

    `state` is JSON, the same on all ranks. Raises OutputError on every rank if any cannot write;
    then nothing of it is left.
    """
    unfinished = UnfinishedCheckpoint(root, step=step, pieces=pieces, state=state, rank=rank)
    return unfinished.finish(unfinished.write)


@contextlib.contextmanager
def writing(place: Path) -> Iterator[None]:
    """Makes an OutputError of an OSError met in the block."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write the checkpoint under {place}: {error.strerror or error}; earlier "
            "checkpoints are whole, make room or permission and run the same command again"
        ) from error


def _make_aside(root: Path, aside: Path) -> None:
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()


def _finish(
    root: Path, aside: Path, final: Path, document: dict[str, Any], entries: dict[str, FileEntry]
) -> None:
    with writing(root):
        (aside / _STATE).write_text(json.dumps(document, indent=1))
        flush_to_disk(aside / _STATE)
        files = {**entries, _STATE: entry_of(aside / _STATE)}
        write_manifest(aside, files, format=FORMAT, version=VERSION)
        flush_to_disk(aside)
        # One of the same step is moved, not deleted, until this one has its name.
        replaced = root / f"{_REPLACED}{final.name}"
        if final.is_dir():
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        aside.rename(final)
        shutil.rmtree(replaced, ignore_errors=True)
        write_aside(root / _LATEST, lambda pointer: pointer.write_text(final.name + "\n"))
        flush_to_disk(root)


def fault_of(folder: Path) -> str | None:
    """Returns why the checkpoint in `folder` is not valid, or None if it is."""
    return fault_in(folder, format=FORMAT, version=VERSION, needed=_STATE)


def steps_in(root: Path) -> list[Path]:
    """Returns the checkpoint folders under `root`, oldest first, valid or not.

    Among them one that a kill left aside just before another of the same step took its name.
    """
    return sorted((*named(root), *_left_aside(root)), key=step_of)


def put_back(root: Path) -> None:
    """Gives those that a kill left aside their names again, so that they count and are kept.

    For who alone writes there, once no rank is about to open one of them. Raises OutputError.
    """
    with writing(root):
        for path in _left_aside(root):
            path.rename(step_folder(root, step_of(path)))


def _left_aside(root: Path) -> list[Path]:
    """Returns those moved for another of the same step that never took the name."""
    moved = named(root, _REPLACED)
    return [path for path in moved if not step_folder(root, step_of(path)).is_dir()]


def named(root: Path, prefix: str = "") -> list[Path]:
    """Returns the folders under `root` that are named as checkpoints are, after `prefix`."""
    beginning = f"{prefix}{_PREFIX}"
    paths = [path for path in root.glob(f"{beginning}*") if path.name[len(beginning) :].isdigit()]
    return [path for path in paths if path.is_dir()]


def newest_valid(root: Path) -> Path | None:
    """Returns the newest valid checkpoint under `root`, or None when there is none at all.

    Says which it passed over and why. Raises CheckpointError when there are checkpoints but none
    is valid, or a newer one is of another format: to go on from before it would throw good training
    away.
    """
    faults = []
    for folder in reversed(steps_in(root)):
        fault = fault_of(folder)
        if fault is None:
            return folder
        if fault.startswith(FOREIGN):
            raise CheckpointError(
                f"{folder} is {fault}; go on with the srepa_ds that wrote it, or move it away"
            )
        log.warning("passing over checkpoint %s: %s", folder, fault)
        faults.append(f"{folder.name}: {fault}")
    if faults:
        raise CheckpointError(
            f"{root} holds no valid checkpoint ({'; '.join(faults)}); restore one, or move the "
            "folder away to start anew"
        )
    return None


def remove_leftovers(root: Path) -> None:
    """Removes what interrupted saves left; for who is about to save, or has just done so."""
    for leftover in root.glob(f"{_ASIDE}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def step_of(folder: Path) -> int:
    """Returns the step in the name of a checkpoint's folder."""
    return int(folder.name.rpartition("-")[2])
