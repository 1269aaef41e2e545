"""Draws one set by independent processes that are killed or paused; prints what it saw as JSON.

Arguments: the experiment, the folder for the sets, a seed, and settings of every process. The
processes are forked from this one, which has imported everything and computed nothing.
"""

import json
import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch

from srepa_ds.commands.sample import sample
from srepa_ds.config.experiment import load_config

SECONDS = 100
CONFIG, ROOT = Path(sys.argv[1]), Path(sys.argv[2])
CHANCE, SETTINGS = random.Random(int(sys.argv[3])), sys.argv[4:]


def started(folder: Path) -> int:
    """Starts a process that draws into `folder`, and returns its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        sample(load_config(CONFIG, [*SETTINGS, f"sample.folder={folder}"]))
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    os._exit(code)


def code_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def is_stopped_with_a_claim(child: int, folder: Path) -> bool:
    """Stops a process; lets it go on if it holds no chunk that another would have to draw."""
    os.kill(child, signal.SIGSTOP)
    os.waitpid(child, os.WUNTRACED)
    claims = (folder / "parts").glob("*.claim")
    lacking = [path for path in claims if not path.with_suffix(".safetensors").exists()]
    if any(f'"pid": {child},' in path.read_text() for path in lacking):
        return True
    os.kill(child, signal.SIGCONT)
    return False


def wait_until(condition) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def parts_of(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "parts").glob("*.safetensors"))


def has_more_than(number: int, folder: Path) -> bool:
    return len(parts_of(folder)) > number or (folder / "samples.npz").exists()


def undisturbed() -> None:
    """Draws a set as one process does."""
    assert code_of(started(ROOT / "undisturbed")) == 0


def killed() -> dict:
    """Kills two processes again and again, at random moments; then two finish the set."""
    folder, kills = ROOT / "killed", 0
    for _ in range(3):
        number = len(parts_of(folder))
        children = [started(folder) for _ in range(2)]
        wait_until(partial(has_more_than, number, folder))
        for child in children:
            time.sleep(CHANCE.uniform(0, 0.2))
            os.kill(child, signal.SIGKILL)
            kills += code_of(child) == -signal.SIGKILL
    was_unfinished = not (folder / "samples.npz").exists()
    last = [started(folder) for _ in range(2)]
    codes = [code_of(child) for child in last]
    return {"kills": kills, "was_unfinished": was_unfinished, "codes": codes}


def paused() -> dict:
    """Pauses a process; another draws its chunk too and finishes, and the first one ends well."""
    folder = ROOT / "paused"
    first = started(folder)
    wait_until(lambda: parts_of(folder))
    wait_until(partial(is_stopped_with_a_claim, first, folder))
    code = code_of(started(folder))
    finished = (folder / "samples.npz").is_file()
    os.kill(first, signal.SIGCONT)
    return {"codes": [code, code_of(first)], "finished": finished}


torch.set_num_threads(1)
undisturbed()
print(json.dumps({"paused": paused(), "killed": killed()}))
