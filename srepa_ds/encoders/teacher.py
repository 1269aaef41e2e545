"""Frozen teachers: a timm ViT with its preprocessing, its tokens, and its pooled features.

Alignment matches the tokens; the metrics use the pooled features and the logits. Position
embeddings are resampled once, when weights are loaded, by timm's antialiased bicubic interpolation.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, UInt8
from pydantic import model_validator
from torch import Tensor, nn

from srepa_ds.encoders.features import Features
from srepa_ds.encoders.publications import PUBLISHED
from srepa_ds.encoders.published import local_weights
from srepa_ds.encoders.spec import Resolution, both_sides
from srepa_ds.encoders.spec import TeacherSpec as TeacherSpec
from srepa_ds.encoders.table import TEACHERS as TEACHERS
from srepa_ds.encoders.timm_models import (
    Encoder,
    check_published_classes,
    create_encoder,
    fill_from_file,
    has_published_weights,
    known_architecture,
    published_names,
)
from srepa_ds.errors import ConfigError, DataError, Fault, nearest
from srepa_ds.files import looked_for
from srepa_ds.schema import MayChange, Section, one_of, to_tree
from srepa_ds.weight_file import hash_of_tensors


class TeacherConfig(Section):
    """A teacher and its weights."""

    name: Annotated[str, one_of("teacher", TEACHERS)] | None = None
    """A known teacher, or null if `spec` describes one."""

    spec: TeacherSpec | None = None
    """Any other timm ViT, or null."""

    weights: Annotated[Path | None, MayChange] = None
    """Local weights: .safetensors, or a torch file (.pt, .pth, .pth.tar), from which only tensors
    are loaded; null takes timm's pretrained weights, which `srepa-ds fetch` downloads."""

    dtype: Literal["bf16", "fp32"] = "bf16"
    """Precision of the encoder's products; its weights stay float32."""

    compile: Annotated[bool, MayChange] = False
    """Whether to compile the encoder with torch.compile, about a minute at the start."""

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

    def weights_fault(self) -> Fault | None:
        """Returns the fault if no local weights are given and none can be fetched; reads no file.

        The fault's path is relative to this section.
        """
        architecture = self.resolved.architecture
        if self.weights is not None:
            return None
        if has_published_weights(architecture):
            return _unfetchable(architecture)
        reason = (
            f"timm publishes no weights of '{self.name or architecture}'; "
            "give a local .safetensors, .pt, .pth or .pth.tar file"
        )
        if self.spec and (names := published_names(architecture)):
            reason += f", or spec.architecture with a tag: {nearest(architecture, names)}"
        return Fault("weights", reason)


def _unfetchable(architecture: str) -> Fault | None:
    """Returns the fault of published weights that cannot be fetched, None if they can."""
    try:
        PUBLISHED["timm"](architecture)
    except DataError as error:
        return Fault("weights", str(error))
    return None


@dataclass(frozen=True)
class TeacherTokens:
    """A teacher's tokens of a batch: patches in row-major order, and the class token if any."""

    patches: Float[Tensor, "batch tokens width"]
    cls: Float[Tensor, "batch width"] | None


