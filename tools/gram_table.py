"""Formats the measurements of `bench_gram.py` as a table."""

from typing import NamedTuple

from gram_measure import PRINTED

HEAD = """\
| device | loss | tokens | width | images | algorithm \
| median ms | faster | fastest ms | faster | extra MiB | less |
|---|---|---|---|---|---|--:|--:|--:|--:|--:|--:|
"""


class Row(NamedTuple):
    """One algorithm in one setting; `needed_bytes` if it did not fit and was not run."""

    device: str
    kind: str
    tokens: int
    width: int
    images: int
    algorithm: str
    seconds: float | None
    """Median."""
    fastest_seconds: float | None
    extra_bytes: int | None
    needed_bytes: float | None


def markdown(rows: list[Row]) -> str:
    """Returns the table; its ratios are Algorithm 1's numbers divided by the row's.

    It has the fastest round beside the median, because other programs disturb it least.
    """
    printed = {row[:5]: row for row in rows if row.algorithm == PRINTED}
    cells = [[*map(str, row[:6]), *_numbers(row, printed[row[:5]])] for row in rows]
    return HEAD + "".join(f"| {' | '.join(line)} |\n" for line in cells)


def _numbers(row: Row, base: Row) -> list[str]:
    if row.needed_bytes is not None:
        return [f"does not fit: needs {row.needed_bytes / 2**30:.0f} GiB", *[""] * 5]
    measured = (
        (row.seconds, base.seconds, 1e3),
        (row.fastest_seconds, base.fastest_seconds, 1e3),
        (row.extra_bytes, base.extra_bytes or base.needed_bytes, 2**-20),
    )
    pairs = [(f"{a * unit:,.1f}", f"{b / a:.2f}x" if b else "") for a, b, unit in measured]
    return [text for pair in pairs for text in pair]
