"""`srepa-ds demo`: the whole pipeline on handwritten digits, or on a person's own images.

Each step is an ordinary command.
"""

import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from srepa_ds.config.own_images import FEWEST_IMAGES, OwnImages
from srepa_ds.distributed.launcher import start_child
from srepa_ds.distributed.signals import handled
from srepa_ds.documents.json_reader import read_json
from srepa_ds.errors import ConfigError, Fault, OutputError, SRepaError, nearest
from srepa_ds.files import make_folder, remove_empty, shipped, write_aside, writing
from srepa_ds.run_folder import RunFolder
from srepa_ds.schema import load_section

if TYPE_CHECKING:
    from srepa_ds.config.experiment import Config

MODES = (
    *("sit", "repa", "srepa-mse", "srepa-kl"),
    *("irepa", "irepa-srepa-mse", "reg", "reg-srepa-mse"),
)


@dataclass(frozen=True)
class Road:
    """The configurations of the demo's steps."""

    prepare: Path
    teachers: tuple[Path, ...]
    """Of the teachers to train; none if the teacher has published weights."""
    experiment: Path


CONFIGS = "configs"
"""The folder in a run's folder for the configurations of a demo on own images."""


def run_demo(
    *,
    mode: str,
    steps: int | None,
    ranks: int,
    seed: int,
    images: int | None = None,
    own: OwnImages | None = None,
) -> int:
    """Runs all steps and returns 0, or the exit code of the first one that fails.

    On handwritten digits, or on `own` images; then the configurations are written to the run's
    folder first. Prints each command line before running it. The same demo run again continues
    where it stopped, since finished steps find their work done. Raises SRepaError, before the first
    step, for what would make a later one refuse.
    """
    if mode not in MODES:
        raise ConfigError("demo", [Fault("--mode", f"unknown '{mode}'; {nearest(mode, MODES)}")])
    name = own.run_name if own else "digits"
    run = RunFolder(Path("runs") / (f"{name}-{mode}" + (f"-seed{seed}" if seed else "")))
    changes = [f"run.folder={run.path}"]
    changes += [f"train.steps={steps}"] if steps is not None else []
    changes += [f"run.seed={seed}", f"sample.seed={seed}"] if seed else []
    changes += [f"sample.num_samples={images}"] if images is not None else []
    with ExitStack() as undone:
        if own:
            road = _written(own, mode, run.path / CONFIGS, undone)
        else:
            road = shipped_road(mode)
        check(road, changes, ranks=ranks, needs_digits=own is None)
        undone.pop_all()
    spent = _read_timings(run.timings)
    timings: dict[str, float] = {}
    for arguments in commands(road, changes, ranks=ranks):
        name = arguments[0]
        print(f"\n$ {shlex.join(['srepa-ds', *arguments])}", flush=True)
        step_began = time.perf_counter()
        code = _run(arguments)
        timings[name] = timings.get(name, 0) + time.perf_counter() - step_began
        _write_timings(
            run.timings, {n: spent.get(n, 0) + timings.get(n, 0) for n in {**spent, **timings}}
        )
        if code != 0:
            print(f"\n{name} ended with code {code}; {_what_next(code)}")
            return code
    print("\n" + "  ".join(f"{name} {seconds:.0f} s" for name, seconds in timings.items()))
    print(f"total {sum(timings.values()):.0f} s; open {run.report}")
    return 0


def _what_next(code: int) -> str:
    if code == SRepaError.exit_code:
        return "correct what its message names, then run the same demo command again"
    return "the same demo command continues from here"


def check(road: Road, changes: Sequence[str], *, ranks: int, needs_digits: bool = True) -> None:
    """Checks everything that can be known before the first step.

    Raises ConfigError with all faults, OutputError or DataError for what the machine lacks.
    """
    from srepa_ds.commands.teacher import TeacherTrainingConfig
    from srepa_ds.config.experiment import load_config
    from srepa_ds.distributed.devices import local_device
    from srepa_ds.preparation.config import PrepareConfig

    faults: list[Fault] = []
    outputs: list[Path] = []
    for name, path, *_ in commands(road, changes, ranks=ranks):
        if name == "prepare":
            outputs.append(load_section(PrepareConfig, Path(path)).output)
        elif name == "teacher":
            outputs.append(load_section(TeacherTrainingConfig, Path(path)).output)
        elif name == "train":
            try:
                config = load_config(Path(path), changes)
            except ConfigError as error:
                given = error.faults
                faults += [Fault(_OPTIONS.get(one.path, one.path), one.message) for one in given]
                # The folder's name holds the seed, whatever that is.
                wrong = {one.path for one in given} | {"run.folder"}
                sound = [one for one in changes if one.partition("=")[0] not in wrong]
                config = load_config(Path(path), sound)
            outputs.append(config.run.folder)
            faults += _faults_of_numbers(config, ranks)
    if ranks < 1:
        faults.append(Fault("--ranks", f"must be at least 1 (given: {ranks})"))
    if faults:
        raise ConfigError("demo", dict.fromkeys(faults))
    local_device(ranks - 1)
    _check_packages(needs_digits=needs_digits)
    for folder in outputs:
        _check_writable(folder)


