"""Reads image and label files; a wrong file gives an error of one line.

A label file has one number for each pixel: a grey or palette PNG (palette indices are the numbers)
or a MATLAB file of the Semantic Boundaries Dataset. Reading maps the numbers to class ids. An
instance file has the number of an object for each pixel, 0 for none, and may need 16 bits.
"""

import dataclasses
import hashlib
import io
import pathlib
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import scipy.io
from PIL import Image

from dense_jax.data.classes import ClassTable
from dense_jax.errors import UserError

_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

_MAT_COMPRESSED = 15  # type code of a compressed variable
_MOST_OBJECTS = 2**16 - 1  # the largest number in 16 bits
_VAL_SHARE = 0.2

_PILLOW_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclasses.dataclass(frozen=True)
class Pair:
    """The paths of an image and its label; either file may be missing."""

    split: str
    name: str
    image: pathlib.Path
    label: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Sample:
    """The content of a valid pair.

    Attributes:
      image: the bytes of the image file.
      label: class ids, uint8 [H, W].
      digest: a hash of the image's pixels.
      instances: object numbers in 0..65535, [H, W], 0 = no object; None for a dataset without them.
    """

    image: bytes
    label: np.ndarray
    digest: str
    instances: np.ndarray | None = None


def read_pair(pair: Pair, classes: ClassTable) -> Sample:
    """Reads and decodes both files in full.

    Raises:
      UserError: a file is missing, empty, truncated, not an image or not a label, a value is not in
        the class table, or the sizes differ.
    """
    image_bytes, pixels = read_image(pair.image)
    label = read_label(pair.label, classes)
    check_size(label, pair.label, pixels, pair.image)
    return Sample(image_bytes, label, digest(pixels))


@dataclasses.dataclass(frozen=True)
class Files:
    """A dataset on disk: what a dataset module finds in ``data_dir``.

    Attributes:
      name, classes, description: see `dense_jax.data.dataset.Dataset`.
      pairs: the files of all splits.
      read: reads a pair; raises UserError for a wrong file.
      has_instances: whether the samples have instances.
      options: what the samples depend on besides files and classes.
      absent: see `dense_jax.data.dataset.Dataset`.
    """

    name: str
    classes: ClassTable
    pairs: Sequence[Pair]
    description: str
    read: Callable[[Pair, ClassTable], Sample] = read_pair
    has_instances: bool = False
    options: tuple[int, ...] = ()
    absent: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def splits(self) -> list[str]:
        """The names of the splits, in the order of the pairs."""
        return list(dict.fromkeys(pair.split for pair in self.pairs))


def read_image(path: pathlib.Path) -> tuple[bytes, np.ndarray]:
    """Returns the bytes of an image file and its pixels; see `decode_image`.

    Raises:
      UserError: the file is missing, empty, damaged or not an 8-bit image.
    """
    data = _read(path)
    return data, decode_image(data, path)


def read_label(path: pathlib.Path, classes: ClassTable) -> np.ndarray:
    """Returns the class ids of a label file, uint8 [H, W].

    Raises:
      UserError: the file is missing, empty, damaged or not a label, or a value is not in the class
        table.
    """
    return _to_ids(_read_label_values(path), classes, path)


def check_size(
    label: np.ndarray, path: pathlib.Path, pixels: np.ndarray, image: pathlib.Path
) -> None:
    """Refuses a label, read from ``path``, whose size is not that of its image.

    Raises:
      UserError: with the file and both sizes.
    """
    if pixels.shape[:2] != label.shape:
        raise UserError(
            f"{path}: the label is {_size(label)} but its image {image.name} is"
            f" {_size(pixels)}; make the label at the size of the image"
        )


