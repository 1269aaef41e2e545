"""Measures exports of a training checkpoint of random weights that 8 ranks wrote, and imports.

    python tools/bench_export.py /tmp/bench --variant SiT-XL/2

For each format: seconds, and the largest resident memory without and with the files mapped into it.
SiT-XL/2 needs 40 GB of disk. The folder is made, and removed.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import torch

from srepa_ds.alignment.alignment import TeacherShape
from srepa_ds.checkpoint.folder import FORMAT, STATE, VERSION, step_folder
from srepa_ds.checkpoint.manifest import entry_of, write_manifest
from srepa_ds.config.experiment import Config, load_config
from srepa_ds.documents.safetensors_writer import TensorEntry, write_safetensors
from srepa_ds.objective import Objective
from srepa_ds.schema import to_tree

CONFIG = Path("configs/imagenet256/sit-xl2-srepa-mse.yaml")
RANKS, STEP = 8, 400_000
KINDS = ("master", "ema", "exp_avg", "exp_avg_sq")


def write_checkpoint(config: Config) -> int:
    """Writes each rank's share of every weight, as ZeRO 3 does, and returns the number of bytes."""
    width = config.alignments[0].teacher.resolved.width
    with torch.device("meta"):
        teachers = (TeacherShape(width, config.model.grid),)
        objective = Objective(config.model, config.objective, config.alignments, teachers=teachers)
    shapes = {name: tuple(weight.shape) for name, weight in objective.named_parameters()}
    folder = step_folder(config.run_folder.checkpoints, STEP)
    folder.mkdir(parents=True)
    for rank in range(RANKS):
        pieces = {}
        for kind, (name, shape) in product(KINDS, shapes.items()):
            share = -(-math.prod(shape) // RANKS)
            numel = min(share, math.prod(shape) - rank * share)
            pieces[f"{kind}/{name}@{rank * share}"] = numel
        entries = [TensorEntry(key, torch.float32, (n,)) for key, n in pieces.items() if n > 0]
        path = folder / f"fragments-{rank:05d}.safetensors"
        write_safetensors(path, entries, lambda key, pieces=pieces: torch.randn(pieces[key]), {})
    state = {"step": STEP, "adam_step": STEP, "samples_seen": 256 * STEP, "shapes": shapes}
    (folder / STATE).write_text(json.dumps({**state, "config": to_tree(config), "identity": {}}))
    files = {path.name: entry_of(path) for path in folder.iterdir()}
    write_manifest(folder, files, format=FORMAT, version=VERSION)
    return sum(entry["bytes"] for entry in files.values())


def measure(command: list[str]) -> str:
    """Runs the command line of srepa_ds, and returns its time and its largest memory."""
    start, most = time.perf_counter(), {"RssAnon": 0, "VmHWM": 0}
    with subprocess.Popen([sys.executable, "-m", "srepa_ds", *command]) as process:
        while process.poll() is None:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            found = dict(line.split(":", 1) for line in lines)
            for name in most:
                # Absent from a process that has just ended.
                most[name] = max(most[name], int(found.get(name, "0 kB").split()[0]) >> 10)
            time.sleep(0.01)
    if process.returncode:
        return "failed"
    seconds = time.perf_counter() - start
    return f"{seconds:6.1f} s, RssAnon {most['RssAnon']:,} MiB, VmHWM {most['VmHWM']:,} MiB"


def main() -> None:
    """Writes the checkpoint, exports it in each format, imports what was made, and prints all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--variant", default="SiT-XL/2")
    parser.add_argument("--formats", nargs="*", default=["srepa_ds", "repa", "diffusers"])
    given = parser.parse_args()
    changes = [f"run.folder={given.folder}/run", f"model.variant={given.variant}"]
    # A block that every variant has.
    changes += ["alignments.0.depth=4"]
    given.folder.mkdir(parents=True)
    try:
        size = write_checkpoint(load_config(CONFIG, changes))
        print(f"{given.variant}: a checkpoint of {size / 1e9:.2f} GB of {RANKS} ranks")
        for name in given.formats:
            command = ["export", str(CONFIG), *changes, f"export.format={name}"]
            print(f"export {name}: {measure(command)}", flush=True)
        shutil.rmtree(given.folder / "run" / "checkpoints")
        for name in ("export/model.safetensors", "export-repa/0400000.pt", "export-diffusers"):
            source, made = given.folder / "run" / name, given.folder / "imported"
            if source.exists():
                print(f"import {name}: {measure(['import', str(source), str(made)])}", flush=True)
                shutil.rmtree(made, ignore_errors=True)
    finally:
        shutil.rmtree(given.folder)


if __name__ == "__main__":
    main()
