"""Decodes the contents of image files, by PIL alone.

Of JPEGs of 500 x 375, torchvision and simplejpeg gave PIL's pixels in all of 378 files tried, of
every sampling of colours, progressive or not. But an image for ADM's crop took 1.07 ms by
simplejpeg and 1.16 ms by PIL, of the 5.5 ms that decoding, crop and WebP take together. So PIL's
pixels come from PIL, whichever libjpeg the others are built with. Nothing is decoded at a smaller
scale, which would change pixels.

A photograph's orientation in EXIF is not applied, as in ADM and REPA (PIL itself applies a TIFF's).
Of an animation the first image is taken.
"""

import io
import re
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from srepa_ds.errors import DataError

MOST_PIXELS = 1 << 28
"""A larger image is refused before memory is taken for it; 1 GiB holds this many pixels."""

IMAGE_SUFFIXES = frozenset(
    f".{ending}" for ending in "bmp gif jfif jpeg jpg pbm pgm png ppm tif tiff webp".split()
)
"""Endings of image files, in lower case: those that torchvision's `ImageFolder` takes, and GIF."""


class _Jpeg(JpegImageFile):
    """A JPEG whose EXIF is not read: it changes no pixel, and PIL warns of each damaged one."""

    def getexif(self) -> Image.Exif:
        """Returns an empty EXIF."""
        return Image.Exif()


# A closed list: `Image.open` would also start ghostscript for PostScript, and compares sizes with a
# setting of the whole process, of which it warns once per image.
_READERS: tuple[tuple[str, re.Pattern[bytes], type[ImageFile.ImageFile]], ...] = (
    ("JPEG", re.compile(rb"\xff\xd8\xff"), _Jpeg),
    ("PNG", re.compile(rb"\x89PNG\r\n\x1a\n"), PngImageFile),
    ("WebP", re.compile(rb"RIFF....WEBP", re.DOTALL), WebPImageFile),
    ("GIF", re.compile(rb"GIF8[79]a"), GifImageFile),
    ("BMP", re.compile(rb"BM"), BmpImageFile),
    ("TIFF", re.compile(rb"II[*+]\0|MM\0[*+]"), TiffImageFile),
    ("PPM", re.compile(rb"P[1-6]\s"), PpmImageFile),
)

_END_OF_JPEG = b"\xff\xd9"
_MOST_MISSING = 0.1
_BLOCK = 8

# Markers of JPEG: of frames, of a scan, and those without a segment (among pixels: 00, restarts).
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SCAN = 0xDA
_ALONE = frozenset((0x00, 0x01, 0xFF, *range(0xD0, 0xDA)))


def decoded(contents: bytes) -> Image.Image:
    """Returns the image in a file's contents, read in full.

    The contents decide the format, not the name. A JPEG that lacks its last bytes passes if they
    decide at most a tenth of its pixels; libjpeg makes these plain. Raises DataError for other
    damaged files, for other formats, and beyond `MOST_PIXELS`.
    """
    reader = next((cls for _, start, cls in _READERS if start.match(contents)), None)
    if reader is None:
        known = ", ".join(name for name, _, _ in _READERS)
        what = "it is empty" if not contents else f"its contents are none of {known}"
        raise DataError(f"cannot be decoded ({what})")
    try:
        return _loaded(reader, contents)
    except (DataError, MemoryError):
        raise
    # PIL promises no type of exception for damaged files; a fuzzer met four.
    except Exception as error:
        if isinstance(error, OSError) and reader is _Jpeg:
            completed = _completed(contents)
            if completed is not None:
                return completed
        reason = str(error) or type(error).__name__
        raise DataError(f"cannot be decoded ({reason})") from error


def _loaded(reader: type[ImageFile.ImageFile], contents: bytes) -> Image.Image:
    image = reader(io.BytesIO(contents))
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise DataError(f"has {width} x {height} pixels; at most {MOST_PIXELS:,} are decoded")
    image.load()
    return image


def _completed(jpeg: bytes) -> Image.Image | None:
    """Returns the image in a JPEG without its end; None if the missing bytes decide too much.

    PIL's `LOAD_TRUNCATED_IMAGES` would let half a file pass, in all threads. Here the end is
    added, and other continuations show where the missing bytes begin.
    """
    jpeg = jpeg.rstrip(b"\xff")
    if not _reaches_full_precision(jpeg):
        return None
    try:
        image = _loaded(_Jpeg, jpeg + _END_OF_JPEG)
        others = [_loaded(_Jpeg, jpeg + more + _END_OF_JPEG) for more in _continuations(jpeg)]
    except (OSError, SyntaxError):
        return None
    return image if _missing(image, others) <= _MOST_MISSING else None


def _continuations(jpeg: bytes) -> tuple[bytes, bytes]:
    """Returns arbitrary bytes; and the same as the next restart interval, if there are any."""
    arbitrary = np.random.default_rng(0).integers(0, 255, 256, dtype=np.uint8).tobytes()
    markers = re.findall(rb"\xff([\xd0-\xd7])", jpeg)
    number = (markers[-1][0] - 0xD0 + 1) % 8 if markers else 0
    return arbitrary, bytes([0xFF, 0xD0 + number]) + arbitrary


def _missing(image: Image.Image, others: list[Image.Image]) -> float:
    """Returns the share of pixels from the first that differs in `others`, block by block."""
    pixels = np.asarray(image)
    different = np.any([pixels != np.asarray(other) for other in others], axis=0)
    different = different.reshape(image.height, image.width, -1).any(axis=2)
    if not different.any():
        return 0.0
    top = int(different.any(axis=1).argmax())
    # Blocks of the same row before the first that differs are there. They have 8 rows, or 16.
    left = int(different[top : top + _BLOCK].any(axis=0).argmax())
    return ((image.height - top) * image.width - _BLOCK * left) / different.size


def _reaches_full_precision(jpeg: bytes) -> bool:
    """Returns whether scans of the last bits of all components are there, or have begun.

    In a progressive JPEG many others precede them. Source: ITU T.81, B.1.1 and B.2.
    """
    components, complete = set(), set()
    for marker, segment in _segments(jpeg):
        if marker in _FRAMES:
            components = set(segment[6::3])
        elif marker == _SCAN and segment:
            end = 1 + 2 * segment[0]
            selected = segment[end : end + 3]
            if len(selected) == 3 and selected[1] == 63 and selected[2] & 15 == 0:
                complete |= set(segment[1:end:2])
    return bool(components) and components <= complete


def _segments(jpeg: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields each marker of a JPEG that has a segment, with what it holds."""
    place = 2
    while (place := jpeg.find(b"\xff", place)) >= 0 and place + 4 <= len(jpeg):
        marker = jpeg[place + 1]
        if marker in _ALONE:
            place += 1
            continue
        length = int.from_bytes(jpeg[place + 2 : place + 4], "big")
        yield marker, jpeg[place + 4 : place + 2 + length]
        place += 2 + length
