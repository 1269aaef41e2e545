"""A run as a file of REPA's trainer: `model`, `ema`, `opt`, `args` and `steps`."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from srepa_ds.checkpoint.reader import CheckpointReader
from srepa_ds.documents.safetensors_writer import TensorEntry
from srepa_ds.errors import CheckpointError, listed
from srepa_ds.files import write_aside
from srepa_ds.objective import official_name
from srepa_ds.optim.adamw import OptimizerConfig, build_optimizer
from srepa_ds.optim.ema import MAIN_EMA
from srepa_ds.optim.learning_rate import learning_rate
from srepa_ds.schema import validated
from srepa_ds.weights.export_request import ExportRequest
from srepa_ds.weights.from_checkpoint import CheckpointWeights, weights_of_kind
from srepa_ds.weights.lazy import LazyTensors
from srepa_ds.weights.repa_args import args_of
from srepa_ds.weights.repa_names import (
    TrainedModel,
    check_fit,
    name_in_file,
    names_in_order,
    trained_model,
)
from srepa_ds.weights.staging import staged

MOMENTS = ("exp_avg", "exp_avg_sq")


def write_repa_file(path: Path, request: ExportRequest) -> None:
    """Writes a checkpoint as REPA's, REG's or iREPA's trainer writes it, whole or not at all.

    `model` has the masters; `ema` the average that the request names, and the run's main one where
    it names the masters. Weights have the names and the order of those trainers' models, so that
    they load strictly, and AdamW's state is that of their parameters in turn. No more than one
    tensor is in memory; the folder has room for the file twice. Raises CheckpointError for a model
    that those trainers cannot hold, ConfigError for a stored configuration that is not valid, and
    OSError.
    """
    source, place = request.source, request.source.reader.folder
    model = trained_model(source.config, source=place)
    with_projectors = request.config.projectors
    check_fit(model, projectors=with_projectors, source=place)
    parts = _parts_of(request)
    projectors = [n for n in parts["model"] if n.startswith("projectors.") and with_projectors]
    names = names_in_order(model, projectors)
    _refuse_lacking(parts, names, source.reader)
    entries = [
        TensorEntry(f"{part}/{name}", torch.float32, tensors.shapes[name])
        for part, tensors in parts.items()
        for name in names
        # The position embedding has no moments: it is not trained.
        if name != "pos_embed" or part not in MOMENTS
    ]

    def read(key: str) -> Tensor:
        part, _, name = key.partition("/")
        return parts[part][name]

    def write(aside: Path) -> None:
        with staged(path.parent, entries, read) as tensors:
            document = _document(request, model, names, tensors)
            try:
                torch.save(document, aside)
            except RuntimeError as error:
                # torch gives neither number nor reason of what the system said.
                raise OSError("torch.save could not write all of it, as on a full disk") from error

    write_aside(path, write)


def _parts_of(request: ExportRequest) -> dict[str, LazyTensors]:
    """Returns all tensors of the file by part and official name; raises CheckpointError."""
    source = request.source
    average = source if source.provenance["weights"] != "master" else None
    parts = {
        "model": weights_of_kind(source, "master"),
        "ema": average.tensors if average else weights_of_kind(source, MAIN_EMA),
    }
    if request.config.optimizer:
        parts |= {kind: _moments(source.reader, kind) for kind in MOMENTS}
    return parts


def _refuse_lacking(
    parts: Mapping[str, LazyTensors], names: Iterable[str], reader: CheckpointReader
) -> None:
    needed = {name for name in names if name != "pos_embed"}
    for part, tensors in parts.items():
        if lacking := needed - tensors.keys():
            raise CheckpointError(
                f"{reader.folder} does not fit its configuration: {part} lacks "
                f"{listed(sorted(lacking), most=3)}; choose another checkpoint (export.step)"
            )


def _moments(reader: CheckpointReader, kind: str) -> LazyTensors:
    names = {official_name(name): name for name in reader.names(kind)}
    if not names:
        raise CheckpointError(
            f"{reader.folder} holds no state of Adam; export without it: export.optimizer=false"
        )
    shapes = {official: reader.shape(name) for official, name in names.items()}
    return LazyTensors(shapes, lambda official: reader.tensor(kind, names[official]))


def _document(
    request: ExportRequest, model: TrainedModel, names: list[str], tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    source = request.source
    document: dict[str, Any] = {
        part: {name_in_file(name, model): tensors[f"{part}/{name}"] for name in names}
        for part in ("model", "ema")
    }
    if request.config.optimizer:
        document["opt"] = _optimizer_state(source, names, tensors)
    document["args"] = args_of(source.config, model, source=source.reader.folder)
    document["steps"] = source.provenance["step"]
    return document


def _optimizer_state(
    source: CheckpointWeights, names: Iterable[str], tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Returns what AdamW's `state_dict` returns for the weights in this order, as one group.

    The position embedding is among them, but has no state: it is not trained.
    """
    state = source.reader.state
    moments = {
        number: {kind: tensors[f"{kind}/{name}"] for kind in MOMENTS}
        for number, name in enumerate(names)
        if name != "pos_embed"
    }
    step = torch.tensor(float(state["adam_step"]))
    # A storage for each, as torch has: AdamW counts them up in place.
    by_number = {number: {"step": step.clone(), **found} for number, found in moments.items()}
    return {"state": by_number, "param_groups": [_group_of(source, len(moments) + 1)]}


def _group_of(source: CheckpointWeights, num_weights: int) -> dict[str, Any]:
    place = source.reader.folder
    config = validated(OptimizerConfig, source.config["optimizer"], source=f"{place}: optimizer")
    # As this torch writes it, with the rate of the step to come.
    adamw = build_optimizer(config, [nn.Parameter(torch.zeros(1))])
    (group,) = adamw.state_dict()["param_groups"]
    rate = learning_rate(config, source.provenance["step"])
    # The kernel is a choice of the program that goes on: None is torch's default, and REPA's.
    return {**group, "lr": rate, "fused": None, "params": list(range(num_weights))}
