"""The `Source` protocol: a labelled collection of images, or of latents, in a fixed order."""

from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from jaxtyping import Float, Int64
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class SourceItem:
    """The contents of one sample of a source."""

    image: Image.Image | bytes | None
    """The image, or the contents of an image file; None if the source has only latents."""
    moments: Float[Tensor, "moments latent_height latent_width"] | None = None
    """The latent, from sources that hold them."""
    moments_mirrored: Float[Tensor, "moments latent_height latent_width"] | None = None
    """The latent of the mirrored image, from sources that hold them."""


@dataclass(frozen=True)
class SourceLatents:
    """The latents that a source holds."""

    values: Literal["moments", "samples"]
    """`moments`: mean and standard deviation of the posterior; `samples`: one draw from it."""
    latent_shape: tuple[int, int, int]
    """Channels, height, width of a latent."""
    mirrored: bool
    """Whether the latents of the mirrored images are there too."""
    facts: dict[str, Any]
    """What the source says of them, such as the `scale` and `shift` they are trained with; plain
    JSON values."""
    has_images: bool
    """Whether the source holds the images too."""


@runtime_checkable
class Source(Protocol):
    """A labelled collection of images in a fixed order."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each label, for people."""

    @property
    def class_ids(self) -> tuple[str, ...]:
        """The source's own name of each label, such as a WordNet id; empty if there are none."""

    @property
    def labels(self) -> Int64[Tensor, " samples"]:
        """The label of every image, known without decoding images."""

    @property
    def fingerprint(self) -> str:
        """A hash of what is known without reading images: keys, labels, sizes of files.

        Not of where the source lies, nor of times. A preparation goes on only if it is the same.
        """

    @property
    def latents(self) -> SourceLatents | None:
        """The latents that the source holds; None if it holds images only."""

    def key(self, index: int) -> str:
        """Returns the name of a sample, which no other has: its path in a folder or an archive."""

    def item(self, index: int) -> SourceItem:
        """Returns the contents of one sample; several threads may call it at once.

        Raises DataError, whose message need not name the sample, if it cannot be read.
        """
