"""Compares a run's student, which sees noised real images, with its teachers, which see clean ones.

As in the paper's Figure 2, it compares the similarities between the tokens of an image.
"""

from dataclasses import dataclass

from jaxtyping import Float, Int64
from torch import Tensor

from srepa_ds.config.experiment import Config
from srepa_ds.errors import DataError
from srepa_ds.report.probe import Probe
from srepa_ds.report.similarity import gram_correlation, similarity_to, spread_queries
from srepa_ds.report.tokens import Pair, Pairs, Tokens
from srepa_ds.weights.exported import ExportedModel

NUM_QUERIES = 4


@dataclass(frozen=True)
class Space:
    """The similarities between tokens of one kind: the teacher's, a block's, or projected ones."""

    name: str
    similarities: Float[Tensor, "shown queries tokens"]
    correlations: Float[Tensor, " images"] | None
    """Of each image's Gram matrix with the teacher's; None for the teacher itself."""


@dataclass(frozen=True)
class Comparison:
    """One teacher compared with one block of the student."""

    teacher: str
    is_aligned: bool
    """Whether the student was aligned with this teacher."""
    grid: tuple[int, int]
    queries: Int64[Tensor, "shown queries"]
    spaces: tuple[Space, ...]
    """The teacher's first, then the student's."""


def compare(config: Config, exported: ExportedModel, seen: Probe) -> tuple[Comparison, ...]:
    """Returns a comparison for each teacher the model was aligned with.

    A model without teachers is compared, at its middle block, with the extractor of `evaluate`.
    Raises ConfigError or DataError for a teacher that cannot be loaded or has another token grid.
    """
    images = seen.batch.images
    if images is None:
        raise DataError("teachers need pixels, but the real images are stored without any")
    resolution = (images.shape[-2], images.shape[-1])
    pairs = Pairs(config, exported, resolution=resolution, device=images.device)
    each = zip(pairs.all, pairs.tokens(seen), strict=True)
    return tuple(compared(pair, tokens, seen) for pair, tokens in each)


def queries_of(
    tokens: Float[Tensor, "images tokens width"], grid: tuple[int, int]
) -> Int64[Tensor, "images queries"]:
    """Returns the token in the middle of each image, and those that resemble it least."""
    first = (grid[0] // 2) * grid[1] + grid[1] // 2
    return spread_queries(tokens, first=first, count=min(NUM_QUERIES, tokens.shape[1]))


def compared(pair: Pair, tokens: Tokens, seen: Probe) -> Comparison:
    """Returns the comparison of one teacher's tokens with the student's, of the images `seen`."""
    target = tokens.target
    shown = seen.shown.to(target.device)
    queries = queries_of(target[shown], pair.grid)
    spaces = [Space("teacher", similarity_to(target[shown], queries), None)]
    spaces += [
        Space(name, similarity_to(own[shown], queries), gram_correlation(own, target))
        for name, own in tokens.student.items()
    ]
    return Comparison(pair.name, pair.alignment is not None, pair.grid, queries, tuple(spaces))


def alone(
    name: str,
    tokens: Float[Tensor, "images tokens width"],
    grid: tuple[int, int],
    shown: Int64[Tensor, " shown"],
) -> Comparison:
    """Returns the similarities in a teacher that no student is compared with."""
    tokens = tokens[shown.to(tokens.device)]
    queries = queries_of(tokens, grid)
    spaces = (Space("teacher", similarity_to(tokens, queries), None),)
    return Comparison(name, True, grid, queries, spaces)
