"""A training step as research code writes it, on the same model: the engine's baseline.

fp32 weights and AdamW's defaults, autocast, eager, a full copy for the EMA, and a loop over images
in the alignment losses; the structural term is Algorithm 1 as printed.
"""

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy

import torch
import torch.nn.functional as F
from algorithm_one import algorithm_one
from torch import Tensor

from srepa_ds.alignment.alignment import AlignmentConfig
from srepa_ds.model.precision import PRECISIONS, Precision
from srepa_ds.objective import Objective

EMA_DECAY, LEARNING_RATE = 0.9999, 1e-4


def plain_step(
    objective: Objective,
    *,
    alignment: AlignmentConfig | None,
    tokens: Callable[[], Tensor | None],
    latents: Tensor,
    labels: Tensor,
    precision: Precision,
) -> Callable[[], Tensor]:
    """Returns a function that takes one step and returns its loss; `precision` fp32: no autocast.

    The loss stays on the device. Research code reads it in every step, but that would slow down the
    plain loop only.
    """
    average = deepcopy(objective)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    depths = () if alignment is None else (alignment.depth,)
    device, products = latents.device.type, PRECISIONS[precision].products

    def step() -> Tensor:
        teacher_tokens = tokens()
        t = torch.rand(len(latents), device=device)
        noise = torch.randn_like(latents)
        at = t[:, None, None, None]
        is_exact = products == torch.float32
        with nullcontext() if is_exact else torch.autocast(device, products):
            output = objective.sit((1 - at) * latents + at * noise, t, labels, depths=depths)
            projected = [p(h) for p, h in zip(objective.projectors, output.hidden, strict=True)]
        loss = (output.velocity.float() - (noise - latents)).square().mean(dim=(1, 2, 3)).mean()
        if alignment is not None and teacher_tokens is not None:
            loss = loss + aligned(projected[0].float(), teacher_tokens, alignment)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for kept, new in zip(average.parameters(), objective.parameters(), strict=True):
                kept.mul_(EMA_DECAY).add_(new, alpha=1 - EMA_DECAY)
        return loss.detach()

    return step


def aligned(student: Tensor, teacher: Tensor, alignment: AlignmentConfig) -> Tensor:
    """Returns the weighted alignment losses of one teacher, the point-wise one image by image."""
    loss, weights = student.new_zeros(()), alignment.weights_at(0)
    for own, theirs in zip(student, teacher, strict=True):
        cosine = (F.normalize(own, dim=-1) * F.normalize(theirs, dim=-1)).sum(-1)
        loss = loss - (weights.pointwise or 0.0) * cosine.mean() / len(student)
    if alignment.structural is None or weights.structural is None:
        return loss
    term = algorithm_one(student, teacher, kind=alignment.structural.kind)
    if alignment.structural.kind == "kl":
        # Algorithm 1 sums over an image's tokens; the weights are meant for Eq. 8, the mean.
        term = term / student.shape[1]
    return loss + weights.structural * term
