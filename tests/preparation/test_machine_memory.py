import os

import pytest

from srepa_ds.preparation.machine_memory import usable_memory

PHYSICAL = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
# What version 1 says where there is no limit.
NO_LIMIT = str((1 << 63) - 4096)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("memory.max", "1000000\n", 1_000_000),
        ("memory.max", "max\n", PHYSICAL),
        ("memory.max", "", PHYSICAL),
        ("memory/memory.limit_in_bytes", "2000000\n", 2_000_000),
        ("memory/memory.limit_in_bytes", NO_LIMIT, PHYSICAL),
    ],
)
def test_the_smaller_of_physical_memory_and_limit(tmp_path, name, text, expected):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    assert usable_memory(tmp_path) == expected


def test_without_control_groups_it_is_the_physical_memory(tmp_path):
    assert usable_memory(tmp_path / "none") == PHYSICAL
