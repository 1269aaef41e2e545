"""Matrix products in full float32 precision, whatever autocast and TF32 settings surround them."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any

import torch

_PRECISION_LOCK = RLock()


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Turns autocast and TF32 off while the block runs.

    torch has no thread-local switch for TF32, so the process's is set while kernels are launched
    and restored afterwards; the work of other threads can only become more precise.
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
