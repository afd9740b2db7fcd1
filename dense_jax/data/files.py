"""Reads image and label files; a wrong file gives an error of one line.

A label file has one number for each pixel: a grey or palette PNG (palette indices are the numbers)
or a MATLAB file of the Semantic Boundaries Dataset. Reading maps the numbers to class ids. Where
somebody chose colours in the class table, a picture in these colours is a label as well. An
instance file has the number of an object for each pixel, 0 for none, and may need 16 bits.
"""

import codecs
import collections
import dataclasses
import glob
import hashlib
import io
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image

from dense_jax.data.classes import ClassTable
from dense_jax.data.objects import Objects
from dense_jax.data.pictures import SUFFIXES, Picture, decode_image, open_picture
from dense_jax.data.sbd import read_class_map
from dense_jax.errors import UserError

_LOSSLESS = {None, "raw", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits", "lzma",
             "zstd", "group3", "group4", "tiff_ccitt", "tiff_raw_16"}  # fmt: skip

_MOST_COLOURS = 256  # of a label: one for each class, and void
_MOST_OBJECTS = 2**16 - 1  # the largest number in 16 bits
_NEAR = 8  # between a channel of two colours that are meant to be one
_VAL_SHARE = 0.2


@dataclasses.dataclass(frozen=True)
class Pair:
    """The paths of an image, its label and perhaps its object numbers; files may be missing."""

    split: str
    name: str
    image: pathlib.Path
    label: pathlib.Path
    objects: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class Sample:
    """The content of a valid pair.

    Attributes:
      image: the bytes of the image file.
      label: class ids, uint8 [H, W].
      digest: a hash of the image's pixels.
      instances: object numbers in 0..65535, [H, W], 0 = no object; None for a dataset without them.
      annotations: the objects, where they may overlap; None for a dataset without such.
      image_id: number of the image in the file of the annotations.
      orientation: how viewers turn the image, as EXIF numbers it; 1 is not at all.
    """

    image: bytes
    label: np.ndarray
    digest: str
    instances: np.ndarray | None = None
    orientation: int = 1
    annotations: Objects | None = None
    image_id: int = 0


class NoClassError(UserError):
    """A label has values or colours that are no class; ``values`` or ``colours`` are all it has."""

    def __init__(
        self,
        message: str,
        values: Sequence[int] = (),
        colours: Sequence[tuple[int, int, int]] = (),
    ):
        super().__init__(message)
        self.values, self.colours = list(values), list(colours)


def read_pair(pair: Pair, classes: ClassTable) -> Sample:
    """Reads and decodes both files in full.

    Raises:
      UserError: a file is missing, empty, truncated, not an image or not a label, a value is not in
        the class table, or the sizes differ.
    """
    image_bytes, image = read_image(pair.image)
    label = read_label(pair.label, classes)
    check_size(label, pair.label, image, pair.image)
    return Sample(image_bytes, label, digest(image.pixels), orientation=image.orientation)


@dataclasses.dataclass(frozen=True)
class Files:
    """A dataset on disk: what a dataset module finds in ``data_dir``.

    Attributes:
      name, classes, description: see `dense_jax.data.dataset.Dataset`.
      pairs: the files of all splits.
      read: reads a pair; raises UserError for a wrong file.
      has_instances: whether the samples have instances.
      has_annotations: whether the samples have annotations.
      category_ids: see `dense_jax.data.dataset.Dataset`.
      notes: warnings about files that no pair shows.
      options: what the samples depend on besides files and classes.
      absent: see `dense_jax.data.dataset.Dataset`.
    """

    name: str
    classes: ClassTable
    pairs: Sequence[Pair]
    description: str
    read: Callable[[Pair, ClassTable], Sample] = read_pair
    has_instances: bool = False
    has_annotations: bool = False
    category_ids: Sequence[int] = ()
    notes: Sequence[str] = ()
    options: tuple[int, ...] = ()
    absent: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def splits(self) -> list[str]:
        """The names of the splits, in the order of the pairs."""
        return list(dict.fromkeys(pair.split for pair in self.pairs))


