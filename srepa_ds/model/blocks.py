"""The transformer block with adaptive layer norm, and the layers at the residual stream's ends.

The residual stream is float32 (or wider) whatever the dtype of the weights: normalisation,
modulation and the sum are done there, products in the dtype of the weights. So a bfloat16 model
rounds in the same places as a float32 model under autocast.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from srepa_ds.model.attention import Attention
from srepa_ds.model.variants import MLP_RATIO, SiTConfig

_LAYER_NORM_EPS = 1e-6


def modulated_norm(
    tokens: Float[Tensor, "batch tokens hidden"],
    *,
    shift: Float[Tensor, "batch 1 hidden"],
    scale: Float[Tensor, "batch 1 hidden"],
) -> Float[Tensor, "batch tokens hidden"]:
    """Returns LayerNorm(tokens) * (1 + scale) + shift, where the norm has no weights."""
    normalised = layer_norm(tokens, (tokens.shape[-1],), eps=_LAYER_NORM_EPS)
    return torch.addcmul(shift, normalised, 1 + scale)


class AdaLayerNormProjection(nn.Sequential):
    """The linear map from the conditioning to shifts, scales and gates."""

    def __init__(self, hidden_size: int, *, num_chunks: int):
        # Official names have the SiLU at index 0; the model applies it once for all blocks.
        super().__init__(nn.Identity(), nn.Linear(hidden_size, num_chunks * hidden_size))
        self.num_chunks = num_chunks

    def chunks(
        self, conditioning: Float[Tensor, "batch hidden"], *, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "batch 1 hidden"], ...]:
        """Returns the shifts, scales and gates, in `dtype`."""
        return self(conditioning).to(dtype).unsqueeze(1).chunk(self.num_chunks, dim=-1)


class Mlp(nn.Module):
    """Two linear maps with a tanh-approximated GELU in between."""

    def __init__(self, hidden_size: int, *, mlp_ratio: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_ratio * hidden_size)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(mlp_ratio * hidden_size, hidden_size)

    def forward(
        self, tokens: Float[Tensor, "batch tokens hidden"]
    ) -> Float[Tensor, "batch tokens hidden"]:
        """Returns the transformed tokens."""
        return self.fc2(self.act(self.fc1(tokens)))


class SiTBlock(nn.Module):
    """Attention and perceptron, each behind a modulated norm and a gate (adaLN-zero)."""

    def __init__(self, config: SiTConfig):
        super().__init__()
        hidden_size = config.shape.hidden_size
        self.attn = Attention(
            hidden_size,
            num_heads=config.shape.num_heads,
            qk_norm=config.qk_norm,
            backend=config.attention,
        )
        self.mlp = Mlp(hidden_size, mlp_ratio=MLP_RATIO)
        self.adaLN_modulation = AdaLayerNormProjection(hidden_size, num_chunks=6)

    def forward(
        self,
        residual_stream: Float[Tensor, "batch tokens hidden"],
        conditioning: Float[Tensor, "batch hidden"],
    ) -> Float[Tensor, "batch tokens hidden"]:
        """Returns the residual stream after the block."""
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = (
            self.adaLN_modulation.chunks(conditioning, dtype=residual_stream.dtype)
        )
        weights = conditioning.dtype
        tokens = modulated_norm(residual_stream, shift=shift_msa, scale=scale_msa).to(weights)
        residual_stream = torch.addcmul(residual_stream, gate_msa, self.attn(tokens))
        tokens = modulated_norm(residual_stream, shift=shift_mlp, scale=scale_mlp).to(weights)
        return torch.addcmul(residual_stream, gate_mlp, self.mlp(tokens))


class ResidualStreamLayerNorm(nn.LayerNorm):
    """A LayerNorm into the residual stream: its result is not rounded to the weights' dtype."""

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size, eps=_LAYER_NORM_EPS)

    def forward(self, input: Float[Tensor, "... hidden"]) -> Float[Tensor, "... hidden"]:
        """Returns the normalised vectors in the dtype of `input`."""
        weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
        return layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class FinalLayer(nn.Module):
    """A modulated norm and the linear map from tokens to the pixels of their patches.

    With a `class_token_width` the first token has its own linear map.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        patch_size: int,
        out_channels: int,
        class_token_width: int | None = None,
    ):
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.linear_cls = (
            None if class_token_width is None else nn.Linear(hidden_size, class_token_width)
        )
        self.adaLN_modulation = AdaLayerNormProjection(hidden_size, num_chunks=2)

    def forward(
        self,
        residual_stream: Float[Tensor, "batch tokens hidden"],
        conditioning: Float[Tensor, "batch hidden"],
    ) -> tuple[
        Float[Tensor, "batch patches pixels"], Float[Tensor, "batch class_token_width"] | None
    ]:
        """Returns the pixels of each patch, channels last, and the class token if there is one."""
        shift, scale = self.adaLN_modulation.chunks(conditioning, dtype=residual_stream.dtype)
        tokens = modulated_norm(residual_stream, shift=shift, scale=scale).to(conditioning.dtype)
        if self.linear_cls is None:
            return self.linear(tokens), None
        return self.linear(tokens[:, 1:]), self.linear_cls(tokens[:, 0])
