"""The latents of one shard in a safetensors file beside it.

`moments` are (n, 2 c, h, w): the mean of the posterior and its standard deviation, neither scaled
nor shifted; where only draws from it are known, (n, c, h, w). `moments_mirrored` are those of the
images mirrored left to right.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from srepa_ds.data.contents import IndexedFile
from srepa_ds.data.headers import Form, Header, Kind, check_header, metadata_of, read_header
from srepa_ds.data.shard_index import CURE, LatentDescription, LatentFileEntry, LatentIndex, again
from srepa_ds.data.stored_files import StoredFile
from srepa_ds.errors import DataError
from srepa_ds.files import sha256_of, write_aside, writing
from srepa_ds.schema import to_tree

LATENT_FORMAT = "srepa-ds latents"
_LATENT_VERSION = 1
_DTYPES = {"fp16": "F16", "fp32": "F32"}
_TORCH_DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


def latent_name(number: int) -> str:
    """Returns the name of the file with the latents of shard `number`."""
    return f"latents-{number:05d}.safetensors"


def latent_facts(
    description: LatentDescription, *, num_samples: int, shard_sha256: str
) -> dict[str, Any]:
    """Returns the facts in the header of a file of latents."""
    described = to_tree(description)
    return {
        "format": LATENT_FORMAT,
        "version": _LATENT_VERSION,
        "num_samples": num_samples,
        "shard_sha256": shard_sha256,
        **{name: described[name] for name in ("codec", "values", "latent_shape", "scale", "shift")},
    }


def latent_forms(description: LatentDescription, num_samples: int) -> dict[str, Form]:
    """Returns the tensors in a file of latents."""
    names = ["moments", *(["moments_mirrored"] if description.mirrored else [])]
    form = (_DTYPES[description.dtype], (num_samples, *description.stored_shape))
    return dict.fromkeys(names, form)


def check_latents(
    folder: Path, index: LatentIndex, entry: LatentFileEntry, *, num_samples: int
) -> StoredFile:
    """Returns one file of latents, whose header and size fit the index; raises DataError."""
    path, kind = folder / entry.file, Kind("file of latents", again(folder))
    found = read_header(path, kind, expected_bytes=entry.bytes)
    facts = latent_facts(index, num_samples=num_samples, shard_sha256=entry.shard_sha256)
    expected = Header(facts, latent_forms(index, num_samples), entry.bytes)
    check_header(path, kind, found.header, expected)
    return found.file


def indexed_latents(folder: Path, index: LatentIndex | None) -> tuple[IndexedFile, ...]:
    """Returns the hash that the index of a data set gives for each file of latents."""
    cure, entries = again(folder), index.files if index else ()
    return tuple(IndexedFile(folder / e.file, e.bytes, e.sha256, cure) for e in entries)


def write_latents(
    folder: Path,
    number: int,
    described: LatentDescription,
    moments: Tensor,
    mirrored: Tensor | None,
    *,
    shard_sha256: str,
    concurrent: bool = False,
) -> LatentFileEntry:
    """Writes the latents of shard `number` and returns their entry in the index.

    With `concurrent`, several processes may write the same file at once. Raises OutputError;
    DataError for values that are not finite in the stored precision.
    """
    path, dtype = folder / latent_name(number), _TORCH_DTYPES[described.dtype]
    tensors = {"moments": moments.to(dtype).contiguous()}
    if mirrored is not None:
        tensors["moments_mirrored"] = mirrored.to(dtype).contiguous()
    for values in tensors.values():
        bad = (~values.isfinite().flatten(1).all(1)).nonzero()[:, 0].tolist()
        if bad:
            raise DataError(
                f"{path}: the latents of image {bad[0]} of this shard are not finite in "
                f"{described.dtype}; set latents.dtype=fp32, or look at the image"
            )
    facts = latent_facts(described, num_samples=len(moments), shard_sha256=shard_sha256)
    with writing(path, cure=CURE):
        write_aside(
            path,
            lambda aside: save_file(tensors, aside, metadata=metadata_of(facts)),
            concurrent=concurrent,
        )
        return LatentFileEntry(
            file=path.name,
            shard_sha256=shard_sha256,
            bytes=path.stat().st_size,
            sha256=sha256_of(path),
        )
