"""Checks that a data set's latents are those of the codec."""

from srepa_ds.codec.latent_codec import LatentCodec
from srepa_ds.data.shards import ShardDataset
from srepa_ds.errors import DataError
from srepa_ds.trees import differences


def fitting_latent_shape(dataset: ShardDataset, codec: LatentCodec) -> tuple[int, int, int]:
    """Returns (channels, height, width) of the latents that the codec gives for a data set.

    Stored ones, or those it makes of the images. Raises DataError if it can do neither, or if the
    stored latents are another codec's.
    """
    stored = dataset.latents
    if not codec.reads_moments or stored is None:
        if dataset.index.pixels is None:
            raise DataError(
                f"{dataset.folder} holds latents and no images, which the identity codec trains "
                "on; set codec to the one that the latents were made with"
            )
        return codec.latent_shape(dataset.image_shape)
    # An empty identity fits all: such a codec does not know what it reads.
    found = differences(stored.codec, codec.identity) if codec.identity else []
    if found:
        words = [f"{d.path} is {d.old!r} there and {d.new!r} here" for d in found]
        raise DataError(
            f"{dataset.folder}: its latents were made by another codec ({'; '.join(words)}); set "
            "codec.weights to the VAE they were encoded with, or prepare the data with this one"
        )
    return stored.latent_shape
