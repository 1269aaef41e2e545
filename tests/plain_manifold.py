"""Precision and recall as ADM's evaluator computes them, with whole matrices of distances."""

import torch


def plain_half(rows, columns):
    """Returns distances by torch's own half arithmetic, and in fp32 if any of them overflows."""

    def expanded(u, v):
        norms = u.square().sum(dim=1)[:, None], v.square().sum(dim=1)[None]
        return (norms[0] - 2 * (u @ v.T) + norms[1]).clamp(min=0)

    found = expanded(rows.half(), columns.half())
    return found.float() if found.isfinite().all() else expanded(rows, columns)


def plain_precision_recall(samples, reference, block_size):
    """Returns which samples the reference's manifold holds, and which of it the samples'."""

    def matrix(rows, columns):
        return torch.cat(
            [
                torch.cat([plain_half(u, v) for v in columns.split(block_size)], dim=1)
                for u in rows.split(block_size)
            ]
        )

    radii = [matrix(rows, rows).sort(dim=1).values[:, 3] for rows in (samples, reference)]
    across = matrix(reference, samples)
    in_reference = (across <= radii[1][:, None]).any(dim=0)
    return in_reference, (across <= radii[0]).any(dim=1)
