"""Keeps other packages off the network: weights are fetched before, by one process."""

import os
from collections.abc import Sequence

WITH_NETWORK = frozenset({"fetch"})
"""The commands that download."""

PUSH = "--push"
"""The option with which `export` uploads."""

_OFFLINE = ("HF_HUB_OFFLINE",)
_UNTRACKED = ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK")


def stay_offline(arguments: Sequence[str]) -> None:
    """Sets the variables by which timm, diffusers and the Hub's client stay off the network.

    `arguments` are the command line's. Ranks and data workers inherit them. A variable that is set
    already keeps its value. Call it before these packages are imported, which read them once.
    """
    command = next((word for word in arguments if not word.startswith("-")), None)
    pushes = command == "export" and any(word.split("=")[0] == PUSH for word in arguments)
    is_online = command in WITH_NETWORK or pushes
    names = _UNTRACKED if is_online else (*_OFFLINE, *_UNTRACKED)
    for name in names:
        os.environ.setdefault(name, "1")
