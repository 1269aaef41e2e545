"""Other packages' warnings on the terminal: each once per run, on whichever rank meets it first.

Python's own rule, once per line of code, does not hold in a training: it starts over whenever any
package enters `warnings.catch_warnings`, and every rank follows it for itself.
"""

import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

log = logging.getLogger("srepa_ds")

_PACKAGE = str(Path(__file__).parent) + os.sep


def on_main_rank(_key: str) -> bool:
    """Returns whether this process is the main rank: who shows a warning before all have met."""
    return os.environ.get("RANK", "0") == "0"


class WarningsOnce:
    """Stands in for `warnings.showwarning`; what this package itself warns of is always shown."""

    def __init__(self) -> None:
        self._otherwise = warnings.showwarning
        self._known: set[str] = set()
        self.is_first: Callable[[str], bool] = on_main_rank
        self._process = os.getpid()

    def show(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        """Shows a warning, unless this run has already shown the same text from the same line."""
        if file is not None or filename.startswith(_PACKAGE):
            self._otherwise(message, category, filename, lineno, file, line)
            return
        where = f"{'/'.join(Path(filename).parts[-3:])}:{lineno}"
        key = f"{category.__name__} {where} {message}"
        if key not in self._known:
            self._known.add(key)
            if self._may_show(key):
                log.warning("%s: %s (%s; shown once)", category.__name__, message, where)

    def _may_show(self, key: str) -> bool:
        # A forked data worker must not talk over its parent's connection to the other ranks.
        if os.getpid() != self._process:
            return True
        try:
            return self.is_first(key)
        except RuntimeError:
            return True  # The other ranks are gone; better twice than never.


_shown = WarningsOnce()


def show_warnings_once() -> None:
    """Has warnings shown by `WarningsOnce` from now on, in this process and those it forks."""
    warnings.showwarning = _shown.show


def let_ranks_agree(is_first: Callable[[str], bool] = on_main_rank) -> None:
    """Has ranks decide by `is_first(key)` who shows a warning: True on one of them per key."""
    _shown.is_first = is_first
