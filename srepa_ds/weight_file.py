"""Files of weights that come from elsewhere: opened without running anything they say."""

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
    """Returns the mapping in a .safetensors file or in one that torch has written, on the CPU.

    Mappings inside it (`model`, `ema`, `state_dict`) stay as they are. Of pickled objects only
    tensors, plain values and `argparse.Namespace` (the settings that MAE, DINO and REPA keep beside
    their weights) are opened. Raises `fault` if the file is missing or damaged, or holds anything
    else; its message calls the file `named` and what is to be corrected `setting`.
    """
    try:
        found = _opened(path)
    except FileNotFoundError as error:
        raise fault(f"{named}: no such file; correct {setting}") from error
    # A damaged file may raise anything: what reads it trusts its lengths, names and codes.
    except Exception as error:
        raise fault(f"{named}: cannot be read: {_reason(error)}") from error
    if not isinstance(found, Mapping):
        raise fault(f"{named}: holds a {type(found).__name__}, no state_dict")
    return {str(key): value for key, value in found.items()}


def _opened(path: Path) -> Any:
    # The libraries' words for a folder, or for a file one may not read, are less clear.
    path.open("rb").close()
    if path.suffix == ".safetensors":
        return load_file(path)
    archive = zipfile.is_zipfile(path)
    if archive:
        with zipfile.ZipFile(path) as opened:
            if any(name.endswith("/constants.pkl") for name in opened.namelist()):
                raise RuntimeError(
                    "it is a TorchScript archive; save the state_dict of what torch.jit.load gives"
                )
    # A training's file can be ten times its model: mapped, only what is used is read.
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        # The error that follows, if any, says it in the user's terms.
        warnings.filterwarnings("ignore", message="Detected pickle protocol")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)


def _reason(error: Exception) -> str:
    if foreign := re.search(r"GLOBAL (\S+)", str(error)):
        return (
            f"it holds Python objects ({foreign[1]}), which are never opened; save its state_dict "
            "alone"
        )
    if isinstance(error, pickle.UnpicklingError | LookupError | EOFError):
        # Here torch advises to open the file unsafely, or says nothing.
        return "it is damaged, or not in the form that torch.save writes by default"
    text = getattr(error, "strerror", None) or str(error).split("\n")[0]
    return text or type(error).__name__
