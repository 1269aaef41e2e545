"""Reads weight files from elsewhere without running code that they contain."""

import argparse
import hashlib
import mmap
import pickle
import re
import stat
import struct
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from srepa_ds.documents.pickle_check import NoWeightsError, check_pickle, objects_refused
from srepa_ds.documents.safetensors_check import check_safetensors
from srepa_ds.documents.torch_archive import check_archive
from srepa_ds.errors import SRepaError, listed

# Bytes at the beginning of files that are no weights, or not such as can be read here.
_OTHER_FILES = {
    b"version https://git-lfs": "a Git LFS pointer, not the weights; run `git lfs pull`",
    b"\x1f\x8b": "compressed with gzip; unpack it first",
    b"BZh": "compressed with bzip2; unpack it first",
    b"\xfd7zXZ": "compressed with xz; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it first",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
    b"\x93NUMPY": "a NumPy array, not a state_dict",
    b"\x89HDF": "an HDF5 file, as Keras and TensorFlow write; convert it to safetensors",
    b"GGUF": "a GGUF file; give the safetensors it was made of",
    b"\x08\x01\x12": "a protocol buffer of TensorFlow or ONNX; convert it to safetensors",
    b"{": "a JSON document, not weights; give the file of the weights themselves",
    b"[": "a JSON document, not weights; give the file of the weights themselves",
}
_PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<error")
_TENSORFLOW_INDEX = bytes.fromhex("57fb808b247547db")
_DAMAGED = "it is damaged, or neither a safetensors file nor in torch.save's default format"

_ORDINARY_TYPES = frozenset(
    {
        torch.float64, torch.float32, torch.float16, torch.bfloat16,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    }
)  # fmt: skip
# Tied weights repeat some values. A file made to exhaust memory repeats them without end.
_MOST_REPETITION = 8
_SMALL_BYTES = 64 << 20
_MOST_WRAPPERS = 5
# A magic number, the version, facts of the system, the content, and the keys of storages.
_PICKLES_OF_OLD_FORMAT = 5

V = TypeVar("V")


def read_weight_file(
    path: Path, *, named: str, setting: str, fault: type[SRepaError]
) -> dict[str, Any]:
    """Returns the mapping in a safetensors file or a file of torch.save, on the CPU.

    The content decides which of them it is, whatever the file is called. Mappings inside it
    (`model`, `ema`, `state_dict`) stay as they are. Only tensors, plain values and
    `argparse.Namespace` (the settings that MAE, DINO and REPA keep with their weights) are
    unpickled. Memory stays within the size of the file. Raises `fault` if the file is missing,
    damaged or holds anything else; its message calls the file `named` and tells the user to correct
    `setting`.
    """
    try:
        found = _opened(path)
    except FileNotFoundError as error:
        raise fault(f"{named}: no such file; correct {setting}") from error
    # A damaged file may raise anything: the readers trust its lengths, names and codes.
    except Exception as error:
        raise fault(f"{named}: cannot be read: {_reason(error)}") from error
    if not isinstance(found, Mapping):
        raise fault(f"{named}: holds a {type(found).__name__}, not a state_dict")
    return {str(key): value for key, value in found.items()}


def _opened(path: Path) -> Any:
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise NoWeightsError(_of_folder(path))
    if not stat.S_ISREG(mode):
        raise NoWeightsError("it is no regular file")
    size = path.stat().st_size
    head, tail = _ends_of(path)
    if _is_safetensors(head, size):
        try:
            check_safetensors(path)
        except ValueError as error:
            raise NoWeightsError(str(error)) from error
        return load_file(path)
    if head.startswith(b"PK\x03\x04"):
        check_archive(path, size)
        return _unpickled(path, mapped=True)
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        _check_pickles(path)
        return _unpickled(path, mapped=False)
    raise NoWeightsError(_kind_of(head, tail))


def other_kind(path: Path) -> str | None:
    """Returns what the file is if its first bytes show that it holds no weights, else None.

    Raises OSError.
    """
    kind = _kind_of(*_ends_of(path))
    return None if kind == _DAMAGED else kind


def _ends_of(path: Path) -> tuple[bytes, bytes]:
    with path.open("rb") as file:
        head = file.read(512)
        file.seek(max(path.stat().st_size - 8, 0))
        return head, file.read(8)


def _is_safetensors(head: bytes, size: int) -> bool:
    """Returns whether a file begins with the length of a JSON object and the object."""
    is_other = head[:1] == b"\x80" and int.from_bytes(head[:8], "little") > max(size, 1 << 27)
    return head[8:9] == b"{" and not is_other


