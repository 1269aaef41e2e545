"""Finds the checkpoint that a run resumes from, and checks that it is of the same experiment."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from srepa_ds.checkpoint.folder import newest_valid
from srepa_ds.checkpoint.reader import read_state
from srepa_ds.config.experiment import Config
from srepa_ds.distributed import ranks
from srepa_ds.errors import ConfigError, Fault
from srepa_ds.schema import may_change, to_tree, validated
from srepa_ds.trees import Tree, differences


@ranks.main_rank_only
def checkpoint_to_resume(
    config: Config, identity: Mapping[str, Any], *, allow_change: bool
) -> Path | None:
    """Returns the newest valid checkpoint of the run, or None for a new run. Collective.

    `identity` has hashes of the files behind the configuration's paths; those that an older
    checkpoint does not have are taken to be equal. Raises CheckpointError if there are checkpoints
    but none is valid, and ConfigError if they are of another experiment, unless `allow_change`.
    """
    source = newest_valid(config.run_folder.checkpoints)
    if source is None or allow_change:
        return source
    state = read_state(source, needed=("config",))
    stored = state.get("identity", {})
    faults = list(unsafe_changes(state["config"], config))
    faults += [
        Fault(key, f"the contents have changed: their hash was {stored[key]}, is {value}")
        for key, value in identity.items()
        if stored.get(key, value) != value
    ]
    if faults:
        raise ConfigError(
            f"{config.run.folder} holds a run of another configuration; choose another "
            "run.folder, or pass --allow-config-change to continue",
            faults,
        )
    return source


def unsafe_changes(stored: Tree, config: Config) -> Iterator[Fault]:
    """Yields a fault per changed setting that would make a resumed run another experiment."""
    try:
        # Through the current schema, so that a setting added since then has its default.
        stored = to_tree(validated(Config, stored, source="the stored configuration"))
    except ConfigError:
        pass
    for path, old, new in differences(stored, to_tree(config)):
        if not may_change(Config, path):
            yield Fault(path, f"was {old!r}, is {new!r}")
