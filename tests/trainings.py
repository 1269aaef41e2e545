"""Trainings for `ranks.run_function`: each rank of a test calls them."""

import shutil
from pathlib import Path

import torch


def train_runs(*runs: list[str]) -> None:
    """Trains one run after another: a configuration file and its overrides each."""
    # Not in the tests' own process: DeepSpeed takes seconds to import.
    from srepa_ds.commands.train import train
    from srepa_ds.config.experiment import load_config

    for config, *overrides in runs:
        assert train(load_config(Path(config), overrides))


def train_in_a_folder_that_goes_away(config: str, folder: str, *overrides: str) -> str | None:
    """Trains while the run's folder is removed at the third step; returns the message, if any."""
    from srepa_ds.commands.train import train
    from srepa_ds.config.experiment import load_config
    from srepa_ds.distributed import ranks
    from srepa_ds.engine import Engine
    from srepa_ds.errors import OutputError

    step = Engine.step

    def removing(engine, *args, **kwargs):
        report = step(engine, *args, **kwargs)
        if engine.step_count == 3 and ranks.rank() == 0:
            shutil.rmtree(folder)
        return report

    Engine.step = removing
    try:
        train(load_config(Path(config), [f"run.folder={folder}", *overrides]))
    except OutputError as error:
        return str(error)
    return None


def train_on_faulty_data(config: str, spans: list[list[int]], *overrides: str) -> str | None:
    """Trains with a codec that makes some samples' latents infinite, as broken memory would.

    `spans` are positions in the data, each from its first to before its second. Returns the
    message if training gives up.
    """
    from srepa_ds.codec.identity import IdentityCodec
    from srepa_ds.codec.table import LATENT_CODECS
    from srepa_ds.errors import DivergedError

    class FaultyCodec(IdentityCodec):
        """Encodes pixels as themselves, except inside the spans."""

        def encode(self, batch, *, seed):
            """Returns infinite latents inside the spans."""
            latents = super().encode(batch, seed=seed)
            for first, end in spans:
                inside = (batch.positions >= first) & (batch.positions < end)
                latents[inside] = torch.inf
            return latents

    LATENT_CODECS["identity"] = lambda *_: FaultyCodec()
    try:
        train_runs([config, *overrides])
    except DivergedError as error:
        return str(error)
    return None