def read_instances(path: pathlib.Path) -> np.ndarray:
    """Reads object numbers from an 8-bit or 16-bit grey PNG, 0 = no object.

    Returns:
      uint16 [H, W].

    Raises:
      UserError: the file is missing, empty or damaged, or its values are not object numbers.
    """
    data = _read(path)
    image = _open(data, path)
    remedy = "save object numbers 1, 2, ... (0 = none) as an 8-bit or 16-bit grey PNG"
    if image.format == "JPEG":
        raise UserError(f"{path}: JPEG changes object numbers; {remedy}")
    if image.mode not in ("L", "P", "I", "I;16"):
        raise UserError(f"{path}: the file has {image.mode} values, not object numbers; {remedy}")
    if image.format == "PNG" and image.mode == "L" and data[24] < 8:  # the depth in its header
        raise UserError(f"{path}: readers stretch the {data[24]}-bit greys to 0..255; {remedy}")
    values = np.asarray(image)
    if values.min() < 0 or values.max() > _MOST_OBJECTS:
        raise UserError(f"{path}: object number {values.max()} needs more than 16 bits; {remedy}")
    if values.max() in (255, _MOST_OBJECTS) and len(np.unique(values)) <= 2:
        raise UserError(
            f"{path}: one mask of value {values.max()} for all objects, not one number for each;"
            f" {remedy}"
        )
    return values.astype(np.uint16)


def read_mask(path: pathlib.Path) -> np.ndarray:
    """Reads the mask of one object: an image with 0 and at most one other value.

    Returns:
      bool [H, W].

    Raises:
      UserError: the file is missing, empty or damaged, or has more values.
    """
    image = _open(_read(path), path)
    values = np.asarray(image if image.mode in ("1", "L", "P") else image.convert("L"))
    wrong = np.setdiff1d(values, (0, values.max()))
    if len(wrong):
        raise UserError(
            f"{path}: a mask has 0 and one other value, but this one also has {wrong[0]}; save it"
            " uncompressed or as PNG, without smoothing"
        )
    return values > 0


def digest(array: np.ndarray) -> str:
    """Returns a short hash of the values of an array."""
    return hashlib.blake2b(array.tobytes(), digest_size=8).hexdigest()


def decode_image(data: bytes, path: pathlib.Path | str) -> np.ndarray:
    """Decodes an image to uint8 [H, W, 3] RGB; ``path`` is for messages.

    Raises:
      UserError: the bytes are not a complete image with 8 bits per channel.
    """
    return np.asarray(as_rgb(_open(data, path), path))


def as_rgb(image: Image.Image, path: pathlib.Path | str) -> Image.Image:
    """Converts an image to 8-bit RGB; ``path`` is for messages.

    Raises:
      UserError: it has more than 8 bits per channel, which Pillow would clip.
    """
    if image.mode.startswith(("I", "F")):
        raise UserError(f"{path}: the image has more than 8 bits per channel; convert it to 8 bits")
    return image.convert("RGB")


def decode_label(data: bytes) -> np.ndarray:
    """Decodes the result of `encode_label`."""
    return np.asarray(Image.open(io.BytesIO(data)))


