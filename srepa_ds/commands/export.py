"""`srepa-ds export`: a checkpoint's weights in a format that other programs read."""

import logging
from pathlib import Path

from srepa_ds.config.experiment import Config
from srepa_ds.weights.formats import EXPORT_FORMATS, ExportRequest
from srepa_ds.weights.from_checkpoint import chosen_checkpoint, read_checkpoint_weights

log = logging.getLogger("srepa_ds")


def export(config: Config, *, replace: bool = False) -> Path:
    """Writes the weights and returns their folder or file; needs neither GPU nor process group.

    A model of another run is replaced only if `replace` says so. Raises CheckpointError without a
    valid checkpoint, or for a model that the format cannot hold, and OutputError if the folder
    cannot be written.
    """
    settings = config.export
    source = read_checkpoint_weights(
        chosen_checkpoint(config.run_folder.checkpoints, settings.step),
        weights=settings.weights,
        power_sigma=settings.power_sigma,
        schema=Config,
    )
    request = ExportRequest(source, settings, replace)
    written = EXPORT_FORMATS[settings.format](config.export_folder, request)
    facts = source.provenance
    log.info("exported %s of step %d to %s", facts["weights"], facts["step"], written)
    return written