def read_image(path: pathlib.Path) -> tuple[bytes, Picture]:
    """Returns the bytes of an image file and what they hold; see `decode_image`.

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
    values, palette = _read_label_values(path, classes)
    if palette is not None:
        _check_greys(values, palette, classes, path)
    labels = _to_ids(values, classes, path)
    if palette is not None:
        _check_palette(values, palette, classes, path)
    return labels


def check_size(
    label: np.ndarray, path: pathlib.Path, image: Picture, image_path: pathlib.Path
) -> None:
    """Refuses a label, read from ``path``, whose size is not that of its image.

    Raises:
      UserError: with the file and both sizes.
    """
    if image.pixels.shape[:2] != label.shape:
        is_turned = image.orientation >= 5 and image.pixels.shape[1::-1] == label.shape
        raise UserError(
            f"{path}: the label is {_size(label)} but its image {image_path.name} is"
            f" {_size(image.pixels)}"
            + (
                f" with EXIF orientation {image.orientation}, which viewers apply; save the image"
                " upright and without it (mogrify -auto-orient)"
                if is_turned
                else "; make the label at the size of the image"
            )
        )


def read_instances(path: pathlib.Path, void: int | None = None) -> np.ndarray:
    """Reads object numbers from an 8-bit or 16-bit grey PNG, 0 = no object.

    Args:
      path: of the PNG.
      void: a number that stands for pixels of no object.

    Returns:
      uint16 [H, W].

    Raises:
      UserError: the file is missing, empty or damaged, or its values are not object numbers.
    """
    data, image = _open_numbers(path)
    remedy = "save object numbers 1, 2, ... (0 = none) as an 8-bit or 16-bit grey PNG"
    if image.format == "JPEG":
        raise UserError(f"{path}: JPEG changes object numbers; {remedy}")
    if image.mode not in ("L", "P", "I", "I;16", "I;16B"):
        raise UserError(f"{path}: the file has {image.mode} values, not object numbers; {remedy}")
    if image.format == "PNG" and image.mode == "L" and data[24] < 8:  # the depth in its header
        raise UserError(f"{path}: readers stretch the {data[24]}-bit greys to 0..255; {remedy}")
    values = np.asarray(image)
    if values.min() < 0 or values.max() > _MOST_OBJECTS:
        raise UserError(f"{path}: object number {values.max()} needs more than 16 bits; {remedy}")
    if void is not None:
        return np.where(values == void, 0, values).astype(np.uint16)
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
    _, image = _open_numbers(path)
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

    Raises:
      UserError: two files of a folder have one name, with different suffixes.
    """
    found = _by_name(labels)
    pairs = [
        Pair(split, name, path, found.pop(name, labels / f"{name}.png"))
        for name, path in _by_name(images).items()
    ]
    return pairs + [
        Pair(split, name, images / f"{name}.jpg", label) for name, label in found.items()
    ]