class Teacher(nn.Module):
    """A frozen encoder with its preprocessing; always in evaluation mode, without gradients."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        encoder: Encoder,
        spec: TeacherSpec,
        *,
        resolution: Resolution,
        dtype: torch.dtype,
        compiled: bool = False,
    ):
        super().__init__()
        self.encoder = encoder.eval().requires_grad_(False)
        self.spec = spec
        self.resolution = both_sides(resolution)
        self.input_size = spec.input_size_at(resolution)
        self.dtype = dtype
        intermediates = self.encoder.forward_intermediates
        self._intermediates = torch.compile(intermediates) if compiled else intermediates
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
        height, width = self.input_size
        return height // self.spec.patch_size, width // self.spec.patch_size

    @property
    def num_classes(self) -> int:
        """Classes of the teacher's head, 0 if it has none."""
        return self.spec.num_classes

    @property
    def spatial_width(self) -> None:
        """None: teachers have no spatial features for sFID."""
        return None

    @property
    def identity(self) -> dict[str, Any]:
        """The spec, the hash of the weights in fp32, and the precision of the products."""
        return {
            "spec": to_tree(self.spec),
            "weights_sha256": hash_of_tensors(self.encoder.state_dict()),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def train(self, mode: bool = True) -> "Teacher":
        """Returns itself, in evaluation mode whatever `mode` says."""
        return super().train(False)

    @torch.no_grad()
    def tokens(self, images: UInt8[Tensor, "batch 3 height width"]) -> TeacherTokens:
        """Returns the float32 tokens of images of the teacher's resolution."""
        with self._precision(images.device):
            (tokens,) = self._intermediates(
                self.preprocess(images),
                indices=1,
                norm=self.spec.final_norm,
                output_fmt="NLC",
                intermediates_only=True,
                # Some of timm's classes fail here if they have no prefix tokens.
                return_prefix_tokens=self.spec.num_prefix_tokens > 0,
            )
        patches, prefix = tokens if isinstance(tokens, tuple) else (tokens, None)
        cls = prefix[:, 0].float() if prefix is not None and self.spec.has_cls else None
        return TeacherTokens(patches=patches.float(), cls=cls)

    @torch.no_grad()
    def features(self, images: UInt8[Tensor, "batch 3 height width"]) -> Features:
        """Returns the encoder's pooled features, and its logits if it has a head (float32)."""
        with self._precision(images.device):
            features = self.encoder.forward_features(self.preprocess(images))
            pooled = self.encoder.forward_head(features, pre_logits=True)
            logits = self.encoder.forward_head(features) if self.num_classes else None
        return Features(pooled.float(), None if logits is None else logits.float())

    def preprocess(
        self, images: UInt8[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 3 input_height input_width"]:
        """Returns the encoder's input for images of 0..255.

        Raises ValueError for images of another resolution or dtype than the teacher takes.
        """
        expected = (3, *self.resolution)
        if images.shape[1:] != expected or images.dtype != torch.uint8:
            found = f"{tuple(images.shape[1:])} of {images.dtype}"
            raise ValueError(f"the teacher takes {expected} of torch.uint8, got {found}")
        unit = images.float() / 255
        if self.spec.order == "normalise_then_resize":
            return self._resized((unit - self.mean) / self.std)
        return (self._resized(unit) - self.mean) / self.std

    def _resized(self, images: Tensor) -> Tensor:
        if images.shape[-2:] == self.input_size:
            return images
        return nn.functional.interpolate(
            images,
            size=self.input_size,
            mode=self.spec.resize,
            align_corners=False,
            antialias=self.spec.antialias,
        )

    def _precision(self, device: torch.device) -> torch.autocast:
        enabled = self.dtype != torch.float32
        return torch.autocast(device.type, dtype=self.dtype if enabled else None, enabled=enabled)


def build_encoder(spec: TeacherSpec, *, resolution: Resolution) -> Encoder:
    """Returns the timm model of `spec` for images of `resolution` pixels, on the CPU.

    `resolution` is the side of a square, or height and width. `load_teacher` loads the model's
    state_dict after training; it takes a table with a square number of positions to be a square.
    Raises ConfigError if timm cannot build the model or if it contradicts `spec`.
    """
    encoder = create_encoder(
        spec.architecture,
        input_size=spec.input_size_at(resolution),
        num_classes=spec.num_classes,
        arguments=spec.arguments,
    )
    if faults := _contradictions(spec, encoder):
        raise ConfigError("teacher", faults)
    return encoder


def _contradictions(spec: TeacherSpec, encoder: Encoder) -> list[Fault]:
    """Returns a fault for each field of `spec` that contradicts the encoder."""
    patches = getattr(encoder, "patch_embed", None)
    if patches is None or not hasattr(encoder, "num_prefix_tokens"):
        reason = f"'{spec.architecture}' is not a vision transformer with patch and prefix tokens"
        return [Fault("teacher.spec.architecture", reason)]
    height, width = patches.patch_size
    found = {
        "width": encoder.embed_dim,
        "patch_size": height if height == width else (height, width),
        "num_prefix_tokens": encoder.num_prefix_tokens,
        "has_cls": getattr(encoder, "cls_token", None) is not None,
    }
    faults = [
        Fault(f"teacher.spec.{name}", f"is {getattr(spec, name)}, but the model's is {value}")
        for name, value in found.items()
        if getattr(spec, name) != value
    ]
    if spec.final_norm and isinstance(encoder.norm, nn.Identity):
        reason = "is True, but the model has no normalisation after its last block"
        faults.append(Fault("teacher.spec.final_norm", reason))
    return faults


def _check_present(weights: Path, spec: TeacherSpec) -> None:
    """Raises DataError if there is no such file, with what makes one."""
    if not os.path.exists(weights):
        published = has_published_weights(spec.architecture)
        how = "" if published else ", or train this teacher first with `srepa-ds teacher CONFIG`"
        raise DataError(
            f"teacher weights {weights}: no such file{looked_for(weights)}; correct "
            f"teacher.weights{how}"
        )


def load_teacher(
    config: TeacherConfig, *, resolution: Resolution, device: torch.device | str
) -> Teacher:
    """Returns the frozen teacher of `config` for images of `resolution` pixels.

    `resolution` is the side of a square, or height and width. Raises ConfigError if no weights are
    available or timm cannot build the model as described, DataError for weights that are missing,
    not fetched, damaged or of another model.
    """
    if fault := config.weights_fault():
        raise ConfigError("teacher", [Fault(f"teacher.{fault.path}", fault.message)])
    spec = config.resolved
    encoder = build_encoder(spec, resolution=resolution)
    if config.weights is None:
        check_published_classes(encoder, spec.num_classes)
        weights = local_weights(spec.architecture)
    else:
        _check_present(config.weights, spec)
        weights = config.weights
    # Published files may contain heads that this teacher does not have.
    heads = {"head.": spec.num_classes, "attn_pool.": getattr(encoder, "attn_pool", None)}
    ignored = tuple(prefix for prefix, own in heads.items() if not own)
    fill_from_file(encoder, weights, layout=spec.layout, ignored_prefixes=ignored)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[config.dtype]
    teacher = Teacher(encoder, spec, resolution=resolution, dtype=dtype, compiled=config.compile)
    return teacher.to(device)
