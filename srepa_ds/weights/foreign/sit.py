"""Weights of the original SiT: its learned sigma is dropped, its time reversed.

There t = 1 is data and the velocity is data minus noise. DiT's tensors are the same by name and
shape, and only what a trainer says of itself tells them apart: a bare file of DiT passes for SiT.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from srepa_ds.errors import CheckpointError
from srepa_ds.weights.foreign.converted import Converted
from srepa_ds.weights.lazy import LazyTensors, shapes_of
from srepa_ds.weights.reversed_time import CHANGED, reversed_time

_PATCHES = "x_embedder.proj.weight"
_LAST = ("final_layer.linear.weight", "final_layer.linear.bias")
# Arguments that REPA's trainers have and SiT's has not.
_OF_REPA = ("enc_type", "encoder_depth", "proj_coeff")

_SIGMA = "the learned sigma is left out: half the rows of final_layer.linear, which enter no sample"
_TIME = "time is reversed, exactly, within three weights: here t = 1 is noise and t = 0 data"
UNNAMED = (
    "its tensors are those of SiT and of DiT, and nothing in it says which: a DiT predicts noise, "
    "and cannot be drawn from or continued here"
)
"""Of weights without settings."""
SCALED = (
    "LightningDiT scales each channel of its latents by latents_stats.pt, which is in no model: "
    "codec.scale and codec.shift must be of it"
)
"""Of LightningDiT, whose sizes may be those of a SiT."""


def is_sit(weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> bool:
    """Returns whether weights are in the convention of the original SiT.

    Learned sigma shows in the last layer. Without it the settings must say so: `learn_sigma` is
    False where nothing is of REPA, or the model is a LightningDiT.
    """
    if _has_learned_sigma(weights) or is_lightning(settings):
        return True
    return settings.get("learn_sigma") is False and not any(key in settings for key in _OF_REPA)


def is_of_diffusers(weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> bool:
    """Returns whether weights lie in a folder of the layout that SiT has in diffusers."""
    return settings.get("_class_name") == "SiTTransformer2DModel"


def is_lightning(settings: Mapping[str, Any]) -> bool:
    """Returns whether the settings are of a LightningDiT."""
    return model_in(settings).startswith("LightningDiT")


def of_sit(weights: Mapping[str, Tensor], path: Path) -> Converted:
    """Returns weights of the original SiT in REPA's convention, converted as they are read.

    Raises CheckpointError if those that change are missing, or of another shape.
    """
    _check_forms(weights, path)
    has_sigma = _has_learned_sigma(weights)
    kept = _without_sigma(weights) if has_sigma else _in_float32(weights)
    return Converted(reversed_time(kept), (_SIGMA, _TIME) if has_sigma else (_TIME,))


def model_in(settings: Mapping[str, Any]) -> str:
    """Returns the name of the model: SiT's and DiT's `model`, LightningDiT's `model.model_type`."""
    found = settings.get("model")
    if isinstance(found, Mapping):
        found = found.get("model_type")
    return found if isinstance(found, str) else ""


def _check_forms(weights: Mapping[str, Tensor], path: Path) -> None:
    shapes = shapes_of(weights)
    time, weight, bias = (shapes.get(name) for name in CHANGED)
    is_fit = time and weight and bias and (len(time), len(weight)) == (2, 2)
    if not is_fit or time[1] % 2 or bias != weight[:1]:
        wrong = ", ".join(f"{name} {shapes.get(name, 'none')}" for name in CHANGED)
        raise CheckpointError(
            f"{path} is of no SiT: time is reversed in three weights, which do not fit: {wrong}"
        )


def _has_learned_sigma(weights: Mapping[str, Tensor]) -> bool:
    shapes = shapes_of(weights)
    first, last = shapes.get(_PATCHES, ()), shapes.get(_LAST[0], ())
    if len(first) != 4 or len(last) != 2:
        return False
    _, channels, height, width = first
    return last[0] == 2 * channels * height * width


def _without_sigma(weights: Mapping[str, Tensor]) -> LazyTensors:
    """Returns the weights without the rows of the sigma, which follow the velocity's at each pixel.

    Row (pixel x 2 + half) x channels + channel of the last layer; a pixel is row by row within the
    patch.
    """
    shapes = shapes_of(weights)
    channels = shapes[_PATCHES][1]
    halved = {name: (shapes[name][0] // 2, *shapes[name][1:]) for name in _LAST if name in shapes}
    whole = _in_float32(weights)

    def read(name: str) -> Tensor:
        value = whole[name]
        if name not in halved:
            return value
        return value.unflatten(0, (-1, 2, channels))[:, 0].flatten(0, 1)

    return LazyTensors({**shapes, **halved}, read)


def _in_float32(weights: Mapping[str, Tensor]) -> LazyTensors:
    """Returns those that will change in float32 at least: what they become is not rounded."""

    def read(name: str) -> Tensor:
        value = weights[name]
        return value.float() if name in CHANGED and value.element_size() < 4 else value

    return LazyTensors(shapes_of(weights), read)
