"""The place that a launcher gives this process, by environment variables, and their faults."""

import os
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from srepa_ds.errors import TopologyError

STORE_DESCRIPTOR = "SREPA_STORE_DESCRIPTOR"
"""Names the open socket that our launcher hands to rank 0, which listens on MASTER_PORT."""

_PLACE = ("RANK", "WORLD_SIZE")
_ALL = (*_PLACE, "MASTER_ADDR", "MASTER_PORT")
_NUMBERS = (*_PLACE, "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")

# The number of processes that each of these starts, none of which knows of the others.
_STARTERS = {
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "MV2_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
    # Set by srun alone; a batch script has the others of Slurm too.
    "SLURM_STEP_NUM_TASKS": "srun",
}


class Place(NamedTuple):
    """The place of this process among those a launcher started."""

    rank: int
    world_size: int
    local_rank: int


def launched() -> bool:
    """Returns whether a launcher (torchrun, deepspeed, ours) gave this process a place."""
    return all(name in os.environ for name in _PLACE)


def check_surroundings() -> None:
    """Raises TopologyError if the launcher's variables make no sense, naming all that is wrong.

    Also if an MPI launcher or srun started several processes without a place: each would do all
    of the work, in the same files.
    """
    faults = list(_faults(os.environ))
    if faults:
        raise TopologyError(
            f"the launcher's variables are not usable: {'; '.join(faults)}; start with torchrun or "
            "--ranks, or unset RANK and WORLD_SIZE"
        )
    if not launched():
        _check_alone(os.environ)


def place() -> Place:
    """Returns this process's place, that of the only one without a launcher.

    Raises TopologyError as `check_surroundings` does.
    """
    check_surroundings()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if not launched():
        return Place(0, 1, local_rank)
    return Place(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), local_rank)


def _faults(variables: Mapping[str, str]) -> Iterator[str]:
    given = [name for name in _PLACE if name in variables]
    if len(given) == 1:
        (other,) = {*_PLACE} - {*given}
        yield f"{given[0]} is set and {other} is not"
    missing = [name for name in _ALL if name not in variables]
    if len(given) == 2 and missing:
        yield f"{', '.join(missing)} not set"
    # Without a launcher the others have no meaning, and may be somebody else's: Kubernetes sets
    # MASTER_PORT for a service that is called "master".
    numbers = {}
    for name in _NUMBERS if given else ("LOCAL_RANK",):
        text = variables.get(name)
        if text is None:
            continue
        if text.isascii() and text.isdecimal() and len(text) < 10:
            numbers[name] = int(text)
        else:
            yield f"{name} is {text!r}, not a number from 0 on"
    if given and not variables.get("MASTER_ADDR", "-").strip():
        yield "MASTER_ADDR is empty"
    sizes = (numbers.get("LOCAL_RANK", 0), numbers.get("LOCAL_WORLD_SIZE", 1 << 40))
    if sizes[0] >= sizes[1]:
        yield f"LOCAL_RANK {sizes[0]} is not below LOCAL_WORLD_SIZE {sizes[1]}"
    if numbers.get("RANK", 0) >= numbers.get("WORLD_SIZE", 1 << 40):
        yield f"RANK {numbers['RANK']} is not below WORLD_SIZE {numbers['WORLD_SIZE']}"
    if not 1 <= numbers.get("MASTER_PORT", 1) < 1 << 16:
        yield f"MASTER_PORT {numbers['MASTER_PORT']} is not a port from 1 to 65535"


def _check_alone(variables: Mapping[str, str]) -> None:
    for name, starter in _STARTERS.items():
        text = variables.get(name, "")
        if text.isdecimal() and int(text) > 1:
            raise TopologyError(
                f"{starter} started {text} processes ({name}) that do not know of each other; "
                "start one per node and torchrun inside it, or set RANK, WORLD_SIZE, LOCAL_RANK, "
                "MASTER_ADDR and MASTER_PORT for each"
            )


def seconds_in_environment(name: str, default: float) -> float:
    """Returns the seconds that the environment variable `name` gives, or `default`.

    Raises TopologyError unless they are a positive number.
    """
    text = os.environ.get(name, str(default))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise TopologyError(f"{name} is {text!r}; give a positive number of seconds")
    return seconds
