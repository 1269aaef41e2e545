"""Small data sets in the formats of others, written as their tools write them."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

SIZE = 16


def picture(number: int, size: int = SIZE) -> np.ndarray:
    """Returns a smooth image of random colours, the same for the same number."""
    generator = torch.Generator().manual_seed(number)
    coarse = torch.rand(1, 3, 4, 4, generator=generator) * 255
    image = nn.functional.interpolate(coarse, size=size, mode="bilinear")
    return image[0].permute(1, 2, 0).byte().contiguous().numpy()


def png(number: int, size: int = SIZE) -> bytes:
    contents = io.BytesIO()
    Image.fromarray(picture(number, size)).save(contents, format="PNG", compress_level=0)
    return contents.getvalue()


def write_parquet(
    path: Path,
    numbers: Sequence[int],
    *,
    labels: Sequence[int | None] | None = None,
    class_names: Sequence[str] | None = None,
    row_group_size: int = 4,
    columns: Callable[[dict[str, Any]], dict[str, Any]] = lambda columns: columns,
) -> Path:
    """Writes a file as `datasets` does: the names of the classes are in the schema's metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    images = [{"bytes": png(number), "path": f"{number}.png"} for number in numbers]
    label = [number % 3 for number in numbers] if labels is None else labels
    table = pa.table(
        columns({"image": pa.array(images, kind), "label": pa.array(label, pa.int64())})
    )
    if class_names is not None:
        features = {"label": {"names": list(class_names), "_type": "ClassLabel"}}
        features |= {"image": {"_type": "Image"}}
        document = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": document})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def write_repa(
    root: Path,
    count: int,
    moments: Callable[[np.ndarray], np.ndarray] | None = None,
    *,
    images: bool = True,
    size: int = SIZE,
) -> Path:
    """Writes a folder as REPA's preparation does; `moments` of an image are random by default."""
    labels = []
    for number in range(count):
        # REPA has 1000 images in a folder; five show as well that folders are sorted.
        index = number if number < 5 else 995 + number
        name, folder = f"{index:08d}", f"{index:08d}"[:5]
        pixels = picture(number, size)
        if images:
            _save(root / "images" / folder / f"img{name}.png", png(number, size))
        found = _random_moments(number) if moments is None else moments(pixels)
        array = io.BytesIO()
        np.save(array, found)
        feature = f"{folder}/img-mean-std-{name}.npy"
        _save(root / "vae-sd" / feature, array.getvalue())
        labels.append([feature, number % 3])
    if images:
        _save(root / "images" / "dataset.json", b'{"labels": null}')
    _save(root / "vae-sd" / "dataset.json", json.dumps({"labels": labels}).encode())
    return root


def _random_moments(number: int) -> np.ndarray:
    generator = np.random.default_rng(number)
    mean = generator.standard_normal((4, 4, 4), dtype=np.float32)
    std = np.exp(generator.standard_normal((4, 4, 4), dtype=np.float32) - 2)
    return np.concatenate((mean, std))


def _save(path: Path, contents: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents)


def write_lightningdit(
    folder: Path, *, counts: Sequence[int] = (3, 2, 3), shape=(32, 2, 2), stats: bool = True
) -> Path:
    """Writes latents as `extract_features.py` does, of two ranks; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ["rank00_shard000", "rank00_shard001", "rank01_shard000"]
    for number, (name, count) in enumerate(zip(names, counts, strict=True)):
        generator = torch.Generator().manual_seed(number)
        latents, mirrored = torch.randn(2, count, *shape, generator=generator)
        tensors = {"latents": 3 * latents + 1, "latents_flip": 3 * mirrored + 1}
        tensors["labels"] = torch.arange(count) + number
        metadata = {"total_size": str(count), "dtype": "torch.float32", "device": "cpu"}
        save_file(tensors, folder / f"latents_{name}.safetensors", metadata=metadata)
    if stats:
        mean = torch.linspace(-1, 1, shape[0]).view(1, -1, 1, 1)
        torch.save({"mean": mean, "std": mean.exp()}, folder / "latents_stats.pt")
    return folder
