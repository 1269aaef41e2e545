"""The flow loss on images that training does not see, at fixed times and with fixed noise.

It is the curve to compare runs by: one number without the noise of sampling.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from srepa_ds.codec.latent_codec import LatentCodec
from srepa_ds.config.sections import MonitorConfig
from srepa_ds.data.batch import Batch
from srepa_ds.data.contents import IndexedFile
from srepa_ds.data.shards import Parts, ShardDataset
from srepa_ds.distributed import ranks
from srepa_ds.distributed.ranks import Rank
from srepa_ds.encoders.teacher import Teacher
from srepa_ds.errors import DataError
from srepa_ds.interpolant import Interpolant, flow_loss
from srepa_ds.model.variants import SiTConfig
from srepa_ds.noise import NoiseStream, normal
from srepa_ds.sampling.state import SamplingModel
from srepa_ds.training.latent_fit import fitting_latent_shape

# Training and the report take draws 0 and 1 of these noise streams.
_DRAW = 2
_SEED = 0
"""Not the run's: runs with other seeds are compared at the same times and noise."""


class HeldoutLoss:
    """Measures the flow loss of a model on the same samples, times and noise each time."""

    def __init__(
        self,
        config: MonitorConfig,
        folder: Path,
        *,
        model: SiTConfig,
        codec: LatentCodec,
        interpolant: Interpolant,
        teacher: Teacher | None,
        rank: Rank,
    ):
        """Takes the `teacher` of the class token, for a model that carries one.

        Raises DataError for data that do not fit the model.
        """
        whole = ShardDataset(folder)
        found = (fitting_latent_shape(whole, codec), whole.num_classes)
        expected = (model.latent_shape, model.num_classes)
        if found != expected:
            raise DataError(
                f"{folder} gives latents of shape {found[0]} in {found[1]} classes, but the model "
                f"takes {expected[0]} in {expected[1]}; correct monitor.heldout"
            )
        if teacher is not None:
            whole.require_images("the teacher of the class token looks at images")
        reads_moments = codec.reads_moments and whole.latents is not None
        parts = Parts(images=teacher is not None or not reads_moments, moments=reads_moments)
        self._dataset = ShardDataset(folder, parts=parts)
        self._codec = codec
        self._interpolant = interpolant
        self._teacher = teacher
        self._rank = rank
        self._batch_size = config.heldout_batch_size
        self._count = min(config.num_heldout, len(whole))

    @property
    def indexed_files(self) -> tuple[IndexedFile, ...]:
        """The hash that the index gives for each file."""
        return self._dataset.indexed_files

    def measure(self, model: SamplingModel) -> float:
        """Returns the mean over the held-out samples. Collective.

        Sample i of n is noised at time (i + 1/2) / n of a fixed shuffle, so that times cover the
        unit interval evenly. Ranks take equally many batches.
        """
        total = torch.zeros(2, dtype=torch.float64, device=self._rank.device)
        for rows in self._rows_of_this_rank():
            inside = rows < self._count
            # A rank that cannot read its share must not leave the others waiting.
            batch = ranks.together(self._read, rows.clamp(max=self._count - 1))
            losses = self._losses(model, batch)[inside]
            total += torch.tensor([float(losses.sum()), float(inside.sum())]).to(total)
        sums = ranks.summed(total)
        return float(sums[0] / sums[1])

    def _rows_of_this_rank(self) -> Iterator[Int64[Tensor, " batch"]]:
        size, world = self._batch_size, self._rank.world_size
        for start in range(0, self._count, size * world):
            yield torch.arange(size) + start + size * self._rank.number

    def _read(self, rows: Int64[Tensor, " batch"]) -> Batch:
        samples = rows * len(self._dataset) // self._count
        return self._dataset.read(samples, positions=rows)

    def _losses(self, model: SamplingModel, batch: Batch) -> Float[Tensor, " batch"]:
        t = self._times()[batch.positions]
        batch = batch.to(self._rank.device)
        clean = self._codec.encode(batch, seed=_SEED)
        t = t.to(clean)
        gaussian = normal(
            _SEED, NoiseStream.NOISE, batch.positions, tuple(clean.shape[1:]), draw=_DRAW
        )
        noised = self._interpolant.noised(clean, gaussian.to(clean), t)
        output = model(noised.x_t, t, batch.labels, cls_t=self._class_tokens(batch, t))
        return flow_loss(output.velocity.float(), noised.velocity)

    def _times(self) -> Float[Tensor, " samples"]:
        """Returns the time of each sample."""
        ids = torch.arange(self._count)
        order = normal(_SEED, NoiseStream.TIME, ids, draw=_DRAW).argsort(stable=True)
        times = torch.empty(self._count)
        times[order] = (ids + 0.5) / self._count
        return times

    def _class_tokens(self, batch: Batch, t: Tensor) -> Tensor | None:
        if self._teacher is None:
            return None
        tokens = self._teacher.tokens(batch.pixels).cls
        assert tokens is not None
        gaussian = normal(
            _SEED, NoiseStream.CLS_NOISE, batch.positions, tuple(tokens.shape[1:]), draw=_DRAW
        )
        return self._interpolant.noised(tokens.float(), gaussian.to(tokens.device), t).x_t