def _by_name(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns the pictures of a folder by their names without suffix."""
    found: dict[str, pathlib.Path] = {}
    for path in pictures(folder):
        if (other := found.setdefault(path.stem, path)) != path:
            raise UserError(
                f"{folder}: {other.name} and {path.name} have one name; remove one of them"
            )
    return found


def split_by_hash(pairs: Sequence[Pair]) -> list[Pair]:
    """Moves every fifth pair, chosen by a hash of its name, to val; at least one of two."""
    order = sorted(pairs, key=lambda pair: hashlib.blake2b(pair.name.encode()).digest())
    val = {pair.name for pair in order[: max(round(_VAL_SHARE * len(order)), len(order) > 1)]}
    train = [pair for pair in pairs if pair.name not in val]
    return train + [dataclasses.replace(pair, split="val") for pair in pairs if pair.name in val]


def pictures(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the image files of a folder in the order of names; none if it is missing.

    Names that begin with a dot are passed over, such as those that a Mac leaves beside files.

    Raises:
      UserError: a name is not UTF-8.
    """
    found = pictures_of_any_name(folder)
    for path in found:
        check_name(path)
    return found


def pictures_of_any_name(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the same as `pictures`, also those whose names `check_name` refuses."""
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )


def check_name(path: pathlib.Path) -> None:
    """Refuses a file whose name is not UTF-8: no other program would write it the same.

    Raises:
      UserError: with the name.
    """
    try:
        path.name.encode()
    except UnicodeEncodeError:
        name = os.fsencode(path.name)
        raise UserError(f"{path.parent}: the file name {name!r} is not UTF-8; rename it") from None


def read_text(path: pathlib.Path) -> str:
    """Reads a text file in UTF-8, with or without a byte order mark, or in UTF-16 with one.

    Raises:
      UserError: it cannot be read, or is in another encoding.
    """
    data = _read(path)
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None


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
    if path.exists() and not path.is_file():  # a pipe would wait for ever
        raise UserError(f"{path}: not a file; remove it")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        others = sorted(p.name for p in path.parent.glob(f"{glob.escape(path.stem)}.*"))
        if others:
            raise UserError(
                f"{path}: the file is missing, and {others[0]} is of a kind that is not read; save "
                f"it as {path.suffix} ({', '.join(SUFFIXES)} are read)"
            ) from None
        raise UserError(f"{path}: the file is missing; add it or remove its partner") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); repair or remove it") from None
    if not data:
        raise UserError(f"{path}: the file is empty (0 bytes); restore or remove it")
    return data


def _check_greys(
    values: np.ndarray, palette: np.ndarray, classes: ClassTable, path: pathlib.Path
) -> None:
    """Refuses a palette that has the values of the class table as greys, at other numbers.

    Programs that save fewer colours number them anew. Black and white alone tell nothing: a mask of
    0 and 1 may have them to be seen.
    """
    numbers = np.flatnonzero(np.bincount(values.ravel())[: len(palette)]).tolist()
    greys = {number: int(palette[number][0]) for number in numbers}
    is_grey = all(palette[number].max() == palette[number].min() for number in numbers)
    if not is_grey or not {*greys.values()} <= {*classes.values, *classes.void_values}:
        return
    drawn = dict(zip(classes.values, classes.colours, strict=True))
    moved = [
        (i, grey)
        for i, grey in greys.items()
        if grey not in (i, 0, 255) and drawn.get(i) != (grey, grey, grey)
    ]
    if moved:
        raise UserError(
            f"{path}: value {moved[0][0]} has the grey {moved[0][1]} in the palette, so the program"
            " that saved the file may have numbered the classes anew; save class ids as an 8-bit"
            " grey PNG"
        )


def _check_palette(
    values: np.ndarray, palette: np.ndarray, classes: ClassTable, path: pathlib.Path
) -> None:
    """Refuses a palette that gives classes other colours than those chosen in the class table.

    The colours of a class may differ a little from the table. A palette of greys may mean nothing.
    """
    if not classes.has_chosen_colours:
        return
    known = [i for i, value in enumerate(classes.values) if value < len(palette)]
    used = [i for i in known if np.any(values == classes.values[i])]
    drawn = {i: palette[classes.values[i]].tolist() for i in known}
    shown = {i: (red, green, blue) for i, (red, green, blue) in drawn.items()}
    class_of = {colour: i for i, colour in enumerate(classes.colours)}
    near = _nearest(shown, classes.colours)
    for i in used:
        other = class_of.get(shown[i], near[i])
        if classes.colours[other] != classes.colours[i]:
            raise UserError(
                f"{path}: value {classes.values[i]} has the colour {shown[i]}, which is"
                f" {classes.names[other]} in the class table, where {classes.values[i]} is"
                f" {classes.names[i]} with {classes.colours[i]}; correct one"
            )
    coloured = [i for i in used if len(set(shown[i])) > 1]
    if coloured and not any(_is_near(shown[i], classes.colours[i]) for i in known):
        i = coloured[0]
        raise UserError(
            f"{path}: no class has its colour of the class table: value {classes.values[i]} has"
            f" {shown[i]}, but {classes.names[i]} is {classes.colours[i]}; correct one, or save"
            " class ids as an 8-bit grey PNG"
        )


def _nearest(
    shown: Mapping[int, tuple[int, int, int]], colours: Sequence[tuple[int, int, int]]
) -> dict[int, int]:
    """Returns the class that the colour of each is near to; its own where that is not sure."""
    near = {
        i: [j for j, other in enumerate(colours) if _is_near(colour, other)]
        for i, colour in shown.items()
    }
    claims = collections.Counter(j for found in near.values() for j in found)
    return {
        i: found[0] if len(found) == 1 and claims[found[0]] == 1 else i for i, found in near.items()
    }


def _is_near(colour: Sequence[int], other: Sequence[int]) -> bool:
    return all(abs(a - b) <= _NEAR for a, b in zip(colour, other, strict=True))


def _read_label_values(
    path: pathlib.Path, classes: ClassTable
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns the values of a label file, [H, W], and its palette [N, 3] if it has one."""
    if path.suffix == ".mat":
        return read_class_map(_read(path), path), None
    data, image = _open_numbers(path)
    remedy = "save class ids as an 8-bit grey or palette PNG"
    if image.format == "JPEG":
        raise UserError(f"{path}: JPEG changes label values; {remedy}")
    if image.format == "TIFF" and image.info.get("compression") not in _LOSSLESS:
        raise UserError(
            f"{path}: {image.info['compression']} compression changes label values; {remedy}"
        )
    if image.mode.startswith(("I", "F")):
        numbers = np.asarray(image)
        low, high = numbers.min(), numbers.max()
        raise UserError(
            f"{path}: a label with 16 bits or more (values {low} to {high}), which usually has"
            f" object numbers and not classes; {remedy}"
        )
    if image.mode in ("RGB", "RGBA"):
        return _values_of_colours(image, classes, path), None
    if image.mode not in ("1", "L", "P"):
        raise UserError(f"{path}: the label has colours ({image.mode}), not class ids; {remedy}")
    if image.format == "PNG" and image.mode == "L" and data[24] < 8:  # the depth in its header
        raise UserError(f"{path}: readers stretch the {data[24]}-bit greys to 0..255; {remedy}")
    values, palette = np.asarray(image, np.uint8), None
    if image.mode == "P" and (colours := image.getpalette("RGB")):
        palette = np.array(colours, np.uint8).reshape(-1, 3)
        used = np.flatnonzero(np.bincount(values.ravel())[: len(palette)])
        if image.format == "GIF" and np.any(palette[used] != used[:, None]):
            raise UserError(f"{path}: programs number the values of a GIF anew; {remedy}")
    return values, palette


def _values_of_colours(image: Image.Image, classes: ClassTable, path: pathlib.Path) -> np.ndarray:
    """Returns the values, [H, W], of a picture in the colours of the class table."""
    if image.mode == "RGBA" and image.getchannel("A").getextrema() != (255, 255):
        raise UserError(f"{path}: a label that is transparent in parts; save it without alpha")
    codes = np.asarray(image.convert("RGB"), np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    found, places = np.unique(codes, return_inverse=True)
    colours = [(c >> 16, c >> 8 & 255, c & 255) for c in found[: _MOST_COLOURS + 1].tolist()]
    seen = colours if len(colours) <= _MOST_COLOURS else ()
    if classes.has_chosen_colours and not classes.has_own_colours:
        colour = collections.Counter(classes.colours).most_common(1)[0][0]
        first, second, *_ = (
            name for name, c in zip(classes.names, classes.colours, strict=True) if c == colour
        )
        raise UserError(
            f"{path}: the label has colours, and {first} and {second} both are {colour} in the"
            " class table; give each class a colour of its own"
        )
    if not classes.has_own_colours:
        raise NoClassError(
            f"{path}: the label has colours ({image.mode}), not class ids; save class ids as an"
            " 8-bit grey or palette PNG, or give each class its colour in the class table",
            colours=seen,
        )
    value_of = classes.value_of_colour()
    if wrong := [colour for colour in colours if colour not in value_of]:
        raise NoClassError(
            f"{path}: label colour {wrong[0]} is not in the class table"
            f"{f', nor are {len(wrong) - 1} others' if wrong[1:] else ''}; correct the label or the"
            " class table, and save labels without smoothing",
            colours=seen,
        )
    return np.array([value_of[colour] for colour in colours], np.uint8)[places].reshape(codes.shape)


def _open_numbers(path: pathlib.Path) -> tuple[bytes, Image.Image]:
    """Returns the bytes of a label, a mask or object numbers, and the picture in them."""
    data = _read(path)
    image, orientation = open_picture(data, path)
    if orientation != 1:  # some programs apply it and some do not
        raise UserError(
            f"{path}: a label with EXIF orientation {orientation}, so that nobody knows which way"
            " it fits its image; save it as it lies on the image's pixels, without orientation"
        )
    return data, image


def _to_ids(values: np.ndarray, classes: ClassTable, path: pathlib.Path) -> np.ndarray:
    counts = np.bincount(values.ravel(), minlength=256)
    lookup = classes.lookup()
    wrong = np.flatnonzero((counts > 0) & (lookup < 0))
    if len(wrong):
        shown = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
        share = counts[wrong].sum() / values.size
        raise NoClassError(
            f"{path}: label value {shown} ({share:.2%} of the pixels) is neither a class"
            f" ({_ranges(classes.values)}) nor void ({_ranges(classes.void_values) or 'none'});"
            " correct the label or the class table",
            np.flatnonzero(counts).tolist(),
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
