"""Builds timm models and fills them with weights from a file."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srepa_ds.encoders.layouts import LAYOUTS
from srepa_ds.errors import ConfigError, DataError, Fault, listed, nearest
from srepa_ds.weight_file import plain_tensors, read_weight_file, without_wrappers

RESERVED_ARGUMENTS = frozenset({"checkpoint_path", "img_size", "num_classes", "pretrained"})

_MISFITS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

# timm's vision transformers share methods and attributes, but no type that declares them.
Encoder = Any


@dataclass(frozen=True)
class _WeightsOf:
    """A file of weights, and what messages call the model that needs them."""

    role: str
    path: Path

    def __str__(self) -> str:
        return f"{self.role} weights {self.path}"


def known_architecture(name: str) -> str:
    """Returns `name` if timm has such a model, and such a tag of pretrained weights after the dot.

    Raises ValueError naming the nearest otherwise.
    """
    import timm

    base, dot, tag = name.partition(".")
    if not timm.is_model(base):
        known = nearest(base, timm.list_models())
        raise ValueError(f"timm has no model '{base}'; {known if len(known) < 200 else 'see timm'}")
    if dot and not has_published_weights(name):
        tagged = published_names(base)
        known = nearest(name, tagged) if tagged else "it has no weights at all: leave out the tag"
        raise ValueError(f"timm has no weights '{tag}' of '{base}'; {known}")
    return name


def has_published_weights(name: str) -> bool:
    """Returns whether timm publishes the weights that `name` and its tag identify.

    A name without a tag identifies none: timm would choose any that fit the architecture.
    """
    from timm.models import is_model_pretrained

    return "." in name and is_model_pretrained(name)


def published_names(base: str) -> list[str]:
    """Returns the names, with tags, of all weights that timm publishes for the model `base`."""
    import timm

    return timm.list_models(f"{base}.*", pretrained=True)


def create_encoder(
    architecture: str,
    *,
    input_size: tuple[int, int],
    num_classes: int,
    arguments: Mapping[str, Any],
) -> Encoder:
    """Returns a timm model with random weights, on the CPU.

    `input_size` is its height and width in pixels; position embeddings are resampled to it. The
    process's random state is left as it was. Raises ConfigError for an architecture or arguments
    that timm refuses.
    """
    import timm

    options: dict[str, Any] = {**arguments, "img_size": input_size, "num_classes": num_classes}
    try:
        with torch.random.fork_rng(devices=[]):
            return timm.create_model(architecture, pretrained=False, **options)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        reason = f"timm cannot build '{architecture}' with {options}: {error}"
        raise ConfigError("teacher", [Fault("teacher.spec", reason)]) from error


def check_published_classes(encoder: Encoder, num_classes: int) -> None:
    """Raises ConfigError if the published weights of `encoder` have another number of classes."""
    published = encoder.pretrained_cfg.get("num_classes")
    if num_classes not in (0, published):
        reason = f"is {num_classes}, but the published weights have {published} classes"
        raise ConfigError("teacher", [Fault("teacher.spec.num_classes", reason)])


def fill_from_file(
    encoder: Encoder,
    path: Path,
    *,
    layout: str = "timm",
    ignored_prefixes: tuple[str, ...] = (),
    role: str = "teacher",
) -> None:
    """Fills a timm model from a local checkpoint, resampling its position embedding to the grid.

    Published layouts are read by their row of `LAYOUTS`, then by timm's own filter for the model.
    Keys with one of `ignored_prefixes` are dropped. `role` is what messages call the model. Raises
    DataError if the file is missing or damaged, or naming the keys that are missing, unexpected or
    of another shape.
    """
    file = _WeightsOf(role, path)
    checkpoint = read_weight_file(path, named=str(file), setting=f"{role}.weights", fault=DataError)
    try:
        kept = _converted(encoder, checkpoint, file, layout, ignored_prefixes)
    # Layouts and timm's filters trust the shapes of what a file holds under a name.
    except _MISFITS as error:
        raise DataError(
            f"{file}: not a state_dict of a {type(encoder).__name__}: {error}"
        ) from error
    _check_fit(encoder, kept, file)
    encoder.load_state_dict(kept)


def _converted(
    encoder: Encoder,
    checkpoint: Mapping[str, Any],
    file: _WeightsOf,
    layout: str,
    ignored_prefixes: tuple[str, ...],
) -> dict[str, Tensor]:
    """Returns the weights of a checkpoint under timm's names, for the encoder's grid.

    Raises DataError, and one of `_MISFITS` for shapes that no layout has.
    """
    state = LAYOUTS[layout](checkpoint)
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise DataError(
            f"{file}: holds no state_dict where the layout '{layout}' has it, "
            f"but {listed(sorted(map(str, checkpoint)))}"
        )
    state = plain_tensors(state, file.path, named=str(file), fault=DataError)
    if unwrapped := _unwrapped(encoder, state):
        state = LAYOUTS[layout](unwrapped)
    # Otherwise the positions of half-precision files would be resampled in half precision.
    state = {
        key: value.float() if value.is_floating_point() else value for key, value in state.items()
    }
    _check_patch_size(encoder, state, file)
    converted = _named_as_timm(encoder, state, file)
    kept = {key: value for key, value in converted.items() if not key.startswith(ignored_prefixes)}
    if "pos_embed" in kept and getattr(encoder, "pos_embed", None) is not None:
        kept["pos_embed"] = _on_grid(encoder, kept["pos_embed"], state)
    return kept


def _unwrapped(encoder: Encoder, state: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Returns `state` without prefixes of all names; None if there are none."""
    found = without_wrappers(state, encoder.state_dict().__contains__)
    return None if found.keys() == state.keys() else found


