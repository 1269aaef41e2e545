"""`srepa-ds demo`: the whole road on handwritten digits, each step an ordinary command."""

import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from srepa_ds.distributed.launcher import STOP_SIGNALS, start_child
from srepa_ds.errors import ConfigError, Fault, nearest
from srepa_ds.files import shipped, write_aside

MODES = (
    *("sit", "repa", "srepa-mse", "srepa-kl"),
    *("irepa", "irepa-srepa-mse", "reg", "reg-srepa-mse"),
)
TIMINGS = "timings.json"


def run_demo(
    *, mode: str, steps: int | None, ranks: int, seed: int, images: int | None = None
) -> int:
    """Returns 0 after every step went well, else the exit code of the step that did not.

    Prints each command line before it runs it. Running the demo again goes on where it stopped:
    finished steps find their work done. Raises ConfigError for an unknown mode.
    """
    if mode not in MODES:
        raise ConfigError("demo", [Fault("--mode", f"unknown '{mode}'; {nearest(mode, MODES)}")])
    folder = Path("runs") / (f"digits-{mode}" + (f"-seed{seed}" if seed else ""))
    changes = [f"run.folder={folder}"]
    changes += [f"train.steps={steps}"] if steps is not None else []
    changes += [f"run.seed={seed}", f"sample.seed={seed}"] if seed else []
    changes += [f"sample.num_samples={images}"] if images is not None else []
    spent = _read_timings(folder)
    timings: dict[str, float] = {}
    for arguments in commands(mode, changes, ranks=ranks):
        name = arguments[0]
        print(f"\n$ {shlex.join(['srepa-ds', *arguments])}", flush=True)
        step_began = time.perf_counter()
        code = _run(arguments)
        timings[name] = timings.get(name, 0) + time.perf_counter() - step_began
        _write_timings(
            folder, {n: spent.get(n, 0) + timings.get(n, 0) for n in {**spent, **timings}}
        )
        if code != 0:
            print(f"\n{name} ended with code {code}; the same demo command goes on from here")
            return code
    print("\n" + "  ".join(f"{name} {seconds:.0f} s" for name, seconds in timings.items()))
    print(f"all of it {sum(timings.values()):.0f} s; look at {folder / 'report.html'}")
    return 0


def commands(mode: str, changes: Sequence[str], *, ranks: int) -> list[list[str]]:
    """Returns the command lines of the demo, without the program's name.

    `changes` are the overrides that every command of the experiment gets.
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
    """Runs one command; stop signals are passed on once, and waited for."""
    command = [sys.executable, "-m", "srepa_ds", *arguments]
    child = start_child(command, {**os.environ, "PYTHONUNBUFFERED": "1"})

    def forward(number: int, _frame: FrameType | None) -> None:
        if child.poll() is None:
            child.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in STOP_SIGNALS}
    try:
        code = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 128 - code if code < 0 else code


def _read_timings(folder: Path) -> dict[str, float]:
    """Returns the seconds each step has taken so far, over all times the demo was run here."""
    try:
        return json.loads((folder / TIMINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _write_timings(folder: Path, timings: dict[str, float]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(timings, indent=2) + "\n"
    write_aside(folder / TIMINGS, lambda aside: aside.write_text(text, encoding="utf-8"))
