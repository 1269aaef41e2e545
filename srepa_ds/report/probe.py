"""Real images, and the same noised: what a run's teachers and its student see when compared."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from srepa_ds import noise
from srepa_ds.codec.latent_codec import LatentCodec
from srepa_ds.codec.table import build_codec
from srepa_ds.config.experiment import Config
from srepa_ds.data.batch import Batch
from srepa_ds.data.shards import ShardDataset
from srepa_ds.errors import DataError
from srepa_ds.interpolant import INTERPOLANTS
from srepa_ds.noise import NoiseStream
from srepa_ds.schema import validated
from srepa_ds.training.latent_fit import fitting_latent_shape
from srepa_ds.weights.exported import ExportedModel

NUM_IMAGES = 32
NUM_SHOWN = 3
NOISE_DRAW = 1
"""Training draws noise with draw 0, by sample counters that run through the same numbers."""


@dataclass(frozen=True)
class Probe:
    """Real images, the same noised at time `t`, and the places of those shown."""

    batch: Batch
    x_t: Float[Tensor, "images channels height width"]
    t: float
    shown: Int64[Tensor, " shown"]
    codec: LatentCodec

    @cached_property
    def noised(self) -> UInt8[Tensor, "images height width 3"]:
        """Returns `x_t` decoded to pictures."""
        return self.codec.decode(self.x_t)


@dataclass(frozen=True)
class Pictures:
    """Real images without a student that sees them, and the places of those shown."""

    batch: Batch
    shown: Int64[Tensor, " shown"]


def experiment_of(config: Config, exported: ExportedModel) -> Config:
    """Returns the experiment that an exported model was trained by.

    Without cross-checks: the files that training used may not be here.
    """
    return validated(Config, exported.config, source=str(config.weights_folder))


class Prober:
    """Reads images of a data set and noises them for a model."""

    def __init__(
        self,
        config: Config,
        exported: ExportedModel,
        real: ShardDataset,
        *,
        t: float,
        device: torch.device,
        setting: str = "evaluate.reference",
    ):
        """Builds the model's codec; `setting` names the images.

        Raises DataError if they do not fit the model.
        """
        self._experiment = experiment_of(config, exported)
        self._codec = build_codec(self._experiment.codec.as_used_here(config.codec), device=device)
        _check_fit(self._experiment, self._codec, real, setting)
        self._real, self._t, self._device = real, t, device

    def __call__(self, indices: Int64[Tensor, " images"]) -> Probe:
        """Returns the images `indices`, with noise keyed by them."""
        batch = self._real.read(indices).to(self._device)
        experiment = self._experiment
        clean = self._codec.encode(batch, seed=experiment.run.seed)
        gaussian = noise.normal(
            experiment.run.seed,
            NoiseStream.NOISE,
            batch.sample_ids,
            tuple(clean.shape[1:]),
            draw=NOISE_DRAW,
        )
        path = INTERPOLANTS[experiment.objective.interpolant.path]
        times = torch.full((len(batch),), self._t, device=self._device)
        x_t = path.noised(clean, gaussian, times).x_t
        return Probe(batch, x_t, self._t, places_shown(len(batch)), self._codec)


def probe(
    config: Config,
    exported: ExportedModel,
    real: ShardDataset,
    *,
    t: float,
    device: torch.device,
) -> Probe:
    """Returns images spread over the classes of `real`, with noise keyed by their index there.

    Raises DataError if they do not fit the model.
    """
    prober = Prober(config, exported, real, t=t, device=device)
    return prober(spread_over_classes(real.labels, NUM_IMAGES))


def _check_fit(experiment: Config, codec: LatentCodec, real: ShardDataset, setting: str) -> None:
    found = (fitting_latent_shape(real, codec), real.num_classes)
    expected = (experiment.model.latent_shape, experiment.model.num_classes)
    if found != expected:
        raise DataError(
            f"{real.folder} gives latents of shape {found[0]} in {found[1]} classes, but the model "
            f"takes {expected[0]} in {expected[1]}; set {setting} to data that fits it"
        )


def spread_over_classes(labels: Int64[Tensor, " samples"], count: int) -> Tensor:
    """Returns the indices of at most `count` samples, evenly spread over the classes."""
    by_class = labels.argsort(stable=True)
    return by_class[_spread(len(labels), min(count, len(labels)))]


def places_shown(count: int) -> Int64[Tensor, " shown"]:
    """Returns the places of the images to show, of a batch of `count`."""
    return _spread(count, min(NUM_SHOWN, count))


def _spread(length: int, count: int) -> Tensor:
    """Returns the middles of `count` equal parts of range(length)."""
    return ((2 * torch.arange(count) + 1) * length) // (2 * count)
