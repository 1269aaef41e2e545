"""Contact sheets: a few images of each class in one picture."""

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor

_GAP = 2
_SMALLEST_TILE = 48


class SheetBuilder:
    """Builds a contact sheet from batches of images; keeps only the images it shows.

    Rows are classes (evenly spaced ones if there are many), columns the first images of each; a
    set of one class fills all rows.
    """

    def __init__(self, labels: Int64[Tensor, " samples"], *, rows: int = 10, columns: int = 10):
        """Plans the sheet for the `labels` of the whole set."""
        classes = labels.unique().tolist()
        chosen = np.linspace(0, len(classes) - 1, min(rows, len(classes))).round().astype(int)
        self._columns = columns
        self._wanted = columns if len(classes) > 1 else rows * columns
        self._tiles: dict[int, list[np.ndarray]] = {classes[index]: [] for index in chosen}

    @property
    def wanted(self) -> dict[int, int]:
        """The number of images of each class that the sheet still has room for."""
        return {label: self._wanted - len(tiles) for label, tiles in self._tiles.items()}

    def wants(self, labels: Int64[Tensor, " batch"]) -> bool:
        """Returns whether the sheet has room for an image of one of `labels`."""
        return any(self.wanted.get(label, 0) > 0 for label in set(labels.tolist()))

    def add(
        self, images: UInt8[Tensor, "batch height width 3"], labels: Int64[Tensor, " batch"]
    ) -> None:
        """Adds the images of a batch that the sheet still has room for."""
        for image, label in zip(images, labels.tolist(), strict=True):
            tiles = self._tiles.get(label)
            if tiles is not None and len(tiles) < self._wanted:
                tiles.append(image.numpy().copy())

    def image(self) -> Image.Image:
        """Returns the sheet, white where there was no image; small images are enlarged."""
        rows = [
            tiles[start : start + self._columns]
            for _, tiles in sorted(self._tiles.items())
            for start in range(0, max(len(tiles), 1), self._columns)
        ]
        first = next(tile for row in rows for tile in row)
        height, width = first.shape[:2]
        zoom = max(1, -(-_SMALLEST_TILE // min(height, width)))
        cell_height, cell_width = zoom * height + _GAP, zoom * width + _GAP
        size = (len(rows) * cell_height + _GAP, self._columns * cell_width + _GAP, 3)
        canvas = np.full(size, 255, dtype=np.uint8)
        for row, tiles in enumerate(rows):
            for column, tile in enumerate(tiles):
                enlarged = tile.repeat(zoom, axis=0).repeat(zoom, axis=1)
                top, left = row * cell_height + _GAP, column * cell_width + _GAP
                canvas[top : top + zoom * height, left : left + zoom * width] = enlarged
        return Image.fromarray(canvas)
