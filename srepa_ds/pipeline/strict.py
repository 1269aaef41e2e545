"""Weights that are exactly a model's: diffusers itself only warns of others."""

import os
from collections.abc import Mapping
from typing import Any

from srepa_ds.errors import CheckpointError, listed

_MOST_NAMED = 3
_DIFFERENCES = {
    "missing_keys": "it lacks",
    "unexpected_keys": "the model has no",
    "mismatched_keys": "of another shape are",
}


def refuse_differences(info: Mapping[str, Any], place: str | os.PathLike[str] | None) -> None:
    """Raises CheckpointError if weights were missing, unknown or of another shape.

    `info` is what diffusers tells of a loaded model (`output_loading_info`).
    """
    faults = [
        f"{what} {listed(sorted(map(str, info[key])), most=_MOST_NAMED)}"
        for key, what in _DIFFERENCES.items()
        if info[key]
    ]
    if faults:
        raise CheckpointError(
            f"{place} does not hold the weights of its config.json: {'; '.join(faults)}; export or "
            "download it again"
        )
