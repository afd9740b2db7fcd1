"""Reads image and label files, and says in one line what is wrong with one.

A label file holds one number a pixel: a grey or palette PNG (palette indices are the numbers) or
a MATLAB file of the Semantic Boundaries Dataset. Here the numbers become class ids. An instance
file holds the number of an object instead, 0 for none, and may need 16 bits.
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

_MAT_COMPRESSED = 15  # kind of a variable
_MOST_OBJECTS = 2**16 - 1  # what 16 bits hold
_VAL_SHARE = 0.2

_PILLOW_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclasses.dataclass(frozen=True)
class Pair:
    """An image and its label file, either of which may turn out to be missing."""

    split: str
    name: str
    image: pathlib.Path
    label: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Sample:
    """A pair that was read and found right.

    Attributes:
      image: the bytes of the image file.
      label: class ids, uint8 [H, W].
      digest: a hash of the image's pixels.
      instances: object numbers in 0..65535, [H, W], 0 = no object; None if there are none.
    """

    image: bytes
    label: np.ndarray
    digest: str
    instances: np.ndarray | None = None


def read_pair(pair: Pair, classes: ClassTable) -> Sample:
    """Reads and decodes both files in full.

    Raises:
      UserError: a file is missing, empty, truncated, no picture, no label, or has a value that is
        not in the class table; or the two differ in size.
    """
    image_bytes, pixels = read_image(pair.image)
    label = read_label(pair.label, classes)
    check_size(label, pair.label, pixels, pair.image)
    return Sample(image_bytes, label, digest(pixels))


@dataclasses.dataclass(frozen=True)
class Files:
    """A dataset as it lies on disk: what a dataset module finds in ``data_dir``.

    Attributes:
      read: turns a pair into a sample; raises UserError for files that are wrong.
      has_instances: the samples of ``read`` have instances.
      options: what, besides files and classes, the samples depend on.
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
    """Returns an image file as it is, and its pixels as of `decode_image`.

    Raises:
      UserError: the file is missing, empty, damaged or no image of 8 bits.
    """
    data = _read(path)
    return data, decode_image(data, path)


def read_label(path: pathlib.Path, classes: ClassTable) -> np.ndarray:
    """Returns the class ids of a label file, uint8 [H, W].

    Raises:
      UserError: the file is missing, empty, damaged, no label, or has a value that is not in the
        class table.
    """
    return _to_ids(_read_label_values(path), classes, path)


def check_size(
    label: np.ndarray, path: pathlib.Path, pixels: np.ndarray, image: pathlib.Path
) -> None:
    """Refuses a label, read from ``path``, that is not as large as its image.

    Raises:
      UserError: names the file and both sizes.
    """
    if pixels.shape[:2] != label.shape:
        raise UserError(
            f"{path}: the label is {_size(label)} but its image {image.name} is"
            f" {_size(pixels)}; make the label at the size of the image"
        )


def read_instances(path: pathlib.Path) -> np.ndarray:
    """Reads object numbers from a grey PNG of 8 or 16 bits, 0 = no object.

    Returns:
      uint16 [H, W].

    Raises:
      UserError: the file is missing, empty, damaged, or its values are not object numbers.
    """
    data = _read(path)
    image = _open(data, path)
    remedy = "save object numbers 1, 2, ... (0 = none) as a grey PNG of 8 or 16 bits"
    if image.format == "JPEG":
        raise UserError(f"{path}: JPEG changes object numbers; {remedy}")
    if image.mode not in ("L", "P", "I", "I;16"):
        raise UserError(f"{path}: the file holds {image.mode}, not object numbers; {remedy}")
    if image.format == "PNG" and image.mode == "L" and data[24] < 8:  # the depth in its header
        raise UserError(f"{path}: readers stretch the {data[24]}-bit greys to 0..255; {remedy}")
    values = np.asarray(image)
    if values.min() < 0 or values.max() > _MOST_OBJECTS:
        raise UserError(f"{path}: object number {values.max()} needs more than 16 bits; {remedy}")
    if values.max() in (255, _MOST_OBJECTS) and len(np.unique(values)) <= 2:
        raise UserError(
            f"{path}: one mask of value {values.max()} for all objects, not a number for each;"
            f" {remedy}"
        )
    return values.astype(np.uint16)


def read_mask(path: pathlib.Path) -> np.ndarray:
    """Reads the mask of one object: a picture with 0 and at most one other value.

    Returns:
      bool [H, W].

    Raises:
      UserError: the file is missing, empty, damaged, or has more values.
    """
    image = _open(_read(path), path)
    values = np.asarray(image if image.mode in ("1", "L", "P") else image.convert("L"))
    wrong = np.setdiff1d(values, (0, values.max()))
    if len(wrong):
        raise UserError(
            f"{path}: a mask has 0 and one other value, this one also {wrong[0]}; save it"
            " uncompressed or as PNG, without smoothing"
        )
    return values > 0


