"""The experiment that tests of drawing begin with."""

import pytest

from srepa_ds.config.experiment import Config, load_config

QUICK = ("sample.num_steps=2", "sample.batch_size=4", "sample.num_samples=6")


@pytest.fixture
def configured(small_world, tmp_path):
    """Returns a function that loads the configuration with overrides, in its own folder."""

    def load(*overrides: str) -> Config:
        own = (f"run.folder={tmp_path}/run", *QUICK, *overrides)
        return load_config(small_world.config, own)

    return load
