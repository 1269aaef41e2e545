"""The source `lightningdit`: latents as LightningDiT's `extract_features.py` writes them.

`latents_rank00_shard000.safetensors` holds one draw from each posterior, `latents`, one from that
of the mirrored image, `latents_flip`, and `labels`; `latents_stats.pt` the mean and the standard
deviation of each channel. There are neither images nor names of classes. Files are sorted by name.
The extraction gives each rank the same number of images, so the last of a rank may repeat the
first of the data set; those are kept, since nothing in the files tells them from others.
"""

import hashlib
import re
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor

from srepa_ds.data.headers import Form, Kind, read_header, rows_of
from srepa_ds.data.sources.foreign import numbered_classes
from srepa_ds.data.sources.source import SourceItem, SourceLatents
from srepa_ds.data.stored_files import StoredFile
from srepa_ds.errors import DataError
from srepa_ds.files import reason_of
from srepa_ds.schema import Section
from srepa_ds.weight_file import read_weight_file

_NAME = re.compile(r"latents_rank\d+_shard\d+\.safetensors")
_STATS = "latents_stats.pt"
_KIND = Kind("file of latents", "copy it again")


class LightningDitConfig(Section):
    """A folder of latents that LightningDiT has extracted; they are taken as they are."""

    kind: Literal["lightningdit"]
    """Draws from posteriors, also of mirrored images, without images: they need `pixels: null`."""
    path: Path
    """The folder of `latents_rank00_shard000.safetensors` and others."""
    multiplier: float = Field(default=1.0, gt=0)
    """LightningDiT's `latent_multiplier`: its models see (z - mean) / std x multiplier."""
    num_classes: int | None = Field(default=None, ge=1)
    """How many classes there are. Without it, the largest label is the last class."""

    def opened(self) -> "LightningDit":
        """Returns the source; raises DataError if files are missing or of another form."""
        return LightningDit(self)


class _Shard(NamedTuple):
    """A file whose header was checked."""

    file: StoredFile
    form: Form
    """Of one sample's latent."""
    has_mirrored: bool
    labels: Int64[Tensor, " samples"]


class LightningDit:
    """Latents in the rows of safetensors files; the key is the file and the row in it."""

    class_ids = ()

    def __init__(self, config: LightningDitConfig):
        self._shards = [_shard_of(path) for path in _files_in(config.path)]
        self._form = self._shards[0].form
        if other := next((s for s in self._shards if s.form != self._form), None):
            raise DataError(
                f"{other.file.path}: holds latents of {other.form}, and "
                f"{self._shards[0].file.path.name} of {self._form}; keep one extraction a folder"
            )
        self._starts = [0, *accumulate(len(shard.labels) for shard in self._shards)]
        self.labels = torch.cat([shard.labels for shard in self._shards])
        if len(self.labels) == 0:
            raise DataError(f"{config.path}: its files hold no latents; correct source.path")
        self.class_names = numbered_classes(
            self.labels, num_classes=config.num_classes, place=config.path
        )
        channels, height, width = self._form[1]
        self.latents = SourceLatents(
            values="samples",
            latent_shape=(channels, height, width),
            mirrored=all(shard.has_mirrored for shard in self._shards),
            facts={"origin": "lightningdit", **_statistics(config, channels)},
            has_images=False,
        )

    @property
    def fingerprint(self) -> str:
        """The hash of all names and sizes, and of the labels."""
        files = [shard.file for shard in self._shards]
        names = "\n".join(f"{file.path.name}\0{file.identity.size}" for file in files)
        return hashlib.sha256(names.encode() + self.labels.numpy().tobytes()).hexdigest()[:16]

    def key(self, index: int) -> str:
        """Returns the file and the row, from 0: `latents_rank00_shard000.safetensors:17`."""
        shard, row = self._place(index)
        return f"{shard.file.path.name}:{row}"

    def item(self, index: int) -> SourceItem:
        """Returns the latent of an image, and that of the mirrored image; raises DataError."""
        shard, row = self._place(index)
        mirrored = self._row(shard, "latents_flip", row) if self.latents.mirrored else None
        return SourceItem(None, self._row(shard, "latents", row), mirrored)

    def _place(self, index: int) -> tuple[_Shard, int]:
        number = bisect_right(self._starts, index) - 1
        return self._shards[number], index - self._starts[number]

    def _row(self, shard: _Shard, name: str, row: int) -> Float[Tensor, "c h w"]:
        form = rows_of({name: (self._form[0], (1, *self._form[1]))})[name]
        latent = _read(shard.file, name, row * form.num_bytes, form.num_bytes)
        latent = latent.view(form.dtype).view(form.shape).float()
        if not latent.isfinite().all():
            raise DataError(f"its {name} are not finite")
        return latent


