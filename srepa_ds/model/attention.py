"""Multi-head self-attention."""

from jaxtyping import Float
from torch import Tensor, nn

from srepa_ds.model.attention_backends import (
    ATTENTION_BACKENDS,
    Attend,
    runs_everywhere,
    sdpa_attention,
)


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection to queries, keys and values."""

    def __init__(self, hidden_size: int, *, num_heads: int, qk_norm: bool, backend: str):
        super().__init__()
        self.head_shape = (num_heads, hidden_size // num_heads)
        # A backend that does not run everywhere is bound later by `use`; until then, torch's.
        self.attend: Attend = sdpa_attention
        if runs_everywhere(backend):
            self.use(backend)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = nn.LayerNorm(self.head_shape[1]) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_shape[1]) if qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def use(self, backend: str) -> None:
        """Switches to a row of ATTENTION_BACKENDS; its package is imported here."""
        self.attend = ATTENTION_BACKENDS[backend].bind()

    def forward(
        self, tokens: Float[Tensor, "batch tokens width"]
    ) -> Float[Tensor, "batch tokens width"]:
        """Returns the attended tokens, in the dtype of the projection."""
        batch, num_tokens, _ = tokens.shape
        qkv = self.qkv(tokens).reshape(batch, num_tokens, 3, *self.head_shape)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        # Under autocast LayerNorm returns float32, which not every attention kernel accepts.
        query, key = self.q_norm(query).to(value.dtype), self.k_norm(key).to(value.dtype)
        attended = self.attend(query, key, value)
        return self.proj(attended.transpose(1, 2).flatten(2))
