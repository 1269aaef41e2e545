"""The table of attention kernels, and how the one to use is chosen."""

import logging
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from srepa_ds.errors import ConfigError, Fault

HeadTokens = Float[Tensor, "batch heads tokens head_dim"]


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


_LOG = logging.getLogger("srepa_ds")


_HALF = (torch.float16, torch.bfloat16)


def sdpa_attention(query: HeadTokens, key: HeadTokens, value: HeadTokens) -> HeadTokens:
    """Returns attention, computed by the fastest kernel torch has for these inputs."""
    return scaled_dot_product_attention(query, key, value)


def math_attention(query: HeadTokens, key: HeadTokens, value: HeadTokens) -> HeadTokens:
    """Returns softmax(query key' / sqrt(head_dim)) value: the definition, for reference."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    return scores.softmax(dim=-1) @ value


class _KernelPackage(NamedTuple):
    """A package of CUDA attention kernels, and its requirements."""

    module: str
    function: str
    """Takes queries, keys and values of (batch, tokens, heads, head_dim)."""
    package: str
    dtypes: tuple[torch.dtype, ...]
    head_dim_multiple: int
    max_head_dim: dict[int, int]
    """Per major compute capability that it has kernels for."""

    def bind(self) -> Attend:
        """Returns the package's attention, imported here: torch.compile traces no import."""
        attend = getattr(import_module(self.module), self.function)

        def package_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            attended = attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
            # Some versions also return the log-sum-exp of the softmax.
            attended = attended[0] if isinstance(attended, tuple) else attended
            return attended.transpose(1, 2)

        return package_attention

    def missing(self, device: torch.device, head_dim: int, dtype: torch.dtype) -> str | None:
        """Returns what is missing to run on `device`, or None."""
        faults = []
        if find_spec(self.module.partition(".")[0]) is None:
            faults.append(f"the package {self.package} is not installed")
        if device.type != "cuda":
            faults.append(f"it needs a CUDA device, the model is on {device}")
        if dtype not in self.dtypes:
            known = " or ".join(str(known).removeprefix("torch.") for known in self.dtypes)
            faults.append(f"it computes in {known}, not in {str(dtype).removeprefix('torch.')}")
        if head_dim % self.head_dim_multiple or head_dim > max(self.max_head_dim.values()):
            multiples = f"multiples of {self.head_dim_multiple}"
            at_most = max(self.max_head_dim.values())
            faults.append(f"its head dims are {multiples} up to {at_most}, not {head_dim}")
        return "; ".join(faults) or self._missing_on_device(device, head_dim)

    def _missing_on_device(self, device: torch.device, head_dim: int) -> str | None:
        major, minor = torch.cuda.get_device_capability(device)
        if major not in self.max_head_dim:
            known = ", ".join(f"{known}.x" for known in self.max_head_dim)
            return f"it has kernels for compute capability {known}, the device has {major}.{minor}"
        if head_dim > self.max_head_dim[major]:
            limit = self.max_head_dim[major]
            return f"on this device its head dims go up to {limit}, not {head_dim}"
        try:
            import_module(self.module)
        except (ImportError, OSError, RuntimeError) as error:
            return f"the package {self.package} cannot be loaded: {error}"
        return None


def _always_available(device: torch.device, head_dim: int, dtype: torch.dtype) -> str | None:
    return None


class AttentionBackend(NamedTuple):
    """A way to compute attention, and when it is unavailable."""

    bind: Callable[[], Attend]
    """Imports the package, if any, and returns the function that computes attention."""
    unavailable: Callable[[torch.device, int, torch.dtype], str | None]
    """For a device, head dim and dtype: a sentence that says what is missing, or None."""
    operators: tuple[str, ...]
    """Patterns for the names of torch's operators that compute it, backward pass included."""


_FLASH_4 = _KernelPackage(
    "flash_attn.cute", "flash_attn_func", "flash-attn-4", _HALF, 8, {9: 256, 10: 128}
)


_FLASH_2 = _KernelPackage(
    "flash_attn.flash_attn_interface",
    "flash_attn_func",
    "flash-attn",
    _HALF,
    8,
    dict.fromkeys((8, 9, 10, 12), 256),
)


_XFORMERS = _KernelPackage(
    "xformers.ops",
    "memory_efficient_attention",
    "xformers",
    (*_HALF, torch.float32),
    8,
    dict.fromkeys((7, 8, 9, 10, 12), 256),
)


_TORCH_OPERATORS = ("aten::*_attention*",)


# Names differ between versions, and some bypass torch's operators: see
# `bypasses_torch_operators`.
_FLASH_OPERATORS = ("flash_attn*::*fwd*", "flash_attn*::*forward*")


_XFORMERS_OPERATORS = ("xformers*::*fwd*", "xformers*::*forward*", *_TORCH_OPERATORS)


# In order of preference. torch's own kernels come before flash-attn 2 and xformers because they are
# the same or newer, with no package to match to torch and CUDA.
ATTENTION_BACKENDS: dict[str, AttentionBackend] = {
    "flash_attn_4": AttentionBackend(_FLASH_4.bind, _FLASH_4.missing, _FLASH_OPERATORS),
    "sdpa": AttentionBackend(lambda: sdpa_attention, _always_available, _TORCH_OPERATORS),
    "flash_attn_2": AttentionBackend(_FLASH_2.bind, _FLASH_2.missing, _FLASH_OPERATORS),
    "xformers": AttentionBackend(_XFORMERS.bind, _XFORMERS.missing, _XFORMERS_OPERATORS),
    "math": AttentionBackend(lambda: math_attention, _always_available, ()),
}


