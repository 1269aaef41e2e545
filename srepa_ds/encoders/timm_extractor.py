"""Pooled features of any timm model, and the encoders of FDr6: `FDR_ENCODERS`.

FDr6 averages Frechet distances over six encoders; Inception is the sixth. Models, inputs and
features are those of FD-loss (arXiv 2604.28190). Distances there are of images in float; ours are
of images in uint8.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from srepa_ds.encoders.features import Features
from srepa_ds.encoders.spec import IMAGENET_MEAN, IMAGENET_STD, Resolution, both_sides
from srepa_ds.encoders.table import CLIP_MEAN, CLIP_STD, HALF
from srepa_ds.encoders.timm_models import Encoder, fill_from_file
from srepa_ds.errors import ConfigError, Fault
from srepa_ds.weight_file import hash_of_tensors

# Vision transformers take inputs of other sizes than their own, and pad them to whole patches with
# zeros at the right and below, after normalisation.
_ANY_SIZE = {"dynamic_img_size": True, "dynamic_img_pad": True}

POOLS: dict[str, Callable[[Encoder, Tensor], Tensor]] = {
    "cls": lambda encoder, features: features[:, 0],
    "mean": lambda encoder, features: features.float().mean((-2, -1)),
    "attention": lambda encoder, features: encoder.forward_head(features, pre_logits=True),
}
"""From the output of a timm model's last normalisation to one vector per image."""


@dataclass(frozen=True)
class PooledSpec:
    """A timm model, its preprocessing, and the feature taken from it."""

    architecture: str
    """Name of the model in timm, with the tag of its pretrained weights."""
    width: int
    """Channels of the feature."""
    pool: Literal["cls", "mean", "attention"]
    """A row of `POOLS`."""
    input_size: int
    """Side of the input in pixels, before padding to whole patches."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    layout: str = "timm"
    """Naming of the keys in a local weights file, a row of `LAYOUTS`."""
    arguments: Mapping[str, Any] = field(default_factory=lambda: _ANY_SIZE)
    """Further arguments of the timm model."""


FDR_ENCODERS: dict[str, PooledSpec] = {
    "fdr-convnext": PooledSpec(
        "convnextv2_base.fcmae_ft_in22k_in1k", 1024, "mean", 224, arguments={}
    ),
    "fdr-dinov2": PooledSpec("vit_large_patch14_dinov2.lvd142m", 1024, "cls", 256),
    # With the final normalisation, unlike the teacher of this name.
    "fdr-mae": PooledSpec("vit_large_patch16_224.mae", 1024, "cls", 224, layout="mae"),
    "fdr-siglip": PooledSpec(
        "vit_so400m_patch16_siglip_256.v2_webli", 1152, "attention", 224, HALF, HALF
    ),
    "fdr-clip": PooledSpec(
        "vit_large_patch14_clip_224.openai", 1024, "cls", 256, CLIP_MEAN, CLIP_STD
    ),
}


class TimmExtractor(nn.Module):
    """A frozen timm model with its preprocessing, and one vector per image."""

    mean: Tensor
    std: Tensor
    num_classes = 0
    spatial_width = None

    def __init__(
        self,
        encoder: Encoder,
        spec: PooledSpec,
        *,
        name: str,
        resolution: Resolution,
        dtype: torch.dtype,
        compiled: bool = False,
    ):
        super().__init__()
        self.encoder = encoder.eval().requires_grad_(False)
        self.spec = spec
        self.name = name
        self.resolution = both_sides(resolution)
        self.dtype = dtype
        self._pooled = torch.compile(self._plainly_pooled) if compiled else self._plainly_pooled
        for key, values in (("mean", spec.mean), ("std", spec.std)):
            self.register_buffer(key, torch.tensor(values)[:, None, None], persistent=False)
        self.training = False

    @property
    def width(self) -> int:
        """Channels of the features."""
        return self.spec.width

    @property
    def identity(self) -> dict[str, Any]:
        """Name, spec, the hash of the weights in fp32, and the precision of the products."""
        spec = asdict(self.spec)
        return {
            "name": self.name,
            "spec": {**spec, "mean": list(self.spec.mean), "std": list(self.spec.std)},
            "weights_sha256": hash_of_tensors(self.encoder.state_dict()),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def train(self, mode: bool = True) -> "TimmExtractor":
        """Returns itself, in evaluation mode whatever `mode` says."""
        return super().train(False)

    @torch.no_grad()
    def features(self, images: UInt8[Tensor, "batch 3 height width"]) -> Features:
        """Returns the pooled features (float32)."""
        inputs = self.preprocess(images)
        enabled = self.dtype != torch.float32
        dtype = self.dtype if enabled else None
        with torch.autocast(images.device.type, dtype=dtype, enabled=enabled):
            pooled = self._pooled(inputs)
        return Features(pooled.float(), None)

    def _plainly_pooled(self, inputs: Tensor) -> Tensor:
        return POOLS[self.spec.pool](self.encoder, self.encoder.forward_features(inputs))

    def preprocess(
        self, images: UInt8[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 3 input_height input_width"]:
        """Returns the encoder's input: in [0, 1], resized (bicubic, antialiased), normalised.

        Values beyond [0, 1], which bicubic interpolation makes, stay. Raises ValueError for images
        of another resolution or type.
        """
        expected = (3, *self.resolution)
        if images.shape[1:] != expected or images.dtype != torch.uint8:
            found = f"{tuple(images.shape[1:])} of {images.dtype}"
            raise ValueError(f"{self.name} takes {expected} of torch.uint8, got {found}")
        unit = images.float() / 255
        side = self.spec.input_size
        if unit.shape[-2:] != (side, side):
            unit = nn.functional.interpolate(
                unit, (side, side), mode="bicubic", align_corners=False, antialias=True
            )
        return (unit - self.mean) / self.std


def build_pooled_encoder(spec: PooledSpec) -> Encoder:
    """Returns the timm model of `spec` with random weights, without a classifier, on the CPU.

    The process's random state is left as it was.
    """
    import timm

    with torch.random.fork_rng(devices=[]):
        return timm.create_model(
            spec.architecture, pretrained=False, num_classes=0, **spec.arguments
        )


def load_timm_extractor(
    spec: PooledSpec,
    weights: Path,
    *,
    name: str,
    resolution: Resolution,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    compiled: bool = False,
) -> TimmExtractor:
    """Returns the frozen encoder of `spec` for square images of `resolution` pixels.

    Raises ConfigError for images that are not square, DataError for weights that are missing,
    damaged or of another model.
    """
    height, width = both_sides(resolution)
    if height != width:
        reason = (
            f"'{name}' takes square images, and these have {height} x {width} px, which would be "
            "squeezed; leave it out"
        )
        raise ConfigError("extractor", [Fault("extractor.name", reason)])
    encoder = build_pooled_encoder(spec)
    # Published files may contain a classifier, which is not built.
    classifier = f"{encoder.pretrained_cfg['classifier']}."
    fill_from_file(
        encoder, weights, layout=spec.layout, ignored_prefixes=(classifier,), role="extractor"
    )
    extractor = TimmExtractor(
        encoder, spec, name=name, resolution=resolution, dtype=dtype, compiled=compiled
    )
    return extractor.to(device)
