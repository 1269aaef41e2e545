"""The versions and the machine that produced a result."""

import importlib.metadata
import platform
import sys
from typing import Any

import torch

from srepa_ds import __version__
from srepa_ds.distributed import ranks

_PACKAGES = ("torch", "deepspeed", "timm", "numpy", "safetensors", "torchdata")


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
