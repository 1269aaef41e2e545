"""The choice of the algorithm for a structural loss, and of how many images it takes at a time."""

from collections.abc import Callable, Iterator
from functools import partial

from jaxtyping import Float
from torch import Tensor

from srepa_ds.alignment.gram_algorithms.kl import kl_dense, kl_tiled
from srepa_ds.alignment.gram_algorithms.mse import mse_dense, mse_feature, mse_tiled
from srepa_ds.alignment.gram_algorithms.parts import BLOCK, compute_dtype, on_unit_tokens
from srepa_ds.alignment.gram_algorithms.triton import kl_triton, mse_triton
from srepa_ds.errors import nearest

# From tokens, `scale`, where to write the gradient, and its own options: the sum over pairs.
Algorithm = Callable[..., Float[Tensor, ""]]
MSE_ALGORITHMS: dict[str, Algorithm] = {
    "dense": mse_dense,
    "tiled": partial(on_unit_tokens, mse_tiled),
    "feature": partial(on_unit_tokens, mse_feature),
    "triton": partial(on_unit_tokens, mse_triton),
}
KL_ALGORITHMS: dict[str, Algorithm] = {
    "dense": partial(on_unit_tokens, kl_dense),
    "tiled": partial(on_unit_tokens, kl_tiled),
    "triton": partial(on_unit_tokens, kl_triton),
}
ALGORITHMS = {"mse": MSE_ALGORITHMS, "kl": KL_ALGORITHMS}

# The choice of `auto`, by device: `dense` up to this many tokens, where whole Gram matrices are
# small, and for mse `feature` above this many tokens per channel of mean width; `tiled` elsewhere.
# CPU: value and gradient timed on two cores of an AMD EPYC, widths 768 and 1024, 256 to 4,096
# tokens, November 2026; `feature` and `tiled` were equal at about 2.0. CUDA: not measured.
Row = dict[str, int | float]
DENSE_UP_TO: dict[str, Row] = {"mse": {"cpu": 768, "cuda": 0}, "kl": {"cpu": 1024, "cuda": 0}}
FEATURE_ABOVE: Row = {"cpu": 2.0, "cuda": 1.9}

# Images are processed together until their temporaries reach this many elements. CPU: with 256
# tokens `dense` KL was fastest on two to four images, MSE on eight or more. CUDA: not measured;
# 32 images of 1,024 tokens at width 768, with the gradient saved for a bfloat16 student, stay
# below 64 MiB.
WORKING_SET_ELEMENTS: Row = {"cpu": 7 << 18, "cuda": 3 << 20}

# `triton` has a program for every 64 tokens: one for each multiprocessor of an H100.
TRITON_TOKENS = 1 << 13


def resolve_algorithm(
    kind: str,
    algorithm: str,
    student: Float[Tensor, "batch tokens d_student"],
    teacher: Float[Tensor, "batch tokens d_teacher"],
) -> str:
    """Returns the algorithm `auto` chooses here, or `algorithm` itself; ValueError if unknown."""
    table = ALGORITHMS[kind]
    if algorithm != "auto":
        if algorithm not in table:
            known = nearest(algorithm, ["auto", *table])
            raise ValueError(f"unknown algorithm '{algorithm}' for structural {kind}; {known}")
        return algorithm
    _, num_tokens, d_student = student.shape
    mean_width = (d_student + teacher.shape[2]) / 2
    if kind == "mse" and num_tokens > _row(FEATURE_ABOVE, student) * mean_width:
        return "feature"
    return "dense" if num_tokens <= _row(DENSE_UP_TO[kind], student) else "tiled"


def image_groups(
    student: Float[Tensor, "batch tokens d_student"],
    teacher: Float[Tensor, "batch tokens d_teacher"],
    *,
    kind: str,
    algorithm: str,
    tile: int,
) -> Iterator[slice]:
    """Yields groups of images small enough that temporaries do not grow with the batch."""
    num_images, num_tokens, _ = student.shape
    if algorithm == "triton":
        size = TRITON_TOKENS // num_tokens
    else:
        size = working_set(student) // _temporaries(student, teacher, kind, algorithm, tile)
    size = max(1, size)
    for start in range(0, num_images, size):
        yield slice(start, start + size)


def _temporaries(student: Tensor, teacher: Tensor, kind: str, algorithm: str, tile: int) -> int:
    """Returns roughly how many temporary elements an algorithm makes for an image."""
    _, num_tokens, d_student = student.shape
    d_teacher = teacher.shape[2]
    if (kind, algorithm) == ("mse", "dense"):
        # Tokens are copied if their dtype is not computed in; then so is the gradient.
        dtype = compute_dtype(student, teacher)
        widths = d_teacher * (teacher.dtype != dtype) + 2 * d_student * (student.dtype != dtype)
        return num_tokens * (num_tokens + 3 * BLOCK + widths)
    matrices = {
        "dense": 2 * num_tokens**2,
        "tiled": min(tile, num_tokens) * num_tokens * (4 if kind == "kl" else 1),
        "feature": d_student**2 + d_teacher**2 + d_student * d_teacher,
    }[algorithm]
    return matrices + num_tokens * (2 * d_student + d_teacher)


def working_set(tensor: Tensor) -> int:
    """Returns the most elements temporaries should have on the tensor's device."""
    return int(_row(WORKING_SET_ELEMENTS, tensor))


def _row(table: Row, tensor: Tensor) -> int | float:
    return table.get(tensor.device.type, table["cuda"])
