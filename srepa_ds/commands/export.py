"""`srepa-ds export`: a checkpoint's weights as `model.safetensors` and `config.json`."""

import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from srepa_ds.checkpoint.folder import fault_of, newest_valid, step_folder, step_of, steps_in
from srepa_ds.checkpoint.reader import CheckpointReader
from srepa_ds.config.experiment import Config
from srepa_ds.errors import CheckpointError
from srepa_ds.model.sit import fixed_position_embedding
from srepa_ds.model.variants import SiTConfig
from srepa_ds.objective import official_name
from srepa_ds.optim.ema import MAIN_EMA, power_kind
from srepa_ds.optim.power_ema import PowerAverage, combination, gamma_of
from srepa_ds.schema import validated, with_current_names
from srepa_ds.weights.exported import write_model

log = logging.getLogger("srepa_ds")
LARGEST_ERROR = 0.3
"""Largest relative error of a reconstructed profile; above it the wanted length means nothing."""


def export(config: Config) -> Path:
    """Writes the exported model and returns its folder; needs neither GPU nor process group.

    The tensors have the official REPA names. Raises CheckpointError without a valid checkpoint and
    OutputError if the folder cannot be written.
    """
    reader = CheckpointReader(_chosen(config))
    sigma = config.export.power_sigma
    if sigma is None:
        label, mixture, error = config.export.weights, {(reader, config.export.weights): 1.0}, None
    else:
        label, (mixture, error) = power_kind(sigma), _mixture(reader, sigma)
    tensors = {official_name(name): value for name, value in _mixed(mixture)}
    stored = with_current_names(Config, reader.state["config"])
    # Not trained, so no checkpoint holds it.
    model = validated(SiTConfig, stored["model"], source=f"{reader.folder}: model")
    tensors["pos_embed"] = fixed_position_embedding(model)
    provenance = {
        "checkpoint": reader.fingerprint(),
        "step": reader.state["step"],
        "weights": label,
        "ema_decay": stored["ema"]["decay"],
        **({} if error is None else {"profile_error": error}),
        # What its latents mean; exports of the first release have none.
        **{key: value for key, value in reader.state.get("identity", {}).items() if key == "codec"},
    }
    write_model(config.export_folder, tensors, config=stored, provenance=provenance)
    log.info("exported %s of step %d to %s", label, reader.state["step"], config.export_folder)
    return config.export_folder


Mixture = dict[tuple[CheckpointReader, str], float]
"""(checkpoint, kind of average) -> its factor in the sum."""


def _mixed(mixture: Mixture) -> Iterator[tuple[str, Tensor]]:
    """Yields each weight's name and float32 value, summed in float64.

    Raises CheckpointError if the checkpoint lacks the kind of weights.
    """
    ((reader, kind), _), *_ = mixture.items()
    exportable = [k for k in reader.kinds() if k == "master" or k.startswith(MAIN_EMA)]
    if kind not in exportable:
        known = ", ".join(exportable)
        raise CheckpointError(f"{reader.folder} holds no '{kind}'; export.weights may be: {known}")
    for name in reader.names(kind):
        parts = [factor * r.tensor(k, name).double() for (r, k), factor in mixture.items()]
        yield name, torch.stack(parts).sum(0).float() if len(parts) > 1 else parts[0].float()


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


def _chosen(config: Config) -> Path:
    """Returns the checkpoint to export; raises CheckpointError if it is absent or damaged."""
    root = config.run_folder.checkpoints
    if config.export.step is None:
        folder = newest_valid(root)
        if folder is None:
            raise CheckpointError(f"{root} holds no checkpoint; train first: `srepa-ds train`")
        return folder
    folder = step_folder(root, config.export.step)
    fault = fault_of(folder)
    if fault is not None:
        known = ", ".join(path.name for path in steps_in(root)) or "none"
        raise CheckpointError(f"{folder} is not valid: {fault}; checkpoints: {known}")
    return folder
