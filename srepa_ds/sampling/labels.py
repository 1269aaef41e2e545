"""The class of each image of a set: drawn, in turn, by number, or listed in a file."""

import hashlib
import re
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor

from srepa_ds import noise
from srepa_ds.errors import ConfigError, Fault
from srepa_ds.noise import NoiseStream
from srepa_ds.sampling.config import SamplerConfig

_NUMBER = re.compile(r"[0-9]{1,9}")


def draw_labels(
    config: SamplerConfig,
    sample_ids: Int64[Tensor, " batch"],
    *,
    num_classes: int,
    listed: Int64[Tensor, " samples"] | None = None,
) -> Int64[Tensor, " batch"]:
    """Returns the label of each image: of `listed`, by `config.labels` or by `config.label_mode`.

    The first of these that is given decides.
    """
    if listed is not None:
        return listed.to(sample_ids.device)[sample_ids]
    if config.labels is not None:
        return _chosen_labels(config.labels, sample_ids)
    if config.label_mode == "balanced":
        return sample_ids % num_classes
    return noise.integers(config.seed, NoiseStream.SAMPLE_LABEL, sample_ids, num_classes)


def _chosen_labels(
    labels: tuple[int, ...] | dict[int, int], sample_ids: Int64[Tensor, " batch"]
) -> Int64[Tensor, " batch"]:
    """Returns the label of each image: `labels` in turn, or as many of each class as it says."""
    if isinstance(labels, tuple):
        return sample_ids.new_tensor(labels)[sample_ids % len(labels)]
    classes = sorted(labels)
    ends = sample_ids.new_tensor([labels[number] for number in classes]).cumsum(0)
    return sample_ids.new_tensor(classes)[torch.searchsorted(ends, sample_ids, right=True)]


def read_label_file(path: Path) -> Int64[Tensor, " lines"]:
    """Returns the classes in a text file, one number per line.

    Raises ConfigError that names the first line that holds something else.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise label_fault(f"{path}: {error.strerror}; correct the path") from error
    except UnicodeDecodeError as error:
        raise label_fault(f"{path}: is no text; write one class per line") from error
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise label_fault(f"{path}: is empty; write one class per line")
    for number, line in enumerate(lines, start=1):
        if not _NUMBER.fullmatch(line.strip()):
            shown = repr(line if len(line) <= 40 else f"{line[:40]}...")
            raise label_fault(
                f"{path}, line {number}: {shown} is no class; write its number alone, such as 3"
            )
    return torch.tensor([int(line) for line in lines], dtype=torch.int64)


def labels_of_set(
    path: Path, *, num_samples: int, num_classes: int
) -> Int64[Tensor, " num_samples"]:
    """Returns the labels of the first `num_samples` lines of a label file.

    Raises ConfigError for too few lines or a class that the model does not have, as well as for
    lines that are no numbers.
    """
    labels = read_label_file(path)
    if len(labels) < num_samples:
        raise label_fault(
            f"{path}: has {len(labels)} line(s) for {num_samples} images; set sample.num_samples "
            f"to at most {len(labels)}, or add lines"
        )
    labels = labels[:num_samples]
    outside = (labels >= num_classes).nonzero().flatten().tolist()
    if outside:
        raise label_fault(
            f"{path}, line {outside[0] + 1}: class {labels[outside[0]].item()}, and the model has "
            f"{num_classes} classes, 0 to {num_classes - 1}"
        )
    return labels


def hash_of_labels(labels: Int64[Tensor, " samples"]) -> str:
    """Returns the sha256 of labels as little-endian 64-bit numbers, in order."""
    return hashlib.sha256(labels.numpy().astype("<i8").tobytes()).hexdigest()


def label_fault(reason: str) -> ConfigError:
    """Returns the error for a label file."""
    return ConfigError("configuration", [Fault("sample.label_file", reason)])
