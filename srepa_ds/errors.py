"""Errors the user can mend: each says what is wrong, where, and what to do."""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TypeVar


class SRepaError(Exception):
    """An error the user can mend; the command line prints it and exits with `exit_code`."""

    exit_code = 2

    on_all_ranks = False
    """True once every rank raises it, so that only one needs to print it."""


E = TypeVar("E", bound=SRepaError)


def raised_on_all_ranks(error: E) -> E:
    """Returns `error`, marked as raised by every rank at the same place."""
    error.on_all_ranks = True
    return error


class DataError(SRepaError):
    """A data set, shard or index is missing, empty or inconsistent."""


class SourceError(DataError):
    """A source cannot be read any more; unlike a broken image, it is never skipped."""


class CheckpointError(SRepaError):
    """A checkpoint or exported model is missing, damaged or of another shape."""


class TopologyError(SRepaError):
    """The number of ranks, the batch size and the ZeRO stage do not fit together."""


class DivergedError(SRepaError):
    """Losses or gradients of a training are no longer finite."""


class OutputError(SRepaError):
    """A file or folder cannot be written."""


class RankError(SRepaError):
    """An unexpected failure on one rank; the rank's own output has the traceback."""

    exit_code = 1


@dataclass(frozen=True)
class Fault:
    """One fault of a configuration: where it is and what is wrong with it."""

    path: str
    message: str


class ConfigError(SRepaError):
    """A configuration with one or more faults, all of them listed."""

    def __init__(self, source: str, faults: Iterable[Fault]):
        self.source = source
        self.faults = tuple(faults)
        count = f"{len(self.faults)} fault{'s' if len(self.faults) != 1 else ''}"
        lines = [f"{source}: {count}"]
        lines += [f"  {fault.path or '(whole file)'}: {fault.message}" for fault in self.faults]
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[str, tuple[Fault, ...]]]:
        # Ranks exchange errors by pickle; by default the message would become the source.
        return type(self), (self.source, self.faults)


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns a sentence naming the known name nearest to `name`, or all known names."""
    names = sorted(known)
    match = get_close_matches(name, names, n=1)
    return f"did you mean '{match[0]}'?" if match else f"known: {', '.join(names)}"


def listed(words: Iterable[str], separator: str = ", ", most: int = 5) -> str:
    """Returns the first `most` words, and the number of the others if there are any.

    On one line, whatever they hold: they may be names in a file of somebody else.
    """
    words = list(words)
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return separator.join(map(printable, words[:most])) + more


def printable(text: str) -> str:
    """Returns a text without line feeds and codes that a terminal would obey: they are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
