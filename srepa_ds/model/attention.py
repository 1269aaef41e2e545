"""Self-attention and the backends that can compute it."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

HeadTokens = Float[Tensor, "batch heads tokens head_dim"]


def sdpa_attention(query: HeadTokens, key: HeadTokens, value: HeadTokens) -> HeadTokens:
    """Returns attention by the fastest kernel torch has for these inputs."""
    return scaled_dot_product_attention(query, key, value)


def math_attention(query: HeadTokens, key: HeadTokens, value: HeadTokens) -> HeadTokens:
    """Returns softmax(query key' / sqrt(head_dim)) value: the definition, for reference."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    return scores.softmax(dim=-1) @ value


AttentionBackend = Callable[[Tensor, Tensor, Tensor], Tensor]

ATTENTION_BACKENDS: dict[str, AttentionBackend] = {
    "sdpa": sdpa_attention,
    "math": math_attention,
}


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection to queries, keys and values."""

    def __init__(self, hidden_size: int, *, num_heads: int, qk_norm: bool, backend: str):
        super().__init__()
        self.head_shape = (num_heads, hidden_size // num_heads)
        self.attend = ATTENTION_BACKENDS[backend]
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = nn.LayerNorm(self.head_shape[1]) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_shape[1]) if qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(
        self, tokens: Float[Tensor, "batch tokens width"]
    ) -> Float[Tensor, "batch tokens width"]:
        """Returns the attended tokens, in the dtype of the projection."""
        batch, num_tokens, _ = tokens.shape
        qkv = self.qkv(tokens).reshape(batch, num_tokens, 3, *self.head_shape)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        # Under autocast a LayerNorm answers in float32, which not every attention kernel takes.
        query, key = self.q_norm(query).to(value.dtype), self.k_norm(key).to(value.dtype)
        attended = self.attend(query, key, value)
        return self.proj(attended.transpose(1, 2).flatten(2))
