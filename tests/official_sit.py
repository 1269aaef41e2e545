"""The names, shapes and order of the parameters of REPA's, REG's and iREPA's models."""

import torch
from torch import Tensor, nn

from srepa_ds.config.experiment import Config
from srepa_ds.model.variants import SiTConfig


class Holder(nn.Module):
    """Modules and parameters by name, in the order in which they are given."""

    def __init__(self, **parts: nn.Module | nn.Parameter | None):
        super().__init__()
        for name, part in parts.items():
            if part is not None:
                setattr(self, name, part)


def official_sit(config: Config) -> Holder:
    """Returns a module whose state_dict is that of the official model for a run, all random."""
    sizes = config.model
    width, tokens = sizes.shape.hidden_size, sizes.num_tokens + sizes.num_prefix_tokens
    patch, cls_width = sizes.shape.patch_size, sizes.class_token_width
    position_embedding = nn.Parameter(torch.randn(1, tokens, width), requires_grad=False)
    t_mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
    final = Holder(
        linear=nn.Linear(width, patch * patch * sizes.in_channels),
        linear_cls=None if cls_width is None else nn.Linear(width, cls_width),
        adaLN_modulation=nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width)),
    )
    return Holder(
        pos_embed=position_embedding,
        x_embedder=Holder(proj=nn.Conv2d(sizes.in_channels, width, patch, patch)),
        t_embedder=Holder(mlp=t_mlp),
        y_embedder=Holder(embedding_table=nn.Embedding(sizes.num_classes + 1, width)),
        blocks=nn.ModuleList(_block(sizes) for _ in range(sizes.shape.depth)),
        projectors=nn.ModuleList(_projectors(config)),
        final_layer=final,
        cls_projectors2=None if cls_width is None else nn.Linear(cls_width, width),
        wg_norm=None if cls_width is None else nn.LayerNorm(width),
    )


def _block(sizes: SiTConfig) -> Holder:
    width = sizes.shape.hidden_size

    def norm() -> nn.Module | None:
        return nn.LayerNorm(sizes.head_dim) if sizes.qk_norm else None

    return Holder(
        attn=Holder(
            qkv=nn.Linear(width, 3 * width),
            q_norm=norm(),
            k_norm=norm(),
            proj=nn.Linear(width, width),
        ),
        mlp=Holder(fc1=nn.Linear(width, 4 * width), fc2=nn.Linear(4 * width, width)),
        adaLN_modulation=nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width)),
    )


def _projectors(config: Config) -> list[nn.Module]:
    """Returns REPA's projectors, or iREPA's where its trainer alone has such a run."""
    width = config.model.shape.hidden_size
    projectors = []
    for alignment in config.alignments:
        own, out = alignment.projector, alignment.teacher.resolved.width
        layers = {
            "linear": lambda out=out: nn.Linear(width, out),
            "conv": lambda out=out, k=own.kernel: nn.Conv2d(width, out, k, padding=k // 2),
            "mlp": lambda out=out, inner=own.hidden_width: nn.Sequential(
                nn.Linear(width, inner), nn.SiLU(), nn.Linear(inner, inner), nn.SiLU(),
                nn.Linear(inner, out),
            ),
        }[own.kind]()  # fmt: skip
        is_of_irepa = own.kind != "mlp" or alignment.spatial_norm is not None
        if alignment.has_projector:
            projectors.append(Holder(projection_layer=layers) if is_of_irepa else layers)
    return projectors


def engine_name(name: str) -> str:
    """Returns the name of an official parameter in the engine's objective."""
    if not name.startswith("projectors."):
        return f"sit.{name}"
    number, rest = name.removeprefix("projectors.").split(".", 1)
    inner = rest.removeprefix("projection_layer.")
    return f"projectors.{number}.{inner if inner[0].isdigit() else rest}"


def values_of(module: nn.Module) -> dict[str, Tensor]:
    """Returns a copy of the trained parameters under the engine's names."""
    return {
        engine_name(name): value.detach().clone()
        for name, value in module.named_parameters()
        if name != "pos_embed"
    }
