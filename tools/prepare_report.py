"""Writes the measurements of `bench_prepare.py` as tables, and what ImageNet takes by them."""

from collections.abc import Sequence

from prepare_measure import REPA, Row, Storage

_IMAGENET = 1_281_167
_CORES = 16


def report(rows: Sequence[Row], stored: Sequence[Storage]) -> str:
    """Returns the tables in Markdown."""
    theirs = next(row for row in rows if row.pixels == REPA.pixels)
    lines = [
        "| | ranks | ms per image (CPU) | images/s per core | vs REPA | images/s | KB per image | "
        f"ImageNet, {_CORES} cores | ImageNet, disk |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
        *(_row(row, theirs) for row in rows),
        "",
        "| pixels | KB per image | of raw | encode, ms | decode, ms |",
        "|---|--:|--:|--:|--:|",
        *(_storage(one, stored[0]) for one in stored),
    ]
    return "\n".join(lines) + "\n"


def _row(row: Row, theirs: Row) -> str:
    name = "REPA, one process" if row is theirs else f"`prepare`, {row.pixels}"
    # REPA's has no way to share the work.
    cores = 1 if row is theirs else _CORES
    minutes = _IMAGENET * row.cpu_ms / 1e3 / cores / 60
    cells = [
        name, row.ranks, f"{row.cpu_ms:.2f}", f"{1e3 / row.cpu_ms:.0f}",
        f"{theirs.cpu_ms / row.cpu_ms:.2f}x", _rate(row),
        f"{row.num_bytes / 1e3:.0f}", f"{minutes:.0f} min{' (1 core)' if cores == 1 else ''}",
        f"{_IMAGENET * row.num_bytes / 1e9:.0f} GB",
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def _rate(row: Row) -> str:
    """Returns images per second by the clock; `?` where other programs have disturbed it."""
    return f"{1e3 / row.wall_ms:.0f}" if row.wall_ms > 0 else "?"


def _storage(one: Storage, raw: Storage) -> str:
    share = f"{one.num_bytes / raw.num_bytes:.0%}".replace("%", " %")
    return (
        f"| {one.name} | {one.num_bytes / 1e3:.0f} | {share} | {one.encode_ms:.1f} | "
        f"{one.decode_ms:.1f} |"
    )
