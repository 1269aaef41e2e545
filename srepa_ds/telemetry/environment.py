"""The versions and the machine that produced a result."""

import importlib.metadata
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from srepa_ds import __version__
from srepa_ds.distributed import ranks

_PACKAGES = ("torch", "deepspeed", "timm", "numpy", "safetensors", "torchdata")


def device_name(device: torch.device) -> str:
    """Returns kind and name of a device: other ones round otherwise."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return f"{device.type} {name}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.machine()


def environment() -> dict[str, Any]:
    """Returns the versions, the machine and the command that produce a result."""
    return {
        "srepa_ds": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "world_size": ranks.world_size(),
        "command": sys.argv,
    }
