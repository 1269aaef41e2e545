"""Three thousand images of every form, forty of them broken, through `srepa-ds prepare`."""

import io
import json

import numpy as np
import pytest
import torch
import yaml
from messy_images import write_messy_tree
from PIL import Image

from srepa_ds.cli import run
from srepa_ds.data.images import center_crop
from srepa_ds.data.shards import ShardDataset

SIZE = 16


@pytest.mark.slow
def test_sound_images_are_there_and_broken_ones_listed(tmp_path):
    tree = write_messy_tree(tmp_path / "messy")
    settings = {
        "kind": "prepare",
        "source": {"kind": "image_folder", "path": str(tree.root)},
        "image_size": SIZE,
        "output": str(tmp_path / "data"),
        "pixels": "webp",
        "samples_per_shard": 700,
        "on_error": "skip",
    }
    (tmp_path / "prepare.yaml").write_text(yaml.safe_dump(settings))
    assert run(["prepare", str(tmp_path / "prepare.yaml")]) == 0
    folder = tmp_path / "data" / "train"
    lines = (folder / "skipped.jsonl").read_text().splitlines()
    assert {json.loads(line)["key"] for line in lines} == tree.broken.keys()
    dataset = ShardDataset(folder)
    everything = torch.arange(len(dataset))
    keys = dataset.keys(everything)
    assert dict(zip(keys, dataset.labels.tolist(), strict=True)) == tree.sound
    assert dataset.index.class_ids == tree.class_ids
    batch, compared = dataset.read(everything), 0
    for key, pixels in zip(keys, batch.images, strict=True):
        # Those that Pillow opens by itself as it is.
        if key.lower().endswith((".jpeg", ".png", ".bmp")):
            with Image.open(io.BytesIO((tree.root / key).read_bytes())) as image:
                expected = center_crop(image, SIZE)
            assert np.array_equal(pixels.permute(1, 2, 0).numpy(), expected), key
            compared += 1
    assert compared > 500
