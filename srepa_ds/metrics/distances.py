"""Squared distances between blocks of features, by ADM's half-precision arithmetic or in fp32."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Float32
from torch import Tensor

Arithmetic = Literal["fp32", "fp16"]

_DTYPES: dict[Arithmetic, tuple[torch.dtype, ...]] = {
    "fp32": (torch.float32,),
    "fp16": (torch.float16, torch.float32),
}
_SLICE_ELEMENTS = 4_000_000
"""Distances held at once; a block of 10,000 x 10,000 would take 400 MB for each temporary."""


@dataclass(frozen=True)
class Block:
    """All distances between two sets of points, computed a slice of rows at a time."""

    rows: Float[Tensor, "rows width"]
    columns: Float[Tensor, "columns width"]
    dtype: torch.dtype
    """float16 or float32, in which norms, products and sums are rounded."""

    def slices(self, *, upper: bool = False) -> Iterator["BlockSlice"]:
        """Yields the block's rows in order, a few at a time.

        `upper`, for equal rows and columns: without the columns before the slice's first row.
        """
        size = max(1, _SLICE_ELEMENTS // max(1, len(self.columns)))
        transposed = self._columns.T
        for start in range(0, len(self.rows), size):
            chosen = slice(start, min(start + size, len(self.rows)))
            first = start if upper else 0
            # Half precision by products of rounded inputs in fp32, rounded once: what half
            # products with fp32 sums give, and four times as fast on a CPU.
            doubled = (self._rows[chosen] @ transposed[:, first:]).to(self.dtype).mul_(2)
            norms = self._row_norms[chosen, None], self._column_norms[first:]
            yield BlockSlice(chosen, doubled, *norms)

    @cached_property
    def _rows(self) -> Tensor:
        return self.rows.to(self.dtype).float()

    @cached_property
    def _columns(self) -> Tensor:
        return self.columns.to(self.dtype).float()

    @cached_property
    def _row_norms(self) -> Tensor:
        return self.rows.to(self.dtype).square().sum(dim=1)

    @cached_property
    def _column_norms(self) -> Tensor:
        return self.columns.to(self.dtype).square().sum(dim=1)


@dataclass(frozen=True)
class BlockSlice:
    """Some rows of a block."""

    rows: slice
    """Their places in the block."""
    doubled_products: Float[Tensor, "slice columns"]
    row_norms: Float[Tensor, "slice 1"]
    column_norms: Float[Tensor, " columns"]

    def distances(self) -> Float[Tensor, "slice columns"]:
        """Returns |u|^2 - 2 u'v + |v|^2, clamped at 0, from rows u to columns v."""
        return (self.row_norms - self.doubled_products).add_(self.column_norms).clamp_(min=0)

    def distances_from_columns(self) -> Float[Tensor, "slice columns"]:
        """Returns the distances of the block with rows and columns exchanged, untransposed.

        The products are the same, but fp16 rounds the two norms in the other order.
        """
        return (self.column_norms - self.doubled_products).add_(self.row_norms).clamp_(min=0)


def dtypes_of(arithmetic: Arithmetic) -> tuple[torch.dtype, ...]:
    """Returns the dtypes to try for a block, in order, until all its distances are finite."""
    return _DTYPES[arithmetic]


def are_finite(distances: Float[Tensor, "rows columns"]) -> bool:
    """Returns whether all of a slice's distances, which are never negative, are finite."""
    return bool(distances.amax().isfinite())


def squared_distances(
    rows: Float[Tensor, "rows width"],
    columns: Float[Tensor, "columns width"],
    *,
    arithmetic: Arithmetic = "fp32",
) -> Float32[Tensor, "rows columns"]:
    """Returns |u|^2 - 2 u'v + |v|^2, clamped at 0, for every pair of a row u and a column v.

    "fp16" computes norms, products and sums in half precision, and falls back to fp32 for the whole
    block if any of its distances overflows. Source: ADM's evaluator.
    """
    for dtype in dtypes_of(arithmetic):
        found = [part.distances() for part in Block(rows, columns, dtype).slices()]
        if all(are_finite(distances) for distances in found):
            break
    return torch.cat(found).float()