def digest(array: np.ndarray) -> str:
    """Returns a short hash of the values of an array."""
    return hashlib.blake2b(array.tobytes(), digest_size=8).hexdigest()


def decode_image(data: bytes, path: pathlib.Path | str) -> np.ndarray:
    """Decodes an image to uint8 [H, W, 3] RGB; ``path`` is for the message.

    Raises:
      UserError: the bytes are not a whole image of 8 bits a channel.
    """
    image = _open(data, path)
    if image.mode.startswith(("I", "F")):
        raise UserError(f"{path}: the image has more than 8 bits a channel; convert it to 8 bits")
    return np.asarray(image.convert("RGB"))


def decode_label(data: bytes) -> np.ndarray:
    """Decodes what `encode_label` wrote."""
    return np.asarray(Image.open(io.BytesIO(data)))


def encode_label(label: np.ndarray) -> bytes:
    """Encodes class ids, uint8 [H, W], as a grey PNG."""
    buffer = io.BytesIO()
    Image.fromarray(label).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def encode_instances(instances: np.ndarray) -> bytes:
    """Encodes object numbers in 0..65535, [H, W], as a grey PNG of 16 bits."""
    buffer = io.BytesIO()
    Image.fromarray(instances.astype(np.uint16)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def decode_instances(data: bytes) -> np.ndarray:
    """Decodes what `encode_instances` wrote to int32 [H, W]."""
    return np.asarray(Image.open(io.BytesIO(data))).astype(np.int32)


def pairs_in(split: str, images: pathlib.Path, labels: pathlib.Path) -> list[Pair]:
    """Pairs the pictures of two folders by name, in the order of names.

    A label without an image, or the other way round, is paired with the path that is missing, so
    that reading it says so. A folder that is missing gives no pairs.
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
    """Moves every fifth pair, picked by a hash of its name, to val; at least one of two."""
    order = sorted(pairs, key=lambda pair: hashlib.blake2b(pair.name.encode()).digest())
    val = {pair.name for pair in order[: max(round(_VAL_SHARE * len(order)), len(order) > 1)]}
    train = [pair for pair in pairs if pair.name not in val]
    return train + [dataclasses.replace(pair, split="val") for pair in pairs if pair.name in val]


def pictures(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the picture files of a folder in the order of names; none if it is missing."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)


def find_folder(
    *candidates: pathlib.Path,
    holding: Sequence[str],
    dataset: str,
    remedy: str = "give the folder that holds it with --data-dir",
) -> pathlib.Path:
    """Returns the first candidate folder that holds all of the named entries.

    Raises:
      UserError: none does; the message names what was looked for.
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
        raise UserError(f"{path}: cannot be read ({error.strerror}); mend or remove it") from None
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
    """Returns the numbers in a label file, [H, W]."""
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
            f"{path}: a label of 16 bits or more (values {low} to {high}), which usually holds"
            f" object numbers and not classes; {remedy}"
        )
    if image.mode not in ("1", "L", "P"):
        raise UserError(f"{path}: the label holds colours ({image.mode}), not class ids; {remedy}")
    if image.format == "PNG" and image.mode == "L" and data[24] < 8:  # the depth in its header
        raise UserError(f"{path}: readers stretch the {data[24]}-bit greys to 0..255; {remedy}")
    return np.asarray(image, np.uint8)


def _read_sbd(path: pathlib.Path) -> np.ndarray:
    data = _read(path)
    wrong = UserError(f"{path}: not a class file of SBD, or damaged; restore it")
    try:
        _check_mat(data)
        values = np.asarray(scipy.io.loadmat(io.BytesIO(data))["GTcls"]["Segmentation"][0, 0])
    except Exception:  # SciPy parses damaged bytes until anything at all goes wrong
        raise wrong from None
    if values.ndim != 2 or not values.size or values.dtype != np.uint8:
        raise wrong
    return values


def _check_mat(data: bytes) -> None:
    """Raises some exception if a variable of a MATLAB file (version 5) is cut or damaged.

    SciPy does not look at the checksums, and may end the process by a segmentation fault.
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
            " mend the label or the class table"
        )
    return lookup[values].astype(np.uint8)


def _ranges(values: Sequence[int]) -> str:
    """Returns "0..10" for numbers in a row, else the numbers."""
    values = sorted(values)
    if len(values) > 2 and values[-1] - values[0] == len(values) - 1:
        return f"{values[0]}..{values[-1]}"
    return ", ".join(map(str, values))


def _size(array: np.ndarray) -> str:
    return f"{array.shape[1]}x{array.shape[0]}"
