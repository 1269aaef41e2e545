"""What sources of image files have in common: a list of names, sizes and labels.

Also which files of a tree are images, and what its classes are called.
"""

import hashlib
import logging
import os
import re
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Int64
from torch import Tensor

from srepa_ds.data.decoding import IMAGE_SUFFIXES
from srepa_ds.errors import DataError
from srepa_ds.files import looked_for, reason_of

log = logging.getLogger("srepa_ds")

T = TypeVar("T")

_HASHED_AT_ONCE = 10_000
_SECONDS_BETWEEN_LINES = 10


class Listed(NamedTuple):
    """One image of a source."""

    key: str
    label: int
    size: int
    """Bytes of its file; -1 if they are not known."""


class Classes(NamedTuple):
    """The classes of a source, in the order of their labels."""

    ids: tuple[str, ...]
    """The source's own names; empty if it has only numbers."""
    names: tuple[str, ...]
    """Names for people."""


class ListedSource:
    """A source whose images are listed when it is opened; subclasses read one in `item`."""

    latents = None

    def __init__(self, where: object, images: Sequence[Listed], classes: Classes):
        """Takes the images in their order, and `where` they were found, for messages.

        Raises DataError if there are none, or a key is not Unicode.
        """
        if not images:
            raise DataError(f"{where}: holds no images; correct source.path")
        self._images = images
        self.class_ids, self.class_names = classes
        self.labels: Int64[Tensor, " samples"] = torch.tensor([image.label for image in images])
        check_unicode(where, (*self.class_ids, *(image.key for image in images)))

    @cached_property
    def fingerprint(self) -> str:
        """The hash of all keys, labels and sizes."""
        found = hashlib.sha256()
        for start in range(0, len(self._images), _HASHED_AT_ONCE):
            some = self._images[start : start + _HASHED_AT_ONCE]
            found.update("".join(f"{key}\0{label}\0{size}\n" for key, label, size in some).encode())
        return found.hexdigest()[:16]

    def key(self, index: int) -> str:
        """Returns the name of an image."""
        return self._images[index].key


@contextmanager
def reading(path: Path, *, needs: str) -> Iterator[None]:
    """Turns an OSError in the block into a DataError, which says what `source.path` needs."""
    try:
        yield
    except OSError as error:
        place = error.filename if isinstance(error.filename, str) else path
        raise DataError(
            f"{place}: {reason_of(error)}{looked_for(path)}; correct source.path, which needs "
            f"{needs} that you can read"
        ) from error


def check_unicode(where: object, names: Iterable[str]) -> None:
    """Checks that names of files are UTF-8, as every other program expects; raises DataError."""
    for name in names:
        if not name.isascii():
            try:
                name.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"{where}: the name {os.fsencode(name)!r} is not UTF-8; rename the file"
                ) from error


def listing_shown(steps: Iterable[T], where: object, what: str) -> Iterator[T]:
    """Yields `steps`, and logs every ten seconds how many of them there were."""
    last = time.monotonic()
    for count, step in enumerate(steps, start=1):
        yield step
        if time.monotonic() - last > _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            log.info("%s: listed %s %s", where, f"{count:,}", what)


def is_litter(name: str) -> bool:
    """Returns whether systems put a file or folder there: hidden ones, and macOS's in archives."""
    return name.startswith(".") or name == "__MACOSX"


def is_image(name: str) -> bool:
    """Returns whether the ending of a name is that of an image."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def listed_by_class(
    sizes: Iterable[tuple[str, int]], folders: Collection[str]
) -> tuple[list[Listed], Classes]:
    """Returns the images of a tree in the order of their paths, and its classes.

    Takes paths inside the tree with sizes, and the folders of the classes. A label is the place of
    the folder among all of them, as in torchvision's `ImageFolder`.
    """
    ids = tuple(sorted(folders))
    labels = {name: label for label, name in enumerate(ids)}
    images = [Listed(path, labels[path.partition("/")[0]], size) for path, size in sorted(sizes)]
    return images, Classes(ids, readable_names(ids))


def listed_by_label(
    samples: Iterable[tuple[str, int | str, int]],
) -> tuple[list[Listed], Classes]:
    """Returns the images of a list of path, label and size, in its order, and the classes.

    Labels are whole numbers, or names: then a label is the place among all sorted names. Raises
    ValueError for a mixture, and for a number that cannot be a label.
    """
    samples = list(samples)
    given = {label for _, label, _ in samples}
    if all(isinstance(label, str) for label in given):
        ids = tuple(sorted(map(str, given)))
        labels: dict[int | str, int] = {name: label for label, name in enumerate(ids)}
        classes = Classes(ids, readable_names(ids))
    elif all(isinstance(label, int) for label in given):
        numbers = sorted(map(int, given))
        if not 0 <= numbers[0] <= numbers[-1] < MOST_CLASSES:
            wrong = numbers[0] if numbers[0] < 0 else numbers[-1]
            raise ValueError(f"the label {wrong} is not from 0 to {MOST_CLASSES - 1:,}")
        labels = {label: label for label in numbers}
        classes = Classes((), tuple(str(label) for label in range(numbers[-1] + 1)))
    else:
        raise ValueError("some labels are numbers and others names; use one kind")
    return [Listed(path, labels[label], size) for path, label, size in samples], classes


MOST_CLASSES = 1_000_000
"""A greater label is a mistake, such as a column of other numbers."""

_WORDNET_ID = re.compile(r"n\d{8}")


def readable_names(ids: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the names of ImageNet's classes if all `ids` are theirs; else `ids`.

    Those of ILSVRC2012 are meant, such as n01440764, or some of them. The names are timm's. Two
    classes of one name get their id behind it: some cranes fly, others lift.
    """
    if not ids or not all(_WORDNET_ID.fullmatch(name) for name in ids):
        return ids
    # Importing timm takes seconds, and few folders need it.
    from timm.data import ImageNetInfo

    imagenet = ImageNetInfo("imagenet-1k")
    known = set(imagenet.label_names())
    if not known.issuperset(ids):
        return ids
    names = [imagenet.label_name_to_description(name) for name in ids]
    return tuple(
        f"{name} ({of})" if names.count(name) > 1 else name
        for of, name in zip(ids, names, strict=True)
    )
