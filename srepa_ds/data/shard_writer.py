"""Writes a folder of shards: streaming, started over after a kill, never half visible."""

import json
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from jaxtyping import UInt8
from safetensors.torch import save_file

from srepa_ds.data.contents import CHECKED_NAME
from srepa_ds.data.headers import metadata_of
from srepa_ds.data.shard_index import (
    FORMAT,
    INDEX_NAME,
    VERSION,
    DatasetDescription,
    ShardEntry,
    ShardIndex,
    read_index,
)
from srepa_ds.data.shards import shard_facts
from srepa_ds.documents.json_reader import read_json
from srepa_ds.errors import OutputError
from srepa_ds.files import PARTIAL, claimed, sha256_of, write_aside, writing
from srepa_ds.schema import to_tree

MARKER_NAME = "preparing.json"
# Its own name for a file until that is whole.
_OF_SAFETENSORS = ".tmp??????"
_CURE = "choose a folder you may write to, with free space"
_UNNAMED = {MARKER_NAME + PARTIAL, CHECKED_NAME}
"""What may lie in a folder whose preparation was killed before its marker got its name."""


def is_prepared(folder: Path, description: DatasetDescription) -> bool:
    """Returns whether `folder` already holds exactly this data set, finished.

    Raises OutputError if it holds another data set, DataError if its index is damaged.
    """
    with writing(folder, cure=_CURE):
        if not (folder / INDEX_NAME).exists():
            return False
    index = read_index(folder)
    if index.dataset_id == description.dataset_id:
        return True
    settings = {**index.source, "image_shape": list(index.image_shape)}
    wanted = {**description.source, "image_shape": list(description.image_shape)}
    differing = [
        f"{name} is {settings.get(name)!r} there and {wanted.get(name)!r} here"
        for name in sorted({*settings, *wanted})
        if settings.get(name) != wanted.get(name)
    ]
    raise OutputError(
        f"{folder}: holds a data set made with other settings "
        f"({'; '.join(differing) or 'class names differ'}); choose another folder or delete it"
    )


def shard_name(number: int) -> str:
    """Returns the name of a shard's file."""
    return f"shard-{number:05d}.safetensors"


def remove_marker(folder: Path) -> None:
    """Removes what a kill between the writer's last two moments leaves in a finished folder."""
    with suppress(OSError):
        (folder / MARKER_NAME).unlink(missing_ok=True)


class ShardWriter:
    """Collects samples and writes a shard whenever it is full; a context manager.

    The index is written when the `with` block ends without an exception. An exception removes
    everything written; after a kill, the next writer with the same description starts over.
    """

    def __init__(self, folder: Path, *, description: DatasetDescription, samples_per_shard: int):
        self._folder = folder
        self._description = description
        self._samples_per_shard = samples_per_shard
        self._images: list[np.ndarray] = []
        self._labels: list[int] = []
        self._entries: list[ShardEntry] = []
        self._written: list[Path] = []
        self._claim = ExitStack()

    def __enter__(self) -> "ShardWriter":
        """Locks the folder and clears what a killed writer left in it.

        Raises OutputError if the folder cannot be written to or holds anything else, or if another
        process writes into it.
        """
        claim = claimed(self._folder, doing="writing shards into", cure=_CURE)
        self._claim.enter_context(claim)
        try:
            with writing(self._folder, cure=_CURE):
                self._begin()
        except OutputError:
            self._remove_everything()
            raise
        return self

    def add(self, image: UInt8[np.ndarray, "height width 3"], label: int) -> None:
        """Adds a sample; raises OutputError if a full shard cannot be written."""
        self._images.append(image.transpose(2, 0, 1).copy())
        self._labels.append(label)
        if len(self._labels) == self._samples_per_shard:
            self._write_shard()

    def attach(self, name: str, contents: bytes) -> None:
        """Writes `contents` to a file beside the shards; raises OutputError."""
        self._write(self._folder / name, lambda aside: aside.write_bytes(contents))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Finishes the data set; after an exception, removes everything written instead."""
        try:
            if kind is None:
                self._finish()
        except BaseException:
            self._remove_everything()
            raise
        if kind is not None:
            self._remove_everything()
        self._claim.close()

    def _begin(self) -> None:
        marker = self._folder / MARKER_NAME
        held = sorted({path.name for path in self._folder.iterdir()} - _UNNAMED)
        if held and not self._is_unfinished(marker):
            raise OutputError(
                f"{self._folder}: not empty (it holds {', '.join(held[:3])}"
                f"{', ...' if len(held) > 3 else ''}) and not an unfinished preparation with "
                "these settings; choose an empty folder or delete it"
            )
        for pattern in ("shard-*.safetensors", f"*{PARTIAL}", _OF_SAFETENSORS, CHECKED_NAME):
            for path in self._folder.glob(pattern):
                path.unlink()
        text = json.dumps({"format": FORMAT, "dataset_id": self._description.dataset_id})
        write_aside(marker, lambda aside: aside.write_text(text))
        self._written.append(marker)

    def _is_unfinished(self, marker: Path) -> bool:
        if (self._folder / INDEX_NAME).exists() or not marker.exists():
            return False
        try:
            found = read_json(marker)
        except ValueError:
            return False
        return found == {"format": FORMAT, "dataset_id": self._description.dataset_id}

    def _write_shard(self) -> None:
        path = self._folder / shard_name(len(self._entries))
        tensors = {
            "images": torch.from_numpy(np.stack(self._images)),
            "labels": torch.tensor(self._labels, dtype=torch.int64),
        }
        count, described = len(self._labels), self._description
        facts = shard_facts(count, described.image_shape, described.dataset_id)
        self._write(path, lambda aside: save_file(tensors, aside, metadata=metadata_of(facts)))
        entry = ShardEntry(
            file=path.name, num_samples=count, bytes=path.stat().st_size, sha256=sha256_of(path)
        )
        self._entries.append(entry)
        self._images, self._labels = [], []

    def _finish(self) -> None:
        if self._labels:
            self._write_shard()
        described = self._description
        index = ShardIndex(
            format=FORMAT,
            version=VERSION,
            dataset_id=described.dataset_id,
            num_samples=sum(entry.num_samples for entry in self._entries),
            image_shape=described.image_shape,
            num_classes=len(described.class_names),
            class_names=described.class_names,
            source=described.source,
            shards=tuple(self._entries),
        )
        text = json.dumps(to_tree(index), indent=1) + "\n"
        self._write(self._folder / INDEX_NAME, lambda aside: aside.write_text(text))
        (self._folder / MARKER_NAME).unlink(missing_ok=True)

    def _write(self, path: Path, write: Callable[[Path], object]) -> None:
        with writing(path, cure=_CURE):
            write_aside(path, write)
        self._written.append(path)

    def _remove_everything(self) -> None:
        # The marker goes last: with it, the next writer knows the rest for its own.
        for path in reversed(self._written):
            path.unlink(missing_ok=True)
        self._claim.close()
