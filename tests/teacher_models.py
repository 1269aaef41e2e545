"""Small encoders with random weights, and the tokens that timm itself computes with them."""

from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from srepa_ds.encoders.teacher import TEACHERS, TeacherConfig, TeacherSpec, load_teacher

SMALL = {"depth": 2, "embed_dim": 24, "num_heads": 2}
PLAIN = TeacherSpec(
    architecture="vit_tiny_patch16_224",
    arguments={**SMALL, "patch_size": 4},
    width=24,
    patch_size=4,
    input_size=16,
    num_classes=5,
)


def reduced(name, **arguments):
    """Returns a row of the table with two narrow blocks and otherwise unchanged."""
    spec = TEACHERS[name]
    changes = {**spec.arguments, **SMALL, **arguments}
    return spec.model_copy(update={"arguments": changes, "width": changes["embed_dim"]})


def scrambled(encoder, seed=0):
    """Fills every weight and buffer: initial values such as zero and one can hide a fault."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        key: 0.3 * torch.randn(value.shape, generator=generator)
        for key, value in encoder.state_dict().items()
    }
    encoder.load_state_dict(state)
    return encoder.eval()


def images(resolution, count=2, seed=0):
    height, width = resolution if isinstance(resolution, tuple) else (resolution, resolution)
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 3, height, width)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def saved(encoder, folder, name="teacher.safetensors"):
    path = Path(folder) / name
    if path.suffix == ".safetensors":
        save_file(encoder.state_dict(), path)
    else:
        torch.save({"model": encoder.state_dict(), "epoch": 3}, path)
    return path


def loaded(spec, path, *, resolution=16, dtype="fp32", **settings):
    config = TeacherConfig(spec=spec, weights=path, dtype=dtype, **settings)
    return load_teacher(config, resolution=resolution, device="cpu")


def plain_encoder(spec, grid):
    """Returns timm's own model of a row, for a grid of rows and columns."""
    rows, columns = grid if isinstance(grid, tuple) else (grid, grid)
    return timm.create_model(
        spec.architecture,
        img_size=(spec.patch_size * rows, spec.patch_size * columns),
        num_classes=spec.num_classes,
        **spec.arguments,
    )


def published(name, grid=37, **arguments):
    """Returns a narrow encoder in timm's layout of the published weights, on a square grid."""
    return scrambled(plain_encoder(reduced(name, **arguments), grid))


def preprocessed(spec, size, pixels):
    unit = pixels.float() / 255
    unit = (unit - torch.tensor(spec.mean)[:, None, None]) / torch.tensor(spec.std)[:, None, None]
    return torch.nn.functional.interpolate(
        unit, size, mode=spec.resize, align_corners=False, antialias=spec.antialias
    )


def tokens_by_timm(spec, source, grid, pixels):
    """Returns all tokens of timm's plain forward with the weights of `source`, prefix first."""
    state = dict(source.state_dict())
    plain = plain_encoder(spec, grid).eval()
    if state.get("pos_embed") is not None:
        rows, columns = source.patch_embed.grid_size
        # Some encoders add positions to patches only, others to prefix tokens too.
        prefix = state["pos_embed"].shape[1] - rows * columns
        state["pos_embed"] = resample_abs_pos_embed(
            state["pos_embed"],
            new_size=list(grid),
            old_size=[rows, columns],
            num_prefix_tokens=prefix,
        )
    plain.load_state_dict(state)
    size = (grid[0] * spec.patch_size, grid[1] * spec.patch_size)
    before_norm = []
    plain.norm.register_forward_pre_hook(lambda module, given: before_norm.append(given[0]))
    with torch.no_grad():
        normed = plain.forward_features(preprocessed(spec, size, pixels))
    return normed if spec.final_norm else before_norm[0]
