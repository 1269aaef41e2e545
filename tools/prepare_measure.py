"""Measures what `srepa-ds prepare` and REPA's preprocessing take for each image."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from srepa_ds.data.images import center_crop
from srepa_ds.data.pixels import PIXEL_ENCODERS, decode_into

_TOOLS = Path(__file__).parent
_PHOTOGRAPHS = 40


class Run(NamedTuple):
    """One way to prepare images."""

    pixels: str
    """A storage of `srepa-ds prepare`, or `REPA`."""
    ranks: int


REPA = Run("REPA", 1)


class Row(NamedTuple):
    """What one way takes for each image, the fastest of some rounds."""

    pixels: str
    ranks: int
    cpu_ms: float
    """Of all processes together."""
    wall_ms: float
    num_bytes: float
    """On disk."""


class Storage(NamedTuple):
    """What an image takes in one storage; decoding includes no reading."""

    name: str
    num_bytes: float
    encode_ms: float
    decode_ms: float


def measured(runs: Sequence[Run], trees: Sequence[Path], *, size: int, rounds: int) -> list[Row]:
    """Times each run on a small and a large tree, in turns; returns a row for each run."""
    counts = [sum(1 for _ in tree.rglob("*.JPEG")) for tree in trees]
    found: dict[Run, list[list[tuple[float, float, int]]]] = {run: [] for run in runs}
    for _ in range(rounds):
        for run in runs:
            found[run].append([_timed(run, tree, size) for tree in trees])
    more = counts[1] - counts[0]
    rows = []
    for run, pairs in found.items():
        # The small one takes what starting takes, and the fastest of each is the least disturbed.
        cpu, wall = (
            min(pair[1][kind] for pair in pairs) - min(pair[0][kind] for pair in pairs)
            for kind in (0, 1)
        )
        rows.append(Row(*run, 1e3 * cpu / more, 1e3 * wall / more, pairs[0][1][2] / counts[1]))
    return rows


def _timed(run: Run, tree: Path, size: int) -> tuple[float, float, int]:
    """Returns seconds of the processors, seconds, and bytes written."""
    output = tree.parent / "out"
    command = [str(_TOOLS / "repa_preprocessing.py"), str(tree), str(output), str(size)]
    if run != REPA:
        config = {"kind": "prepare", "source": {"kind": "image_folder", "path": str(tree)}}
        # As many pieces as ranks that share them.
        images = -(-sum(1 for _ in tree.rglob("*.JPEG")) // max(run.ranks, 1))
        config |= {"image_size": size, "output": str(output), "pixels": run.pixels}
        config |= {"samples_per_shard": images, "threads": 1}
        path = tree.parent / "config.yaml"
        path.write_text(json.dumps(config))
        command = ["-m", "srepa_ds", "prepare", str(path), "--ranks", str(run.ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_TOOLS.parent)}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, *command], check=True, env=environment, stderr=subprocess.DEVNULL
    )
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    files = [path for path in output.rglob("*") if path.suffix in (".safetensors", ".png")]
    written = sum(path.stat().st_size for path in files if path.name != "preview.png")
    shutil.rmtree(output)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return cpu, seconds, written


def storages(tree: Path, *, size: int) -> list[Storage]:
    """Returns what crops of the photographs in `tree` take in each storage."""
    paths = sorted(tree.rglob("*.JPEG"))[:_PHOTOGRAPHS]
    crops = [center_crop(Image.open(path), size) for path in paths]
    raw = sum(crop.nbytes for crop in crops) / len(crops)
    rows = [Storage("raw", raw, 0.0, 0.0)]
    for name, encode in PIXEL_ENCODERS.items():
        blobs, encoding = _each(encode, crops)
        contents = [torch.frombuffer(bytearray(blob), dtype=torch.uint8) for blob in blobs]
        _, decoding = _each(partial(_decode, name, size), contents)
        rows.append(Storage(name, sum(map(len, blobs)) / len(blobs), encoding, decoding))
    return rows


def _decode(form: str, size: int, contents: torch.Tensor) -> None:
    decode_into(torch.empty((3, size, size), dtype=torch.uint8), contents, form)


def _each(action: Callable, items: Sequence) -> tuple[list, float]:
    """Returns what `action` makes of each item, and its milliseconds of the processor for one."""
    action(items[0])
    began = time.process_time()
    results = [action(item) for item in items]
    return results, 1e3 * (time.process_time() - began) / len(items)
