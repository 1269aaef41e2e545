"""Generated input for readers: any JSON value, and documents damaged in one place."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

QUICK = settings(max_examples=100, deadline=5_000, derandomize=True, database=None)
"""The same examples in every run, each within five seconds."""

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
PLAIN = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | TEXT


def trees(plain: st.SearchStrategy[Any] = PLAIN) -> st.SearchStrategy[Any]:
    """Returns a strategy of JSON values."""
    return st.recursive(
        plain,
        lambda below: st.lists(below, max_size=3) | st.dictionaries(TEXT, below, max_size=3),
        max_leaves=8,
    )


@st.composite
def damaged(draw: st.DrawFn, document: Any) -> Any:
    """Returns `document` with one of its values replaced by any other, or left out."""
    place = draw(st.sampled_from(list(_places(document))))
    if not place:
        return draw(trees())
    copy = json.loads(json.dumps(document))
    node = copy
    for key in place[:-1]:
        node = node[key]
    if draw(st.integers(0, 3)):
        node[place[-1]] = draw(trees(PLAIN | st.just(10**400)))
    else:
        del node[place[-1]]
    return copy


def _places(node: Any, above: tuple = ()) -> Iterator[tuple]:
    yield above
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _places(value, (*above, key))


_STATUS = Path("/proc/self/status")


@contextmanager
def bounded(*, megabytes: float = 500) -> Iterator[None]:
    """Fails if the block takes more than five seconds, or more memory than before."""
    # Else the peak would be that of whatever this process has done before.
    Path("/proc/self/clear_refs").write_text("5")
    began, before = time.monotonic(), _peak_megabytes()
    yield
    assert time.monotonic() - began < 5
    assert _peak_megabytes() - before < megabytes


def _peak_megabytes() -> float:
    (line,) = [line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) / 1024
