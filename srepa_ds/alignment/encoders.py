"""timm models and their weights: built, filled from a file or a download, and checked to fit."""

import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from srepa_ds.errors import ConfigError, DataError, Fault, nearest

RESERVED_ARGUMENTS = frozenset({"checkpoint_path", "img_size", "num_classes", "pretrained"})

# timm's vision transformers share methods and attributes, but no type that declares them.
Encoder = Any

_SHOWN_KEYS = 3


def known_architecture(name: str) -> str:
    """Returns `name` if timm has a model of that name; raises ValueError naming the nearest."""
    import timm

    if not timm.is_model(name):
        known = nearest(name, timm.list_models())
        raise ValueError(f"timm has no model '{name}'; {known if len(known) < 200 else 'see timm'}")
    return name


def create_encoder(
    architecture: str,
    *,
    input_size: int,
    num_classes: int,
    arguments: Mapping[str, Any],
    pretrained: bool = False,
) -> Encoder:
    """Returns a timm model for square inputs, with random or downloaded weights, on the CPU.

    The process's random numbers are left where they were. Raises ConfigError for an architecture
    or arguments that timm refuses, DataError for a download that fails.
    """
    import timm

    options: dict[str, Any] = {**arguments, "img_size": input_size, "num_classes": num_classes}
    try:
        with torch.random.fork_rng(devices=[]):
            encoder = timm.create_model(architecture, pretrained=False, **options)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        reason = f"timm cannot build '{architecture}' with {options}: {error}"
        raise ConfigError("teacher", [Fault("teacher.spec", reason)]) from error
    return _downloaded(encoder, architecture, options) if pretrained else encoder


def _downloaded(encoder: Encoder, architecture: str, options: dict[str, Any]) -> Encoder:
    import timm

    classes, published = options["num_classes"], encoder.pretrained_cfg.get("num_classes")
    if classes not in (0, published):
        reason = f"is {classes}, but the published weights have {published} classes"
        raise ConfigError("teacher", [Fault("teacher.spec.num_classes", reason)])
    try:
        with torch.random.fork_rng(devices=[]):
            return timm.create_model(architecture, pretrained=True, **options)
    # What a failed download raises depends on the transport, and none of it is ours.
    except Exception as error:
        raise DataError(
            f"the pretrained weights of '{architecture}' could not be fetched: {error}\n"
            "give teacher.weights: a local .safetensors or .pt file"
        ) from error


def fill_from_file(encoder: Encoder, path: Path, *, ignored_prefixes: tuple[str, ...] = ()) -> None:
    """Fills a timm model from a local state_dict, resampling its position embedding to the grid.

    Published layouts are read by timm's own filter of that architecture. Keys with one of
    `ignored_prefixes` may be there. Raises DataError if the file is missing or damaged, or naming
    the keys that are missing, unexpected or of another shape.
    """
    state = read_weights(path)
    _check_patch_size(encoder, state, path)
    convert = getattr(sys.modules[type(encoder).__module__], "checkpoint_filter_fn", None)
    try:
        converted = convert(dict(state), encoder) if convert else dict(state)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        # A filter that trips over a foreign file says less than its keys do.
        _check_fit(encoder, state, path)
        raise DataError(
            f"teacher weights {path}: not a state_dict of a {type(encoder).__name__}: {error}"
        ) from error
    kept = {key: value for key, value in converted.items() if not key.startswith(ignored_prefixes)}
    _check_fit(encoder, kept, path)
    encoder.load_state_dict(kept)


def read_weights(path: Path) -> dict[str, Any]:
    """Returns the mapping in a .safetensors or (weights only) .pt file; raises DataError."""
    if not path.is_file():
        raise DataError(f"teacher weights {path}: no such file; correct teacher.weights")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).split("\n")[0]
        raise DataError(f"teacher weights {path}: cannot be read: {reason}") from error
    while isinstance(state, dict) and not _is_state_dict(state):
        inner = next((state[key] for key in ("state_dict", "model") if key in state), None)
        if inner is None:
            break
        state = inner
    if not isinstance(state, dict):
        raise DataError(f"teacher weights {path}: holds a {type(state).__name__}, no state_dict")
    return state


def _is_state_dict(state: dict[Any, Any]) -> bool:
    return all(isinstance(value, Tensor) for value in state.values())


def _check_patch_size(encoder: Encoder, state: Mapping[str, Any], path: Path) -> None:
    # timm would resample the patch embedding to another patch size, which is another teacher.
    own = encoder.state_dict().get("patch_embed.proj.weight")
    for key, value in state.items():
        if key.endswith("patch_embed.proj.weight") and own is not None and value.ndim == own.ndim:
            if value.shape[2:] != own.shape[2:]:
                raise DataError(
                    f"teacher weights {path}: patches of {tuple(value.shape[2:])} px, "
                    f"but the teacher's are {tuple(own.shape[2:])}"
                )


def _check_fit(encoder: Encoder, state: Mapping[str, Any], path: Path) -> None:
    own = encoder.state_dict()
    shared = own.keys() & state.keys()
    reshaped = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in shared and state[key].shape != own[key].shape
    ]
    groups = {
        "missing": [key for key in own if key not in shared],
        "unexpected": [key for key in state if key not in shared],
        "of another shape": reshaped,
    }
    faults = [f"  {len(keys)} {kind}: {_some(keys)}" for kind, keys in groups.items() if keys]
    if faults:
        raise DataError("\n".join([f"teacher weights {path} do not fit the teacher", *faults]))


def _some(keys: list[str]) -> str:
    shown = ", ".join(keys[:_SHOWN_KEYS])
    return f"{shown}, ..." if len(keys) > _SHOWN_KEYS else shown
