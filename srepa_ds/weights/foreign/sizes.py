"""The sizes of a model, by the shapes of its weights under official names."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from srepa_ds.model.variants import SIT_VARIANTS

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ProjectorSizes:
    """A projector: its kind, and the widths that its settings name."""

    settings: Mapping[str, Any]
    """As in the section `projector` of an alignment."""

    width: int
    """The width of the teacher's tokens."""


@dataclass(frozen=True)
class Sizes:
    """What the shapes tell of a model: all but its heads, and the resolution."""

    depth: int
    hidden_size: int
    patch_size: int
    in_channels: int
    num_classes: int
    qk_norm: bool
    class_token_width: int | None
    """REG: width of the class token."""
    projectors: tuple[ProjectorSizes, ...]

    @property
    def variant(self) -> str | None:
        """The row of `SIT_VARIANTS` with these sizes, or None."""
        own = (self.depth, self.hidden_size, self.patch_size)
        rows = SIT_VARIANTS.items()
        return next(
            (name for name, row in rows if (row.depth, row.hidden_size, row.patch_size) == own),
            None,
        )

    def input_size(self, num_positions: int) -> int | None:
        """Returns the side of square latents with this position embedding; None if not square."""
        patches = num_positions - (self.class_token_width is not None)
        side = math.isqrt(max(patches, 0))
        return side * self.patch_size if side and side**2 == patches else None


def sizes_of(shapes: Mapping[str, Shape]) -> Sizes:
    """Returns the sizes of a model by its weights' shapes.

    Raises LookupError with the name of a weight that is missing or of other dimensions.
    """
    hidden_size, in_channels, patch_size, _ = _shape(shapes, "x_embedder.proj.weight", 4)
    num_labels, _ = _shape(shapes, "y_embedder.embedding_table.weight", 2)
    blocks = {match[1] for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))}
    cls_token = "cls_projectors2.weight"
    return Sizes(
        depth=len(blocks),
        hidden_size=hidden_size,
        patch_size=patch_size,
        in_channels=in_channels,
        num_classes=num_labels - 1,
        qk_norm="blocks.0.attn.q_norm.weight" in shapes,
        class_token_width=_shape(shapes, cls_token, 2)[1] if cls_token in shapes else None,
        projectors=_projectors(shapes),
    )


def _shape(shapes: Mapping[str, Shape], name: str, dimensions: int) -> Shape:
    if len(shapes.get(name, ())) != dimensions:
        raise LookupError(name)
    return shapes[name]


def _projectors(shapes: Mapping[str, Shape]) -> tuple[ProjectorSizes, ...]:
    found = {match[1] for name in shapes if (match := re.match(r"projectors\.(\d+)\.", name))}
    return tuple(_projector(shapes, f"projectors.{number}") for number in sorted(found, key=int))


def _projector(shapes: Mapping[str, Shape], name: str) -> ProjectorSizes:
    layer = shapes.get(f"{name}.projection_layer.weight")
    if layer is None:
        hidden_width, _ = _shape(shapes, f"{name}.0.weight", 2)
        width, _ = _shape(shapes, f"{name}.4.weight", 2)
        return ProjectorSizes({"kind": "mlp", "hidden_width": hidden_width}, width)
    if len(layer) == 4:
        return ProjectorSizes({"kind": "conv", "kernel": layer[-1]}, layer[0])
    return ProjectorSizes({"kind": "linear"}, layer[0])
