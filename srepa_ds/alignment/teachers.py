"""Frozen teachers: a timm ViT, its preprocessing, and the tokens that are the target.

Position embeddings are resampled once, when weights are loaded, by timm's antialiased bicubic
interpolation.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from srepa_ds.alignment.encoders import Encoder, create_encoder, fill_from_file
from srepa_ds.alignment.teacher_specs import TEACHERS as TEACHERS
from srepa_ds.alignment.teacher_specs import TeacherConfig as TeacherConfig
from srepa_ds.alignment.teacher_specs import TeacherSpec as TeacherSpec
from srepa_ds.errors import ConfigError, Fault


@dataclass(frozen=True)
class TeacherTokens:
    """What a teacher says of a batch: patch tokens in row-major order, and its class token."""

    patches: Float[Tensor, "batch tokens width"]
    cls: Float[Tensor, "batch width"] | None


class TeacherFeatures(NamedTuple):
    """One pooled feature vector per image, and class logits where the teacher has a head."""

    pooled: Float[Tensor, "batch width"]
    logits: Float[Tensor, "batch classes"] | None


class Teacher(nn.Module):
    """A frozen encoder with its preprocessing; it never trains and no gradient enters it."""

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: Encoder, spec: TeacherSpec, *, resolution: int, dtype: torch.dtype):
        super().__init__()
        self.encoder = encoder.eval().requires_grad_(False)
        self.spec = spec
        self.resolution = resolution
        self.input_size = spec.input_size_at(resolution)
        self.dtype = dtype
        for name, values in (("mean", spec.mean), ("std", spec.std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        self.training = False

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.spec.width

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patch tokens."""
        side = self.input_size // self.spec.patch_size
        return side, side

    @property
    def num_classes(self) -> int:
        """Classes of the teacher's head, 0 if it has none."""
        return self.spec.num_classes

    def train(self, mode: bool = True) -> "Teacher":
        """Returns itself, in evaluation mode whatever `mode` says."""
        return super().train(False)

    @torch.no_grad()
    def tokens(self, images: UInt8[Tensor, "batch 3 height width"]) -> TeacherTokens:
        """Returns the float32 tokens of images of the teacher's resolution."""
        with self._precision(images.device):
            (tokens,) = self.encoder.forward_intermediates(
                self.preprocess(images),
                indices=1,
                norm=self.spec.final_norm,
                output_fmt="NLC",
                intermediates_only=True,
                return_prefix_tokens=True,
            )
        patches, prefix = tokens if isinstance(tokens, tuple) else (tokens, None)
        cls = prefix[:, 0].float() if prefix is not None and self.spec.has_cls else None
        return TeacherTokens(patches=patches.float(), cls=cls)

    @torch.no_grad()
    def classify(self, images: UInt8[Tensor, "batch 3 height width"]) -> TeacherFeatures:
        """Returns the encoder's own pooled features, and its logits if it has a head (float32)."""
        with self._precision(images.device):
            features = self.encoder.forward_features(self.preprocess(images))
            pooled = self.encoder.forward_head(features, pre_logits=True)
            logits = self.encoder.forward_head(features) if self.num_classes else None
        return TeacherFeatures(pooled.float(), None if logits is None else logits.float())

    def preprocess(
        self, images: UInt8[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 3 input_size input_size"]:
        """Returns the encoder's input for images of 0..255.

        Raises ValueError for images of another resolution or dtype than the teacher was built for.
        """
        expected = (3, self.resolution, self.resolution)
        if images.shape[1:] != expected or images.dtype != torch.uint8:
            found = f"{tuple(images.shape[1:])} of {images.dtype}"
            raise ValueError(f"the teacher takes {expected} of torch.uint8, got {found}")
        unit = images.float() / 255
        if self.spec.order == "normalise_then_resize":
            return self._resized((unit - self.mean) / self.std)
        return (self._resized(unit) - self.mean) / self.std

    def _resized(self, images: Tensor) -> Tensor:
        if images.shape[-1] == self.input_size:
            return images
        return nn.functional.interpolate(
            images,
            size=(self.input_size, self.input_size),
            mode=self.spec.resize,
            align_corners=False,
            antialias=self.spec.antialias,
        )

    def _precision(self, device: torch.device) -> torch.autocast:
        enabled = self.dtype != torch.float32
        return torch.autocast(device.type, dtype=self.dtype if enabled else None, enabled=enabled)


def build_encoder(spec: TeacherSpec, *, resolution: int, pretrained: bool = False) -> Encoder:
    """Returns the timm model of `spec` for images of `resolution` pixels, on the CPU.

    What is trained from it and saved as a state_dict is loaded by `load_teacher`. Raises
    ConfigError if timm cannot build it or if it is not what `spec` says, DataError if pretrained
    weights cannot be fetched.
    """
    encoder = create_encoder(
        spec.architecture,
        input_size=spec.input_size_at(resolution),
        num_classes=spec.num_classes,
        arguments=spec.arguments,
        pretrained=pretrained,
    )
    found = {
        "width": encoder.embed_dim,
        "patch_size": encoder.patch_embed.patch_size[0],
        "num_prefix_tokens": encoder.num_prefix_tokens,
    }
    faults = [
        Fault(f"teacher.spec.{name}", f"is {getattr(spec, name)}, but the model's is {value}")
        for name, value in found.items()
        if getattr(spec, name) != value
    ]
    if faults:
        raise ConfigError("teacher", faults)
    return encoder


def load_teacher(config: TeacherConfig, *, resolution: int, device: torch.device | str) -> Teacher:
    """Returns the frozen teacher of `config` for square images of `resolution` pixels.

    Raises ConfigError for a model that timm cannot build as described, DataError for weights that
    are missing, damaged or of another model.
    """
    spec = config.resolved
    encoder = build_encoder(spec, resolution=resolution, pretrained=config.weights is None)
    if config.weights is not None:
        # Published files may carry a classifier that a teacher without one has no place for.
        ignored = () if spec.num_classes else ("head.",)
        fill_from_file(encoder, config.weights, ignored_prefixes=ignored)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[config.dtype]
    return Teacher(encoder, spec, resolution=resolution, dtype=dtype).to(device)
