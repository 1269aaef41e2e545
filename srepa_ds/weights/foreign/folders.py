"""Folders of weights: a transformer as diffusers saves it, its pipeline, or shards with an index.

Only weights and `config.json` are read of them. Code that lies beside them is never looked at.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from srepa_ds.documents.json_reader import read_json
from srepa_ds.errors import CheckpointError, listed
from srepa_ds.files import PARTIAL, reason_of, sha256_of
from srepa_ds.weight_file import read_weight_file
from srepa_ds.weights.foreign.sharded import INDEX_ENDING, read_shards, shards_of
from srepa_ds.weights.ownership import FORMAT

_TRANSFORMER = "transformer"
_CONFIG = "config.json"
_STEM = "diffusion_pytorch_model"
_OF_DIFFUSERS = tuple(
    f"{_STEM}{ending}"
    for ending in (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
)
_OF_HUB = ("model.safetensors", "model.safetensors.index.json")


def is_foreign_folder(folder: Path) -> bool:
    """Returns whether `folder` holds weights of another program, rather than an exported model.

    Weights alone, without a `config.json`, are what is left of an exported model; shards are not.
    """
    place = _with_weights(folder)
    if not os.path.isdir(place) or (weights := _weights_in(place)) is None:
        return False
    if weights.name in _OF_DIFFUSERS:
        return True
    if os.path.exists(place / (_CONFIG + PARTIAL)):
        return False
    if not os.path.exists(place / _CONFIG):
        return weights.name.endswith(INDEX_ENDING)
    try:
        config = read_json(place / _CONFIG)
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and bool(config) and config.get("format") != FORMAT


def read_folder(folder: Path, *, setting: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the weights of a folder, mapped from its files, and the settings beside them.

    `folder` is a transformer's, a pipeline's with `transformer/` in it, or any with
    `model.safetensors` or its index. Raises CheckpointError, which tells the user to correct
    `setting`.
    """
    weights, settings = weights_in(folder, setting=setting), settings_in(folder)
    if settings.get("format") == FORMAT:
        raise CheckpointError(
            f"{folder} holds a model that srepa-ds has exported: there is nothing to convert; set "
            "train.init_from.path or sample.weights to it instead"
        )
    if weights.name.endswith(INDEX_ENDING):
        tensors: dict[str, Any] = dict(read_shards(weights))
    else:
        tensors = read_weight_file(
            weights, named=str(weights), setting=setting, fault=CheckpointError
        )
    return tensors, settings


def weights_in(folder: Path, *, setting: str) -> Path:
    """Returns the file of weights in a folder, or the index of several; raises CheckpointError."""
    place = _with_weights(folder)
    try:
        found = _weights_in(place)
        names = [path.name for path in place.iterdir()] if found is None else []
    except OSError as error:
        raise CheckpointError(f"{place}: {reason_of(error)}; correct {setting}") from error
    if found is None:
        held = listed(sorted(names), most=3) or "nothing"
        raise CheckpointError(
            f"{place} holds {held}, and no weights under a name that is known ({_OF_DIFFUSERS[0]}, "
            f"{_OF_HUB[0]}, or the index of several); correct {setting}, or name the file"
        )
    return found


def weight_files_in(folder: Path) -> list[Path]:
    """Returns the files that the weights of a folder are read from; raises CheckpointError."""
    weights = weights_in(folder, setting="the path")
    return shards_of(weights) if weights.name.endswith(INDEX_ENDING) else [weights]


def settings_in(folder: Path) -> dict[str, Any]:
    """Returns what `config.json` says of the model, empty without one; raises CheckpointError."""
    path = _with_weights(folder) / _CONFIG
    try:
        found = read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {reason_of(error)}; download the folder again") from error
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path} is no JSON object; download the folder again")
    return dict(found)


def sha256_of_weights(folder: Path, *, setting: str) -> str:
    """Returns the hash of a folder's weights: that of the file, or of the names and hashes of all.

    Raises CheckpointError.
    """
    weights = weights_in(folder, setting=setting)
    if not weights.name.endswith(INDEX_ENDING):
        return sha256_of(weights)
    hashes = sorted((path.name, sha256_of(path)) for path in shards_of(weights))
    lines = "".join(f"{name} {sha256}\n" for name, sha256 in hashes)
    return hashlib.sha256(lines.encode()).hexdigest()


def _with_weights(folder: Path) -> Path:
    """Returns the folder of the transformer: that of a pipeline has it as a part."""
    inner = folder / _TRANSFORMER
    return inner if os.path.isdir(inner) else folder


def _weights_in(folder: Path) -> Path | None:
    names = (*_OF_DIFFUSERS, *_OF_HUB)
    return next((folder / name for name in names if os.path.isfile(folder / name)), None)
