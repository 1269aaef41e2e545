"""Models made of weights that fit them, and what is said of those that do not."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from srepa_ds.errors import CheckpointError, listed
from srepa_ds.model.sit import SiT
from srepa_ds.model.variants import SiTConfig
from srepa_ds.schema import replaced

# Weights that sampling does not need.
_TRAINING_ONLY = ("projectors.",)
_MOST_NAMED = 3


def model_of(config: SiTConfig, tensors: Mapping[str, Tensor], path: Path, *, cure: str) -> SiT:
    """Returns the model with these weights under official names, frozen, in evaluation mode.

    Projectors are left out. Raises CheckpointError about `path`, with `cure`, if the weights do not
    fit.
    """
    tensors = {k: v for k, v in tensors.items() if not k.startswith(_TRAINING_ONLY)}
    if fault := misfit_of(config, tensors):
        raise _misfit(path, fault, cure)
    try:
        # The attention backend is not part of a model: the one that trained it may not run here.
        model = SiT(replaced(config, attention="sdpa"), None)
    except (RuntimeError, ValueError) as error:
        raise _misfit(path, str(error), cure) from error
    if faults := list(_faults(model.state_dict(), tensors)):
        raise _misfit(path, "; ".join(faults), cure)
    model.load_state_dict(dict(tensors))
    return model.eval().requires_grad_(False)


def misfit_of(config: SiTConfig, tensors: Mapping[str, Tensor]) -> str | None:
    """Returns why weights cannot be a model's by the shapes of a few, or None.

    It is found before a model is built, which may be of any size.
    """
    hidden_size, last = config.shape.hidden_size, f"blocks.{config.shape.depth - 1}.attn.qkv.weight"
    patch = (config.in_channels, config.shape.patch_size, config.shape.patch_size)
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, config.num_prefix_tokens + config.num_tokens, hidden_size),
        "x_embedder.proj.weight": (hidden_size, *patch),
        "y_embedder.embedding_table.weight": (config.num_classes + 1, hidden_size),
        last: (3 * hidden_size, hidden_size),
    }
    if config.class_token_width is not None:
        shapes["cls_projectors2.weight"] = (hidden_size, config.class_token_width)
    for name, shape in shapes.items():
        found = tuple(tensors[name].shape) if name in tensors else "missing"
        if found != shape:
            return f"{name} is {found}, but should be {shape}"
    return None


def check_finite(weights: Mapping[str, Tensor], path: Path) -> None:
    """Raises CheckpointError about `path` if a weight is NaN or infinite."""
    broken = [name for name, value in weights.items() if not value.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"{path}: not finite: {listed(broken)}; choose weights from before the run diverged"
        )


def _faults(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Iterator[str]:
    """Yields how the names and shapes of weights differ from those of a model."""
    if missing := sorted(wanted.keys() - found.keys()):
        yield f"it lacks {listed(missing, most=_MOST_NAMED)}"
    if unknown := sorted(found.keys() - wanted.keys()):
        yield f"the model has no {listed(unknown, most=_MOST_NAMED)}"
    shapes = [
        f"{name} is {tuple(found[name].shape)}, but should be {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in found and found[name].shape != value.shape
    ]
    if shapes:
        yield listed(shapes, "; ", most=_MOST_NAMED)


def _misfit(path: Path, reason: str, cure: str) -> CheckpointError:
    return CheckpointError(f"{path} does not fit its config: {reason}; {cure}")
