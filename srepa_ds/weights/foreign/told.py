"""What a trainer has told of itself, and the notes about what of it could not be used."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from srepa_ds.errors import printable

# Of numbers that are told; it leaves out infinity and NaN too.
_LARGEST = 1e18


class Note(NamedTuple):
    """Something that was assumed or left out, for the user to read."""

    text: str
    place: str = ""
    """The setting that it is about, if it is about one."""


@dataclass
class Told:
    """The settings of a trainer, and which of them were used."""

    values: Mapping[str, Any]
    used: set[str] = field(default_factory=set)
    notes: list[Note] = field(default_factory=list)

    def take(self, *names: str) -> Any:
        """Returns the first of the settings that is there, as a plain value, or None."""
        self.used |= {*names}
        found = next((self.values[name] for name in names if name in self.values), None)
        if not isinstance(found, Tensor):
            return found
        if found.numel() == 1 and found.layout == torch.strided and not found.is_meta:
            return found.item()
        self.note(f"{names[0]} is a tensor of many values: not taken over")
        return None

    def number(self, *names: str) -> Any:
        """Returns a setting that is a number; None, and a note, for anything else."""
        found = self.take(*names)
        is_number = isinstance(found, int | float) and not isinstance(found, bool)
        if found is None or (is_number and abs(found) <= _LARGEST):
            return found
        self.note(f"{names[0]} {str(found)[:80]!r} is no number: not taken over")
        return None

    def note(self, text: str, place: str = "") -> None:
        """Keeps a note for the user."""
        self.notes.append(Note(printable(text), place))

    def rest(self) -> list[str]:
        """Returns the names of settings that were not used."""
        return [name for name in self.values if name not in self.used and not name.startswith("_")]
