"""What a finished data set holds, and whether a sample of it can be read as training reads it."""

from collections.abc import Iterator

import torch
from jaxtyping import Int64
from torch import Tensor

from srepa_ds.codec.latent_codec import LatentCodec
from srepa_ds.data.batch import Batch
from srepa_ds.data.shard_index import ShardIndex
from srepa_ds.data.shards import ShardDataset
from srepa_ds.data.unfinished import progress_in
from srepa_ds.errors import DataError, listed
from srepa_ds.preparation.agreement import difference

MOST_READ = 256
_MOST_ENCODED = 16
_AT_ONCE = 32


def spread(count: int, total: int) -> Int64[Tensor, " chosen"]:
    """Returns the numbers of `count` of `total` samples, or of all, evenly spread."""
    chosen = min(count, total)
    return torch.arange(chosen) * total // max(chosen, 1)


def check_sample(dataset: ShardDataset) -> int:
    """Decodes images and latents of a sample that has a part in every shard; returns its size.

    Raises DataError for an image that cannot be decoded, or latents that cannot be.
    """
    indices = _sample_of(dataset)
    for part in indices.split(_AT_ONCE):
        batch = dataset.read(part)
        _check_moments(dataset, batch)
        if dataset.latents is not None and dataset.latents.mirrored:
            turned = torch.ones(len(part), dtype=torch.bool)
            _check_moments(dataset, dataset.read(part, mirrored=turned))
    return len(indices)


def check_codec(dataset: ShardDataset, codec: LatentCodec) -> int:
    """Compares latents with those that `codec` makes of the images; returns of how many.

    0 if the data set holds no latents or no images. Raises DataError if the latents are of another
    codec.
    """
    latents = dataset.latents
    if latents is None:
        return 0
    expected = codec.latent_shape(dataset.image_shape)
    if latents.latent_shape != expected:
        raise DataError(
            f"{dataset.folder}: its latents have the shape {latents.latent_shape}, but those of "
            f"the VAE have {expected}; give the VAE that encoded them"
        )
    if latents.codec.get("kind") == "vae" and latents.codec != codec.identity:
        raise DataError(
            f"{dataset.folder}: its latents are of the codec {latents.codec}, but the VAE is "
            f"{codec.identity}; give the VAE that encoded them"
        )
    if dataset.index.pixels is None:
        return 0
    indices = spread(_MOST_ENCODED, len(dataset))
    for mirrored in (False, True) if latents.mirrored else (False,):
        _compare(dataset, codec, indices, mirrored=mirrored)
    return len(indices)


def summary(
    dataset: ShardDataset, *, read: int, encoded: int | None, every_class: bool
) -> Iterator[str]:
    """Yields the lines that describe a data set.

    `read` samples were decoded, `encoded` compared with a codec (None if there was none).
    """
    index, labels = dataset.index, dataset.labels
    stored = "no images" if index.pixels is None else f"images stored as {index.pixels}"
    height, width = index.image_shape[1:]
    name = dataset.folder.resolve().name
    yield f"{name}: {len(dataset):,} samples, {stored} ({width} x {height} px)"
    yield f"  {read} decoded, some of each of {len(index.shards)} shards"
    yield from _about_latents(dataset, encoded)
    if index.num_skipped:
        yield f"  left out when it was prepared: {index.num_skipped:,} (skipped.jsonl)"
    yield from _about_classes(index, labels.bincount(minlength=index.num_classes), every_class)


def _sample_of(dataset: ShardDataset) -> Int64[Tensor, " chosen"]:
    counts = torch.tensor([entry.num_samples for entry in dataset.index.shards])
    first = counts.cumsum(0) - counts
    return torch.cat((spread(MOST_READ, len(dataset)), first)).unique()


def _check_moments(dataset: ShardDataset, batch: Batch) -> None:
    if batch.moments is None:
        return
    is_bad = ~batch.moments.isfinite().flatten(1).all(1)
    if batch.latent_values == "moments":
        is_bad |= (batch.moments.chunk(2, dim=1)[1] < 0).flatten(1).any(1)
    if is_bad.any():
        named = listed(map(str, batch.sample_ids[is_bad].tolist()))
        raise DataError(
            f"{dataset.folder}: the latents of sample(s) {named} are not finite, or their standard "
            "deviations are negative; prepare them again"
        )


def _compare(
    dataset: ShardDataset, codec: LatentCodec, indices: Int64[Tensor, " chosen"], *, mirrored: bool
) -> None:
    batch = dataset.read(indices, mirrored=torch.full((len(indices),), mirrored))
    assert batch.moments is not None
    # One by one: large images need not fit into memory together.
    encoded = torch.cat([codec.moments(image[None]).cpu() for image in batch.pixels])
    reason = difference(batch.moments, encoded, batch.latent_values)
    if reason is not None:
        which = "latents of mirrored images" if mirrored else "latents"
        raise DataError(
            f"{dataset.folder}: its {which} are not those that the VAE makes of its images: "
            f"{reason}; give the VAE that encoded them, or prepare them again"
        )


def _about_latents(dataset: ShardDataset, encoded: int | None) -> Iterator[str]:
    latents = dataset.latents
    if latents is None:
        # An index without latents beside receipts of latents: their preparation was ended.
        written = progress_in(dataset.folder).latents
        total = len(dataset.index.shards)
        if written:
            yield f"  latents of {written} of {total} shards; their preparation is not finished"
        return
    shape = " x ".join(map(str, latents.latent_shape))
    also = ", also of mirrored images" if latents.mirrored else ""
    yield f"  latents {shape}, {latents.values} in {latents.dtype}{also}"
    if encoded is not None:
        why = "" if encoded else ", since there are no images; only the identity was"
        yield f"  {encoded} compared with the VAE{why}"


def _about_classes(
    index: ShardIndex, counts: Int64[Tensor, " classes"], every_class: bool
) -> Iterator[str]:
    low, high = int(counts.min()), int(counts.max())
    median = counts.double().quantile(0.5).item()
    yield f"  {len(counts):,} classes of {low:,} to {high:,} samples, median {median:,.6g}"
    names = [_name_of(index, number) for number in range(len(counts))]
    empty = [name for name, count in zip(names, counts.tolist(), strict=True) if count == 0]
    if empty:
        yield f"  classes without samples: {listed(empty)}"
    if every_class:
        yield from (f"    {n}: {count:,}" for n, count in zip(names, counts.tolist(), strict=True))


def _name_of(index: ShardIndex, number: int) -> str:
    """Returns `3 tench`, or `3 n01440764 tench` where classes have ids of their own."""
    own = index.class_ids[number] if index.class_ids else ""
    words = dict.fromkeys(word for word in (str(number), own, index.class_names[number]) if word)
    return " ".join(words)
