"""Measures time and memory of an evaluation on made-up images, without an encoder's own.

    python tools/bench_evaluate.py --images 50000 --reference 10000 --size 256 --folder /tmp

The extractor has Inception's three kinds of features, by random projections of small versions of
the images: what is kept and computed is as large as with Inception, which would need hours on a
CPU. Images and reference are written to the folder, and removed.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from srepa_ds.config.sections import EvaluateConfig
from srepa_ds.console import set_up_logging
from srepa_ds.distributed import ranks
from srepa_ds.encoders.extractors import ExtractorConfig
from srepa_ds.encoders.features import Features
from srepa_ds.evaluation.evaluator import Evaluator, Judge
from srepa_ds.evaluation.image_sets import open_images
from srepa_ds.evaluation.images import ImageBlock
from srepa_ds.evaluation.reference import open_reference
from srepa_ds.metrics.scores import METRICS

BLOCK = 500
"""Images that are made up at once."""


class Projections:
    """Features of Inception's widths, linear in the images' means over 8 x 8 fields."""

    width, spatial_width, num_classes = 2048, 2023, 1008

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        widths = (self.width, self.spatial_width, self.num_classes)
        self._matrices = [torch.randn(192, width, generator=generator) / 14 for width in widths]

    @property
    def identity(self) -> dict[str, Any]:
        """The name: there are no weights."""
        return {"name": "projections"}

    def features(self, images: Tensor) -> Features:
        """Returns the three kinds of features."""
        fields = adaptive_avg_pool2d(images.float() / 255, 8).flatten(1)
        pooled, spatial, logits = (fields @ matrix for matrix in self._matrices)
        return Features(pooled.clamp(min=0), logits, spatial.clamp(min=0))

    def to(self, device: torch.device | str) -> "Projections":
        """Moves the projections."""
        self._matrices = [matrix.to(device) for matrix in self._matrices]
        return self


def write_images(path: Path, count: int, size: int, *, seed: int) -> None:
    """Writes an archive as ADM's evaluator reads it, block by block."""
    generator = np.random.default_rng(seed)
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as file,
    ):
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)}
        np.lib.format.write_array_header_1_0(file, header)
        for first in range(0, count, BLOCK):
            shape = (min(BLOCK, count - first), 8, 8, 3)
            fields = generator.integers(0, 256, shape, dtype=np.uint8)
            side = -(-size // 8)
            images = fields.repeat(side, 1).repeat(side, 2)[:, :size, :size]
            file.write(np.ascontiguousarray(images).data)


def measured(folder: Path, batch_size: int, metrics: Sequence[str]) -> dict[str, Any]:
    """Returns seconds for images and reference, seconds in all, peak memory in GB, and scores."""
    set_up_logging(is_main=True)
    rank = ranks.initialize()
    settings = EvaluateConfig(
        reference=folder / "reference.npz",
        extractor=ExtractorConfig(name="inception"),
        batch_size=batch_size,
    )
    images = open_images(folder / "samples.npz", setting="samples")
    reference = open_reference(settings.reference, setting="reference")
    judge = Judge("inception", Projections(), tuple(metrics))
    evaluator = Evaluator(settings, [judge], reference, rank=rank)
    before, start = peak(), time.perf_counter()
    evaluator.see_reference()
    after_reference, of_reference = time.perf_counter(), peak()
    moments = []

    def timed() -> Iterator[ImageBlock]:
        for block in images.blocks(batch_size):
            moments.append((time.perf_counter(), peak()))
            yield block

    result = evaluator.measure(timed(), len(images))
    ended, (last, of_images) = time.perf_counter(), moments[-1]
    ranks.close()
    return {
        "seconds_for_reference": after_reference - start,
        "seconds_for_images": last - after_reference,
        "seconds_for_scores": ended - last,
        "images_per_second": len(images) / (last - after_reference),
        "gb_before": before,
        "gb_with_reference": of_reference,
        "gb_with_images": of_images,
        "gb_at_most": peak(),
        "scores": json.loads(result.scores.to_json()),
    }


def peak() -> float:
    """Returns the largest memory of this process so far in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options = (("images", 2000), ("reference", 1500), ("size", 64), ("batch", 256))
    for option, default in options:
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--metrics", nargs="+", default=list(METRICS), choices=METRICS)
    parser.add_argument("--folder", type=Path, help="for the images, by default the system's")
    parser.add_argument("--in-folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.in_folder:
        print(json.dumps(measured(given.in_folder, given.batch, given.metrics)))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        for seed, (kind, count) in enumerate(
            (("samples", given.images), ("reference", given.reference))
        ):
            write_images(folder / f"{kind}.npz", count, given.size, seed=seed)
        # In a process of its own, whose peak is that of the evaluation.
        command = [sys.executable, *sys.argv, "--in-folder", name]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    scores = ", ".join(f"{field} {value:.5f}" for field, value in found.pop("scores").items())
    print(f"{given.images} images of {given.size} px, {given.reference} real ones: {scores}")
    for field, value in found.items():
        print(f"{field.replace('_', ' '):24} {value:10.2f}")


if __name__ == "__main__":
    main()
