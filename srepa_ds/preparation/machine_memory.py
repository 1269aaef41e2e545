"""The memory that this machine, or the container on it, lets its processes use."""

import os
from pathlib import Path

_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")
"""The files with a control group's limit, of version 2 and version 1."""


def usable_memory(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Returns the bytes that all processes may use together: physical memory, or less by a limit.

    `groups` is the folder of the control groups; in a container it is that of its own group.
    """
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = (_limit(groups / name) for name in _LIMITS)
    return min([physical, *(limit for limit in found if limit is not None)])


def _limit(path: Path) -> int | None:
    """Returns the limit in a file; None if there is none, which version 2 calls `max`."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
