"""Which encoders are teachers, and how images reach them: a row of a table each.

Conventions of preprocessing are those of REPA.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from srepa_ds.alignment.encoders import RESERVED_ARGUMENTS, known_architecture
from srepa_ds.errors import ConfigError, Fault
from srepa_ds.schema import Section, known_in

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class TeacherSpec(Section):
    """Everything that makes a timm ViT a teacher, but for its weights."""

    architecture: str
    """Name of the model in timm, with the tag of its pretrained weights if it has any."""

    arguments: dict[str, Any] = {}
    """Further arguments of the timm model, such as depth or embed_dim."""

    width: int = Field(ge=1)
    """Channels of a token."""

    patch_size: int = Field(ge=1)
    """Pixels of the teacher's input along one side of a token."""

    input_size: int | None = Field(default=None, ge=1)
    """Side of the teacher's input in pixels, the same for every resolution; or null."""

    input_size_per_256: int | None = Field(default=None, ge=1)
    """Side of the teacher's input for every 256 px of the training image; or null."""

    resize: Literal["bicubic", "bilinear"] = "bicubic"
    """Interpolation from the training image to the teacher's input."""

    antialias: bool = False
    """Whether the interpolation of the image is antialiased (REPA: no)."""

    order: Literal["normalise_then_resize", "resize_then_normalise"] = "normalise_then_resize"
    """Which comes first; equal but for rounding."""

    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Subtracted from the channels of the image in [0, 1]."""

    std: tuple[float, float, float] = IMAGENET_STD
    """Divides the channels after the mean is subtracted."""

    num_prefix_tokens: int = Field(default=1, ge=0)
    """Tokens in front of the patches: class token and registers."""

    has_cls: bool = True
    """Whether the first prefix token is a class token."""

    final_norm: bool = True
    """Whether patch tokens pass the encoder's last normalisation."""

    num_classes: int = Field(default=0, ge=0)
    """Classes of the encoder's own head, 0 to leave the head out."""

    @model_validator(mode="after")
    def _consistent(self) -> "TeacherSpec":
        if (self.input_size is None) == (self.input_size_per_256 is None):
            raise ValueError("give exactly one of input_size and input_size_per_256")
        if self.has_cls and self.num_prefix_tokens == 0:
            raise ValueError("has_cls needs num_prefix_tokens of at least 1")
        if min(self.std) <= 0:
            raise ValueError("std must be positive")
        if reserved := sorted(RESERVED_ARGUMENTS & self.arguments.keys()):
            raise ValueError(f"{', '.join(reserved)} cannot be given in arguments")
        return self

    def input_size_at(self, resolution: int) -> int:
        """Returns the side of the teacher's input, in pixels, for images of `resolution` pixels.

        Raises ConfigError unless whole patches fill it.
        """
        size = self.input_size or (self.input_size_per_256 or 0) * resolution / 256
        if size % self.patch_size:
            reason = (
                f"images of {resolution} px give the teacher an input of {size:g} px, which is not "
                f"a multiple of its patch size {self.patch_size}; set input_size"
            )
            raise ConfigError("teacher", [Fault("teacher", reason)])
        return int(size)


def _dinov2(size: str, registers: int, width: int) -> TeacherSpec:
    suffix = f"_reg{registers}" if registers else ""
    return TeacherSpec(
        architecture=f"vit_{size}_patch14{suffix}_dinov2.lvd142m",
        width=width,
        patch_size=14,
        input_size_per_256=224,
        num_prefix_tokens=1 + registers,
    )


_DINOV2_SIZES = {
    "s": ("small", 384),
    "b": ("base", 768),
    "l": ("large", 1024),
    "g": ("giant", 1536),
}

# The demo's own teacher: no pretrained weights exist, `srepa-ds teacher` trains them.
_DIGITS = TeacherSpec(
    architecture="vit_tiny_patch16_224",
    arguments={
        "patch_size": 2,
        "embed_dim": 64,
        "depth": 3,
        "num_heads": 4,
        "mlp_ratio": 2.0,
        "act_layer": "relu",
        "class_token": False,
        "global_pool": "avg",
        "fc_norm": False,
    },
    width=64,
    patch_size=2,
    input_size=16,
    mean=(0.3, 0.3, 0.3),
    std=(0.38, 0.38, 0.38),
    num_prefix_tokens=0,
    has_cls=False,
    num_classes=10,
)

TEACHERS: dict[str, TeacherSpec] = {
    **{
        f"{family}-vit-{letter}": _dinov2(size, registers, width)
        for family, registers in (("dinov2", 0), ("dinov2reg", 4))
        for letter, (size, width) in _DINOV2_SIZES.items()
    },
    "digits-vit": _DIGITS,
}


class TeacherConfig(Section):
    """Which teacher, and where its weights are."""

    name: Annotated[str, known_in("teacher", TEACHERS)] | None = None
    """A known teacher, or null if `spec` describes one."""

    spec: TeacherSpec | None = None
    """Any other timm ViT, or null."""

    weights: Path | None = None
    """Local weights, .safetensors or .pt; null takes timm's pretrained ones, downloaded once."""

    dtype: Literal["bf16", "fp32"] = "bf16"
    """Precision of the encoder's products; its weights stay float32."""

    @model_validator(mode="after")
    def _one_teacher(self) -> "TeacherConfig":
        if (self.name is None) == (self.spec is None):
            raise ValueError("give exactly one of name and spec")
        if self.spec is not None:
            known_architecture(self.spec.architecture)
        return self

    @property
    def resolved(self) -> TeacherSpec:
        """The inline spec, or the row of `TEACHERS` that `name` stands for."""
        return self.spec or TEACHERS[self.name or ""]