def encode_label(label: np.ndarray) -> bytes:
    """Encodes class ids, uint8 [H, W], as a grey PNG."""
    buffer = io.BytesIO()
    Image.fromarray(label).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def encode_instances(instances: np.ndarray) -> bytes:
    """Encodes object numbers in 0..65535, [H, W], as a 16-bit grey PNG."""
    buffer = io.BytesIO()
    Image.fromarray(instances.astype(np.uint16)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def decode_instances(data: bytes) -> np.ndarray:
    """Decodes the result of `encode_instances` to int32 [H, W]."""
    return np.asarray(Image.open(io.BytesIO(data))).astype(np.int32)


def pairs_in(split: str, images: pathlib.Path, labels: pathlib.Path) -> list[Pair]:
    """Pairs the images of two folders by name, in the order of names.

    A file without a partner is paired with the missing path, so that reading the pair reports it.
    A missing folder gives no pairs.
    """
    found = {path.stem: path for path in pictures(labels)}
    pairs = [
        Pair(split, path.stem, path, found.pop(path.stem, labels / f"{path.stem}.png"))
        for path in pictures(images)
    ]
    return pairs + [
        Pair(split, name, images / f"{name}.jpg", label) for name, label in found.items()
    ]


def split_by_hash(pairs: Sequence[Pair]) -> list[Pair]:
    """Moves every fifth pair, chosen by a hash of its name, to val; at least one of two."""
    order = sorted(pairs, key=lambda pair: hashlib.blake2b(pair.name.encode()).digest())
    val = {pair.name for pair in order[: max(round(_VAL_SHARE * len(order)), len(order) > 1)]}
    train = [pair for pair in pairs if pair.name not in val]
    return train + [dataclasses.replace(pair, split="val") for pair in pairs if pair.name in val]


def pictures(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the image files of a folder in the order of names; none if it is missing."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)


def find_folder(
    *candidates: pathlib.Path,
    holding: Sequence[str],
    dataset: str,
    remedy: str = "give the folder that holds it with --data-dir",
) -> pathlib.Path:
    """Returns the first candidate folder that contains all entries in `holding`.

    Raises:
      UserError: no folder does; the message lists the entries.
    """
    for folder in candidates:
        if all((folder / entry).exists() for entry in holding):
            return folder
    raise UserError(
        f"{candidates[0]}: no {dataset} dataset here (looked for {', '.join(holding)}); {remedy}"
    )


def _read(path: pathlib.Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: the file is missing; add it or remove its partner") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); repair or remove it") from None
    if not data:
        raise UserError(f"{path}: the file is empty (0 bytes); restore or remove it")
    return data


def _open(data: bytes, path: pathlib.Path | str) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except _PILLOW_ERRORS as error:
        reason = "truncated" if "truncated" in str(error) else "not an image or damaged"
        raise UserError(f"{path}: the file is {reason}; restore or remove it") from None
    return image


def _read_label_values(path: pathlib.Path) -> np.ndarray:
    """Returns the values of a label file, [H, W]."""
    if path.suffix == ".mat":
        return _read_sbd(path)
    data = _read(path)
    image = _open(data, path)
    remedy = "save class ids as an 8-bit grey or palette PNG"
    if image.format == "JPEG":
        raise UserError(f"{path}: JPEG changes label values; {remedy}")
    if image.mode.startswith(("I", "F")):
        low, high = image.getextrema()
        raise UserError(
            f"{path}: a label with 16 bits or more (values {low} to {high}), which usually has"
            f" object numbers and not classes; {remedy}"
        )
    if image.mode not in ("1", "L", "P"):
        raise UserError(f"{path}: the label has colours ({image.mode}), not class ids; {remedy}")
    if image.format == "PNG" and image.mode == "L" and data[24] < 8:  # the depth in its header
        raise UserError(f"{path}: readers stretch the {data[24]}-bit greys to 0..255; {remedy}")
    return np.asarray(image, np.uint8)


def _read_sbd(path: pathlib.Path) -> np.ndarray:
    data = _read(path)
    wrong = UserError(f"{path}: not a class file of SBD, or damaged; restore it")
    try:
        _check_mat(data)
        values = np.asarray(scipy.io.loadmat(io.BytesIO(data))["GTcls"]["Segmentation"][0, 0])
    except Exception:  # SciPy parses damaged bytes until it fails in any way
        raise wrong from None
    if values.ndim != 2 or not values.size or values.dtype != np.uint8:
        raise wrong
    return values


def _check_mat(data: bytes) -> None:
    """Raises some exception if a variable of a MATLAB file (version 5) is truncated or damaged.

    SciPy does not check the checksums and may end the process by a segmentation fault.
    """
    order = ">" if data[126:128] == b"MI" else "<"
    start = 128
    while start < len(data):
        kind, size = struct.unpack_from(f"{order}II", data, start)
        start += 8 + size
        if start > len(data):
            raise EOFError
        if kind == _MAT_COMPRESSED:
            zlib.decompress(data[start - size : start])


def _to_ids(values: np.ndarray, classes: ClassTable, path: pathlib.Path) -> np.ndarray:
    counts = np.bincount(values.ravel(), minlength=256)
    lookup = classes.lookup()
    wrong = np.flatnonzero((counts > 0) & (lookup < 0))
    if len(wrong):
        shown = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
        share = counts[wrong].sum() / values.size
        raise UserError(
            f"{path}: label value {shown} ({share:.2%} of the pixels) is neither a class"
            f" ({_ranges(classes.values)}) nor void ({_ranges(classes.void_values) or 'none'});"
            " correct the label or the class table"
        )
    return lookup[values].astype(np.uint8)


def _ranges(values: Sequence[int]) -> str:
    """Returns "0..10" for consecutive numbers, else the numbers."""
    values = sorted(values)
    if len(values) > 2 and values[-1] - values[0] == len(values) - 1:
        return f"{values[0]}..{values[-1]}"
    return ", ".join(map(str, values))


def _size(array: np.ndarray) -> str:
    return f"{array.shape[1]}x{array.shape[0]}"
