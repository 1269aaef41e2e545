"""Writes one checkpoint: under a temporary name first, then under its own."""

import contextlib
import copy
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srepa_ds.checkpoint.folder import (
    ASIDE,
    FORMAT,
    LATEST,
    REPLACED,
    STATE,
    VERSION,
    step_folder,
    writing,
)
from srepa_ds.checkpoint.fragment_file import Piece, key_of, snapshot_of, write_snapshot
from srepa_ds.checkpoint.manifest import (
    FileEntry,
    entry_of,
    write_manifest,
)
from srepa_ds.distributed import ranks
from srepa_ds.documents.safetensors_writer import TensorEntry, write_safetensors
from srepa_ds.files import flush_to_disk, write_aside


class UnfinishedCheckpoint:
    """A checkpoint between its first byte and its name.

    Construction is collective and takes a snapshot of the state. Raises OutputError on every rank
    if the folder cannot be made, and RankError if a rank has no memory for the copy.
    """

    def __init__(
        self, root: Path, *, step: int, pieces: Iterable[Piece], state: dict[str, Any], rank: int
    ):
        self.step = step
        self.folder = step_folder(root, step)
        self._root, self._rank = root, rank
        self._file = _file_of(rank)
        self._aside = root / f"{ASIDE}{self.folder.name}"
        ranks.on_main(_make_aside, root, self._aside)
        with self._nothing_left():
            label = f"{FORMAT} {VERSION}"
            self._snapshot = ranks.together(snapshot_of, pieces, label=label)
        # A copy, because training may continue while this is written.
        self._document = copy.deepcopy(state)

    def write(self) -> FileEntry:
        """Writes this rank's fragments to disk and returns their entry of the manifest.

        Not collective, so it may run in any thread. Raises OutputError.
        """
        with writing(self._aside):
            return write_snapshot(self._aside / self._file, self._snapshot)

    def finish(self, written: Callable[[], FileEntry]) -> Path:
        """Gives the checkpoint its name and returns its folder. Collective.

        `written` returns what `write` returned, or raises what it raised. Raises OutputError on
        every rank if any could not write; then nothing of the checkpoint is left.
        """
        with self._nothing_left():
            entry = ranks.together(written)
            parts = ranks.gather((self._file, entry, self._snapshot.shapes))
            entries = {file: entry for file, entry, _ in parts}
            # In the model's order, as each rank knows it for its own share.
            shapes = {name: shape for *_, part in parts for name, shape in part.items()}
            document = _document(self._document, self.step, shapes)
            ranks.on_main(_finish, self._root, self._aside, self.folder, document, entries)
        return self.folder

    @contextlib.contextmanager
    def _nothing_left(self) -> Iterator[None]:
        """Removes the temporary folder if the block fails."""
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

    `state` is JSON and the same on all ranks. Raises OutputError on every rank if any cannot write;
    then nothing of the checkpoint is left.
    """
    unfinished = UnfinishedCheckpoint(root, step=step, pieces=pieces, state=state, rank=rank)
    return unfinished.finish(unfinished.write)


def save_whole(
    root: Path,
    *,
    step: int,
    shapes: Mapping[str, tuple[int, ...]],
    kinds: Mapping[str, Callable[[str], Tensor]],
    state: Mapping[str, Any],
) -> Path:
    """Writes a checkpoint of whole tensors, as one process has them, and returns its folder.

    `shapes` has all weights, in the model's order; each of `kinds` returns one of them when its
    turn comes, so that no more than one is in memory. Raises OutputError, and what `kinds` raise;
    then nothing of the checkpoint is left.
    """
    aside = root / f"{ASIDE}{step_folder(root, step).name}"
    places = {key_of(kind, name, 0): (kind, name) for name in shapes for kind in kinds}
    entries = [
        TensorEntry(key, torch.float32, (math.prod(shapes[name]),))
        for key, (_, name) in places.items()
    ]

    def read(key: str) -> Tensor:
        kind, name = places[key]
        return kinds[kind](name).reshape(-1)

    _make_aside(root, aside)
    try:
        path = aside / _file_of(0)
        with writing(aside):
            sha256 = write_safetensors(path, entries, read, {"format": f"{FORMAT} {VERSION}"})
            files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256}}
        _finish(root, aside, step_folder(root, step), _document(state, step, shapes), files)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return step_folder(root, step)


def _file_of(rank: int) -> str:
    return f"fragments-{rank:05d}.safetensors"


def _document(
    state: Mapping[str, Any], step: int, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    mark = {"format": FORMAT, "version": VERSION}
    return {**state, **mark, "step": step, "shapes": dict(shapes)}


def _make_aside(root: Path, aside: Path) -> None:
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()


def _finish(
    root: Path, aside: Path, final: Path, document: dict[str, Any], entries: dict[str, FileEntry]
) -> None:
    with writing(root):
        (aside / STATE).write_text(json.dumps(document, indent=1))
        flush_to_disk(aside / STATE)
        files = {**entries, STATE: entry_of(aside / STATE)}
        write_manifest(aside, files, format=FORMAT, version=VERSION)
        flush_to_disk(aside)
        # An earlier one of the same step is moved first, and deleted once this one has its name.
        replaced = root / f"{REPLACED}{final.name}"
        if final.is_dir():
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        aside.rename(final)
        shutil.rmtree(replaced, ignore_errors=True)
        write_aside(root / LATEST, lambda pointer: pointer.write_text(final.name + "\n"))
        flush_to_disk(root)
