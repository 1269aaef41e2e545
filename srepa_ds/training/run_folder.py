"""A run's folder: who may train in it, what it resumes from, and what it says of itself."""

import json
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from srepa_ds.checkpoint.folder import newest_valid
from srepa_ds.config.experiment import Config
from srepa_ds.distributed import ranks
from srepa_ds.errors import ConfigError, Fault, OutputError
from srepa_ds.files import locked, make_folder, remove_empty, write_aside
from srepa_ds.schema import to_tree, to_yaml, validated
from srepa_ds.telemetry.environment import environment
from srepa_ds.trees import Tree

# Changing these in the middle of a run changes neither the model nor what it has learnt so far.
# What lies behind a path is compared by its hash instead, see `identity` below.
_SAFE_TO_CHANGE = (
    *("run.folder", "engine", "checkpoint", "export", "sample", "evaluate", "monitor"),
    *("data.folder", "data.num_workers", "data.prefetch_batches"),
    *("train.steps", "train.log_every_steps", "train.accumulation_steps"),
    *("model.attention", "optimizer.cpu_adam"),
    *("train.max_skipped_steps", "train.max_rollbacks", "train.init_from"),
)
_SAFE_ANYWHERE = (
    *(".teacher.weights", ".teacher.compile"),
    *(".structural.algorithm", ".structural.tile"),
)
# A network file system may believe for so long that what was not there a moment ago still is not.
_NEWS_SECONDS = 90.0
_POLL_SECONDS = 0.1


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Makes an OutputError of an OSError met in the block."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write to the run's folder {folder}: {error.strerror or error}; choose another "
            "run.folder or mend its permissions"
        ) from error


@contextmanager
def claimed(folder: Path, *, is_main: bool) -> Iterator[None]:
    """Keeps other trainings out of `folder` while the block runs, on the main rank.

    Makes the folder, and removes it if the block leaves it empty. Raises OutputError if another
    process trains there, or the folder cannot be written to.
    """
    with ExitStack() as stack:
        if is_main:
            with writing(folder):
                made = make_folder(folder)
                try:
                    stack.enter_context(locked(folder))
                except BlockingIOError as error:
                    raise OutputError(
                        f"another process is training in {folder}; wait for it or end it, or "
                        "choose another run.folder"
                    ) from error
            stack.callback(remove_empty, made)
        yield


def check_shared(folder: Path) -> None:
    """Returns if every rank sees in `folder` what the main rank writes there. Collective.

    Raises OutputError on all ranks, naming the first that does not.
    """
    name = f".seen-by-all-{uuid.uuid4().hex}"
    token = folder / ranks.broadcast(name)
    try:
        ranks.on_main(lambda: _leave(token))
        ranks.together(lambda: _find(token))
    finally:
        if ranks.rank() == 0:
            with suppress(OSError):
                token.unlink(missing_ok=True)


def _leave(token: Path) -> None:
    with writing(token.parent):
        token.touch()


def _find(token: Path) -> None:
    deadline = time.monotonic() + _NEWS_SECONDS
    while not token.exists():
        if time.monotonic() > deadline:
            raise OutputError(
                f"this rank does not see the run's folder {token.parent.absolute()} that the main "
                "rank writes to; choose a run.folder that all nodes share"
            )
        time.sleep(_POLL_SECONDS)


def checkpoint_to_resume(
    config: Config, identity: Mapping[str, Any], *, allow_change: bool
) -> Path | None:
    """Returns the newest valid checkpoint of the run, or None to begin anew.

    `identity` names what lies behind the configuration's paths; what an older checkpoint does not
    know of it is taken for the same. Raises CheckpointError if there
    are checkpoints and none is valid, and ConfigError if they are of another experiment.
    """
    source = newest_valid(config.checkpoints)
    if source is None or allow_change:
        return source
    state = json.loads((source / "state.json").read_text(encoding="utf-8"))
    stored = state.get("identity", {})
    faults = list(unsafe_changes(state["config"], config))
    faults += [
        Fault(key, f"other contents than before: their hash was {stored[key]}, is {value}")
        for key, value in identity.items()
        if stored.get(key, value) != value
    ]
    if faults:
        raise ConfigError(
            f"{config.run.folder} holds a run of another configuration; choose another "
            "run.folder, or pass --allow-config-change to go on",
            faults,
        )
    return source


def unsafe_changes(stored: Tree, config: Config) -> Iterator[Fault]:
    """Yields a fault per changed setting that would make a resumed run another experiment."""
    try:
        # Through today's schema, so that a setting added since then counts with its default.
        stored = to_tree(validated(Config, stored, source="the stored configuration"))
    except ConfigError:
        pass
    old, new = dict(leaves(stored)), dict(leaves(to_tree(config)))
    for key in {**old, **new}:
        if old.get(key) != new.get(key) and not _is_safe(key):
            yield Fault(key, f"was {old.get(key)!r}, is {new.get(key)!r}")


def _is_safe(key: str) -> bool:
    below = any(key == safe or key.startswith(safe + ".") for safe in _SAFE_TO_CHANGE)
    return below or key.endswith(_SAFE_ANYWHERE)


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields what a tree holds, in order, each below its `section.field` path from `path` on."""
    if isinstance(node, dict | list) and node:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in items:
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, node


def describe(config: Config, deepspeed: Mapping[str, Any]) -> None:
    """Writes the run's configuration, DeepSpeed's, and the environment; raises OutputError."""
    documents = {
        config.resolved: to_yaml(config),
        config.run.folder / "ds_config.json": json.dumps(deepspeed, indent=2),
        config.environment: json.dumps(environment(), indent=2),
    }
    with writing(config.run.folder):
        for path, text in documents.items():
            write_aside(path, lambda aside, text=text: aside.write_text(text, encoding="utf-8"))
