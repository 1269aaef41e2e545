"""A tiny SiT for tests, and the forward pass of any SiT in plain tensor operations."""

import math

import torch
from builders import randomised
from torch.nn import functional as F

from srepa_ds.model.embeddings import timestep_sinusoid
from srepa_ds.model.sit import SiT
from srepa_ds.model.variants import SiTConfig


def tiny_config(**changes):
    settings = {
        "variant": "SiT-B/2",
        "input_size": (6, 10),
        "in_channels": 3,
        "num_classes": 5,
        "depth": 2,
        "hidden_size": 36,
        "num_heads": 3,
    }
    return SiTConfig(**(settings | changes))


def tiny_model(seed=0, **changes):
    """Returns a model without zero weights, so that every path counts."""
    return randomised(SiT(tiny_config(**changes)), seed=seed)


def tiny_inputs(batch=3, dtype=torch.float32, **changes):
    config = tiny_config(**changes)
    x_t = torch.arange(batch * math.prod(config.latent_shape)).mul(0.37).sin()
    labels = torch.tensor([0, 5, 3, 1, 2])[:batch]
    return (
        x_t.reshape(batch, *config.latent_shape).to(dtype),
        torch.linspace(0.1, 1, batch, dtype=dtype),
        labels,
    )


def plain_attention(tokens, weights, name, heads):
    batch, length, width = tokens.shape
    qkv = tokens @ weights[f"{name}.qkv.weight"].T + weights[f"{name}.qkv.bias"]
    outputs = []
    for head in range(heads):
        start, stop = head * width // heads, (head + 1) * width // heads
        q, k, v = (qkv[..., part * width + start : part * width + stop] for part in range(3))
        if f"{name}.q_norm.weight" in weights:
            size = (stop - start,)
            q, k = (
                F.layer_norm(y, size, weights[f"{name}.{n}.weight"], weights[f"{name}.{n}.bias"])
                for y, n in ((q, "q_norm"), (k, "k_norm"))
            )
        scores = torch.einsum("bid,bjd->bij", q, k) / math.sqrt(stop - start)
        outputs.append(torch.einsum("bij,bjd->bid", scores.softmax(-1), v))
    joined = torch.cat(outputs, dim=-1)
    assert joined.shape == (batch, length, width)
    return joined @ weights[f"{name}.proj.weight"].T + weights[f"{name}.proj.bias"]


def plain_norm(tokens, shift, scale):
    centred = tokens - tokens.mean(-1, keepdim=True)
    normalised = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-6)
    return normalised * (1 + scale[:, None]) + shift[:, None]


def plain_sit(weights, config, x_t, t, labels, cls_t=None):
    """Returns the velocity, every hidden state and the class token's velocity."""
    depth, width, heads, patch = config.shape
    rows, columns = config.grid

    def linear(name, value):
        return value @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    tokens = torch.stack(
        [
            linear_patch(weights, x_t[:, :, r * patch :, c * patch :][:, :, :patch, :patch])
            for r in range(rows)
            for c in range(columns)
        ],
        dim=1,
    )
    if cls_t is not None:
        cls_token = linear("cls_projectors2", cls_t)
        centred = cls_token - cls_token.mean(-1, keepdim=True)
        cls_token = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        cls_token = cls_token * weights["wg_norm.weight"] + weights["wg_norm.bias"]
        tokens = torch.cat((cls_token[:, None], tokens), dim=1)
    tokens = tokens + weights["pos_embed"]
    time = linear("t_embedder.mlp.0", timestep_sinusoid(t).to(t.dtype))
    time = linear("t_embedder.mlp.2", time * time.sigmoid())
    condition = time + weights["y_embedder.embedding_table.weight"][labels]
    condition = condition * condition.sigmoid()
    hidden = []
    for index in range(depth):
        name = f"blocks.{index}"
        m = linear(f"{name}.adaLN_modulation.1", condition).split(width, dim=-1)
        attended = plain_attention(plain_norm(tokens, m[0], m[1]), weights, f"{name}.attn", heads)
        tokens = tokens + m[2][:, None] * attended
        inner = linear(f"{name}.mlp.fc1", plain_norm(tokens, m[3], m[4]))
        cubic = math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)
        tokens = tokens + m[5][:, None] * linear(
            f"{name}.mlp.fc2", 0.5 * inner * (1 + cubic.tanh())
        )
        hidden.append(tokens)
    shift, scale = linear("final_layer.adaLN_modulation.1", condition).split(width, dim=-1)
    final = plain_norm(tokens, shift, scale)
    first = 0 if cls_t is None else 1
    pixels = linear("final_layer.linear", final[:, first:])
    velocity = torch.zeros_like(x_t)
    for token in range(rows * columns):
        for pixel in range(patch * patch):
            y = token // columns * patch + pixel // patch
            x = token % columns * patch + pixel % patch
            start = pixel * config.in_channels
            velocity[:, :, y, x] = pixels[:, token, start : start + config.in_channels]
    cls_velocity = None if cls_t is None else linear("final_layer.linear_cls", final[:, 0])
    return velocity, hidden, cls_velocity


def linear_patch(weights, patch):
    kernel = weights["x_embedder.proj.weight"].flatten(1)
    return patch.flatten(1) @ kernel.T + weights["x_embedder.proj.bias"]
