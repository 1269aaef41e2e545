"""Files of one JSON object per line, to which a run appends; damaged lines are found and set aside.

A kill tears the last line, a crash of the machine may leave zeros, and people edit the rest.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from srepa_ds.documents.json_reader import parse_json
from srepa_ds.files import write_aside

Check = Callable[[Mapping[str, Any]], bool]
"""Returns whether an object is a line of the file: whether it has the keys, of the right types."""

_LONGEST_LINE = 16 << 20
_COPIED_AT_ONCE = 1 << 20

log = logging.getLogger("srepa_ds")


@dataclass(frozen=True)
class Line:
    """One line: its number, counted from 1, its bytes in the file, and its object."""

    number: int
    begin: int
    end: int
    """Behind its line feed, if it has one."""

    value: Mapping[str, Any]
    """Empty if the line is damaged."""


@dataclass(frozen=True)
class Lines:
    """The lines of a file; those that are empty, or torn at its end, are neither good nor bad."""

    path: Path
    good: tuple[Line, ...]
    bad: tuple[Line, ...]

    def warn(self, remedy: str) -> None:
        """Logs a warning that names the damaged lines and ends with `remedy`, if there are any."""
        if self.bad:
            count = f"{len(self.bad)} damaged line{'s' if len(self.bad) != 1 else ''}"
            first = f"the first is line {self.bad[0].number}"
            log.warning("%s has %s (%s); %s", self.path, count, first, remedy)


def read_lines(path: Path, check: Check) -> Lines:
    """Returns the lines of a file; raises OSError."""
    good, bad = [], []
    with path.open("rb") as file:
        number = begin = 0
        while text := file.readline(_LONGEST_LINE):
            number += 1
            is_whole = text.endswith(b"\n")
            value = _parsed(text, check)
            while not is_whole and (rest := file.readline(_LONGEST_LINE)):
                # Too long to be one of ours.
                is_whole, value = rest.endswith(b"\n"), {}
            line = Line(number, begin, file.tell(), value)
            begin = line.end
            if value:
                good.append(line)
            elif is_whole and text.strip():
                bad.append(line)
    return Lines(path, tuple(good), tuple(bad))


def _parsed(text: bytes, check: Check) -> Mapping[str, Any]:
    """Returns the object of a line; empty if the line is damaged."""
    try:
        value = parse_json(text.decode("utf-8"))
    except ValueError:
        return {}
    return value if isinstance(value, dict) and check(value) else {}


def keep_lines(lines: Lines, kept: Iterable[Line]) -> None:
    """Rewrites the file with the lines `kept`, bit for bit; appends damaged ones to `<path>.bad`.

    Raises OSError, and then leaves the file as it was.
    """
    path, aside = lines.path, lines.path.with_name(f"{lines.path.name}.bad")
    if lines.bad:
        with aside.open("ab") as file:
            _copy(path, lines.bad, file)
        lines.warn(f"moved to {aside.name}")

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            _copy(path, kept, file)

    write_aside(path, write)


def _copy(path: Path, lines: Iterable[Line], target: BinaryIO) -> None:
    """Copies lines, each with a line feed at its end."""
    with path.open("rb") as source:
        for line in lines:
            source.seek(line.begin)
            left, last = line.end - line.begin, b"\n"
            while left > 0 and (part := source.read(min(left, _COPIED_AT_ONCE))):
                target.write(part)
                left, last = left - len(part), part[-1:]
            target.write(b"" if last == b"\n" else b"\n")


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Appends one line; after a torn one it begins a new line.

    Opens the file each time, because it may have been moved away since. Raises OSError, and then
    leaves the file as it was.
    """
    with path.open("ab+", buffering=0) as file:
        end, is_torn = file.seek(0, os.SEEK_END), False
        if end > 0:
            file.seek(end - 1)
            is_torn = file.read(1) != b"\n"
        rest = memoryview(b"\n" * is_torn + json.dumps(value).encode() + b"\n")
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(end)
            raise


def is_count(value: Any) -> bool:
    """Returns whether a value is a whole number that counts steps or samples."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63
