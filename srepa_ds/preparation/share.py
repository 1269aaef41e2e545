"""The share of the work that one of several independent commands does."""

import re
from typing import NamedTuple

from srepa_ds.errors import ConfigError, Fault


class Share(NamedTuple):
    """A share of numbered pieces: those whose number leaves `number` when divided by `total`."""

    number: int = 0
    """Counted from 0."""
    total: int = 1

    @classmethod
    def of(cls, text: str, *, command: str = "prepare") -> "Share":
        """Returns the share that `3/16` stands for, the fourth of sixteen.

        Raises ConfigError, which names the `command`.
        """
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if found is None or not int(found[1]) < int(found[2]):
            reason = f"must be i/n, with i from 0 to n - 1, such as 0/16 (given: {text!r})"
            raise ConfigError(command, [Fault("--share", reason)])
        return cls(int(found[1]), int(found[2]))


EVERYTHING = Share()
