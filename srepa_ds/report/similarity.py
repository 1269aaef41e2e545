"""Similarities between the tokens of an image, as pure functions."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def similarity_to(
    tokens: Float[Tensor, "batch tokens width"], queries: Int64[Tensor, "batch queries"]
) -> Float[Tensor, "batch queries tokens"]:
    """Returns the cosine similarity of each image's query tokens to all its tokens, float32."""
    unit = torch.nn.functional.normalize(tokens.float(), dim=-1)
    return torch.take_along_dim(unit, queries[:, :, None], dim=1) @ unit.mT


def spread_queries(
    tokens: Float[Tensor, "batch tokens width"], *, first: int, count: int
) -> Int64[Tensor, "batch count"]:
    """Returns the indices of `count` dissimilar tokens of each image.

    They start with `first`; each next token is the one whose largest similarity to those already
    chosen is smallest.
    """
    chosen = torch.full((len(tokens), 1), first, device=tokens.device)
    for _ in range(count - 1):
        largest = similarity_to(tokens, chosen).amax(dim=1)
        # Rounding must not choose a token twice.
        largest.scatter_(1, chosen, torch.inf)
        chosen = torch.cat((chosen, largest.argmin(dim=1, keepdim=True)), dim=1)
    return chosen


def gram_correlation(
    first: Float[Tensor, "batch tokens d_first"], second: Float[Tensor, "batch tokens d_second"]
) -> Float[Tensor, " batch"]:
    """Returns each image's Pearson correlation of two Gram matrices of L2-normalised tokens.

    Over the pairs i != j, in float64; nan where all pairs of one image are equally similar.
    """
    return torch.stack([_correlation(a, b) for a, b in zip(first, second, strict=True)])


def _correlation(first: Tensor, second: Tensor) -> Tensor:
    similarities = [_off_diagonal(tokens) for tokens in (first, second)]
    a, b = (values - values.mean() for values in similarities)
    return (a * b).sum() / (a.norm() * b.norm())


def _off_diagonal(tokens: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(tokens.double(), dim=-1)
    rows, columns = torch.triu_indices(len(unit), len(unit), offset=1, device=unit.device)
    return (unit @ unit.T)[rows, columns]
