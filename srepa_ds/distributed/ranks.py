"""The process group: this process's rank, collectives, and errors shared by all ranks."""

import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from functools import wraps
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from srepa_ds.console import let_ranks_agree, show_waiting_warnings
from srepa_ds.distributed.devices import (
    agreed_device,
    place_of,
    take_device,
    use_exact_float32,
)
from srepa_ds.distributed.heartbeat import Heartbeat, moved, stuck_seconds
from srepa_ds.distributed.surroundings import STORE_DESCRIPTOR, Place, launched, place
from srepa_ds.distributed.tally import Tally
from srepa_ds.errors import (
    ConfigError,
    Fault,
    OutputError,
    RankError,
    SRepaError,
    TopologyError,
    raised_on_all_ranks,
)

P = ParamSpec("P")
T = TypeVar("T")
# What ends with the process group.
_joined = ExitStack()
# This process's own connection to the store in which the ranks met, and the tallies kept there.
_store: dist.Store | None = None
_num_tallies = 0


@dataclass(frozen=True)
class Rank:
    """This process in the group: its global number, the size of the group, and its device."""

    number: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the main rank, which prints and writes for all."""
        return self.number == 0


def initialize(timeout: timedelta = timedelta(minutes=30)) -> Rank:
    """Joins the process group (NCCL on GPUs, gloo elsewhere) and returns this process's `Rank`.

    Without a launcher the process is a group of one. Raises TopologyError when the launcher's
    variables make no sense or the ranks cannot meet, and on all ranks when one has no GPU or their
    devices differ in kind.
    """
    own = place()
    # DeepSpeed reads LOCAL_RANK on its own.
    os.environ.setdefault("LOCAL_RANK", str(own.local_rank))
    use_exact_float32()
    if not dist.is_initialized():
        try:
            _join(own, timeout)
        finally:
            # Also when this rank cannot join: a warning may say why.
            show_waiting_warnings()
    return Rank(dist.get_rank(), dist.get_world_size(), take_device(own.local_rank))


def _join(own: Place, timeout: timedelta) -> None:
    seconds = stuck_seconds()
    store: dist.Store = _meet(own, timeout) if launched() else dist.HashStore()
    heartbeat = Heartbeat(
        _another_client(store, seconds),
        rank=own.rank,
        world_size=own.world_size,
        where=place_of(own.rank),
        seconds=seconds,
    )
    # Before the ranks wait for each other: one of them may never come.
    _joined.enter_context(heartbeat)
    global _store
    _store = _another_client(store, seconds)
    try:
        _form_group(own, store, timeout)
    except BaseException:
        _joined.close()
        raise


def _form_group(own: Place, store: dist.Store, timeout: timedelta) -> None:
    if launched():
        let_ranks_agree(lambda key: store.add(f"shown/{key}", 1) == 1)
        device = agreed_device(store, own.rank, own.world_size, own.local_rank)
    else:
        device = take_device(own.local_rank)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
        store=dist.PrefixStore("default_pg", store),
        rank=own.rank,
        world_size=own.world_size,
    )


def _meet(own: Place, timeout: timedelta) -> dist.Store:
    """Returns the store in which the ranks meet; raises TopologyError if they cannot."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        if own.rank == 0 and STORE_DESCRIPTOR in os.environ:
            return dist.TCPStore(
                address,
                port,
                own.world_size,
                is_master=True,
                timeout=timeout,
                wait_for_workers=False,
                multi_tenant=True,
                # Taken out, because a store can be opened on it only once.
                master_listen_fd=int(os.environ.pop(STORE_DESCRIPTOR)),
            )
        store, *_ = next(dist.rendezvous("env://", timeout=timeout))
        return store
    except (dist.DistError, ValueError) as error:
        raise TopologyError(_why_apart(own, error)) from error


def _why_apart(own: Place, error: Exception) -> str:
    where = "{MASTER_ADDR}:{MASTER_PORT}".format_map(os.environ)
    text = str(error).split("\n")[0]
    if "EADDRINUSE" in str(error) or "in use" in str(error):
        return f"{place_of(own.rank)}: MASTER_PORT of {where} is in use; choose another"
    return (
        f"{place_of(own.rank)} cannot meet the other ranks at {where}: {text}; check that "
        "MASTER_ADDR and MASTER_PORT are rank 0's, and that all ranks are started"
    )


def _another_client(store: dist.Store, seconds: float) -> dist.Store:
    """Returns another connection to `store`, which gives up after a while."""
    if not isinstance(store, dist.PrefixStore | dist.TCPStore):
        return store
    client = store.clone()
    client.set_timeout(timedelta(seconds=seconds))
    return client


def joined() -> bool:
    """Returns whether this process is in a process group."""
    return dist.is_initialized()


def rank() -> int:
    """Returns this process's global number; before it joins the group, the launcher's."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Returns the number of ranks; 1 outside a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Waits until every rank has arrived here."""
    moved()
    if world_size() > 1:
        dist.barrier()


def broadcast(value: T, *, source: int = 0) -> T:
    """Returns rank `source`'s value on every rank; it must be picklable."""
    if world_size() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def gather(value: T) -> list[T]:
    """Returns every rank's value, in rank order, on every rank."""
    moved()
    if world_size() == 1:
        return [value]
    box: list[Any] = [None] * world_size()
    dist.all_gather_object(box, value)
    return box


