"""Embeddings of patches, positions, time and label, and the conditioning made of them."""

import math

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn
from torch.nn.functional import linear, silu

SINUSOID_WIDTH = 256
MAX_PERIOD = 10000.0


def position_embedding(
    grid: tuple[int, int], width: int, *, num_prefix_tokens: int = 0
) -> Float[Tensor, "1 tokens width"]:
    """Returns the fixed 2-D sine-cosine embedding of a (rows, columns) grid, in float32.

    Prefix tokens have no position; their rows come first and are zero.

    The first half of the channels encodes the column, the second the row (the convention of MAE's
    code, which swaps what the names suggest); positions are whole numbers, whatever the grid.
    `width` is a multiple of 4. Computed in float64: rounded angles of large grids would show.
    """
    assert width % 4 == 0
    rows, columns = grid
    column_part = _axis_embedding(columns, width // 2).repeat(rows, 1)
    row_part = _axis_embedding(rows, width // 2).repeat_interleave(columns, dim=0)
    patches = torch.cat((column_part, row_part), dim=1)
    prefix = patches.new_zeros(num_prefix_tokens, width)
    return torch.cat((prefix, patches))[None].to(torch.float32)


def _axis_embedding(length: int, width: int) -> Tensor:
    frequencies = MAX_PERIOD ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def timestep_sinusoid(
    t: Float[Tensor, " batch"], width: int = SINUSOID_WIDTH
) -> Float[Tensor, "batch width"]:
    """Returns the cosines, then the sines, of `t` in [0, 1] (not times 1000), in float32."""
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.to(torch.float32)[:, None] * torch.exp(-math.log(MAX_PERIOD) * exponents)
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def drop_labels(
    labels: Int[Tensor, " batch"],
    uniforms: Float[Tensor, " batch"],
    probability: float,
    null_label: int,
) -> Int[Tensor, " batch"]:
    """Returns `labels` with `null_label` where the uniform draw is below `probability`."""
    return labels.masked_fill(uniforms < probability, null_label)


class PatchEmbedding(nn.Module):
    """Cuts latents into patches and projects each to a token, row by row."""

    def __init__(self, in_channels: int, hidden_size: int, *, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(
        self, x_t: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch tokens hidden"]:
        """Returns the patch tokens, in the dtype of the projection."""
        patches = self.proj(x_t.to(self.proj.weight.dtype))
        # The residual stream inherits this layout: by tokens, or every block would copy it.
        return patches.flatten(2).transpose(1, 2).contiguous()


class WideLinear(nn.Linear):
    """A linear map computed in float32 or wider, whatever autocast and its weights' dtype are."""

    def forward(self, input: Float[Tensor, "batch inputs"]) -> Float[Tensor, "batch outputs"]:
        """Returns the mapped vectors in the weights' dtype, but at least float32."""
        # Here, not around the perceptron: ZeRO-3 gathers weights for the module that owns them.
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(input.device.type, enabled=False):
            return linear(input.to(wide), self.weight.to(wide), self.bias.to(wide))


class TimestepEmbedding(nn.Module):
    """Embeds t with a sinusoid and a two-layer perceptron."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(
            WideLinear(SINUSOID_WIDTH, hidden_size), nn.SiLU(), WideLinear(hidden_size, hidden_size)
        )

    def forward(self, t: Float[Tensor, " batch"]) -> Float[Tensor, "batch hidden"]:
        """Returns the embedding of `t` in [0, 1], in float32 or wider.

        The reference computes the perceptron in the dtype of autocast; nearby times differ by less
        than bfloat16 can tell.
        """
        return self.mlp(timestep_sinusoid(t))


class LabelEmbedding(nn.Module):
    """A table of class vectors; the last row stands for 'no class'."""

    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        # The ordinary constructor draws at random; on "meta" it also takes seconds.
        unset = torch.empty(num_classes + 1, hidden_size)
        self.embedding_table = nn.Embedding.from_pretrained(unset, freeze=False)

    def forward(self, labels: Int64[Tensor, " batch"]) -> Float[Tensor, "batch hidden"]:
        """Returns the rows of `labels`."""
        return self.embedding_table(labels)


def conditioning_vector(
    time_embedding: Float[Tensor, "batch hidden"], label_embedding: Float[Tensor, "batch hidden"]
) -> Float[Tensor, "batch hidden"]:
    """Returns the conditioning, the input of every adaLN projection, in float32 or wider.

    It is the SiLU of the sum of both embeddings.
    """
    wide = torch.promote_types(time_embedding.dtype, torch.float32)
    return silu(time_embedding.to(wide) + label_embedding.to(wide))
