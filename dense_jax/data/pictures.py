"""Opens pictures of untrusted bytes; a wrong one gives an error of one line."""

import dataclasses
import io
import pathlib
import re
from collections.abc import Mapping

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from dense_jax.errors import UserError

# Suffixes and formats of pictures. Pillow would open others too, some by starting other programs.
SUFFIXES = (
    ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"
)  # fmt: skip
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
_BITS_PER_SAMPLE = 258  # tag of TIFF
_SUBFILE_TYPE = 254  # tag of TIFF; bit 0 marks a smaller view of another page
_ORIENTATION = 274  # tag of TIFF and EXIF; 1 is upright


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image as it is stored.

    Attributes:
      pixels: uint8 [H, W, 3] RGB.
      orientation: how viewers turn it, as EXIF numbers it; 1 is not at all.
    """

    pixels: np.ndarray
    orientation: int


def decode_image(data: bytes, path: pathlib.Path | str) -> Picture:
    """Decodes an image; ``path`` is for messages.

    Raises:
      UserError: the bytes are not a complete image with 8 bits per channel.
    """
    image, orientation = open_picture(data, path)
    bits = image.tag_v2.get(_BITS_PER_SAMPLE, 8) if isinstance(image, TiffImageFile) else 8
    if image.format == "PNG":
        bits = data[24]  # the depth in its header
    if np.max(bits) > 8:  # Pillow would keep the upper byte
        raise UserError(f"{path}: the image has more than 8 bits per channel; convert it to 8 bits")
    return Picture(np.asarray(as_rgb(image, path)), orientation)


def as_rgb(image: Image.Image, path: pathlib.Path | str) -> Image.Image:
    """Converts an image to 8-bit RGB; ``path`` is for messages.

    Raises:
      UserError: it has more than 8 bits per channel, which Pillow would clip.
    """
    if image.mode.startswith(("I", "F")):
        raise UserError(f"{path}: the image has more than 8 bits per channel; convert it to 8 bits")
    return image.convert("RGB")


def open_picture(data: bytes, path: pathlib.Path | str) -> tuple[Image.Image, int]:
    """Opens and decodes a picture of one of `FORMATS`; ``path`` is for messages.

    Returns:
      The picture as stored and its orientation. Pillow turns a TIFF by itself.

    Raises:
      UserError: it is of another format, damaged, too large, or has several pages.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if (pages := _pages(image)) > 1:
            raise UserError(
                f"{path}: the file holds {pages} pages, and only the first would be used; split it "
                "into one file for each"
            )
        turned = image.tag_v2.get(_ORIENTATION) if isinstance(image, TiffImageFile) else None
        image.load()
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: {too_large(error)}") from None
    except UserError:
        raise
    except Exception as error:  # Pillow fails in any way on damaged bytes
        reason = "truncated" if "truncated" in str(error) else "not an image or damaged"
        raise UserError(f"{path}: the file is {reason}; restore or remove it") from None
    return image, orientation_of(image) if turned is None else _checked(turned)


def orientation_of(image: Image.Image) -> int:
    """Returns the EXIF orientation of a picture that is not a TIFF; 1 where it has none."""
    try:
        return _checked(image.getexif().get(_ORIENTATION))
    except Exception:  # Pillow fails in any way on damaged metadata; the pixels are good
        return 1


def _checked(orientation: object) -> int:
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def turned_in_words(orientations: Mapping[str, int]) -> list[str]:
    """Returns a line on the images, by name, that viewers show turned; none without any."""
    turned = {name: number for name, number in orientations.items() if number != 1}
    if not turned:
        return []
    shown = ", ".join(f"{name}: {number}" for name, number in list(turned.items())[:3])
    return [
        f"{len(turned)} {'images carry' if len(turned) > 1 else 'image carries'} an EXIF"
        f" orientation ({shown}{', ...' if len(turned) > 3 else ''}) that is not applied, except to"
        " TIFF: viewers show the image turned, so labels drawn in one do not fit; save images"
        " upright and without it (mogrify -auto-orient)"
    ]


def too_large(error: Image.DecompressionBombError) -> str:
    """Returns what is wrong with an image beyond Pillow's limit, and the remedy."""
    numbers = re.findall(r"\d+", str(error))
    size = f"{int(numbers[0]):,} pixels" if numbers else "too many pixels"
    limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
    return f"the image is too large ({size}; {limit:,} are read); cut it into parts"


def _pages(image: Image.Image) -> int:
    """Returns the number of pictures in a file; smaller views of the first are none.

    Phones add such views to a JPEG, and programs for maps to a TIFF.
    """
    if image.format == "MPO":
        return 1
    frames = getattr(image, "n_frames", 1)
    if frames == 1 or not isinstance(image, TiffImageFile):
        return frames
    size, pages = image.size, 1
    for number in range(1, frames):
        image.seek(number)
        is_marked = bool(image.tag_v2.get(_SUBFILE_TYPE, 0) & 1)
        pages += not _is_view(image.size, size, is_marked)
    image.seek(0)
    return pages


def _is_view(size: tuple[int, int], whole: tuple[int, int], is_marked: bool) -> bool:
    """Whether a page is smaller, and has the same sides but for rounding or is marked as a view."""
    if size == whole or size[0] > whole[0] or size[1] > whole[1]:
        return False
    return is_marked or abs(size[0] * whole[1] - size[1] * whole[0]) <= max(whole)