def gather_on_main(value: T) -> list[T]:
    """Returns every rank's value, in rank order, on the main rank; an empty list elsewhere."""
    if world_size() == 1:
        return [value]
    box: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, box)
    return box or []


def tally() -> Tally:
    """Returns a new count that all ranks share; all ranks ask for the same ones, in turn."""
    global _num_tallies
    _num_tallies += 1
    return Tally(_store, f"tally/{_num_tallies}")


def summed(tensor: Tensor) -> Tensor:
    """Returns the sum of `tensor` over ranks, as a new tensor on every rank."""
    total = tensor.clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def averaged(tensor: Tensor) -> Tensor:
    """Returns the mean of `tensor` over ranks, as a new tensor on every rank."""
    return summed(tensor) / world_size()


def any_rank(flag: bool) -> bool:
    """Returns whether `flag` is true on at least one rank."""
    moved()
    if world_size() == 1:
        return flag
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor([int(flag)], device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return bool(tensor.item())


def together(action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Returns `action(*args, **kwargs)`; raises on *every* rank the error that any rank met.

    So no rank waits in a collective for one that has already left. User errors and OSErrors keep
    their place and cure; on ranks that did not meet the error, a note names the one that did. An
    unexpected error becomes a RankError after its traceback is printed on the rank that met it;
    a single process raises it unchanged.
    """
    result: T | None = None
    error: SRepaError | None = None
    here = place_of(rank())
    try:
        result = action(*args, **kwargs)
    except SRepaError as caught:
        error = caught
    except OSError as caught:
        # Otherwise this rank alone would leave.
        error = OutputError(f"{caught.filename or 'a file'}: {caught.strerror or caught}")
        error.__cause__ = caught
    except Exception as caught:
        if world_size() == 1:
            raise
        # At once: the others may take long to get here.
        traceback.print_exception(caught)
        error = RankError(f"{here} failed: {type(caught).__name__}: {caught}")
        error.__cause__ = caught
    errors = [met for met in gather((here, error) if error else None) if met is not None]
    if errors:
        place, first = errors[0]
        if error is None:
            first.add_note(f"met by {place}")
        # The same type everywhere, so callers know what to clean up. A rank's own keeps its cause.
        raise raised_on_all_ranks(error if error is not None else first)
    return result  # type: ignore[return-value]


def on_main(action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Returns on every rank what `action(*args, **kwargs)` returns on the main rank.

    Only the main rank runs it. Raises on every rank the error it met there.
    """
    result = together(lambda: action(*args, **kwargs) if rank() == 0 else None)
    return broadcast(result)  # type: ignore[return-value]


def collective(function: Callable[P, T]) -> Callable[P, T]:
    """Decorates a function that all ranks call: an error on one rank is raised on all.

    See `together`.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return together(function, *args, **kwargs)

    return call


def main_rank_only(function: Callable[P, T]) -> Callable[P, T]:
    """Decorates a function that all ranks call and the main rank runs for all of them.

    See `on_main`.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return on_main(function, *args, **kwargs)

    return call


def check_same(facts: Mapping[str, Any], *, what: str) -> None:
    """Checks that all ranks give equal `facts`; raises ConfigError on all otherwise. Collective.

    The error names the differing keys and the first rank that differs from rank 0; `what` is its
    first line: the kind of facts, and what to do.
    """
    by_rank = gather((place_of(rank()), dict(facts)))
    first, expected = by_rank[0]
    faults: dict[str, Fault] = {}
    for where, found in by_rank[1:]:
        for key in {**expected, **found}:
            if expected.get(key) != found.get(key):
                values = f"{expected.get(key)!r} on {first}, {found.get(key)!r} on {where}"
                faults.setdefault(key, Fault(key, values))
    if faults:
        raise raised_on_all_ranks(ConfigError(what, faults.values()))


_GONE = re.compile(r"closed|reset|refused|broken pipe|exited|timed out", re.IGNORECASE)


def lost_connection(error: Exception) -> RankError | None:
    """Returns the error to raise if `error` means that another rank has gone; else None."""
    text = str(error)
    of_connections = isinstance(error, dist.DistError) or "/gloo/" in text
    if isinstance(error, SRepaError) or not of_connections or not _GONE.search(text):
        return None
    # The place in the library's source comes first, in brackets.
    reason = re.sub(r"^\[\S*\] *", "", text.split("\n")[0])
    return RankError(
        f"{place_of(rank())} lost the connection to another rank ({reason}); the rank that ended "
        "first says why in its own output, and the same command continues from the last checkpoint"
    )


def another_group() -> Any:
    """Returns a new group of all ranks with the timeout of the group they joined. Collective.

    torch's default for a new group is ten minutes with NCCL; writing or compiling may take longer.
    """
    own: Any = dist.group.WORLD
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return dist.new_group(timeout=own._get_backend(torch.device(device)).options._timeout)


def is_open(group: Any) -> bool:
    """Returns whether `group` belongs to the process group that this process is in."""
    try:
        dist.get_process_group_ranks(group)
    except (KeyError, ValueError, RuntimeError):
        return False
    return True


def close() -> None:
    """Leaves the process group, if this process is in one."""
    global _store
    _store = None
    _joined.close()
    if dist.is_initialized():
        let_ranks_agree(None)
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """Ends this process with exit code `code` as soon as its output is flushed.

    An ordinary interpreter shutdown with live communication threads sometimes aborts a rank that
    has finished, which a launcher would report as a failed run.
    """
    close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
