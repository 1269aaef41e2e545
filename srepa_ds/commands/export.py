"""`srepa-ds export`: a checkpoint's weights as `model.safetensors` and `config.json`."""

import logging
from pathlib import Path

from srepa_ds.config.experiment import Config
from srepa_ds.weights.exported import write_model
from srepa_ds.weights.from_checkpoint import chosen_checkpoint, read_checkpoint_weights

log = logging.getLogger("srepa_ds")


def export(config: Config) -> Path:
    """Writes the exported model and returns its folder; needs neither GPU nor process group.

    The tensors have the official REPA names. Raises CheckpointError without a valid checkpoint and
    OutputError if the folder cannot be written.
    """
    settings = config.export
    found = read_checkpoint_weights(
        chosen_checkpoint(config.run_folder.checkpoints, settings.step),
        weights=settings.weights,
        power_sigma=settings.power_sigma,
        schema=Config,
    )
    folder, facts = config.export_folder, found.provenance
    write_model(folder, found.tensors, config=found.config, provenance=facts)
    log.info("exported %s of step %d to %s", facts["weights"], facts["step"], folder)
    return folder