def _files_in(folder: Path) -> list[Path]:
    """Returns the files of latents, sorted by name; raises DataError if there are none."""
    try:
        found = sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))
    except OSError as error:
        raise DataError(f"{folder}: {reason_of(error)}; correct source.path") from error
    if not found:
        raise DataError(
            f"{folder}: holds no latents_rank00_shard000.safetensors or others; correct source.path"
        )
    return found


def _shard_of(path: Path) -> _Shard:
    """Returns a file whose tensors fit together; raises DataError."""
    found = read_header(path, _KIND)
    tensors = found.header.tensors
    dtype, shape = tensors.get("latents", ("", ()))
    count = shape[0] if shape else 0
    if len(shape) != 4 or dtype not in ("F32", "F16", "BF16"):
        held = f"{dtype} {shape}" if shape else "none"
        raise DataError(f"{path}: expected latents of shape (n, c, h, w), found {held}")
    if tensors.get("labels") != ("I64", (count,)):
        raise DataError(f"{path}: expected int64 labels of {count} latents; extract them again")
    mirrored = tensors.get("latents_flip")
    if mirrored not in (None, (dtype, shape)):
        raise DataError(f"{path}: latents and latents_flip differ in form; extract them again")
    labels = _read(found.file, "labels", 0, 8 * count).view(torch.int64)
    return _Shard(found.file, (dtype, shape[1:]), mirrored is not None, labels)


def _read(file: StoredFile, name: str, offset: int, count: int) -> Tensor:
    """Returns `count` bytes of a tensor; raises DataError.

    It opens the file each time, so threads share nothing, and many files need not stay open.
    """
    room = bytearray(count)
    try:
        with file.path.open("rb") as opened:
            opened.seek(file.starts[name] + offset)
            num_read = opened.readinto(room)
    except OSError as error:
        raise DataError(f"{file.path}: {reason_of(error)}; make it readable") from error
    if num_read < count:
        raise DataError(f"{file.path}: was truncated while it was in use; {file.again}")
    return torch.frombuffer(room, dtype=torch.uint8) if count else torch.empty(0).byte()


def _statistics(config: LightningDitConfig, channels: int) -> dict[str, Any]:
    """Returns mean and standard deviation of each channel, and what they make of a codec.

    Empty without `latents_stats.pt`. Raises DataError if it cannot be read without running code
    that it contains, or does not fit the latents.
    """
    path = config.path / _STATS
    if not path.exists():
        return {}
    found = read_weight_file(path, named=str(path), setting="source.path", fault=DataError)
    numbers = {}
    for name in ("mean", "std"):
        value = found.get(name)
        if not isinstance(value, Tensor) or value.numel() != channels:
            raise DataError(f"{path}: expected {name} of {channels} channels; compute it again")
        numbers[name] = value.flatten().double()
    if not all(value.isfinite().all() for value in numbers.values()) or numbers["std"].min() <= 0:
        raise DataError(f"{path}: a mean is not finite or a std not positive; compute it again")
    return {
        "mean": _rounded(numbers["mean"]),
        "std": _rounded(numbers["std"]),
        "multiplier": config.multiplier,
        "shift": _rounded(numbers["mean"]),
        "scale": _rounded(config.multiplier / numbers["std"]),
    }


def _rounded(values: Tensor) -> list[float]:
    """Returns numbers with the 9 digits that tell any two numbers of float32 apart."""
    return [float(f"{value:.9g}") for value in values.tolist()]
