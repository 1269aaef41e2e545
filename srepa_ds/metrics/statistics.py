"""Mean and covariance of features, streamed in float64 and summed over ranks."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from srepa_ds.errors import DataError


@dataclass(frozen=True)
class FeatureStatistics:
    """Count, float64 mean, and float64 scatter: the sum of outer products of the deviations."""

    count: int
    mean: Float[Tensor, " width"]
    scatter: Float[Tensor, "width width"]

    @classmethod
    def empty(cls, width: int, *, device: torch.device | str = "cpu") -> "FeatureStatistics":
        """Returns the statistics of no features."""
        mean = torch.zeros(width, dtype=torch.float64, device=device)
        return cls(0, mean, mean.new_zeros(width, width))

    @classmethod
    def of_gaussian(
        cls, mean: Float[Tensor, " width"], covariance: Float[Tensor, "width width"]
    ) -> "FeatureStatistics":
        """Returns statistics of that mean and covariance, of a number of images not known."""
        return cls(2, mean.double(), covariance.double())

    def updated(self, features: Float[Tensor, "batch width"]) -> "FeatureStatistics":
        """Returns the statistics with a batch of features (any float dtype) added.

        Source: Chan, Golub and LeVeque (1983).
        """
        if len(features) == 0:
            return self
        features = features.to(self.mean)
        batch_mean = features.mean(dim=0)
        count = self.count + len(features)
        shift = batch_mean - self.mean
        # The shift of the mean enters as one more row, so the scatter is touched only once.
        between = shift * (self.count * len(features) / count) ** 0.5
        rows = torch.cat((features - batch_mean, between[None]))
        mean = self.mean + shift * (len(features) / count)
        return replace(
            self, count=count, mean=mean, scatter=torch.addmm(self.scatter, rows.T, rows)
        )

    def merged(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """Returns the statistics of both sets together."""
        if self.count == 0 or other.count == 0:
            return self if other.count == 0 else other
        count = self.count + other.count
        shift = other.mean - self.mean
        between = torch.outer(shift, shift) * (self.count * other.count / count)
        mean = self.mean + shift * (other.count / count)
        return replace(self, count=count, mean=mean, scatter=self.scatter + other.scatter + between)

    def covariance(self) -> Float[Tensor, "width width"]:
        """Returns the unbiased float64 covariance (ddof 1); raises DataError below two features."""
        if self.count < 2:
            raise DataError(f"a covariance needs at least 2 images, got {self.count}")
        return self.scatter / (self.count - 1)

    def tensors(self, origin: Float[Tensor, " width"]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the count, sum and sum of outer products about `origin`, which add up over ranks.

        Their shapes are (), (width,) and (width, width), all float64. All ranks give the same
        `origin`; the closer to the mean, the less is lost to cancellation.
        """
        offset = self.mean - origin
        count = torch.tensor(float(self.count), dtype=torch.float64, device=self.mean.device)
        return count, self.count * offset, self.scatter + self.count * torch.outer(offset, offset)

    @classmethod
    def from_tensors(
        cls,
        count: Float[Tensor, ""],
        total: Float[Tensor, " width"],
        outer: Float[Tensor, "width width"],
        *,
        origin: Float[Tensor, " width"],
    ) -> "FeatureStatistics":
        """Returns the statistics that `tensors(origin)`, or a sum of several, was taken from."""
        number = round(count.item())
        if number == 0:
            return cls.empty(len(total), device=total.device)
        offset = total / number
        return cls(number, origin + offset, outer - number * torch.outer(offset, offset))

    def save(self, path: Path) -> None:
        """Writes a `.safetensors` file, or an `.npz` with `mu` and `sigma` as ADM names them."""
        if path.suffix == ".npz":
            sigma = self.covariance().cpu().numpy()
            np.savez(path, count=self.count, mu=self.mean.cpu().numpy(), sigma=sigma)
            return
        count = torch.tensor(self.count, dtype=torch.int64)
        tensors = {"count": count, "mean": self.mean.cpu(), "scatter": self.scatter.cpu()}
        save_file(tensors, path)

    @classmethod
    def load(cls, path: Path) -> "FeatureStatistics":
        """Returns the statistics of a file that `save` wrote.

        Raises DataError if the file is missing or holds something else.
        """
        try:
            found = cls._load_npz(path) if path.suffix == ".npz" else cls._load_safetensors(path)
            width = len(found.mean)
            if found.mean.ndim != 1 or found.scatter.shape != (width, width):
                raise ValueError("mean and covariance are not of one width")
            return found
        except FileNotFoundError as error:
            raise DataError(f"{path}: no such file; give the path of feature statistics") from error
        # A damaged file may raise anything: numpy and safetensors trust its headers.
        except Exception as error:
            raise DataError(
                f"{path}: holds no feature statistics ({error}); compute them again"
            ) from error

    @classmethod
    def _load_npz(cls, path: Path) -> "FeatureStatistics":
        with np.load(path, allow_pickle=False) as arrays:
            count = int(arrays["count"])
            mean = torch.from_numpy(arrays["mu"]).double()
            return cls(count, mean, torch.from_numpy(arrays["sigma"]).double() * (count - 1))

    @classmethod
    def _load_safetensors(cls, path: Path) -> "FeatureStatistics":
        tensors = load_file(path)
        return cls(int(tensors["count"]), tensors["mean"], tensors["scatter"])
