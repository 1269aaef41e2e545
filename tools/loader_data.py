"""Writes the same samples as our shards and as REPA's files, from photographs."""

import json
import os
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage import data as photographs

from srepa_ds.data.latent_file import write_latents
from srepa_ds.data.prepared_folder import PreparedFolder
from srepa_ds.data.shard_index import DatasetDescription, LatentDescription, LatentIndex
from srepa_ds.data.shard_writer import ShardWriter
from srepa_ds.data.shards import ShardDataset

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
NUM_CLASSES = 1000
REPA = "repa"


@cache
def photograph(name: str) -> np.ndarray:
    """Returns one of scikit-image's photographs."""
    return getattr(photographs, name)()


def pixels_of(number: int, size: int) -> np.ndarray:
    """Returns a part of a photograph; each number has its own."""
    image = Image.fromarray(photograph(PHOTOGRAPHS[number % len(PHOTOGRAPHS)]))
    if min(image.size) < size + 64:
        scale = (size + 64) / min(image.size)
        image = image.resize([round(scale * side) for side in image.size], Image.Resampling.BICUBIC)
    draw = np.random.default_rng(number)
    left, top = (int(draw.integers(side - size)) for side in image.size)
    return np.asarray(image)[top : top + size, left : left + size].copy()


def moments_of(number: int, size: int) -> np.ndarray:
    """Returns moments of the form of Stable Diffusion's VAE, float32."""
    draw = np.random.default_rng(number)
    return np.abs(draw.standard_normal((8, size // 8, size // 8), dtype=np.float32))


def write(folder: Path, *, size: int, samples: int, storages: list[str]) -> None:
    """Writes `folder`/repa and a folder for each of our storages."""
    torch.set_num_threads(1)
    _write_repa(folder / REPA, size, samples)
    for storage in storages:
        _write_shards(folder / storage, size, samples, storage)
    os.sync()


def _write_repa(folder: Path, size: int, samples: int) -> None:
    labels: dict[str, list[list[object]]] = {"images": [], "vae-sd": []}
    for number in range(samples):
        part, name = f"{number // 1000:05d}", f"{number:08d}"
        paths = {"images": f"{part}/img{name}.png", "vae-sd": f"{part}/img-mean-std-{name}.npy"}
        for kind, path in paths.items():
            (folder / kind / part).mkdir(parents=True, exist_ok=True)
            labels[kind].append([path, number % NUM_CLASSES])
        image = Image.fromarray(pixels_of(number, size))
        image.save(folder / "images" / paths["images"], compress_level=0, optimize=False)
        np.save(folder / "vae-sd" / paths["vae-sd"], moments_of(number, size))
    for kind, rows in labels.items():
        (folder / kind / "dataset.json").write_text(json.dumps({"labels": rows}))


def _write_shards(folder: Path, size: int, samples: int, storage: str) -> None:
    names = tuple(str(number) for number in range(NUM_CLASSES))
    described = DatasetDescription({"name": "benchmark"}, (3, size, size), names, pixels=storage)
    with ShardWriter(folder, description=described, samples_per_shard=500) as writer:
        for number in range(samples):
            writer.add(pixels_of(number, size), number % NUM_CLASSES)
    index, start, entries = ShardDataset(folder).index, 0, []
    shape = (4, size // 8, size // 8)
    latents = LatentDescription(
        codec={"kind": "benchmark"},
        values="moments",
        dtype="fp32",
        latent_shape=shape,
        mirrored=False,
    )
    for shard, entry in enumerate(index.shards):
        numbers = range(start, start + entry.num_samples)
        moments = torch.from_numpy(np.stack([moments_of(number, size) for number in numbers]))
        entries.append(
            write_latents(folder, shard, latents, moments, None, shard_sha256=entry.sha256)
        )
        start = numbers.stop
    whole = LatentIndex(**dict(latents), files=tuple(entries))
    prepared = PreparedFolder(folder, described)
    prepared.finish(prepared.index_of(index.shards, latents=whole))
