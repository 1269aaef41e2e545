"""Files of the right name with the wrong contents: data, weights, exported models, sample sets."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from bad_input.arrangements import (
    a_file,
    exported,
    no_valid_checkpoint,
    nothing,
    sampled,
    trained,
)
from bad_input.case import CONFIGS, TEACHER, Case, Place
from safetensors import safe_open
from safetensors.torch import load_file, save_file

_INITIAL = "train CONFIG train.init_from.path={folder}/weights"
_TEACHER = f"train CONFIG {TEACHER}.weights={{folder}}/weights"
_PREPARE = f"prepare {CONFIGS}/digits-prepare.yaml output={{folder}}/new"


def flipped_shard(place: Place) -> None:
    path = place.shards / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def swapped_shards(place: Place) -> None:
    first, second = (place.shards / f"shard-0000{n}.safetensors" for n in (0, 1))
    first.rename(place.folder / "aside")
    second.rename(first)
    (place.folder / "aside").rename(second)


def scalar_labels(place: Place) -> None:
    path = place.shards / "shard-00000.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(load_file(path) | {"labels": torch.tensor(1)}, path, metadata=metadata)


def edited_entry(**changes: object) -> Callable[[Place], None]:
    def arrange(place: Place) -> None:
        path = place.shards / "index.json"
        index = json.loads(path.read_text())
        index["shards"][1] |= changes
        path.write_text(json.dumps(index))

    return arrange


def changed_teacher(place: Place) -> None:
    folder = place.folder / "trained"
    folder.mkdir()
    shutil.copy(place.folder / "teacher.safetensors", folder / "model.safetensors")
    (folder / "teacher.json").write_text(json.dumps({"sha256": "0" * 64}))


def sampled_beside_a_flipped_shard(place: Place) -> None:
    sampled(place)
    flipped_shard(place)


def flipped_and_missing(place: Place) -> None:
    flipped_shard(place)
    (place.shards / "shard-00002.safetensors").unlink()


def weights(content: bytes) -> Callable[[Place], object]:
    return lambda place: (place.folder / "weights").write_bytes(content)


def edited_export(**changes: object) -> Callable[[Place], None]:
    def arrange(place: Place) -> None:
        exported(place)
        path = place.run / "export" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return arrange


def export_is_a_pointer(place: Place) -> None:
    exported(place)
    path = place.run / "export" / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\n")


def interrupted_export(place: Place) -> None:
    exported(place)
    (place.run / "export" / "config.json").rename(place.run / "export" / "config.json.partial")


def link_to(target: str, before: Callable[[Place], object]) -> Callable[[Place], None]:
    def arrange(place: Place) -> None:
        before(place)
        Path(place.folder / "lost").symlink_to(target)

    return arrange


def few_samples(place: Place) -> None:
    sampled(place)
    np.savez(place.run / "samples" / "samples.npz", np.zeros((3, 16, 16, 3), np.uint8))


CASES = [
    # Data.
    Case("a damaged shard", flipped_shard, "train CONFIG",
         ("shard-00001.safetensors: contents changed since it was written", "prepare it again")),
    Case("two shards swapped", swapped_shards, "train CONFIG",
         ("shard-00000.safetensors: contents changed since it was written",)),
    Case("labels without a dimension", scalar_labels, "train CONFIG",
         ("shard-00000.safetensors", "disagree about labels")),
    Case("a shard outside its folder", edited_entry(file="../secret"), "train CONFIG",
         ("shards.1.file", "is not the name of a file in this folder")),
    Case("a shard named twice", edited_entry(file="shard-00000.safetensors"), "train CONFIG",
         ("names shard-00000.safetensors more than once",)),
    Case("a teacher that changed", changed_teacher,
         f"train CONFIG {TEACHER}.weights={{folder}}/trained/model.safetensors",
         ("model.safetensors: contents changed since it was written", "srepa-ds teacher")),
    Case("a damaged reference", sampled_beside_a_flipped_shard, "evaluate CONFIG",
         ("shard-00001.safetensors: contents changed",)),
    Case("a folder of data sets", nothing, "train CONFIG data.folder={folder}",
         ("holds no index.json, but shards/ in it is a data set",)),
    Case("verify a damaged data set", flipped_and_missing, "verify {folder}/shards",
         ("2 faults in 4 files", "shard-00001.safetensors: contents changed",
          "shard-00002.safetensors: missing")),
    Case("verify a damaged run", no_valid_checkpoint, "verify {folder}/run",
         ("1 fault", "step-0000005: state.json has 2 bytes")),
    Case("verify an export whose weights changed", edited_export(sha256="0" * 64),
         "verify {folder}/run/export", ("1 fault", "has changed since it was exported")),
    Case("verify nothing", nothing, "verify {folder}/nowhere",
         ("No such file or directory", "give a folder to check")),
    Case("verify a file", a_file, "verify {folder}/file",
         ("Not a directory", "give a folder to check")),
    Case("verify what", nothing, "verify", ("Missing argument",)),
    Case("images of ten million pixels a side", nothing, f"{_PREPARE} image_size=10000000",
         ("image_size: Input should be less than or equal to 8192",)),
    Case("a seed of more than 64 bits", nothing, f"{_PREPARE} seed=18446744073709551616",
         ("seed: ", "18446744073709551616 is too large")),
    Case("a shard that no memory holds", nothing,
         f"{_PREPARE} image_size=8192 samples_per_shard=1000000 holdout_fraction=0",
         ("samples_per_shard: a shard of", "images of 8192 px takes")),
    # Weights.
    Case("initial weights that are a pointer",
         weights(b"version https://git-lfs.github.com/spec/v1\n"), _INITIAL,
         ("is a Git LFS pointer", "git lfs pull")),
    Case("a teacher that is a web page", weights(b"<!DOCTYPE html><html>"), _TEACHER,
         ("HTML or XML page", "download it again")),
    Case("a teacher that is gzipped", weights(b"\x1f\x8b\x08"), _TEACHER,
         ("compressed with gzip",)),
    Case("a teacher that is empty", weights(b""), _TEACHER, ("it is empty",)),
    Case("a teacher that is an array", weights(b"\x93NUMPY"), _TEACHER, ("a NumPy array",)),
    Case("a teacher that is JSON", weights(b'{"weight_map": {}}'), _TEACHER,
         ("a JSON document",)),
    Case("a teacher that is a folder", lambda place: (place.folder / "weights").mkdir(), _TEACHER,
         ("it is a folder; give a file in it",)),
    # Exported models.
    Case("sample of a pointer", export_is_a_pointer, "sample CONFIG",
         ("model.safetensors: it is a Git LFS pointer", "git lfs pull")),
    Case("sample of an interrupted export", interrupted_export, "sample CONFIG",
         ("interrupted export", "srepa-ds export")),
    Case("an export of another hash", edited_export(sha256="0" * 64), "sample CONFIG",
         ("has changed since it was exported", "srepa-ds export")),
    Case("an export without provenance", edited_export(provenance={}), "sample CONFIG",
         ("it lacks 'weights'",)),
    Case("an export whose config is a list", edited_export(config=[]), "sample CONFIG",
         ("'config' is not an object",)),
    Case("export into the root", trained, "export CONFIG export.folder=/",
         ("holds files other than an exported model", "choose another export.folder")),
    Case("export into a lost link", link_to("unmounted", trained),
         "export CONFIG export.folder={folder}/lost", ("is a link to unmounted", "does not exist")),
    # Sample sets.
    Case("samples into a lost link", link_to("unmounted", exported),
         "sample CONFIG sample.folder={folder}/lost", ("is a link to unmounted", "does not exist")),
    Case("samples between other files", exported, "sample CONFIG sample.folder={folder}",
         ("holds other files", "give an empty output folder")),
    Case("samples of classes there are not", exported, "sample CONFIG sample.labels=[3,12]",
         ("sample.labels: 12", "has 10 classes, 0 to 9")),
    Case("counts against num_samples", exported, "sample CONFIG sample.labels.3=5",
         ("labels asks for 5 images in all, num_samples for 64", "leave it out")),
    Case("no class at all", exported, "sample CONFIG sample.labels=[]",
         ("labels names no class",)),
    Case("a negative class", exported, "sample CONFIG sample.labels=[-1]",
         ("sample.labels.0", "greater than or equal to 0")),
    Case("too few images to score", few_samples, "evaluate CONFIG",
         ("need more than 3 sample images, got 3",)),
]  # fmt: skip
