"""`srepa-ds demo`: the whole pipeline on handwritten digits, each step an ordinary command."""

import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from srepa_ds.distributed.launcher import start_child
from srepa_ds.distributed.signals import handled
from srepa_ds.errors import ConfigError, Fault, nearest
from srepa_ds.files import shipped, write_aside
from srepa_ds.run_folder import RunFolder
from srepa_ds.trees import read_json

MODES = (
    *("sit", "repa", "srepa-mse", "srepa-kl"),
    *("irepa", "irepa-srepa-mse", "reg", "reg-srepa-mse"),
)


def run_demo(
    *, mode: str, steps: int | None, ranks: int, seed: int, images: int | None = None
) -> int:
    """Runs all steps and returns 0, or the exit code of the first one that fails.

    Prints each command line before running it. The same demo run again continues where it stopped,
    since finished steps find their work done. Raises ConfigError for an unknown mode.
    """
    if mode not in MODES:
        raise ConfigError("demo", [Fault("--mode", f"unknown '{mode}'; {nearest(mode, MODES)}")])
    run = RunFolder(Path("runs") / (f"digits-{mode}" + (f"-seed{seed}" if seed else "")))
    changes = [f"run.folder={run.path}"]
    changes += [f"train.steps={steps}"] if steps is not None else []
    changes += [f"run.seed={seed}", f"sample.seed={seed}"] if seed else []
    changes += [f"sample.num_samples={images}"] if images is not None else []
    spent = _read_timings(run.timings)
    timings: dict[str, float] = {}
    for arguments in commands(mode, changes, ranks=ranks):
        name = arguments[0]
        print(f"\n$ {shlex.join(['srepa-ds', *arguments])}", flush=True)
        step_began = time.perf_counter()
        code = _run(arguments)
        timings[name] = timings.get(name, 0) + time.perf_counter() - step_began
        _write_timings(
            run.timings, {n: spent.get(n, 0) + timings.get(n, 0) for n in {**spent, **timings}}
        )
        if code != 0:
            print(f"\n{name} ended with code {code}; the same demo command continues from here")
            return code
    print("\n" + "  ".join(f"{name} {seconds:.0f} s" for name, seconds in timings.items()))
    print(f"total {sum(timings.values()):.0f} s; open {run.report}")
    return 0


def commands(mode: str, changes: Sequence[str], *, ranks: int) -> list[list[str]]:
    """Returns the command lines of the demo, without the program's name.

    Every command of the experiment gets the overrides `changes`.
    """
    experiment = str(shipped(Path(f"configs/digits-{mode}.yaml")))
    on_ranks = ["--ranks", str(ranks)]
    # All modes are judged by the same teacher; REG learns from one that has a class token.
    teachers = ("teacher", "teacher-cls") if mode.startswith("reg") else ("teacher",)
    return [
        ["prepare", str(shipped(Path("configs/digits-prepare.yaml")))],
        *(["teacher", str(shipped(Path(f"configs/digits-{name}.yaml")))] for name in teachers),
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
        return read_json(path)
    except (OSError, ValueError):
        return {}


def _write_timings(path: Path, timings: dict[str, float]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(timings, indent=2) + "\n"
    write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))
