"""`srepa-ds export`: a checkpoint's weights as `model.safetensors` and `config.json`."""

import logging
from pathlib import Path

from srepa_ds import checkpoint
from srepa_ds.checkpoint import CheckpointReader
from srepa_ds.config import Config
from srepa_ds.errors import CheckpointError
from srepa_ds.model.sit import fixed_position_embedding
from srepa_ds.model.variants import SiTConfig
from srepa_ds.model.weights import write_model
from srepa_ds.objective import official_name
from srepa_ds.schema import validated

log = logging.getLogger("srepa_ds")


def export(config: Config) -> Path:
    """Returns the folder with the exported model; needs neither GPU nor process group.

    The tensors have the official REPA names. Raises CheckpointError without a valid checkpoint and
    OutputError if the folder cannot be written.
    """
    reader = CheckpointReader(_chosen(config))
    weights = config.export.weights
    tensors = {official_name(n): reader.tensor(weights, n) for n in reader.names(weights)}
    stored = reader.state["config"]
    # No trained weight, so no checkpoint holds it.
    model = validated(SiTConfig, stored["model"], source=f"{reader.folder}: model")
    tensors["pos_embed"] = fixed_position_embedding(model)
    provenance = {
        "checkpoint": reader.fingerprint(),
        "step": reader.state["step"],
        "weights": weights,
        "ema_decay": stored["ema"]["decay"],
    }
    write_model(config.export_folder, tensors, config=stored, provenance=provenance)
    log.info("exported %s of step %d to %s", weights, reader.state["step"], config.export_folder)
    return config.export_folder


def _chosen(config: Config) -> Path:
    """Returns the checkpoint to export; raises CheckpointError if it is absent or damaged."""
    root = config.checkpoints
    if config.export.step is None:
        folder = checkpoint.newest_valid(root)
        if folder is None:
            raise CheckpointError(f"{root} holds no checkpoint; train first: `srepa-ds train`")
        return folder
    folder = checkpoint.step_folder(root, config.export.step)
    fault = checkpoint.fault_of(folder)
    if fault is not None:
        there = ", ".join(path.name for path in checkpoint.steps_in(root)) or "none"
        raise CheckpointError(f"{folder} is not valid: {fault}; there are: {there}")
    return folder
