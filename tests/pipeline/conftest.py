"""Runs whose checkpoints are exported for diffusers: of pixels, and of a small VAE's latents."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from drawn_sets import drawn, images, save_checkpoint
from small_vae import write_vae

from srepa_ds.commands.export import export
from srepa_ds.config.experiment import Config, load_config

SAMPLER = (
    "sample.source=checkpoint",
    "sample.num_samples=6",
    "sample.batch_size=6",
    "sample.labels=[3, 0, 7]",
    "sample.seed=11",
    "sample.num_steps=5",
)
LATENT_SCALE = (0.5, 0.6, 0.7, 0.8)


@dataclass(frozen=True)
class Exported:
    """A run with a checkpoint, and its folder for diffusers."""

    folder: Path
    load: Callable[..., Config]
    """Returns the configuration with overrides."""

    def sampled(self, folder: Path, *overrides: str) -> np.ndarray:
        """Returns what `srepa-ds sample` draws of the checkpoint, (n, H, W, 3) uint8."""
        return images(drawn(self.load(*SAMPLER, f"sample.folder={folder}", *overrides)))


def exported(world, folder: Path, *overrides: str) -> Exported:
    own = (f"run.folder={folder}/run", "export.format=diffusers", *overrides)

    def load(*further: str) -> Config:
        return load_config(world.config, [*own, *further])

    save_checkpoint(load(), 5)
    return Exported(export(load()), load)


@pytest.fixture(scope="session")
def of_pixels(small_world, tmp_path_factory) -> Exported:
    return exported(small_world, tmp_path_factory.mktemp("pixels"))


@pytest.fixture(scope="session")
def of_latents(small_world, tmp_path_factory) -> Exported:
    folder = tmp_path_factory.mktemp("latents")
    vae = write_vae(folder / "vae")
    (vae / "modelling.py").write_text("raise AssertionError('code of a VAE has run')")
    return exported(
        small_world,
        folder,
        "alignments=[]",
        "model.in_channels=4",
        "model.input_size=8",
        "codec.kind=vae",
        f"codec.weights={vae}",
        f"codec.scale={list(LATENT_SCALE)}",
    )
