"""Matrix products that keep float32's precision, whatever the surroundings have chosen."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any

import torch

_PRECISION_LOCK = RLock()


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Returns a block without autocast whose float32 products are IEEE ones.

    torch has no thread-local switch for TF32, so the process's is held while kernels are launched
    and put back after; work of other threads can only become more precise by that.
    """
    backend: Any = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
    with torch.autocast(device_type, enabled=False), _PRECISION_LOCK:
        before = backend.matmul.fp32_precision
        if before in ("none", "ieee"):
            yield
            return
        backend.matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            backend.matmul.fp32_precision = before
