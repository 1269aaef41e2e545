"""The structural part of sREPA's Algorithm 1, operation by operation as the paper prints it."""

import torch
import torch.nn.functional as F
from torch import Tensor


def algorithm_one(student: Tensor, teacher: Tensor, *, kind: str, tau: float = 0.2) -> Tensor:
    """Returns the loss of (b, n, d) tokens; as in training, the teacher gets no gradient."""
    with torch.no_grad():
        z = F.normalize(teacher, dim=-1)
        teacher_gram = torch.bmm(z, z.transpose(1, 2))
    z_til = F.normalize(student, dim=-1)
    student_gram = torch.bmm(z_til, z_til.transpose(1, 2))
    mask = torch.eye(student_gram.shape[1]).bool()
    teacher_gram = _others(teacher_gram, mask)
    student_gram = _others(student_gram, mask)
    if kind == "mse":
        return F.mse_loss(teacher_gram, student_gram)
    teacher_rows = F.softmax(teacher_gram / tau, dim=-1)
    student_rows = F.log_softmax(student_gram / tau, dim=-1)
    return F.kl_div(student_rows, teacher_rows, reduction="batchmean")


def _others(gram: Tensor, mask: Tensor) -> Tensor:
    images, tokens, _ = gram.shape
    return gram[:, ~mask].reshape(images, tokens, tokens - 1)
