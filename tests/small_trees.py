"""A small sound tree of images, and the same images in other forms."""

import csv
import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from messy_images import FORMS, contents_of
from PIL import Image

from srepa_ds.data.decoding import decoded
from srepa_ds.data.sources.source import Source

IMAGES = {
    f"{name}/{below}{number:02d}{FORMS[place].suffix}": contents_of(
        FORMS[place], (9 + number, 12 + place), 10 * place + number
    )
    for place, (name, below) in enumerate(
        [("n01440764", ""), ("n01443537", ""), ("n01484850", "one/two/"), ("n03126707", "")]
    )
    for number in range(5)
}
"""The contents of each image by its path."""
CLASS_IDS = ("n01440764", "n01443537", "n01484850", "n03126707")
LABELS = {key: CLASS_IDS.index(key.split("/")[0]) for key in IMAGES}


def write_tree(root: Path) -> Path:
    for key, contents in IMAGES.items():
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes(contents)
    return root


def write_zip(path: Path, *, prefix: str = "", method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for key, contents in reversed(IMAGES.items()):
            archive.writestr(prefix + key, contents)
    return path


def tar_of(files: dict[str, bytes], *, mode: str = "w", form: int = tarfile.PAX_FORMAT) -> bytes:
    room = io.BytesIO()
    with tarfile.open(fileobj=room, mode=mode, format=form) as archive:
        for name, contents in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            archive.addfile(info, io.BytesIO(contents))
    return room.getvalue()


def write_tar(path: Path, *, prefix: str = "", mode: str = "w") -> Path:
    files = {prefix + key: contents for key, contents in reversed(IMAGES.items())}
    path.write_bytes(tar_of(files, mode=mode))
    return path


def write_tar_of_tars(path: Path) -> Path:
    inner = {
        f"{name}.tar": tar_of(
            {key[len(name) + 1 :]: contents for key, contents in IMAGES.items() if name in key}
        )
        for name in CLASS_IDS
    }
    path.write_bytes(tar_of(inner))
    return path


def write_web_dataset(folder: Path) -> Path:
    folder.mkdir()
    keys = sorted(IMAGES)
    for number in range(2):
        files = {}
        for key in keys[number * 10 : number * 10 + 10]:
            base = key.rsplit(".", 1)[0]
            files[key] = IMAGES[key]
            files[f"{base}.cls"] = f"{LABELS[key]}\n".encode()
            document = {"class": LABELS[key], "wnid": CLASS_IDS[LABELS[key]]}
            files[f"{base}.json"] = json.dumps(document).encode()
            files[f"{base}.pkl"] = b"\x80\x04cposix\nsystem\n"
        (folder / f"train-{number:03d}.tar").write_bytes(tar_of(files))
    return folder


def write_csv(path: Path, *, header: bool = True, names: bool = True) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        if header:
            writer.writerow(["label", "width", "path"])
        for key in sorted(IMAGES):
            label = CLASS_IDS[LABELS[key]] if names else LABELS[key]
            writer.writerow([label, 0, key] if header else [key, label])
    return path


def write_json_lines(path: Path, *, names: bool = True) -> Path:
    lines = [
        json.dumps({"path": f"./{key}", "label": CLASS_IDS[LABELS[key]] if names else LABELS[key]})
        for key in sorted(IMAGES)
    ]
    path.write_text("\n".join(lines) + "\n\n")
    return path


def keys_of(source: Source) -> list[str]:
    return [source.key(index) for index in range(len(source.labels))]


def pixels_of(source: Source, index: int) -> np.ndarray:
    return np.asarray(decoded(source.item(index).image))


def as_pil_reads(contents: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(contents)) as image:
        return np.asarray(image)