def _unpickled(path: Path, *, mapped: bool) -> Any:
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        # The error that follows, if any, is clearer.
        warnings.filterwarnings("ignore", message="Detected pickle protocol|Validating sparse")
        # A training's file can be ten times its model: if mapped, only the part in use is read.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def _check_pickles(path: Path) -> None:
    """Looks through the pickles at the beginning of a file of torch.save's old format."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for _ in range(_PICKLES_OF_OLD_FORMAT):
            check_pickle(content)


def _of_folder(path: Path) -> str:
    endings = (".safetensors", ".pt", ".pth", ".bin", ".tar", ".ckpt")
    names = sorted(file.name for file in path.iterdir() if file.name.endswith(endings))
    return f"it is a folder; give a file in it{f' ({listed(names, most=3)})' if names else ''}"


def _kind_of(head: bytes, tail: bytes) -> str:
    """Returns what a file is that holds no weights, by its first and last bytes."""
    if not head:
        return "it is empty"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.lower().startswith(_PAGES):
        return "it is an HTML or XML page, not weights: the download failed; download it again"
    for beginning, kind in _OTHER_FILES.items():
        if head.startswith(beginning) or (beginning in (b"{", b"[") and text.startswith(beginning)):
            return f"it is {kind}"
    if head[257:262] == b"ustar":
        return "it is a tar archive; unpack it first"
    if tail == _TENSORFLOW_INDEX:
        return "it is the index of a TensorFlow checkpoint; convert it to safetensors"
    if head[:1] == b"\x08" and head[2:3] == b"\x12":
        return "it is a protocol buffer, as ONNX writes; convert it to safetensors"
    return _DAMAGED


def _reason(error: Exception) -> str:
    if isinstance(error, NoWeightsError):
        return str(error)
    if foreign := re.search(r"GLOBAL (\S+)", str(error)):
        return objects_refused(foreign[1])
    damage = (pickle.UnpicklingError, LookupError, EOFError, zipfile.BadZipFile, MemoryError)
    if isinstance(error, (*damage, ValueError, struct.error)) or "wrong byte size" in str(error):
        # Here torch advises opening the file unsafely, or gives no message.
        return _DAMAGED
    text = getattr(error, "strerror", None) or str(error).split("\n")[0]
    return text or type(error).__name__


def plain_tensors(
    state: Mapping[str, Tensor], path: Path, *, named: str, fault: type[SRepaError]
) -> dict[str, Tensor]:
    """Returns tensors of the file `path` as contiguous ones that any operation takes.

    `path` may be the folder of several files. Raises `fault` for a tensor without values, that is
    sparse, quantised or of an unusual type, and if they would take far more memory than there are
    bytes on disk.
    """
    for name, tensor in state.items():
        if kind := _unusual_kind(tensor):
            raise fault(f"{named}: '{name}' is {kind}; save it as an ordinary float32 tensor")
    total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    size = _size_of(path)
    if total > _MOST_REPETITION * size + _SMALL_BYTES:
        raise fault(
            f"{named}: its tensors would take {total >> 20:,} MiB, but the file has "
            f"{size >> 20:,} MiB: they repeat a few values; save contiguous copies"
        )
    return {name: tensor.detach().contiguous() for name, tensor in state.items()}


def _size_of(path: Path) -> int:
    """Returns the bytes of a file, or of all below a folder, as a pipeline's weights lie deeper."""
    files = path.rglob("*") if path.is_dir() else (path,)
    return sum(file.stat().st_size for file in files if file.is_file())


def _unusual_kind(tensor: Tensor) -> str | None:
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout != torch.strided:
        return "a sparse tensor"
    if tensor.is_quantized:
        return "a quantised tensor"
    if tensor.is_meta:
        return "a tensor without values (of the device meta)"
    return None if tensor.dtype in _ORDINARY_TYPES else f"of the type {tensor.dtype}"


def without_wrappers(state: Mapping[str, V], is_known: Callable[[str], bool]) -> dict[str, V]:
    """Returns `state` without what other modules, which held the model, put before its names.

    `_orig_mod.` (of torch.compile) goes from everywhere. Other prefixes (`module.`, `net.`) go if
    nearly all names have them and more of the names are known without them.
    """
    plain = _under(state, [name.replace("_orig_mod.", "") for name in state])
    current = dict(state) if plain is None else plain
    best, most = current, sum(map(is_known, current))
    for _ in range(_MOST_WRAPPERS):
        prefix = _shared_prefix(current)
        shorter = _under(current, [name.removeprefix(prefix) for name in current])
        if not prefix or shorter is None:
            break
        current = shorter
        if (known := sum(map(is_known, current))) > most:
            best, most = current, known
    return best


def _shared_prefix(names: Mapping[str, Any]) -> str:
    """Returns the first part of nearly all `names`, with its dot; empty if there is none."""
    parts = Counter(name.partition(".")[0] for name in names if "." in name)
    ((part, count),) = parts.most_common(1) or [("", 0)]
    return f"{part}." if count and count >= 0.9 * len(names) else ""


def _under(state: Mapping[str, V], names: list[str]) -> dict[str, V] | None:
    """Returns `state` under `names`, or None if two are the same."""
    result = dict(zip(names, state.values(), strict=True))
    return result if len(result) == len(state) else None


def hash_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Returns a hash of names and fp32 values, whatever file they came from: 16 digits."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(value.to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