_OPTIONS = {
    "train.steps": "--steps",
    "run.seed": "--seed",
    "sample.seed": "--seed",
    "sample.num_samples": "--images",
}
"""The option that gives a setting."""


def _faults_of_numbers(config: "Config", ranks: int) -> Iterator[Fault]:
    """Yields a fault for each number that fits the settings but not the pipeline."""
    images, batch = config.sample.num_samples, config.train.batch_size
    if images < FEWEST_IMAGES:
        message = f"must be at least {FEWEST_IMAGES}, to be scored (given: {images})"
        yield Fault("--images", message)
    parts = ranks * config.train.accumulation_steps
    if ranks >= 1 and batch % parts:
        yield Fault("--ranks", f"cannot share batches of {batch} images (given: {ranks})")
    if ranks > images:
        yield Fault("--ranks", f"must be at most the number of images, {images} (given: {ranks})")


def _check_packages(*, needs_digits: bool) -> None:
    """Raises SRepaError if a package is missing that only a late step imports."""
    needed = {"matplotlib": "matplotlib"}
    needed |= {"sklearn": "scikit-learn"} if needs_digits else {}
    missing = [name for module, name in needed.items() if find_spec(module) is None]
    if missing:
        raise SRepaError(
            f"the demo needs {' and '.join(missing)}; install the extra: "
            "pip install 'srepa_ds[demo]'"
        )


def _check_writable(folder: Path) -> None:
    """Raises OutputError if `folder` can be neither made nor written to; writes nothing."""
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        reason = "is not a folder" if not existing.is_dir() else "cannot be written to"
        raise OutputError(
            f"the demo writes to {folder}, but {existing.absolute()} {reason}; run it in another "
            "folder"
        )


def shipped_road(mode: str) -> Road:
    """Returns the configurations of the demo on handwritten digits."""
    # All modes are judged by the same teacher; REG learns from one that has a class token.
    teachers = ("teacher", "teacher-cls") if mode.startswith("reg") else ("teacher",)
    return Road(
        shipped(Path("configs/digits-prepare.yaml")),
        tuple(shipped(Path(f"configs/digits-{name}.yaml")) for name in teachers),
        shipped(Path(f"configs/digits-{mode}.yaml")),
    )


def _written(own: OwnImages, mode: str, folder: Path, undone: ExitStack) -> Road:
    """Writes the configurations of the demo on own images; leaving `undone` removes new ones.

    Raises OutputError.
    """
    places = {}
    for name, tree in own.trees(mode).items():
        places[name] = path = folder / f"{name}.yaml"
        text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
        with writing(path, cure="run the demo in another folder"):
            undone.callback(remove_empty, make_folder(folder))
            if not path.exists():
                undone.callback(path.unlink)
            write_aside(path, lambda aside, text=text: aside.write_text(text, encoding="utf-8"))
    teachers = (places["teacher"],) if "teacher" in places else ()
    return Road(places["prepare"], teachers, places["experiment"])


def commands(road: Road, changes: Sequence[str], *, ranks: int) -> list[list[str]]:
    """Returns the command lines of the demo, without the program's name.

    Every command of the experiment gets the overrides `changes`.
    """
    experiment, on_ranks = str(road.experiment), ["--ranks", str(ranks)]
    return [
        ["prepare", str(road.prepare)],
        *(["teacher", str(path)] for path in road.teachers),
        ["train", experiment, *changes, *on_ranks],
        ["export", experiment, *changes],
        ["sample", experiment, *changes, *on_ranks],
        ["evaluate", experiment, *changes],
        ["report", experiment, *changes],
    ]


def _run(arguments: Sequence[str]) -> int:
    """Runs one command and returns its exit code; passes stop signals on, then waits for it."""
    command = [sys.executable, "-m", "srepa_ds", *arguments]
    child = start_child(command, {**os.environ, "PYTHONUNBUFFERED": "1"})

    def forward(number: int) -> None:
        if child.poll() is None:
            child.send_signal(number)

    with handled(forward):
        code = child.wait()
    return 128 - code if code < 0 else code


def _read_timings(path: Path) -> dict[str, float]:
    """Returns the seconds each step has taken so far, summed over earlier runs of the demo."""
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return {}
    seconds = found.items() if isinstance(found, dict) else ()
    return {name: float(s) for name, s in seconds if isinstance(s, int | float)}


def _write_timings(path: Path, timings: dict[str, float]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(timings, indent=2) + "\n"
    write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))
