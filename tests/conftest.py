"""Fixtures for all tests."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import jaxtyping
import pytest
from builders import SmallWorld, write_world
from inception_weights import write_weights
from small_run import SmallRun, run_of

from srepa_ds.config.experiment import load_config


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """Undoes what a command line does to the logger, so that a test can listen to it.

    Before the test as well as after: a fixture of a module may have run a command.
    """
    _reset_logging()
    yield
    _reset_logging()


def _reset_logging() -> None:
    log = logging.getLogger("srepa_ds")
    log.handlers.clear()
    log.propagate = True
    log.setLevel(logging.NOTSET)


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """Turns off the run-time checks of shapes, as in production: Dynamo can trace the functions."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    """Returns the folder of a small experiment; tests that change it copy it first."""
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the random weights of Inception of which the golden features are; 95 MB."""
    return write_weights(tmp_path_factory.mktemp("inception") / "weights.pth")


@pytest.fixture(scope="session")
def small_run(
    small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., SmallRun]:
    """Returns a maker of runs, each in its own folder, which does not exist yet."""

    def make(*overrides: str, name: str = "run", beside: SmallRun | None = None) -> SmallRun:
        parent = tmp_path_factory.mktemp("runs") if beside is None else beside.folder.parent
        folder = f"run.folder={json.dumps(str(parent / name))}"
        return run_of(load_config(small_world.config, [folder, *overrides]))

    return make
