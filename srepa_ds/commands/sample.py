"""`srepa-ds sample`: images from a model, on any number of ranks and machines, resumable."""

import logging
from pathlib import Path

from srepa_ds.config.experiment import Config
from srepa_ds.distributed import ranks
from srepa_ds.drawing.drawing import open_drawing
from srepa_ds.drawing.job import draw_set
from srepa_ds.preparation.share import EVERYTHING, Share

log = logging.getLogger("srepa_ds")


def sample(config: Config, *, share: Share = EVERYTHING) -> Path:
    """Returns the folder of the set: its outputs, `contact_sheet.png` and `provenance.json`.

    Runs on every rank, beside any number of other commands with the same settings. Draws `share` of
    the set; parts of an interrupted command are kept, and a finished set with the same provenance
    is left alone. Raises SRepaError on all ranks alike.
    """
    rank = ranks.initialize()
    drawing = open_drawing(config, rank)
    folder = drawing.folder
    if draw_set(drawing, folder, config.sample.outputs, share=share, rank=rank):
        log.info("%d images in %s", config.sample.num_samples, folder)
    return folder
