"""The parts of a data set, `train` and `heldout`, and the pieces of the source that make each."""

from dataclasses import dataclass

from jaxtyping import Int64
from torch import Tensor

from srepa_ds.data.shard_index import DatasetDescription
from srepa_ds.data.sources.source import Source
from srepa_ds.data.split import stratified_split
from srepa_ds.errors import DataError
from srepa_ds.preparation.config import PrepareConfig
from srepa_ds.schema import to_tree

_PLACES = ("path", "root")
"""The fields of sources that say where they lie."""


@dataclass(frozen=True)
class Part:
    """One part of the data set."""

    name: str
    indices: Int64[Tensor, " samples"]
    """The samples of the source, in rising order."""
    description: DatasetDescription
    images_per_shard: int

    @property
    def num_shards(self) -> int:
        """Pieces of the source; each becomes a shard unless none of its images can be read."""
        return -(-len(self.indices) // self.images_per_shard)

    def num_images(self, number: int) -> int:
        """Returns the number of samples in one piece."""
        start = number * self.images_per_shard
        return min(self.images_per_shard, len(self.indices) - start)

    def of_shard(self, number: int) -> list[int]:
        """Returns the source's samples in one piece."""
        start = number * self.images_per_shard
        return self.indices[start : start + self.images_per_shard].tolist()


def parts_of(config: PrepareConfig, source: Source) -> list[Part]:
    """Returns the parts; raises DataError if one would be empty."""
    split = stratified_split(
        source.labels, holdout_fraction=config.holdout_fraction, seed=config.seed
    )
    indices = {"train": split.train}
    if config.holdout_fraction > 0:
        indices["heldout"] = split.heldout
    for name, chosen in indices.items():
        if len(chosen) == 0:
            raise DataError(
                f"holdout_fraction {config.holdout_fraction} leaves no image for {name}: the "
                f"source '{config.source.kind}' holds {len(source.labels)}; choose another one"
            )
    return [
        Part(name, chosen, _described(config, source, name), config.images_per_shard)
        for name, chosen in indices.items()
    ]


def _described(config: PrepareConfig, source: Source, part: str) -> DatasetDescription:
    # Where the source lies, and how the work is shared, changes no byte.
    tree = to_tree(config)
    own = {name: value for name, value in tree["source"].items() if name not in _PLACES}
    settings = {
        "source": {**own, "fingerprint": source.fingerprint},
        **{name: tree[name] for name in ("image_size", "holdout_fraction", "seed")},
        "samples_per_shard": config.images_per_shard,
        "part": part,
    }
    return DatasetDescription(
        source=settings,
        image_shape=(3, config.image_size, config.image_size),
        class_names=source.class_names,
        class_ids=source.class_ids,
        pixels=config.pixels,
    )
