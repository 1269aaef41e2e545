"""The sizes of SiT, and the configuration of a model."""

from typing import Annotated, NamedTuple

from pydantic import Field, model_validator

from srepa_ds.model.attention_backends import ATTENTION_REQUESTS
from srepa_ds.schema import MayChange, Section, one_of

MLP_RATIO = 4


class SiTShape(NamedTuple):
    """The sizes of a transformer, independent of the images."""

    depth: int
    hidden_size: int
    num_heads: int
    patch_size: int


# fmt: off
SIT_VARIANTS = {
    "SiT-Ti/2": SiTShape(depth=5,  hidden_size=96,   num_heads=3,  patch_size=2),
    "SiT-S/2":  SiTShape(depth=12, hidden_size=384,  num_heads=6,  patch_size=2),
    "SiT-S/4":  SiTShape(depth=12, hidden_size=384,  num_heads=6,  patch_size=4),
    "SiT-S/8":  SiTShape(depth=12, hidden_size=384,  num_heads=6,  patch_size=8),
    "SiT-B/2":  SiTShape(depth=12, hidden_size=768,  num_heads=12, patch_size=2),
    "SiT-B/4":  SiTShape(depth=12, hidden_size=768,  num_heads=12, patch_size=4),
    "SiT-B/8":  SiTShape(depth=12, hidden_size=768,  num_heads=12, patch_size=8),
    "SiT-L/2":  SiTShape(depth=24, hidden_size=1024, num_heads=16, patch_size=2),
    "SiT-L/4":  SiTShape(depth=24, hidden_size=1024, num_heads=16, patch_size=4),
    "SiT-L/8":  SiTShape(depth=24, hidden_size=1024, num_heads=16, patch_size=8),
    "SiT-XL/2": SiTShape(depth=28, hidden_size=1152, num_heads=16, patch_size=2),
    "SiT-XL/4": SiTShape(depth=28, hidden_size=1152, num_heads=16, patch_size=4),
    "SiT-XL/8": SiTShape(depth=28, hidden_size=1152, num_heads=16, patch_size=8),
    # Not from a paper, for scaling up: 3.04 billion weights for ImageNet at 256 px; 16 heads, which
    # 2, 4, 8 or 16 devices can share, of width 128, which every attention kernel supports.
    "SiT-3B/2": SiTShape(depth=40, hidden_size=2048, num_heads=16, patch_size=2),
}
# fmt: on

Size = Annotated[int, Field(gt=0)]


class SiTConfig(Section):
    """The diffusion transformer.

    `shape` holds the effective sizes: the variant's, with the overrides below.
    """

    variant: Annotated[str, one_of("variant", SIT_VARIANTS)]
    """The size of the transformer and its patches, as in the SiT paper."""

    input_size: Size | tuple[Size, Size]
    """The side of the latents (of the images in pixel space), or [height, width]."""

    in_channels: Size
    """The channels of the latents: 4 for the Stable Diffusion VAE, 3 in pixel space."""

    num_classes: Size
    """The number of classes; one more label stands for 'no class'."""

    class_token_width: Size | None = None
    """REG: width of the teacher's class token that goes through the model with the image; null for
    none."""

    qk_norm: bool = False
    """Whether queries and keys are normalised per head."""

    attention: Annotated[str, one_of("attention backend", ATTENTION_REQUESTS), MayChange] = "sdpa"
    """The attention backend; all give the same numbers up to rounding. `auto` takes the best that
    runs, `flash_attn` version 4, else 2."""

    depth: Size | None = None
    """The number of blocks, if not the variant's."""

    hidden_size: Size | None = None
    """The width of a token, if not the variant's."""

    num_heads: Size | None = None
    """The number of attention heads, if not the variant's."""

    patch_size: Size | None = None
    """The side of a patch in latent pixels, if not the variant's."""

    @property
    def shape(self) -> SiTShape:
        """Returns the variant's sizes with this section's overrides applied."""
        given = {name: getattr(self, name) for name in SiTShape._fields}
        overrides = {name: size for name, size in given.items() if size is not None}
        return SIT_VARIANTS[self.variant]._replace(**overrides)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Returns the (channels, height, width) of one input."""
        size = self.input_size
        return (self.in_channels, *((size, size) if isinstance(size, int) else size))

    @property
    def grid(self) -> tuple[int, int]:
        """Returns the rows and columns of patch tokens."""
        _, height, width = self.latent_shape
        return height // self.shape.patch_size, width // self.shape.patch_size

    @property
    def num_tokens(self) -> int:
        """Returns the number of patch tokens of one input; a class token is not counted."""
        rows, columns = self.grid
        return rows * columns

    @property
    def num_prefix_tokens(self) -> int:
        """Returns the number of tokens before the patches: 1 with a class token, else 0."""
        return 0 if self.class_token_width is None else 1

    @property
    def head_dim(self) -> int:
        """Returns the width of one attention head."""
        return self.shape.hidden_size // self.shape.num_heads

    @property
    def null_label(self) -> int:
        """Returns the label that stands for 'no class'."""
        return self.num_classes

    @model_validator(mode="after")
    def _sizes_divide(self) -> "SiTConfig":
        _, hidden_size, num_heads, patch_size = self.shape
        _, height, width = self.latent_shape
        if height % patch_size or width % patch_size:
            raise ValueError(
                f"input_size {height}x{width} cannot be cut into patches of {patch_size}; "
                f"both sides must be multiples of {patch_size}"
            )
        if hidden_size % num_heads:
            raise ValueError(
                f"hidden_size {hidden_size} cannot be divided among {num_heads} heads; "
                "choose num_heads that divides it"
            )
        if hidden_size % 4:
            raise ValueError(
                f"hidden_size {hidden_size} must be a multiple of 4: the position embedding is "
                "sines and cosines of two axes"
            )
        return self
