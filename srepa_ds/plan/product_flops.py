"""Counts the FLOPs of matrix products, operator by operator.

torch's own counter would do, but the operators it knows change from version to version.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def _product(left: Tensor, right: Tensor, *_: Any) -> int:
    return 2 * left.numel() * right.shape[-1]


def _convolution(images: Tensor, kernels: Tensor, *rest: Any, made: Tensor) -> int:
    _bias, _stride, _padding, _dilation, transposed, *_ = rest
    if transposed:
        return 2 * images.numel() * kernels[0].numel()
    return 2 * made.numel() * kernels[0].numel()


def _convolution_backward(gradient: Tensor, _images: Tensor, kernels: Tensor, *rest: Any) -> int:
    *_, transposed, _output_padding, _groups, (of_images, of_kernels, _of_bias) = rest
    if transposed:
        raise LookupError("no formula for the FLOPs of a transposed convolution's backward pass")
    return (of_images + of_kernels) * 2 * gradient.numel() * kernels[0].numel()


def _scores(query: Tensor, key: Tensor) -> int:
    return 2 * query.numel() * key.shape[-2]


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    return _scores(query, key) + _scores(query, key) // query.shape[-1] * value.shape[-1]


def _attention_backward(_: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> int:
    """Returns the FLOPs of the recomputed scores and of two products per forward product."""
    return _scores(query, key) + 2 * _attention(query, key, value)


_FORMULAS: dict[str, Callable[..., int]] = {
    "mm": _product,
    "bmm": _product,
    "addmm": lambda _bias, *operands: _product(*operands),
    "baddbmm": lambda _bias, *operands: _product(*operands),
    "convolution_backward": _convolution_backward,
}
_SUSPECTS = {
    *("addbmm", "addmv", "attention", "attn", "baddbmm", "bmm", "conv", "conv1d", "conv2d"),
    *("conv3d", "convolution", "dot", "einsum", "linear", "matmul", "mm", "mv", "vdot"),
}
"""Words in names of operators that are probably products."""


class ProductFlops(TorchDispatchMode):
    """A context that sums the FLOPs of matrix products in it; a multiply-add counts as two.

    Works on meta and fake tensors too. An operator that looks like a product but has no formula
    here raises LookupError: a silent zero would make the sum wrong.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Returns func(*args, **kwargs) and adds its FLOPs to `total`."""
        made = func(*args, **(kwargs or {}))
        self.total += _flops(func.overloadpacket.__name__, args, made)
        return made


def _flops(name: str, args: Any, made: Any) -> int:
    if name in _FORMULAS:
        return _FORMULAS[name](*args)
    if name == "convolution":
        return _convolution(*args, made=made)
    if name.startswith("_scaled_dot_product"):
        return (_attention_backward if name.endswith("_backward") else _attention)(*args)
    if _SUSPECTS.intersection(name.split("_")):
        raise LookupError(f"no formula for the FLOPs of torch's operator {name}")
    return 0
