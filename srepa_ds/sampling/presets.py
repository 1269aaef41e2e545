"""The table of presets, `PRESETS`: the settings with which papers draw their images."""

from collections.abc import Mapping
from typing import Any

PRESETS: dict[str, Mapping[str, Any]] = {
    "unguided": {"solver": "euler_maruyama", "num_steps": 250, "cfg_scale": 1.0},
}
