"""The weights in a run's checkpoint, of any ZeRO stage, under the names of other programs."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srepa_ds.checkpoint.folder import fault_of, newest_valid, step_folder, step_of, steps_in
from srepa_ds.checkpoint.reader import CheckpointReader
from srepa_ds.errors import CheckpointError
from srepa_ds.model.sit import fixed_position_embedding
from srepa_ds.model.variants import SiTConfig
from srepa_ds.objective import official_name
from srepa_ds.optim.ema import MAIN_EMA, power_kind
from srepa_ds.optim.power_ema import PowerAverage, combination, gamma_of
from srepa_ds.schema import Section, validated, with_current_names
from srepa_ds.weights.exported import ExportDocument, ExportedModel
from srepa_ds.weights.file_hash import hash_of_weight_file
from srepa_ds.weights.fit import model_of
from srepa_ds.weights.lazy import LazyTensors
from srepa_ds.weights.ownership import folder_of
from srepa_ds.weights.weight_files import METADATA

log = logging.getLogger("srepa_ds")
_ANOTHER = "the checkpoint was changed, or is of another release; choose another one"
LARGEST_ERROR = 0.3
"""Largest relative error of a reconstructed profile; above it the wanted length means nothing."""


@dataclass(frozen=True)
class CheckpointWeights:
    """Weights of one kind from a checkpoint, with everything that an export says of them."""

    tensors: LazyTensors
    """Float32, under the official REPA names; projectors are among them."""

    config: Mapping[str, Any]
    """The run's configuration, as a tree with the current names of keys."""

    provenance: Mapping[str, Any]
    """Checkpoint, step and kind of weights."""

    reader: CheckpointReader
    """The checkpoint they are read from."""


def chosen_checkpoint(root: Path, step: int | None) -> Path:
    """Returns the checkpoint of `step` under `root`, without a step the newest valid one.

    Raises CheckpointError if it is absent or damaged.
    """
    if step is None:
        folder = newest_valid(root)
        if folder is None:
            raise CheckpointError(f"{root} holds no checkpoint; train first: `srepa-ds train`")
        return folder
    folder = step_folder(root, step)
    fault = fault_of(folder)
    if fault is not None:
        known = ", ".join(path.name for path in steps_in(root)) or "none"
        raise CheckpointError(f"{folder} is not valid: {fault}; checkpoints: {known}")
    return folder


def read_checkpoint_weights(
    folder: Path, *, weights: str, power_sigma: float | None, schema: type[Section]
) -> CheckpointWeights:
    """Returns the weights of a valid checkpoint; needs neither GPU nor process group.

    `weights` is the kind, unless `power_sigma` asks for a power-function average of this relative
    length. `schema` is the experiment's, whose former names of keys become the current ones. Raises
    CheckpointError.
    """
    reader = CheckpointReader(folder)
    if power_sigma is None:
        label, mixture, error = weights, {(reader, weights): 1.0}, None
    else:
        label, (mixture, error) = power_kind(power_sigma), _mixture(reader, power_sigma)
    stored = with_current_names(schema, reader.state["config"])
    model = validated(SiTConfig, stored["model"], source=f"{reader.folder}: model")
    tensors = _mixed(mixture, fixed_position_embedding(model))
    provenance = {
        "checkpoint": reader.fingerprint(),
        "step": reader.state["step"],
        "weights": label,
        "ema_decay": stored["ema"]["decay"],
        "run": Path(folder_of(stored) or reader.folder.parent.parent).absolute().name,
        "config_sha256": _hash_of_config(stored),
        **({} if error is None else {"profile_error": error}),
        # What its latents mean; exports of the first release have none.
        **{key: value for key, value in reader.state.get("identity", {}).items() if key == "codec"},
    }
    return CheckpointWeights(tensors, stored, provenance, reader)


