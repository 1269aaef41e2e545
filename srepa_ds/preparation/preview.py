"""The picture of a data set that lies beside its shards."""

import io
from math import prod

import torch

from srepa_ds.data.images import image_grid
from srepa_ds.data.prepared_folder import PreparedFolder
from srepa_ds.data.shard_index import ShardIndex
from srepa_ds.data.shards import Parts, ShardDataset

PREVIEW_NAME = "preview.png"
_COLUMNS = 20
_IMAGES = 200
_PIXELS = 1200
# 200 images of 256 px; of larger ones there are fewer.
_MOST_BYTES = 40_000_000


def write_preview(folder: PreparedFolder, index: ShardIndex) -> None:
    """Writes images that are spread evenly over the data set; none if it holds only latents."""
    if index.pixels is None:
        return
    dataset = ShardDataset(folder.folder, parts=Parts(moments=False), index=index)
    fitting = max(1, _MOST_BYTES // prod(index.image_shape))
    count = min(_IMAGES, fitting, len(dataset))
    images = dataset.read(torch.arange(count) * len(dataset) // count).pixels
    scale = max(1, _PIXELS // (_COLUMNS * images.shape[3]))
    contents = io.BytesIO()
    image_grid(images, columns=_COLUMNS, scale=scale).save(contents, format="PNG")
    folder.write(PREVIEW_NAME, contents.getvalue())
