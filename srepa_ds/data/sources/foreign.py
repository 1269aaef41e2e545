"""What the sources of files in others' formats share: their files, and classes without names."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxtyping import Int64
from torch import Tensor

from srepa_ds.errors import DataError


def files_below(root: Path, is_wanted: Callable[[str], bool]) -> list[str]:
    """Returns the paths, relative to `root`, of the wanted files in it and below, sorted as text.

    `is_wanted` decides by name. Links to folders are not followed. Raises DataError if a folder
    cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: {error.strerror}; correct source.path") from error

    def found() -> Iterator[str]:
        for folder, _, names in os.walk(root, onerror=refuse):
            inside = os.path.relpath(folder, root)
            prefix = "" if inside == "." else f"{Path(inside).as_posix()}/"
            yield from (prefix + name for name in names if is_wanted(name))

    return sorted(found())


def numbered_classes(
    labels: Int64[Tensor, " samples"], *, num_classes: int | None, place: Path
) -> tuple[str, ...]:
    """Returns the numbers of the classes as their names, for labels that come without names.

    Without `num_classes`, the largest label is the last class. Raises DataError, naming `place`,
    for a label that is no class.
    """
    count = num_classes if num_classes is not None else int(labels.max()) + 1
    if int(labels.min()) < 0 or int(labels.max()) >= count:
        raise DataError(
            f"{place}: labels run from {int(labels.min())} to {int(labels.max())}, expected 0 to "
            f"{count - 1}; correct source.num_classes, or leave out what has no label"
        )
    return tuple(str(number) for number in range(count))
