"""Reads weight files from elsewhere without running code that they contain."""

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from srepa_ds.errors import SRepaError


def read_weight_file(
    path: Path, *, named: str, setting: str, fault: type[SRepaError]
) -> dict[str, Any]:
    """Returns the mapping in a .safetensors file or a file of torch.save, on the CPU.

    Mappings inside it (`model`, `ema`, `state_dict`) stay as they are. Only tensors, plain values
    and `argparse.Namespace` (the settings that MAE, DINO and REPA keep with their weights) are
    unpickled. Raises `fault` if the file is missing, damaged or holds anything else; its message
    calls the file `named` and tells the user to correct `setting`.
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
    # The libraries' errors for a folder or an unreadable file are less clear.
    path.open("rb").close()
    if path.suffix == ".safetensors":
        return load_file(path)
    archive = zipfile.is_zipfile(path)
    if archive:
        with zipfile.ZipFile(path) as opened:
            if any(name.endswith("/constants.pkl") for name in opened.namelist()):
                raise RuntimeError(
                    "it is a TorchScript archive; load it with torch.jit.load, save its state_dict"
                )
    # A training's file can be ten times its model: if mapped, only the part in use is read.
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        # The error that follows, if any, is clearer.
        warnings.filterwarnings("ignore", message="Detected pickle protocol")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)


def _reason(error: Exception) -> str:
    if foreign := re.search(r"GLOBAL (\S+)", str(error)):
        return (
            f"it holds Python objects ({foreign[1]}), which are never opened; save its state_dict "
            "alone"
        )
    if isinstance(error, pickle.UnpicklingError | LookupError | EOFError):
        # Here torch advises opening the file unsafely, or gives no message.
        return "it is damaged, or not in torch.save's default format"
    text = getattr(error, "strerror", None) or str(error).split("\n")[0]
    return text or type(error).__name__
