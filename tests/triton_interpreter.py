"""Whether Triton's interpreter, in which a CPU runs the kernels, works with the numpy installed."""

from importlib.metadata import PackageNotFoundError, version

import pytest


def _fault() -> str | None:
    try:
        triton, numpy = version("triton"), version("numpy")
    except PackageNotFoundError:
        return "triton is not installed"
    if _parts(triton) < (3, 7) and _parts(numpy) >= (2, 4):
        # It turns arrays of one element into numbers, which numpy refuses from 2.4 on.
        return f"the interpreter of triton {triton} fails with numpy {numpy}"
    return None


def _parts(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


needs_interpreter = pytest.mark.skipif(_fault() is not None, reason=_fault() or "")
