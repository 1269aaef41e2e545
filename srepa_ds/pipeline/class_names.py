"""Classes by number or by name, as ImageNet's are written: synonyms with commas between."""

from collections.abc import Iterable, Mapping
from numbers import Integral

from srepa_ds.errors import nearest


class ClassNames:
    """The names of classes; a name is one of the synonyms of a class, exactly."""

    def __init__(self, names: Mapping[int, str]):
        """Takes all synonyms of each class as one text: `tench, Tinca tinca`."""
        self._classes: dict[str, list[int]] = {}
        for number, text in sorted(names.items()):
            for name in dict.fromkeys(part.strip() for part in text.split(",")):
                if name:
                    self._classes.setdefault(name, []).append(number)

    @property
    def numbers(self) -> dict[str, int]:
        """The class of each name that only one has, by name."""
        return {n: ids[0] for n, ids in sorted(self._classes.items()) if len(ids) == 1}

    def numbers_of(self, labels: Iterable[int | str], *, num_classes: int) -> list[int]:
        """Returns the numbers of classes, given by number or name.

        Raises ValueError for a number that the model does not have, and for a name that no class or
        several have.
        """
        return [self._number_of(label, num_classes) for label in labels]

    def _number_of(self, label: int | str, num_classes: int) -> int:
        if isinstance(label, str):
            found = self._classes.get(label.strip(), [])
            if len(found) > 1:
                several = " and ".join(map(str, found))
                raise ValueError(f"'{label}' is the name of classes {several}; give the number")
            if not found:
                hint = nearest(label, self._classes) if self._classes else "the model has no names"
                raise ValueError(f"no class is called '{label}'; {hint}, or give its number")
            label = found[0]
        if isinstance(label, bool) or not isinstance(label, Integral):
            raise ValueError(f"a class is a whole number or a name, got {label!r}")
        if not 0 <= label < num_classes:
            raise ValueError(f"class {label} is not one of the model's, 0 to {num_classes - 1}")
        return int(label)
