"""What can go wrong at the user's side: each error says what, where, and what to do."""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TypeVar


class SRepaError(Exception):
    """A fault the user can mend; the command line prints its text and ends with `exit_code`."""

    exit_code = 2

    on_all_ranks = False
    """True once every rank has raised it, so that one of them may speak for all."""


E = TypeVar("E", bound=SRepaError)


def met_by_all(error: E) -> E:
    """Returns `error`, to be raised on every rank at the same place."""
    error.on_all_ranks = True
    return error


class DataError(SRepaError):
    """A data set, shard or index that is missing, empty or contradicts itself."""


class CheckpointError(SRepaError):
    """A checkpoint or exported model that is missing, damaged or of another shape."""


class TopologyError(SRepaError):
    """A number of ranks, a batch or a ZeRO stage that do not fit together."""


class DivergedError(SRepaError):
    """A training whose losses or gradients are no longer finite."""


class OutputError(SRepaError):
    """A place that cannot be written to."""


class RankError(SRepaError):
    """A rank that failed in a way nobody foresaw; its own output has the traceback."""

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
        # Ranks tell each other their errors; by default the message would become the source.
        return type(self), (self.source, self.faults)


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns a sentence naming the known name nearest to `name`, or all known names."""
    names = sorted(known)
    match = get_close_matches(name, names, n=1)
    return f"did you mean '{match[0]}'?" if match else f"known: {', '.join(names)}"
