"""A model as a folder for `srepa_ds.pipeline.SiTPipeline`, written without diffusers.

The layout is that of the community's `SiT-diffusers` repositories: `transformer/`, `scheduler/`,
`vae/` and `model_index.json`, with weights in the first SiT's convention (t = 1 is data).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from srepa_ds.codec.config import CodecConfig
from srepa_ds.documents.json_reader import read_json
from srepa_ds.documents.safetensors_writer import TensorEntry, in_file_order, write_safetensors
from srepa_ds.errors import CheckpointError, ConfigError, DataError, Fault, OutputError, listed
from srepa_ds.files import claimed, flush_to_disk, is_of_the_system, writing
from srepa_ds.model.variants import MLP_RATIO, SiTConfig
from srepa_ds.objective import ObjectiveConfig
from srepa_ds.schema import validated
from srepa_ds.weights.export_request import ExportRequest
from srepa_ds.weights.exported import METADATA
from srepa_ds.weights.lazy import LazyTensors, shapes_of
from srepa_ds.weights.reversed_time import reversed_time
from srepa_ds.weights.whole_folder import write_whole_folder

FORMAT = "srepa_ds.diffusers"
VERSION = 1
INDEX = "model_index.json"
PROVENANCE = "provenance.json"
PACKAGE = "srepa_ds.pipeline"
"""Where diffusers finds the classes, once a program has imported it."""
WEIGHTS = "diffusion_pytorch_model.safetensors"
SHARDS = "diffusion_pytorch_model{suffix}.safetensors"
SHARD_INDEX = f"{WEIGHTS}.index.json"

# The last two are a model card and its picture, which are written beside.
_OWN_NAMES = {"transformer", "scheduler", "vae", INDEX, PROVENANCE, "README.md", "samples.png"}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_LABELS = "y_embedder.embedding_table.weight"
_CURE = "choose another export.folder, or fix its permissions and make room"


def write_diffusers(folder: Path, request: ExportRequest) -> Path:
    """Writes the folder as a whole, and returns it; an earlier export of the run is replaced.

    Raises CheckpointError for a model that the layout cannot hold, ConfigError for a size of shards
    that cannot be read, DataError for a VAE that is not whole, and OutputError if `folder` holds
    anything else or cannot be written to; what is there then stays.
    """
    model = validated(SiTConfig, request.source.config["model"], source="the checkpoint: model")
    _refuse_what_it_cannot_hold(model)
    mark = _provenance(request)
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise OutputError(f"{folder} is no folder; choose another export.folder")
    place = Path(os.path.realpath(folder))
    with writing(f"the model to {folder}", cure=_CURE):
        _refuse_others(place, mark["run"], replace=request.replace)
    otherwise = ", or choose another export.folder"
    with claimed(place, doing="exporting into", cure=_CURE, otherwise=otherwise):
        with writing(f"the model to {folder}", cure=_CURE):
            _refuse_others(place, mark["run"], replace=request.replace)
            write_whole_folder(
                place, lambda aside: _write(aside, request, model, mark), names=_OWN_NAMES
            )
    return folder


def _refuse_what_it_cannot_hold(model: SiTConfig) -> None:
    """Raises CheckpointError for a model of which a plain SiT is only a part."""
    _, height, width = model.latent_shape
    reasons = {
        "a class token (model.class_token_width), as REG has": model.class_token_width is not None,
        "norms of queries and keys (model.qk_norm)": model.qk_norm,
        f"images that are not square ({height} x {width} latents)": height != width,
    }
    found = [reason for reason, applies in reasons.items() if applies]
    if found:
        raise CheckpointError(
            f"the layout of diffusers cannot hold this model, which has {listed(found, ' and ')}; "
            "export.format=srepa_ds can"
        )


def _provenance(request: ExportRequest) -> dict[str, Any]:
    source = request.source
    config = json.dumps(source.config, sort_keys=True, separators=(",", ":")).encode()
    return {
        "format": FORMAT,
        "version": VERSION,
        "run": Path(source.config["run"]["folder"]).name,
        "step": source.provenance["step"],
        "weights": source.provenance["weights"],
        "config_sha256": hashlib.sha256(config).hexdigest(),
        "checkpoint": source.provenance["checkpoint"],
    }


def _write(
    folder: Path, request: ExportRequest, model: SiTConfig, provenance: Mapping[str, Any]
) -> None:
    objective = validated(
        ObjectiveConfig, request.source.config.get("objective", {}), source="the checkpoint"
    )
    dropout = objective.label_dropout
    for part in ("transformer", "scheduler"):
        (folder / part).mkdir(parents=True)
    tensors = _tensors(request.source.tensors, model, has_null_label=dropout > 0)
    _write_weights(
        folder / "transformer",
        tensors,
        dtype=_DTYPES[request.config.dtype],
        max_shard_size=request.config.max_shard_size,
    )
    _write_json(folder / "transformer" / "config.json", _transformer(model, dropout))
    scheduler = {
        "_class_name": "SiTFlowMatchScheduler",
        "solver": request.source.config.get("sample", {}).get("solver", "euler_maruyama"),
        "path": objective.interpolant.path,
    }
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    if request.vae is not None:
        _copy_vae(request.vae, folder / "vae")
    _write_json(folder / INDEX, _index(request))
    _write_json(folder / PROVENANCE, provenance)


def _tensors(tensors: LazyTensors, model: SiTConfig, *, has_null_label: bool) -> LazyTensors:
    """Returns the model's tensors in SiT's convention, with the rows that the config announces."""
    turned = reversed_time(tensors.only(lambda name: not name.startswith("projectors.")))
    if has_null_label:
        return turned
    # The layout has no row for a null label that training has never seen.
    shapes = {**turned.shapes, _LABELS: (model.num_classes, model.shape.hidden_size)}

    def read(name: str) -> Tensor:
        return turned[name][: model.num_classes] if name == _LABELS else turned[name]

    return LazyTensors(shapes, read)


def _write_weights(
    folder: Path, tensors: LazyTensors, *, dtype: torch.dtype, max_shard_size: str | None
) -> None:
    """Writes one file, or several with an index; raises ConfigError for an unreadable size."""
    # Positions are sines that training kept in float32.
    entries = {
        name: TensorEntry(name, torch.float32 if name == "pos_embed" else dtype, shape)
        for name, shape in shapes_of(tensors).items()
    }
    total = sum(entry.num_bytes for entry in entries.values())
    try:
        split = split_state_dict_into_shards_factory(
            # The library only hands entries to the functions below.
            entries,
            get_storage_size=lambda entry: entry.num_bytes,
            filename_pattern=SHARDS,
            max_shard_size=total if max_shard_size is None else max_shard_size,
        )
    except ValueError as error:
        fault = Fault(
            "export.max_shard_size", f"{str(error).rstrip('.')}; write it as 5GB or 500MB"
        )
        raise ConfigError("configuration", [fault]) from error

    def read(name: str) -> Tensor:
        return _rounded(name, tensors[name], entries[name].dtype)

    for file, names in split.filename_to_tensors.items():
        ordered = in_file_order([entries[name] for name in names])
        write_safetensors(folder / file, ordered, read, METADATA)
    if split.is_sharded:
        index = {"metadata": {"total_size": total}, "weight_map": split.tensor_to_filename}
        _write_json(folder / SHARD_INDEX, index)


def _rounded(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns `value` in `dtype`; raises CheckpointError if a finite value becomes infinite."""
    result = value.to(dtype)
    if dtype != value.dtype and (result.isinf() & value.isfinite()).any():
        raise CheckpointError(
            f"{name} has values up to {value.abs().max():.3g}, beyond the range of "
            f"{str(dtype).removeprefix('torch.')}; choose another export.dtype"
        )
    return result


