"""A data set that is being prepared: its pieces are written in any order, then its index.

Each finished piece has a receipt, `shard-00003.json` beside `shard-00003.safetensors`, so a
preparation that was killed writes only what is missing. The index replaces the receipts.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from srepa_ds.data.contents import CHECKED_NAME
from srepa_ds.data.latent_file import latent_name
from srepa_ds.data.receipts import LatentReceipt as LatentReceipt
from srepa_ds.data.receipts import ShardReceipt as ShardReceipt
from srepa_ds.data.receipts import Skipped as Skipped
from srepa_ds.data.shard_file import shard_name
from srepa_ds.data.shard_index import (
    CURE,
    FORMAT,
    INDEX_NAME,
    VERSION,
    DatasetDescription,
    LatentDescription,
    LatentFileEntry,
    LatentIndex,
    ShardEntry,
    ShardIndex,
    read_index,
)
from srepa_ds.documents.json_reader import read_json
from srepa_ds.errors import ConfigError, OutputError, listed
from srepa_ds.files import PARTIAL, claimed, locked, write_aside, writing
from srepa_ds.schema import Section, replaced, to_tree, validated
from srepa_ds.trees import differences

MARKER_NAME = "preparing.json"
SKIPPED_NAME = "skipped.jsonl"
"""The file that lists the images of the source which could not be read."""

# Its own name for a file until that is whole.
_OF_SAFETENSORS = ".tmp??????"
_PIECES = ("shard-*.safetensors", "shard-*.json", "latents-*.safetensors", "latents-*.json")

S = TypeVar("S", bound=Section)


def prepared_index(folder: Path, description: DatasetDescription) -> ShardIndex | None:
    """Returns the index of the data set in `folder` if it is this one; None if there is none.

    Raises OutputError if it holds another data set, DataError if its index is damaged.
    """
    with writing(folder, cure=CURE):
        if not (folder / INDEX_NAME).exists():
            return None
    index = read_index(folder)
    if index.dataset_id == description.dataset_id:
        return index
    found = differences(_settings_of(index), _settings_of(description))
    differing = [f"{d.path} is {d.old!r} there and {d.new!r} here" for d in found]
    raise OutputError(
        f"{folder}: holds a data set made with other settings "
        f"({'; '.join(differing) or 'class names differ'}); choose another folder or delete it"
    )


class PreparedFolder:
    """A folder that becomes a data set; several processes may write different pieces of it."""

    def __init__(
        self,
        folder: Path,
        description: DatasetDescription,
        *,
        is_shared: bool = False,
        latent_settings: Mapping[str, Any] | None = None,
    ):
        """With `is_shared`, other processes may prepare the same data set at the same time.

        `latent_settings` are those of the encoding that decide the last bits of latents; files of
        latents that were encoded with others are still to be written.
        """
        self.folder = folder
        self.description = description
        self.is_shared = is_shared
        self._latent_settings = dict(latent_settings or {})

    @contextmanager
    def claimed(self, *, keep: bool = True) -> Iterator[None]:
        """Keeps other data sets out of the folder, and begins; without `keep`, starts over.

        Raises OutputError if the folder cannot be written to or holds anything else, or if another
        process writes into it.
        """
        doing = "writing shards into"
        with claimed(self.folder, doing=doing, cure=CURE, is_shared=self.is_shared):
            with writing(self.folder, cure=CURE):
                self._begin(keep=keep)
            try:
                yield
            except GeneratorExit:
                # The block was not left: what it has written stays, as after a kill.
                raise
            except BaseException:
                self._leave_nothing_useless()
                raise

    def write(self, name: str, contents: bytes) -> None:
        """Writes a file beside the shards; raises OutputError."""
        path = self.folder / name
        with writing(path, cure=CURE):
            write_aside(path, lambda aside: aside.write_bytes(contents), concurrent=self.is_shared)

    def note(self, number: int, receipt: ShardReceipt) -> None:
        """Writes the receipt of one part of the source; raises OutputError."""
        self.write(_receipt_of(shard_name(number)), _text_of(to_tree(receipt)))

    def receipt(self, number: int) -> ShardReceipt | None:
        """Returns the receipt of one part of the source, None if it is still to be written."""
        found = self._receipt(shard_name(number), ShardReceipt)
        return found if found and self._is_there(found.shard) else None

    def note_latents(self, number: int, receipt: LatentReceipt) -> None:
        """Writes the receipt of the latents of a shard; raises OutputError.

        It names the settings of the encoding given to this folder.
        """
        complete = replaced(receipt, settings=self._latent_settings)
        self.write(_receipt_of(latent_name(number)), _text_of(to_tree(complete)))

    def latents(
        self, number: int, described: LatentDescription, *, shard_sha256: str
    ) -> LatentFileEntry | None:
        """Returns the entry of a shard's latents, None if they are still to be written."""
        found = self._receipt(latent_name(number), LatentReceipt)
        if found is None or found.described != described:
            return None
        if found.settings != self._latent_settings:
            return None
        is_of_shard = found.latents.shard_sha256 == shard_sha256
        return found.latents if is_of_shard and self._is_there(found.latents) else None

    def other_latent_settings(self, number: int) -> dict[str, Any] | None:
        """Returns the settings with which a shard's latents were encoded, None if with these."""
        found = self._receipt(latent_name(number), LatentReceipt)
        return found.settings if found and found.settings != self._latent_settings else None

    def index_of(
        self,
        entries: Sequence[ShardEntry],
        *,
        num_skipped: int = 0,
        latents: LatentIndex | None = None,
    ) -> ShardIndex:
        """Returns the index of a data set of the shards `entries`; writes nothing."""
        described = self.description
        return ShardIndex(
            format=FORMAT,
            version=VERSION,
            dataset_id=described.dataset_id,
            num_samples=sum(entry.num_samples for entry in entries),
            image_shape=described.image_shape,
            num_classes=len(described.class_names),
            class_names=described.class_names,
            class_ids=described.class_ids,
            pixels=described.pixels,
            source=described.source,
            num_skipped=num_skipped,
            latents=latents,
            shards=tuple(entries),
        )

    def finish(self, index: ShardIndex, skipped: Sequence[Skipped] = ()) -> None:
        """Writes the list of images left out, if there are any, and then the index.

        The index makes the folder a data set. Raises OutputError.
        """
        if skipped:
            lines = [json.dumps(to_tree(one), ensure_ascii=False) + "\n" for one in skipped]
            self.write(SKIPPED_NAME, "".join(lines).encode())
        self.write(INDEX_NAME, _text_of(to_tree(index)))
        self._tidy_up()

    def tidy_up(self) -> None:
        """Removes what a finished data set does not need, as far as that is possible.

        Leaves all of it to a process that holds the folder: it may be adding latents.
        """
        with suppress(OSError), locked(self.folder):
            self._tidy_up()

    def _tidy_up(self) -> None:
        for path in self._left_over():
            with suppress(OSError):
                path.unlink()

    def remove_beginnings(self, numbers: Iterable[int]) -> None:
        """Removes what killed processes had begun to write of the pieces `numbers`.

        Nobody else may be writing them. Raises OutputError.
        """
        with writing(self.folder, cure=CURE):
            for number in numbers:
                names = (shard_name(number), latent_name(number))
                for path in self._found([f"{Path(name).stem}.*{PARTIAL}" for name in names]):
                    path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Removes everything that was written of an unfinished data set; raises OSError."""
        # The marker goes last: with it, the next preparation knows the rest for its own.
        for path in [*self._found(_PIECES), *self._left_over()]:
            path.unlink(missing_ok=True)

    def _leave_nothing_useless(self) -> None:
        """Removes the beginnings of a data set of which no piece was finished."""
        if (
            not self.is_shared
            and not self._found(_PIECES)
            and not (self.folder / INDEX_NAME).exists()
        ):
            with suppress(OSError):
                self.remove()

    def _left_over(self) -> list[Path]:
        is_indexed_with_latents = not self._lacks_latents()
        receipts = ["shard-*.json", *(["latents-*.json"] if is_indexed_with_latents else [])]
        found = self._found((*receipts, f"*{PARTIAL}", _OF_SAFETENSORS))
        return [*found, self.folder / MARKER_NAME]

    def _lacks_latents(self) -> bool:
        try:
            return bool(read_json(self.folder / INDEX_NAME).get("latents") is None)
        except (OSError, ValueError, AttributeError):
            return False

    def _found(self, patterns: Sequence[str]) -> list[Path]:
        return sorted(path for pattern in patterns for path in self.folder.glob(pattern))

    def _begin(self, *, keep: bool) -> None:
        marker = self.folder / MARKER_NAME
        if (self.folder / INDEX_NAME).exists():
            # Latents are to be added.
            return
        held = sorted(path.name for path in self.folder.iterdir() if not _may_come_first(path.name))
        if held and not self._is_unfinished(marker):
            raise OutputError(
                f"{self.folder}: not empty (it holds {listed(held, most=3)}) and not an unfinished "
                f"preparation with these settings{self._differing(marker)}; choose an empty folder "
                "or delete it"
            )
        if not self.is_shared:
            patterns = (f"*{PARTIAL}", _OF_SAFETENSORS, CHECKED_NAME, *(() if keep else _PIECES))
            for path in self._found(patterns):
                path.unlink()
        self.write(MARKER_NAME, json.dumps(self._marker).encode())

    def _is_unfinished(self, marker: Path) -> bool:
        try:
            return read_json(marker) == self._marker
        except (OSError, ValueError):
            return False

    def _differing(self, marker: Path) -> str:
        """Returns the settings that differ from those in the marker, as a part of a message."""
        try:
            found = differences(dict(read_json(marker)["settings"]), self._marker["settings"])
        except (OSError, ValueError, LookupError, TypeError):
            return ""
        names = [f"{d.path} was {d.old!r} and is {d.new!r}" for d in found]
        changed = [name for name in names if not name.startswith("source.fingerprint ")]
        if len(changed) < len(names):
            changed.append("the files of the source have changed")
        return f" ({listed(changed, '; ')})" if changed else ""

    @property
    def _marker(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "dataset_id": self.description.dataset_id,
            "settings": _settings_of(self.description),
        }

    def _receipt(self, name: str, schema: type[S]) -> S | None:
        path = self.folder / _receipt_of(name)
        try:
            return validated(schema, read_json(path), source=str(path))
        except (OSError, ValueError, ConfigError):
            return None

    def _is_there(self, entry: ShardEntry | LatentFileEntry | None) -> bool:
        if entry is None:
            return True
        try:
            # A file gets its name only when it is whole, so its size suffices.
            return (self.folder / entry.file).stat().st_size == entry.bytes
        except OSError:
            return False


def _settings_of(described: DatasetDescription | ShardIndex) -> dict[str, Any]:
    """Returns what decides a data set, as plain JSON values with a name each."""
    shape = {"image_shape": list(described.image_shape), "pixels": described.pixels}
    return {**described.source, **shape}


def _may_come_first(name: str) -> bool:
    """Returns whether a file may lie in a folder before the marker has its name."""
    return name == CHECKED_NAME or (name.startswith(MARKER_NAME) and name.endswith(PARTIAL))


def _receipt_of(name: str) -> str:
    return Path(name).with_suffix(".json").name


def _text_of(tree: Any) -> bytes:
    return (json.dumps(tree, indent=1) + "\n").encode()
