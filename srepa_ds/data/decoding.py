"""Decodes the contents of image files."""

import io

from PIL import Image

from srepa_ds.errors import DataError


def decoded(contents: bytes) -> Image.Image:
    """Returns the image in a file's contents, read in full; raises DataError if it cannot be."""
    try:
        image = Image.open(io.BytesIO(contents))
        image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot be decoded ({error})") from error
    return image
