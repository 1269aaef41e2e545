"""Prepares micro batches one ahead, on a CUDA stream beside the one that trains."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

T = TypeVar("T")


@runtime_checkable
class SideStream(Protocol):
    """A queue of device work beside the one that trains."""

    def work(self) -> AbstractContextManager[Any]:
        """Queues the block's work here; yields the event that marks its end."""

    def hand_over(self, ready: Any, tensors: Iterable[Tensor]) -> None:
        """Makes training's queue wait for `ready`, the end of the work that made `tensors`."""


class CudaSideStream:
    """A CUDA stream of its own. Never makes the host wait."""

    def __init__(self, device: torch.device):
        self._device, self._stream = device, torch.cuda.Stream(device)
        # The weights it reads may still be being copied.
        self._stream.wait_stream(torch.cuda.current_stream(device))

    @contextmanager
    def work(self) -> Iterator[torch.cuda.Event]:
        """Queues the block's work here; yields the event that marks its end."""
        ready = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            yield ready
            ready.record(self._stream)

    def hand_over(self, ready: torch.cuda.Event, tensors: Iterable[Tensor]) -> None:
        """Makes the current CUDA stream wait for `ready`, and keeps `tensors` for its use."""
        consumer = torch.cuda.current_stream(self._device)
        consumer.wait_event(ready)
        for tensor in tensors:
            # Otherwise its memory could be reused while the consumer still reads it.
            tensor.record_stream(consumer)


def side_stream(device: torch.device, *, overlaps: bool) -> SideStream | None:
    """Returns the queue to prepare micro batches on ahead; None to prepare each when needed."""
    return CudaSideStream(device) if overlaps and device.type == "cuda" else None


def one_ahead(prepared: Iterator[T], stream: SideStream) -> Iterator[T]:
    """Yields the items of `prepared`, each made on `stream` while its predecessor is used.

    Items are nested tuples of tensors.
    """

    def launch() -> tuple[T | None, Any]:
        with stream.work() as ready:
            return next(prepared, None), ready

    item, ready = launch()
    while item is not None:
        ahead = launch()
        stream.hand_over(ready, _tensors(item))
        yield item
        item, ready = ahead


def _tensors(tree: object) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple):
        for branch in tree:
            yield from _tensors(branch)