def _transformer(model: SiTConfig, label_dropout: float) -> dict[str, Any]:
    size = model.latent_shape[1]
    return {
        "_class_name": "SiTTransformer2DModel",
        "input_size": size,
        "patch_size": model.shape.patch_size,
        "in_channels": model.in_channels,
        "hidden_size": model.shape.hidden_size,
        "depth": model.shape.depth,
        "num_heads": model.shape.num_heads,
        "mlp_ratio": float(MLP_RATIO),
        "class_dropout_prob": label_dropout,
        "num_classes": model.num_classes,
        "learn_sigma": False,
    }


def _index(request: ExportRequest) -> dict[str, Any]:
    codec = validated(
        CodecConfig, request.source.config.get("codec", {}), source="the checkpoint: codec"
    )
    names = {str(number): name for number, name in sorted(request.class_names.items())}
    # Also without the folder: it may be put there later.
    vae = ["diffusers", "AutoencoderKL"] if codec.kind == "vae" else [None, None]
    return {
        "_class_name": "SiTPipeline",
        "transformer": [PACKAGE, "SiTTransformer2DModel"],
        "scheduler": [PACKAGE, "SiTFlowMatchScheduler"],
        "vae": vae,
        "id2label": names or None,
        "latent_scale": codec.scale,
        "latent_shift": codec.shift,
    }


def _copy_vae(source: Path, target: Path) -> None:
    """Copies config and safetensors files of a VAE, of all that its folder holds.

    Raises DataError if there are none.
    """
    index = source / SHARD_INDEX
    names = ["config.json"]
    if index.exists():
        names += [index.name, *sorted(set(read_json(index)["weight_map"].values()))]
    else:
        names.append(WEIGHTS)
    if missing := [name for name in names if not (source / Path(name).name).is_file()]:
        raise DataError(
            f"{source}: holds no VAE, as it lacks {listed(missing)}; give a folder as diffusers "
            "saves one (codec.weights, or sample.decoder)"
        )
    target.mkdir()
    for name in names:
        shutil.copyfile(source / Path(name).name, target / Path(name).name)
        flush_to_disk(target / Path(name).name)


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    flush_to_disk(path)


def _refuse_others(folder: Path, run: str, *, replace: bool) -> None:
    """Raises OutputError unless `folder` is absent, empty, or an earlier export of `run`."""
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    names = {name for name in names if not is_of_the_system(name)}
    if not names:
        return
    found = _mark_of(folder)
    if found is None or names - _OWN_NAMES:
        others = sorted(names - _OWN_NAMES or names)
        raise OutputError(
            f"{folder} holds files other than an earlier export ({listed(others, most=3)}); choose "
            "another export.folder"
        )
    if found != run and not replace:
        raise OutputError(
            f"{folder} holds the model of another run ({found}, and this is {run}); choose another "
            "export.folder, or replace it with --replace"
        )


def _mark_of(folder: Path) -> str | None:
    """Returns the run that an export in `folder` is of, or None if there is no export."""
    try:
        mark = read_json(folder / PROVENANCE)
        return str(mark["run"]) if mark["format"] == FORMAT else None
    except (OSError, ValueError, TypeError, KeyError, IndexError):
        return None
