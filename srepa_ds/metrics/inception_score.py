"""The inception score of a classifier's logits."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from srepa_ds.errors import DataError

SPLIT_SIZE = 5000
"""Images per split in ADM's evaluator: 10 splits of 50,000."""


def inception_score(
    logits: Float[Tensor, "samples classes"], *, split_size: int = SPLIT_SIZE
) -> Float[Tensor, ""]:
    """Returns the mean over consecutive splits of exp(mean KL(p(y|x) || p(y))), float32.

    Without shuffling; a shorter last split counts like the others. Inception's logits are those
    without the bias. Source: Salimans et al. (2016), as ADM computes it. Raises DataError for no
    images or logits that are not finite.
    """
    if len(logits) == 0:
        raise DataError("the inception score needs at least 1 sample image, got 0")
    if not logits.isfinite().all():
        raise DataError("logits of the sample images hold NaN or infinity; check the images")
    scores = []
    for split in logits.split(split_size):
        log_probabilities = split.float().log_softmax(dim=1)
        probabilities = log_probabilities.exp()
        log_marginal = log_probabilities.logsumexp(dim=0) - math.log(len(split))
        divergence = (probabilities * (log_probabilities - log_marginal)).sum(dim=1)
        scores.append(divergence.mean().exp())
    return torch.stack(scores).mean()