def _named_as_timm(
    encoder: Encoder, state: dict[str, Tensor], file: _WeightsOf
) -> dict[str, Tensor]:
    convert = getattr(sys.modules[type(encoder).__module__], "checkpoint_filter_fn", None)
    try:
        return convert(dict(state), encoder) if convert else state
    except _MISFITS:
        # The keys of a foreign file say more than the filter's error.
        _check_fit(encoder, state, file)
        raise


def _on_grid(encoder: Encoder, table: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """Returns the position embedding for the encoder's grid, resampled if timm has not done so.

    timm's filters leave Perception Encoder's table as it is, and, unless they know the published
    size, any table with as many positions as the grid, even if the grid's shape differs. A table
    with a square number of positions is taken to be a square.
    """
    from timm.layers import resample_abs_pos_embed

    rows, columns = encoder.patch_embed.grid_size
    prefix = encoder.pos_embed.shape[1] - rows * columns
    side = math.isqrt(max(table.shape[1] - prefix, 0))
    stored = {value.untyped_storage().data_ptr() for value in state.values()}
    untouched = table.untyped_storage().data_ptr() in stored
    if not untouched or side * side != table.shape[1] - prefix or (rows, columns) == (side, side):
        return table
    return resample_abs_pos_embed(
        table, new_size=[rows, columns], old_size=[side, side], num_prefix_tokens=prefix
    )


def _check_patch_size(encoder: Encoder, state: Mapping[str, Any], file: _WeightsOf) -> None:
    # timm would resample the patch embedding to another patch size: a different teacher.
    own = encoder.state_dict().get("patch_embed.proj.weight")
    patches = ("patch_embed.proj.weight", "visual.conv1.weight")
    for key, value in state.items():
        if key.endswith(patches) and own is not None and value.ndim == own.ndim:
            if value.shape[2:] != own.shape[2:]:
                raise DataError(
                    f"{file}: patches of {tuple(value.shape[2:])} px, "
                    f"but the {file.role}'s are {tuple(own.shape[2:])}"
                )


def _check_fit(encoder: Encoder, state: Mapping[str, Any], file: _WeightsOf) -> None:
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
    faults = [f"  {len(keys)} {kind}: {listed(keys)}" for kind, keys in groups.items() if keys]
    if faults:
        raise DataError("\n".join([f"{file} do not fit the {file.role}", *faults]))
