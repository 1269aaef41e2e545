"""Describes a timm ViT as a teacher by what timm itself knows of it."""

import torch

from srepa_ds.encoders.spec import IMAGENET_MEAN, IMAGENET_STD, TeacherSpec
from srepa_ds.encoders.table import TEACHERS
from srepa_ds.encoders.timm_models import Encoder, known_architecture
from srepa_ds.errors import ConfigError, Fault
from srepa_ds.schema import replaced

_MOST_PATCHES = 16


def spec_for(name: str) -> TeacherSpec:
    """Returns the description of a known teacher, or of a timm ViT, at any size of images.

    Raises ConfigError as `spec_of` does.
    """
    known = TEACHERS.get(name)
    if known is None:
        return spec_of(name)
    if known.input_size is not None:
        return known
    side = _MOST_PATCHES * known.patch_size
    return replaced(known, input_size=side, input_size_per_256=None)


def spec_of(architecture: str) -> TeacherSpec:
    """Returns the description of a timm ViT, for an input of at most 16 patches a side.

    Raises ConfigError if timm has no such model, or if it is no ViT with square patches.
    """
    import timm

    try:
        known_architecture(architecture)
        with torch.device("meta"):
            encoder: Encoder = timm.create_model(architecture, pretrained=False, num_classes=0)
        patch_size, other = encoder.patch_embed.patch_size
        own_side = max(encoder.patch_embed.img_size)
        prefix, has_cls = encoder.num_prefix_tokens, encoder.cls_token is not None
    except (ValueError, RuntimeError, AttributeError, TypeError) as error:
        reason = f"timm's '{architecture}' cannot be a teacher: {error}"
        raise ConfigError("teacher", [Fault("teacher", reason)]) from error
    if patch_size != other:
        reason = f"timm's '{architecture}' has patches of {patch_size} x {other} px, not squares"
        raise ConfigError("teacher", [Fault("teacher", reason)])
    known = encoder.pretrained_cfg
    return TeacherSpec(
        architecture=architecture,
        width=encoder.embed_dim,
        patch_size=patch_size,
        input_size=min(own_side, _MOST_PATCHES * patch_size),
        mean=known.get("mean") or IMAGENET_MEAN,
        std=known.get("std") or IMAGENET_STD,
        num_prefix_tokens=prefix,
        has_cls=has_cls,
    )
