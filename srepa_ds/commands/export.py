"""`srepa-ds export`: a checkpoint's weights in a format that other programs read."""

import logging
from pathlib import Path

from srepa_ds.config.experiment import Config
from srepa_ds.report.model_card import CARD_FORMATS, write_card
from srepa_ds.weights.formats import EXPORT_FORMATS, ExportRequest
from srepa_ds.weights.from_checkpoint import chosen_checkpoint, read_checkpoint_weights
from srepa_ds.weights.pushing import Push, push_model

log = logging.getLogger("srepa_ds")


def export(config: Config, *, replace: bool = False, push: Push | None = None) -> Path:
    """Writes the weights and returns their folder or file; needs neither GPU nor process group.

    With `push`, uploads the folder afterwards. A model of another run is replaced, here as there,
    only if `replace` says so. Raises CheckpointError without a valid checkpoint, or for a model
    that the format cannot hold, and OutputError if the folder cannot be written or uploaded.
    """
    settings = config.export
    if push is not None:
        push.check(settings.format)
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
    if settings.format in CARD_FORMATS:
        write_card(config, source, name=None if push is None else push.name)
    if push is not None:
        message = f"step {facts['step']} of {config.run.folder.absolute().name}"
        pushed = push_model(config.export_folder, push, message=message, replace=replace)
        log.info("pushed to %s, commit %s", pushed.address, pushed.commit)
    return written