# Accepted settings; the first backend of the row that runs is used.
ATTENTION_REQUESTS: dict[str, tuple[str, ...]] = {
    "auto": tuple(ATTENTION_BACKENDS),
    "flash_attn": ("flash_attn_4", "flash_attn_2"),
    **{name: (name,) for name in ATTENTION_BACKENDS},
}


def runs_everywhere(request: str) -> bool:
    """Returns whether `request` is one backend that runs on any device, head dim and dtype."""
    names = ATTENTION_REQUESTS[request]
    return len(names) == 1 and ATTENTION_BACKENDS[names[0]].unavailable is _always_available


@cache
def choose_backend(request: str, *, device: torch.device, head_dim: int, dtype: torch.dtype) -> str:
    """Returns the name of the first backend of `request` that runs on `device`.

    Optional packages are tried on a few tokens. For a request of several backends, the choice is
    logged with the reasons against the others. `sdpa` on a GPU: see `activate_torch_flash`. Raises
    ConfigError that says what is missing if none runs.
    """
    refused: dict[str, str] = {}
    names = ATTENTION_REQUESTS[request]
    for name in names:
        reason = _reason_against(name, device, head_dim, dtype)
        if reason is None:
            break
        refused[name] = reason
    else:
        reasons = ". ".join(f"{name}: {reason}" for name, reason in refused.items())
        advice = "use 'sdpa', which runs everywhere, or 'auto'"
        message = f"'{request}' cannot run here ({reasons}); {advice}"
        raise ConfigError(f"model on {device}", [Fault("model.attention", message)])
    if len(names) > 1:
        reasons = [f"not {other}: {reason}" for other, reason in refused.items()]
        reasons += [f"not {other}: comes after it" for other in names[len(refused) + 1 :]]
        _LOG.info("attention '%s' is %s here; %s", request, name, ". ".join(reasons))
    if name == "sdpa":
        activate_torch_flash(device=device, head_dim=head_dim, dtype=dtype)
    return name


def _reason_against(
    name: str, device: torch.device, head_dim: int, dtype: torch.dtype
) -> str | None:
    backend = ATTENTION_BACKENDS[name]
    reason = backend.unavailable(device, head_dim, dtype)
    if reason is None and backend.unavailable is not _always_available:
        reason = _trial(backend, device, head_dim, dtype)
    return reason


def _trial(
    backend: AttentionBackend, device: torch.device, head_dim: int, dtype: torch.dtype
) -> str | None:
    """Returns why `backend` fails forward and backward on a few tokens, or None."""
    try:
        _few_tokens(backend, device, head_dim, dtype).float().sum().backward()
    # Kernels compiled at run time fail in many ways; each is a reason not to use them.
    except Exception as error:
        return f"it fails when tried: {type(error).__name__}: {error}"
    return None


def _few_tokens(
    backend: AttentionBackend, device: torch.device, head_dim: int, dtype: torch.dtype
) -> Tensor:
    """Returns the attention of a few tokens, with gradients as in training."""
    with torch.inference_mode(False), torch.enable_grad():
        query, key, value = torch.ones(3, 1, 1, 16, head_dim, device=device, dtype=dtype)
        return backend.bind()(query.requires_grad_(), key, value)


@cache
def is_attention(name: str) -> bool:
    """Returns whether the torch operator `namespace::name` is attention's forward pass."""
    if "backward" in name or "bwd" in name:
        return False
    patterns = {pattern for row in ATTENTION_BACKENDS.values() for pattern in row.operators}
    return any(fnmatchcase(name, pattern) for pattern in patterns)


class _AttentionOperators(TorchDispatchMode):
    """A context that records whether an attention operator runs in it."""

    found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found = self.found or is_attention(func.name())
        return func(*args, **(kwargs or {}))


def bypasses_torch_operators(
    name: str, *, device: torch.device, head_dim: int, dtype: torch.dtype
) -> bool:
    """Returns whether the backend `name` computes attention without an operator of torch.

    Selective checkpointing keeps outputs of operators, so it cannot keep that attention.
    """
    with _AttentionOperators() as operators:
        _few_tokens(ATTENTION_BACKENDS[name], device, head_dim, dtype)
    return not operators.found


def activate_torch_flash(*, device: torch.device, head_dim: int, dtype: torch.dtype) -> str | None:
    """Activates FA4 or FA3 for torch's `sdpa` if one works on `device`, and returns its name.

    Takes the first in torch's registry (torch.nn.attention) whose package is installed and that
    computes a few tokens. torch applies it to the whole process, teachers included; one that is
    already active stays. Returns None if `sdpa` keeps torch's own kernels.
    """
    registry = torch.nn.attention
    listed = getattr(registry, "list_flash_attention_impls", None)
    current = getattr(registry, "current_flash_attention_impl", None)
    if listed is None or device.type != "cuda" or dtype not in _HALF:
        return None
    if current is not None and current() is not None:
        return current()
    for name in sorted(listed(), reverse=True):
        try:
            registry.activate_flash_attention_impl(name)
        except (ImportError, OSError, RuntimeError) as error:
            reason = str(error)
        else:
            reason = _trial(ATTENTION_BACKENDS["sdpa"], device, head_dim, dtype)
            if reason is None:
                _LOG.info("torch's sdpa uses %s in this process", name)
                return name
            registry.restore_flash_attention_impl()
        _LOG.info("torch's sdpa does not use %s: %s", name, reason)
    return None
