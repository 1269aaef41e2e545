"""A model as a folder for `srepa_ds.pipeline.SiTPipeline`, written without diffusers.

The layout is that of the community's `SiT-diffusers` repositories: `transformer/`, `scheduler/`,
`vae/` and `model_index.json`, with weights in the first SiT's convention (t = 1 is data).
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from srepa_ds.codec.config import CodecConfig
from srepa_ds.documents.json_reader import read_json
from srepa_ds.documents.safetensors_writer import write_safetensors
from srepa_ds.errors import CheckpointError, DataError, OutputError, listed
from srepa_ds.files import flush_to_disk, writing
from srepa_ds.model.variants import MLP_RATIO, SiTConfig
from srepa_ds.objective import ObjectiveConfig
from srepa_ds.schema import validated
from srepa_ds.weights.export_config import ExportConfig
from srepa_ds.weights.export_request import ExportRequest
from srepa_ds.weights.lazy import DTYPES, LazyTensors, entries_of, rounded
from srepa_ds.weights.ownership import CARD, PICTURE, PIPELINE_FORMAT, room_for_model, run_of
from srepa_ds.weights.reversed_time import reversed_time
from srepa_ds.weights.weight_files import METADATA, index_of, split_into_files
from srepa_ds.weights.whole_folder import write_whole_folder

VERSION = 1
INDEX = "model_index.json"
PROVENANCE = "provenance.json"
PACKAGE = "srepa_ds.pipeline"
"""Where diffusers finds the classes, once a program has imported it."""
STEM = "diffusion_pytorch_model"
SHARD_INDEX = f"{STEM}.safetensors.index.json"

# A model card and its picture are written beside.
_OWN_NAMES = {"transformer", "scheduler", "vae", INDEX, PROVENANCE, CARD, PICTURE}
_LABELS = "y_embedder.embedding_table.weight"
_CURE = "choose another export.folder, or fix its permissions and make room"


def write_diffusers(folder: Path, request: ExportRequest) -> Path:
    """Writes the folder as a whole, and returns it; an earlier export of the run is replaced.

    Raises CheckpointError for a model that the layout cannot hold, DataError for a VAE that is not
    whole, and OutputError if `folder` holds anything else or cannot be written to; what is there
    then stays.
    """
    model = validated(SiTConfig, request.source.config["model"], source="the checkpoint: model")
    _refuse_what_it_cannot_hold(model)
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise OutputError(f"{folder} is no folder; choose another export.folder")
    # The folder behind a link is replaced, not the link.
    place, config = Path(os.path.realpath(folder)), request.source.config
    with room_for_model(place, format="diffusers", config=config, replace=request.replace):
        with writing(f"the model to {folder}", cure=_CURE):
            write_whole_folder(place, lambda aside: _write(aside, request, model), names=_OWN_NAMES)
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
    facts = {**source.provenance, "dtype": request.config.dtype, "run_id": run_of(source.config)}
    return {"format": PIPELINE_FORMAT, "version": VERSION, **facts}


def _write(folder: Path, request: ExportRequest, model: SiTConfig) -> None:
    objective = validated(
        ObjectiveConfig, request.source.config.get("objective", {}), source="the checkpoint"
    )
    dropout = objective.label_dropout
    for part in ("transformer", "scheduler"):
        (folder / part).mkdir(parents=True)
    tensors = _tensors(request.source.tensors, model, has_null_label=dropout > 0)
    _write_weights(folder / "transformer", tensors, request.config)
    _write_json(folder / "transformer" / "config.json", _transformer(model, dropout))
    scheduler = {
        "_class_name": "SiTFlowMatchScheduler",
        "solver": request.solver,
        "path": objective.interpolant.path,
    }
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    if request.vae is not None:
        _copy_vae(request.vae, folder / "vae")
    _write_json(folder / INDEX, _index(request))
    _write_json(folder / PROVENANCE, _provenance(request))


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


def _write_weights(folder: Path, tensors: LazyTensors, config: ExportConfig) -> None:
    """Writes one file, or several with an index."""
    dtype = DTYPES[config.dtype]
    values = rounded(tensors, dtype)
    files = split_into_files(entries_of(tensors, dtype), config.max_shard_size, stem=STEM)
    for name, entries in files.items():
        write_safetensors(folder / name, entries, values.__getitem__, METADATA)
    if len(files) > 1:
        _write_json(folder / SHARD_INDEX, index_of(files))


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
        names += [index.name, *_shards_of(index)]
    else:
        names.append(f"{STEM}.safetensors")
    if missing := [name for name in names if not (source / Path(name).name).is_file()]:
        raise DataError(
            f"{source}: holds no VAE, as it lacks {listed(missing)}; give a folder as diffusers "
            "saves one (codec.weights, or sample.decoder)"
        )
    target.mkdir()
    for name in names:
        shutil.copyfile(source / Path(name).name, target / Path(name).name)
        flush_to_disk(target / Path(name).name)


def _shards_of(index: Path) -> list[str]:
    try:
        found = {str(name) for name in read_json(index)["weight_map"].values()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{index}: is no index of shards; download the VAE again") from error
    return sorted(found)


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    flush_to_disk(path)
