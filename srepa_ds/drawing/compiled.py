"""A model whose forward pass torch.compile has compiled, for batches of two sizes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from srepa_ds.config.machine_checks import missing_compiler
from srepa_ds.errors import ConfigError, Fault
from srepa_ds.model.sit import SiT, SiTOutput
from srepa_ds.model.variants import SiTConfig


class CompiledModel:
    """A SiT as the sampler calls it, compiled for `batch_size` images and for twice as many.

    A shorter batch is filled with copies of its last image, which are dropped again: what a row
    becomes does not depend on the others, and another size would take a minute to compile.
    """

    def __init__(self, model: SiT, *, batch_size: int, cuda_graphs: bool):
        """Compiles nothing yet: the first call of each size does."""
        self._sizes = (batch_size, 2 * batch_size)
        self._config = model.config
        self._cuda_graphs = cuda_graphs
        mode = "reduce-overhead" if cuda_graphs else None
        self._forward: Callable[..., Any] = torch.compile(model.forward, dynamic=False, mode=mode)

    @property
    def config(self) -> SiTConfig:
        """The sizes of the model."""
        return self._config

    def __call__(
        self, x_t: Tensor, t: Tensor, labels: Tensor, *, cls_t: Tensor | None = None
    ) -> SiTOutput:
        """Returns the velocity, and that of the class token if there is one."""
        count = len(x_t)
        # Callers may bring any number of images; ours never bring more than twice a chunk.
        size = next((size for size in self._sizes if count <= size), count)
        # Of whole batches too: that makes views contiguous, for which there would be a third graph.
        rows = torch.arange(size, device=x_t.device).clamp(max=count - 1)
        filled = [None if part is None else part[rows] for part in (x_t, t, labels, cls_t)]
        if self._cuda_graphs:
            # The last call's outputs may be overwritten: what is needed of them was copied.
            torch.compiler.cudagraph_mark_step_begin()
        velocity, _, cls_velocity = self._forward(*filled[:3], cls_t=filled[3])
        outputs = [None if part is None else part[:count] for part in (velocity, cls_velocity)]
        if self._cuda_graphs:
            outputs = [None if part is None else part.clone() for part in outputs]
        assert outputs[0] is not None
        return SiTOutput(outputs[0], (), outputs[1])


def check_compiler(wanted: bool, device: torch.device) -> None:
    """Raises ConfigError if compiled models are wanted where torch.compile cannot work."""
    if wanted and (missing := missing_compiler(device)):
        reason = f"torch.compile cannot work here: {missing}; or set it to false"
        raise ConfigError("configuration", [Fault("sample.compile", reason)])


def check_cuda_graphs(wanted: bool, device: torch.device) -> None:
    """Raises ConfigError if CUDA graphs are wanted on a device that has none."""
    if wanted and device.type != "cuda":
        reason = f"needs a GPU, and this rank computes on its {device.type}; set false"
        raise ConfigError("configuration", [Fault("sample.cuda_graphs", reason)])
