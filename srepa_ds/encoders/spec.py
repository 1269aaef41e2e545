"""`TeacherSpec`: a timm ViT, its preprocessing of images, and the tokens taken from it."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from srepa_ds.encoders.layouts import LAYOUTS
from srepa_ds.encoders.timm_models import RESERVED_ARGUMENTS
from srepa_ds.errors import ConfigError, Fault
from srepa_ds.schema import Section, one_of

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Pixels = Annotated[int, Field(ge=1)]
Resolution = int | tuple[int, int]


class TeacherSpec(Section):
    """Everything that makes a timm ViT a teacher, except its weights."""

    architecture: str
    """Name of the model in timm, with the tag of its pretrained weights, if any."""

    arguments: dict[str, Any] = {}
    """Further arguments of the timm model, such as depth or embed_dim."""

    layout: Annotated[str, one_of("layout", LAYOUTS)] = "timm"
    """Naming of the keys in a local weights file; files with timm's own names always fit."""

    width: int = Field(ge=1)
    """Channels of a token."""

    patch_size: int = Field(ge=1)
    """Pixels of the teacher's input along one side of a token."""

    input_size: Pixels | tuple[Pixels, Pixels] | None = None
    """Side of the teacher's input in pixels, or [height, width], at every resolution; or null."""

    input_size_per_256: int | None = Field(default=None, ge=1)
    """Side of the teacher's input per 256 px of the training image; or null."""

    resize: Literal["bicubic", "bilinear"] = "bicubic"
    """Interpolation from the training image to the teacher's input."""

    antialias: bool = False
    """Whether the interpolation of the image is antialiased (REPA: no)."""

    order: Literal["normalise_then_resize", "resize_then_normalise"] = "normalise_then_resize"
    """The order of the two; the results are equal up to rounding."""

    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Subtracted from the channels of an image in [0, 1]."""

    std: tuple[float, float, float] = IMAGENET_STD
    """Divides the channels after subtraction of the mean."""

    num_prefix_tokens: int = Field(default=1, ge=0)
    """Tokens before the patches: class token and registers."""

    has_cls: bool = True
    """Whether the first prefix token is a class token."""

    final_norm: bool = True
    """Whether patch tokens pass the encoder's last normalisation."""

    num_classes: int = Field(default=0, ge=0)
    """Classes of the encoder's own head; 0 leaves the head out."""

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

    def input_size_at(self, resolution: Resolution) -> tuple[int, int]:
        """Returns height and width of the teacher's input, in pixels, for images of `resolution`.

        An integer is the side of a square. Raises ConfigError unless whole patches fill the input,
        or if images are not square but `input_size` is a single side.
        """
        height, width = both_sides(resolution)
        if isinstance(self.input_size, int) and height != width:
            reason = (
                f"images of {height} x {width} px would be squeezed into a square of "
                f"{self.input_size} px; set input_size to [height, width]"
            )
            raise ConfigError("teacher", [Fault("teacher", reason)])
        scale = (self.input_size_per_256 or 0) / 256
        fixed = self.input_size
        size = both_sides(fixed) if fixed else (height * scale, width * scale)
        if any(side % self.patch_size for side in size):
            reason = (
                f"images of {_by(height, width)} px give the teacher an input of {_by(*size)} px, "
                f"which is not a multiple of its patch size {self.patch_size}; set input_size"
            )
            raise ConfigError("teacher", [Fault("teacher", reason)])
        return int(size[0]), int(size[1])


def both_sides(size: Resolution) -> tuple[int, int]:
    """Returns (height, width) of a size, which may be the side of a square."""
    return size if isinstance(size, tuple) else (size, size)


def _by(height: float | int, width: float | int) -> str:
    return f"{height:g}" if height == width else f"{height:g} x {width:g}"
