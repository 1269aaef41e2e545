"""`srepa-ds import`: weights of another program as a run of this one."""

from collections.abc import Iterable
from pathlib import Path

from srepa_ds.weights.foreign.opening import open_foreign


def import_weights(
    source: Path,
    folder: Path,
    overrides: Iterable[str] = (),
    *,
    layout: str | None = None,
    latent_statistics: Path | None = None,
) -> str:
    """Makes the run `folder` of foreign weights, and returns what was made, for the user to read.

    It gets `config.yaml` with all that the file tells of its training, and `overrides`; a
    checkpoint to continue from, if the file has the optimizer's state, else an exported model.
    """
    model = open_foreign(source, layout=layout, setting="the path")
    raise NotImplementedError(model.layout)
