"""The source `repa`: a data set as REPA's preparation writes it.

`images/00000/img00000017.png` and `vae-sd/00000/img-mean-std-00000017.npy` are one sample, and
`vae-sd/dataset.json` has its label. REPA pairs images and latents by their places in sorted order;
here the number in the name decides, and both must agree.
"""

import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int64
from PIL import Image
from pydantic import Field
from torch import Tensor

from srepa_ds.data.sources.foreign import files_below, numbered_classes
from srepa_ds.data.sources.image_file import image_file
from srepa_ds.data.sources.moments_array import moments_in, shape_of_moments
from srepa_ds.data.sources.source import SourceItem, SourceLatents
from srepa_ds.documents.json_reader import read_json
from srepa_ds.errors import DataError, listed
from srepa_ds.files import reason_of
from srepa_ds.schema import Section

_IMAGE = re.compile(r"img(\d{8})\.png")
_ARRAY = re.compile(r"img-mean-std-(\d{8})\.npy")
_LABELS = "dataset.json"
_SCALE = 0.18215
"""REPA's trainer multiplies its latents by it."""


class RepaConfig(Section):
    """A folder that REPA's preparation has written; its latents are taken as they are."""

    kind: Literal["repa"]
    """Images in `images/`, means and standard deviations in `vae-sd/`."""
    path: Path
    """The folder that holds both. Without `images/`, only latents can be prepared."""
    images: str = "images"
    """The folder of the images in it; REG calls it `imagenet_256_vae`."""
    latents: str = "vae-sd"
    """The folder of the latents in it, with `dataset.json`."""
    num_classes: int | None = Field(default=None, ge=1)
    """How many classes there are. Without it, the largest label is the last class."""

    def opened(self) -> "Repa":
        """Returns the source; raises DataError unless images, latents and labels fit together."""
        return Repa(self)


class Repa:
    """Images and latents in a file each; the key is the number in their names."""

    class_ids = ()

    def __init__(self, config: RepaConfig):
        self._images, self._arrays = config.path / config.images, config.path / config.latents
        arrays = _numbered(self._arrays, _ARRAY)
        images = _numbered(self._images, _IMAGE) if self._images.exists() else None
        if not arrays:
            raise DataError(f"{self._arrays}: holds no latents; correct source.path")
        if images is not None:
            _check_pairs(self._images, images, self._arrays, arrays)
        self._keys = list(arrays)
        self._array_names = list(arrays.values())
        self._image_names = list(images.values()) if images is not None else None
        self.labels = _labels_of(self._arrays, self._array_names)
        self.class_names = numbered_classes(
            self.labels, num_classes=config.num_classes, place=self._arrays / _LABELS
        )
        shape = shape_of_moments(self._arrays / self._array_names[0])
        self.latents = SourceLatents(
            values="moments",
            latent_shape=(shape[0] // 2, *shape[1:]),
            mirrored=False,
            facts={"origin": "repa", "scale": _SCALE, "shift": 0.0},
            has_images=images is not None,
        )

    @property
    def fingerprint(self) -> str:
        """The hash of all names and labels, and of the shape, which gives the size of each file."""
        names = [*self._array_names, *(self._image_names or ())]
        digest = hashlib.sha256("\n".join(names).encode())
        digest.update(self.labels.numpy().tobytes())
        digest.update(str(self.latents.latent_shape).encode())
        return digest.hexdigest()[:16]

    def key(self, index: int) -> str:
        """Returns the number in the names of image and latents, of 8 digits."""
        return self._keys[index]

    def item(self, index: int) -> SourceItem:
        """Returns one image, as the contents of its file, and its moments; raises DataError."""
        moments = self._moments(self._arrays / self._array_names[index])
        if self._image_names is None:
            return SourceItem(None, moments)
        path = self._images / self._image_names[index]
        return SourceItem(image_file(path, root=self._images), moments)

    def _moments(self, path: Path) -> Float[Tensor, "moments latent_height latent_width"]:
        channels, height, width = self.latents.latent_shape
        return moments_in(path, (2 * channels, height, width))


@cache
def _suffixes() -> frozenset[str]:
    """Returns the endings of the files that REPA's reader takes: of any image, and of arrays."""
    return frozenset({*Image.registered_extensions(), ".npy"})


def _numbered(root: Path, pattern: re.Pattern[str]) -> dict[str, str]:
    """Returns the path of each file by its number, in REPA's order, which is that of the paths.

    Raises DataError for a file of another name, which REPA's reader would count too.
    """
    found: dict[str, str] = {}
    others = []
    for name in files_below(root, lambda name: Path(name).suffix.lower() in _suffixes()):
        match = pattern.fullmatch(name.rpartition("/")[2])
        if match is None:
            others.append(name)
            continue
        if match[1] in found:
            raise DataError(f"{root}: {found[match[1]]} and {name} have the same number; keep one")
        found[match[1]] = name
    if others:
        raise DataError(
            f"{root}: {listed(others)} do not belong there, and would shift the pairs of images "
            "and latents where these are found by their places; remove them"
        )
    return found


def _check_pairs(
    image_root: Path, images: dict[str, str], array_root: Path, arrays: dict[str, str]
) -> None:
    """Checks that the same numbers are there in the same order; raises DataError naming files."""
    faults = []
    for root, own, others, lacking in (
        (image_root, images, arrays, "latents"),
        (array_root, arrays, images, "an image"),
    ):
        alone = [f"{root.name}/{name}" for number, name in own.items() if number not in others]
        if alone:
            faults.append(f"without {lacking}: {listed(alone)}")
    for image, array in zip(images, arrays, strict=False):
        if not faults and image != array:
            faults.append(
                f"by their places in sorted order, {image_root.name}/{images[image]} belongs to "
                f"{array_root.name}/{arrays[array]}, and by their numbers it does not"
            )
    if faults:
        raise DataError(
            f"{image_root.parent}: {'; '.join(faults)}; complete the folders, or remove what has "
            "no partner"
        )


def _labels_of(root: Path, names: list[str]) -> Int64[Tensor, " samples"]:
    """Returns the labels of `names`; raises DataError unless each has one and no other file has."""
    path = root / _LABELS
    try:
        listing = read_json(path)["labels"]
    except OSError as error:
        raise DataError(f"{path}: {reason_of(error)}; REPA reads all labels from it") from error
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(f"{path}: has no list of labels ({error}); write it again") from error
    if not listing:
        raise DataError(
            f"{path}: its labels are null, as REPA writes where images are not in a folder for "
            'each class; write {"labels": [["00000/img-mean-std-00000000.npy", 0], ...]} into it'
        )
    labels = _label_by_name(path, listing)
    if missing := [name for name in names if name not in labels]:
        raise DataError(f"{path}: has no label for {listed(missing)}; write it again")
    if len(labels) > len(names):
        there = set(names)
        absent = [name for name in labels if name not in there]
        raise DataError(f"{path}: has labels for {listed(absent)}, which are missing; copy them")
    return torch.tensor([labels[name] for name in names])


def _label_by_name(path: Path, listing: object) -> dict[str, int]:
    """Returns the label of each file; raises DataError for anything but [[path, number], ...]."""
    labels: dict[str, int] = {}
    for entry in listing if isinstance(listing, list) else [listing]:
        match entry:
            case [str() as name, int() as label] if not isinstance(label, bool):
                labels[name.replace("\\", "/")] = label
            case _:
                raise DataError(
                    f"{path}: expected labels as [path, number], found {str(entry)[:80]}; write "
                    "it again"
                )
    return labels
