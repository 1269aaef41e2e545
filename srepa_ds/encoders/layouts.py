"""The table of layouts: `LAYOUTS`, functions that rename published weights for timm's filters.

timm itself reads its own files, DINOv2's, CLIP's and Perception Encoder's visual towers. These
functions run before its filters, and leave a file that already has timm's names as it is.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

Checkpoint = Mapping[str, Any]
Layout = Callable[[Checkpoint], dict[str, Any]]

_WRAPPERS = ("state_dict", "model", "ema", "module", "model_state_dict", "net")
# A file can hold a mapping that holds itself.
_MOST_NESTED = 8

# Four weights and biases of MoCo v3's ViT-L are named after their block in the published file.
_MOCOV3_MISNAMED = {
    "blocks.13.norm13.": "blocks.13.norm1.",
    "blocks.13.mlp.fc13.": "blocks.13.mlp.fc1.",
    "blocks.14.norm14.": "blocks.14.norm2.",
    "blocks.14.mlp.fc14.": "blocks.14.mlp.fc2.",
}


def from_timm(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns the state_dict of a checkpoint, however deep under `state_dict`, `model` or `ema`."""
    return _state_dict_in(checkpoint)


def from_mocov3(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns the base encoder of a MoCo v3 training, without its projection head.

    The fixed sine-cosine table of positions is taken from the file.
    """
    state = _state_dict_in(checkpoint)
    prefixes = ("module.base_encoder.", "base_encoder.")
    prefix = next((p for p in prefixes if any(key.startswith(p) for key in state)), "")
    encoder = {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }
    return {
        _repaired(key): value
        for key, value in encoder.items()
        if not key.startswith(("head.", "fc."))
    }


def _repaired(key: str) -> str:
    for wrong, right in _MOCOV3_MISNAMED.items():
        if key.startswith(wrong):
            return right + key.removeprefix(wrong)
    return key


def from_ijepa(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns the context encoder of an I-JEPA training, without its average and the predictor."""
    state = _state_dict_in(checkpoint, "encoder")
    return {key.removeprefix("module."): value for key, value in state.items()}


def from_mae(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns the encoder of an MAE training, without its decoder and mask token."""
    state = _state_dict_in(checkpoint)
    return {
        key: value for key, value in state.items() if not key.startswith(("decoder_", "mask_token"))
    }


def from_dinov1(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns the teacher's backbone of a DINO training, without its head; or a bare backbone."""
    state = _state_dict_in(checkpoint, "teacher")
    bare = {
        key.removeprefix("module.").removeprefix("backbone."): value for key, value in state.items()
    }
    return {key: value for key, value in bare.items() if not key.startswith("head.")}


def from_dinov3(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns a DINOv3 backbone with separate query and value biases, or none if all are zero.

    timm has models with and without these biases, and its own filter silently drops keys it has no
    place for; here, biases that matter keep a name that must fit.
    """
    state = _state_dict_in(checkpoint)
    biases = {key: value.chunk(3) for key, value in state.items() if key.endswith(".attn.qkv.bias")}
    kept = {
        key: value
        for key, value in state.items()
        if key not in biases and not key.endswith(".attn.qkv.bias_mask")
    }
    if any(part.any() for query, _, value in biases.values() for part in (query, value)):
        for key, (query, _, value) in biases.items():
            kept[key.replace("qkv.bias", "q_bias")] = query
            kept[key.replace("qkv.bias", "v_bias")] = value
    return kept


LAYOUTS: dict[str, Layout] = {
    "timm": from_timm,
    "mocov3": from_mocov3,
    "ijepa": from_ijepa,
    "mae": from_mae,
    "dinov1": from_dinov1,
    "dinov3": from_dinov3,
}


def _state_dict_in(checkpoint: Checkpoint, *places: str) -> dict[str, Any]:
    """Returns the first mapping of tensors only, below `places` or one of `_WRAPPERS`."""
    state = checkpoint
    for _ in range(_MOST_NESTED):
        if all(isinstance(value, Tensor) for value in state.values()):
            break
        below = (state.get(place) for place in (*places, *_WRAPPERS))
        inner = next((part for part in below if isinstance(part, Mapping)), None)
        if inner is None:
            break
        state = inner
    return {str(key): value for key, value in state.items()}