def _hash_of_config(config: Mapping[str, Any]) -> str:
    """Returns the sha256 of a configuration as JSON with sorted keys and without spaces."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    # A path may hold bytes that are no Unicode.
    return hashlib.sha256(text.encode("utf-8", errors="surrogateescape")).hexdigest()


def read_model_of_checkpoint(
    folder: Path, *, weights: str, power_sigma: float | None, schema: type[Section]
) -> ExportedModel:
    """Returns the model of a valid checkpoint, as `read_model` returns that of its export.

    The hash is that of the file which an export would write, so that both draw the same set. Raises
    CheckpointError.
    """
    found = read_checkpoint_weights(folder, weights=weights, power_sigma=power_sigma, schema=schema)
    sha256 = hash_of_weight_file(found.tensors, METADATA)
    document = ExportDocument(folder, found.config, found.provenance, sha256, cure=_ANOTHER)
    sizes = document.section(SiTConfig, "model")
    model = model_of(sizes, found.tensors, folder, cure=_ANOTHER)
    return ExportedModel(model, document, sha256)


Mixture = dict[tuple[CheckpointReader, str], float]
"""(checkpoint, kind of average) -> its factor in the sum."""


def weights_of_kind(source: CheckpointWeights, kind: str) -> LazyTensors:
    """Returns weights of another kind from the same checkpoint; raises CheckpointError."""
    position_embedding = source.tensors["pos_embed"]
    return _mixed({(source.reader, kind): 1.0}, position_embedding)


def _mixed(mixture: Mixture, position_embedding: Tensor) -> LazyTensors:
    """Returns the weights in float32, sums computed in float64 as they are read.

    `position_embedding` is added: it is not trained, so no checkpoint holds it. Raises
    CheckpointError if the checkpoint lacks the kind of weights.
    """
    ((reader, kind), _), *_ = mixture.items()
    exportable = [k for k in reader.kinds() if k == "master" or k.startswith(MAIN_EMA)]
    if kind not in exportable:
        known = ", ".join(exportable)
        raise CheckpointError(f"{reader.folder} holds no '{kind}'; export.weights may be: {known}")
    names = {official_name(name): name for name in reader.names(kind)}

    def read(official: str) -> Tensor:
        if official == "pos_embed":
            return position_embedding
        if mixture == {(reader, kind): 1.0}:
            return reader.tensor(kind, names[official])
        parts = [f * r.tensor(k, names[official]).double() for (r, k), f in mixture.items()]
        return torch.stack(parts).sum(0).float() if len(parts) > 1 else parts[0].float()

    shapes = {official: reader.shape(name) for official, name in names.items()}
    return LazyTensors({**shapes, "pos_embed": tuple(position_embedding.shape)}, read)


def _mixture(reader: CheckpointReader, sigma: float) -> tuple[Mixture, float]:
    """Returns the mixture for relative length `sigma`, and the relative error of its profile.

    It approximates the power-function average at the step of `reader` by those the run has stored
    up to there; damaged checkpoints are skipped. Raises CheckpointError if there are none, or if
    the error is above `LARGEST_ERROR`.
    """
    stored: dict[tuple[CheckpointReader, str], PowerAverage] = {}
    lengths: set[float] = set()
    for folder in steps_in(reader.folder.parent):
        if folder == reader.folder:
            source = reader
        elif step_of(folder) < reader.state["step"] and fault_of(folder) is None:
            source = CheckpointReader(folder)
        else:
            continue
        for kept in source.state["config"]["ema"].get("power_sigmas", ()):
            if source.names(power_kind(kept)):
                average = PowerAverage(source.state["step"], gamma_of(kept))
                stored[source, power_kind(kept)] = average
                lengths.add(kept)
    if not stored:
        raise CheckpointError(
            f"{reader.folder.parent} holds no power-function averages; train with ema.power_sigmas"
        )
    wanted = PowerAverage(reader.state["step"], gamma_of(sigma))
    factors, error = combination(list(stored.values()), wanted)
    steps = sorted({average.step for average in stored.values()})
    span = f"{len(steps)} checkpoint(s) from step {steps[0]} to {steps[-1]}"
    if error > LARGEST_ERROR:
        raise CheckpointError(
            f"export.power_sigma {sigma:g} cannot be made of {span} with averages of lengths "
            f"{', '.join(f'{length:g}' for length in sorted(lengths))}: its profile would be off "
            f"by {error:.0%}, above {LARGEST_ERROR:.0%}; choose a length closer to these, or keep "
            "more checkpoints (checkpoint.keep_every_steps)"
        )
    log.info("made the average of length %g of %s; its profile is off by %.2g", sigma, span, error)
    return dict(zip(stored, factors, strict=True)), error
