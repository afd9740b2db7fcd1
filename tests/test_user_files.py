"""Files as users have them: each odd one is read right, or named in one line with the remedy."""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import re
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from dense_jax.__main__ import expanded, main
from dense_jax.commands import check_data
from dense_jax.data import check, dataset, prepared
from dense_jax.data.classes import ClassTable
from dense_jax.data.datasets import folder as folders
from dense_jax.data.files import pictures, read_image, read_instances, read_label, read_mask
from dense_jax.data.pictures import decode_image
from dense_jax.errors import UserError
from dense_jax.infer.predictor import predict_folder
from dense_jax.train.config import RunConfig
from tests.test_predictor import CLASSES, PREDICTOR

NAMES = "ground\nred\nblue\n"


def scene(seed, num_classes=3):
    """A noisy image and its label, 12 x 16."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, num_classes, (12, 16), np.uint8)
    return rng.integers(0, 256, (12, 16, 3), np.uint8), label


@pytest.fixture
def root(tmp_path):
    """A right dataset of six images, to be spoilt."""
    for part in ("images", "labels"):
        (tmp_path / "data" / part).mkdir(parents=True)
    for i in range(6):
        for part, array in zip(("images", "labels"), scene(i), strict=True):
            Image.fromarray(array).save(tmp_path / f"data/{part}/s{i}.png")
    (tmp_path / "data/classes.txt").write_text(NAMES)
    return tmp_path / "data"


def report(root):
    return check.check_dataset("folder", root)


def names(root):
    return {pair.split: [] for pair in folders.find(root).pairs} | {
        split: [p.name for p in folders.find(root).pairs if p.split == split]
        for split in {p.split for p in folders.find(root).pairs}
    }


def test_the_dataset_is_right_before_it_is_spoilt(root):
    assert not report(root).errors


# Pictures.


@pytest.mark.parametrize("suffix", ["tif", "gif", "png", "webp"])
def test_several_pages_are_not_dropped(tmp_path, suffix):
    pages = [Image.fromarray(scene(i)[0]).convert("RGB") for i in range(3)]
    path = tmp_path / f"a.{suffix}"
    pages[0].save(path, save_all=True, append_images=pages[1:])
    for read in (read_image, lambda path: read_label(path, CLASSES)):
        with pytest.raises(UserError, match=r"the file holds 3 pages.*split it"):
            read(path)


def test_smaller_views_of_a_picture_are_no_pages(tmp_path):
    image = Image.fromarray(scene(0)[0])
    image.save(tmp_path / "a.tif", save_all=True, append_images=[image.resize((8, 6))])
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif")[1].pixels, scene(0)[0])


@pytest.mark.parametrize("size", [(24, 18), (16, 14), (8, 12), (12, 16)])
def test_pages_of_other_sizes_are_not_dropped(tmp_path, size):
    image = Image.fromarray(scene(0)[0])
    image.save(tmp_path / "a.tif", save_all=True, append_images=[image.resize(size)])
    with pytest.raises(UserError, match="the file holds 2 pages"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize(("size", "pages"), [((8, 8), 1), ((24, 24), 2)])
def test_marked_views_of_a_picture_may_have_other_sides(tmp_path, size, pages):
    image = Image.fromarray(scene(0)[0])
    view = image.resize(size)
    view.encoderinfo = {"tiffinfo": {254: 1}}
    image.save(tmp_path / "a.tif", save_all=True, append_images=[view])
    with pytest.raises(UserError) if pages > 1 else contextlib.nullcontext():
        read_image(tmp_path / "a.tif")


def png(values, depth, colour):
    """The bytes of a PNG of big-endian values [H, W, C]."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bits_a_channel_are_not_halved(colour, channels):
    values = np.full((4, 4, channels), 4000, ">u2")
    with pytest.raises(UserError, match=r"a\.png: the image has more than 8 bits per channel"):
        decode_image(png(values, 16, colour), "a.png")
    small = np.full((4, 4, channels), 40, np.uint8)
    assert decode_image(png(small, 8, colour), "a.png").pixels.shape == (4, 4, 3)


def tiff(label, order):
    """The bytes of a 16-bit grey TIFF."""
    mark = {"<": b"II*\0", ">": b"MM\0*"}[order]
    height, width = label.shape
    data = label.astype(f"{order}u2").tobytes()
    tags = [(256, 3, width), (257, 3, height), (258, 3, 16), (259, 3, 1), (262, 3, 1)]
    tags += [(273, 4, 8), (277, 3, 1), (278, 3, height), (279, 4, len(data))]
    table = struct.pack(f"{order}H", len(tags))
    for tag, kind, value in tags:
        table += struct.pack(f"{order}HHI", tag, kind, 1)
        form, numbers = ("HH", (value, 0)) if kind == 3 else ("I", (value,))
        table += struct.pack(f"{order}{form}", *numbers)
    return mark + struct.pack(f"{order}I", 8 + len(data)) + data + table + bytes(4)


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_labels_get_the_same_line_in_both_byte_orders(tmp_path, order):
    (tmp_path / "a.tif").write_bytes(tiff(scene(0)[1], order))
    with pytest.raises(UserError, match=r"16 bits or more \(values 0 to 2\)"):
        read_label(tmp_path / "a.tif", CLASSES)


def test_lossy_labels_are_refused(tmp_path):
    label = Image.fromarray(scene(0)[1])
    for options in ({"compression": "jpeg"}, {"compression": "webp"}):
        try:
            label.save(tmp_path / "a.tif", **options)
        except (OSError, KeyError, ValueError):  # this build of libtiff lacks it
            continue
        with pytest.raises(UserError, match="compression changes label values"):
            read_label(tmp_path / "a.tif", CLASSES)
    for lossless in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits"):
        label.save(tmp_path / "a.tif", compression=lossless)
        np.testing.assert_array_equal(read_label(tmp_path / "a.tif", CLASSES), scene(0)[1])


@pytest.mark.parametrize("form", ["BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged metadata
def test_damage_to_any_format_is_one_line(form):
    image, rng, lines = Image.fromarray(scene(0)[0]), np.random.default_rng(1), 0
    several = {"save_all": True, "append_images": [image.rotate(90)]}
    buffer = io.BytesIO()
    image.save(buffer, form, **({} if form in ("BMP", "JPEG") else several))
    for _ in range(300):
        data = bytearray(buffer.getvalue())
        data = data[: rng.integers(1, len(data) + 1)] if rng.random() < 0.5 else data
        data[rng.integers(len(data))] = rng.integers(256)
        try:  # a changed pixel can also go unseen
            decode_image(bytes(data), "a")
        except UserError:
            lines += 1
    assert lines > 20


def test_other_formats_are_not_opened(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(UserError, match="not an image or damaged"):
        read_image(tmp_path / "a.png")
    Image.fromarray(scene(0)[0]).save(tmp_path / "b.png", "PPM")
    with pytest.raises(UserError, match="not an image or damaged"):
        read_image(tmp_path / "b.png")


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(UserError, match="not a file; remove it"):
        read_image(tmp_path / "a.png")
    summary = predict_folder(PREDICTOR, CLASSES, tmp_path, tmp_path / "out")
    assert summary.failures == (f"{tmp_path / 'a.png'}: not a file; remove it",)


def test_too_large_images_say_by_how_much(tmp_path, monkeypatch):
    Image.new("RGB", (50, 40)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    words = r"too large \(2,000 pixels; 1,000 are read\); cut it into parts"
    with pytest.raises(UserError, match=words):
        read_image(tmp_path / "a.png")
    (line,) = predict_folder(PREDICTOR, CLASSES, tmp_path, tmp_path / "out").failures
    assert "2,000 pixels" in line


# Orientation.

TURNED = {"JPEG": "jpg", "PNG": "png", "TIFF": "tif", "WEBP": "webp"}


def turned(path, array, form, orientation):
    """Saves a picture that viewers show turned."""
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(array).save(path, form, exif=exif)


@pytest.mark.parametrize("form", TURNED)
@pytest.mark.parametrize("orientation", [3, 6])
def test_turned_images_are_told(root, form, orientation):
    for i in range(2):
        (root / f"images/s{i}.png").unlink()
        image = scene(i)[0]
        # Pillow turns a TIFF, so that one of 12 x 16 is stored as 16 x 12.
        stored = image.swapaxes(0, 1) if form == "TIFF" and orientation == 6 else image
        turned(root / f"images/s{i}.{TURNED[form]}", stored, form, orientation)
    found = report(root)
    assert not found.errors
    (line,) = [line for line in found.warnings() if "EXIF" in line]
    assert line.startswith("2 images carry an EXIF orientation (train/s")
    assert f"/s0: {orientation}" in line
    assert f"/s1: {orientation}" in line
    assert "not applied, except to TIFF" in line
    assert "save images upright" in line
    assert line in dataset.load("folder", root).warnings
    assert line in dataset.load("folder", root).warnings, "of the prepared dataset"
    summary = predict_folder(PREDICTOR, CLASSES, root / "images", root.parent / "out")
    (note,) = summary.notes
    assert note in str(summary).splitlines()
    assert note.startswith(f"2 images carry an EXIF orientation (s0.{TURNED[form]}: {orientation},")


def test_turned_images_change_no_fingerprint(root):
    before = report(root).fingerprint
    turned(root / "images/s0.png", scene(0)[0], "PNG", 3)
    assert report(root).fingerprint == before


def test_upright_images_are_not_told(root):
    turned(root / "images/s0.png", scene(0)[0], "PNG", 1)
    turned(root / "images/s1.png", scene(1)[0], "PNG", 99)
    assert not [line for line in report(root).warnings() if "EXIF" in line]


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_label_of_the_upright_view_is_told_the_orientation(root, orientation):
    (root / "images/s0.png").unlink()
    turned(root / "images/s0.jpg", scene(0)[0].swapaxes(0, 1), "JPEG", orientation)
    (error,) = report(root).errors
    assert "s0.png: the label is 16x12 but its image s0.jpg is 12x16 with EXIF" in error
    assert f"EXIF orientation {orientation}, which viewers apply; save the image upright" in error


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
def test_turned_labels_are_refused(tmp_path, form):
    path = tmp_path / "a.png"
    for read in (lambda path: read_label(path, CLASSES), read_instances, read_mask):
        turned(path, scene(0)[1], form, 3)
        with pytest.raises(UserError, match=r"a\.png: a label with EXIF orientation 3.*save it"):
            read(path)


# Palettes.

COLOURS = "ground,0,0,0\nred,255,0,0\nblue,0,0,255\n"


def with_palette(root, colours):
    for i in range(6):
        label = Image.fromarray(scene(i)[1]).convert("P")
        label.putpalette([channel for colour in colours for channel in colour])
        label.save(root / f"labels/s{i}.png")


def test_a_palette_of_another_order_is_refused(root):
    with_palette(root, [(0, 0, 255), (0, 0, 0), (255, 0, 0)])
    assert not report(root).errors  # nobody says what the colours mean
    (root / "classes.txt").write_text(COLOURS)
    error = report(root).errors[0]
    assert "value 0 has the colour (0, 0, 255), which is blue in the class table" in error
    assert "where 0 is ground with (0, 0, 0)" in error


@pytest.mark.parametrize(
    "colours",
    [
        [(0, 0, 0), (255, 0, 0), (0, 0, 255)],
        [(7, 7, 7), (8, 8, 8), (9, 9, 9)],  # a palette that means nothing
    ],
)
def test_other_palettes_are_read(root, colours):
    (root / "classes.txt").write_text(COLOURS)
    with_palette(root, colours)
    assert not report(root).errors


VOC = "ground,0,0,0\nred,128,0,0\nblue,0,128,0\n"


@pytest.mark.parametrize("name", ["classes.txt", "classes.json"])
def test_chosen_colours_may_be_those_of_voc(root, name):
    colours = np.array([(0, 0, 0), (128, 0, 0), (0, 128, 0)], np.uint8)
    table = {"names": ["ground", "red", "blue"], "colours": colours.tolist()}
    (root / "classes.txt").unlink()
    (root / name).write_text(VOC if name == "classes.txt" else json.dumps(table))
    with_palette(root, colours)
    assert not report(root).errors
    with_palette(root, colours[[2, 0, 1]])
    assert "value 0 has the colour (0, 128, 0), which is blue" in report(root).errors[0]
    for i in range(6):
        Image.fromarray(colours[scene(i)[1]]).save(root / f"labels/s{i}.png")
    np.testing.assert_array_equal(
        read_label(root / "labels/s0.png", folders.read_classes(root)), scene(0)[1]
    )
    assert not report(root).errors


def test_chosen_colours_change_no_earlier_table_or_run(root):
    plain = ClassTable(["a", "b"])
    chosen = ClassTable(["a", "b"], plain.colours)
    assert (plain.has_own_colours, chosen.has_own_colours) == (False, True)
    assert plain == chosen
    assert repr(plain) == repr(chosen)
    assert plain.to_json().keys() == {"names", "colours", "values", "void_values"}
    for table in (plain, chosen, dataclasses.replace(chosen, values=(3, 4))):
        again = ClassTable.from_json(json.loads(json.dumps(table.to_json())))
        assert again.has_own_colours == table.has_own_colours
    before, key = report(root).fingerprint, prepared._key(folders.find(root))
    (root / "classes.txt").write_text(VOC)
    assert report(root).fingerprint == before
    assert prepared._key(folders.find(root)) != key  # the labels must be checked against them


def test_labels_in_colours_need_one_for_each_class(root):
    (root / "classes.txt").write_text("ground,0,0,0\nred,9,9,9\nblue,9,9,9\n")
    Image.fromarray(scene(0)[0]).save(root / "labels/s0.png")
    (error,) = report(root).errors
    assert "red and blue both are (9, 9, 9) in the class table; give each" in error


@pytest.mark.parametrize("first", [(0, 0, 0), (1, 1, 1)])
def test_a_palette_of_nearly_the_colours_in_another_order_is_refused(root, first):
    (root / "classes.txt").write_text(COLOURS)
    with_palette(root, [first, (254, 0, 0), (0, 3, 250)])
    assert not report(root).errors
    with_palette(root, [first, (0, 3, 250), (254, 0, 0)])
    assert "value 1 has the colour (0, 3, 250), which is blue" in report(root).errors[0]


def test_a_palette_without_the_chosen_colours_is_refused(root):
    (root / "classes.txt").write_text(COLOURS)
    with_palette(root, [(90, 90, 0), (0, 90, 90), (90, 0, 90)])
    words = "value 0 has (90, 90, 0), but ground is (0, 0, 0); correct one"
    assert words in report(root).errors[0]
    (root / "classes.txt").write_text(NAMES)
    assert not report(root).errors


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_grey_palette_of_the_values_is_read(root, number):
    (root / "classes.txt").write_text(COLOURS)
    with_palette(root, [(0, 0, 0), (1, 1, 1), (2, 2, 2)])
    Image.fromarray(scene(0)[1] % number).save(root / "labels/s0.png")
    assert not report(root).errors


@pytest.mark.parametrize("table", [NAMES, COLOURS])
def test_values_that_a_program_numbered_anew_are_refused(root, table):
    (root / "classes.txt").write_text(table)
    label = Image.fromarray(scene(0, 2)[1]).convert("P")
    label.putpalette([0, 0, 0, 2, 2, 2])
    label.save(root / "labels/s0.png")
    (error,) = report(root).errors
    assert "s0.png: value 1 has the grey 2 in the palette" in error
    assert "save class ids as an 8-bit grey PNG" in error
    label.putpalette([0, 0, 0, 255, 255, 255])  # to be seen
    label.save(root / "labels/s0.png")
    assert not report(root).errors


def test_a_grey_class_of_the_usual_colours_is_no_value(root):
    table = ClassTable([f"c{i}" for i in range(150)])
    label = Image.fromarray(scene(0, 2)[1] * 7).convert("P")  # class 7 of VOC is (128, 128, 128)
    label.putpalette(table.palette().tobytes())
    label.save(root / "labels/s0.png")
    np.testing.assert_array_equal(read_label(root / "labels/s0.png", table), scene(0, 2)[1] * 7)


def test_a_gif_that_a_program_numbered_anew_is_refused(root):
    (root / "labels/s0.png").unlink()
    Image.fromarray(scene(0, 2)[1] * 2).save(root / "labels/s0.gif")
    (error,) = report(root).errors
    assert "s0.gif: programs number the values of a GIF anew; save class ids as" in error
    Image.fromarray(scene(0)[1]).save(root / "labels/s0.gif")
    assert not report(root).errors


# Names, lists and class tables.


def test_two_files_of_one_name_are_refused(root):
    Image.fromarray(scene(0)[1]).save(root / "labels/s0.tif")
    with pytest.raises(UserError, match=r"labels: s0\.png and s0\.tif have one name"):
        folders.find(root)
    (root / "labels/s0.tif").rename(root / "images/s0.tif")
    with pytest.raises(UserError, match=r"images: s0\.png and s0\.tif have one name"):
        folders.find(root)


def test_dot_files_are_passed_over(root):
    for part in ("images", "labels"):
        (root / part / "._s0.png").write_bytes(b"\0\x05\x16\x07")
    assert not report(root).errors
    assert len(pictures(root / "images")) == 6


def test_other_suffixes_are_named(root):
    (root / "images/s0.png").rename(root / "images/s0.jp2")
    (root / "labels/s4.png").rename(root / "labels/s4.npy")
    errors = " ".join(report(root).errors)
    assert "s0.jp2 is of a kind that is not read" in errors
    assert "s4.npy is of a kind that is not read; save it as .png" in errors
    for suffix in ("jfif", "jpe"):
        Image.fromarray(scene(0)[0]).save(root / f"images/s0.{suffix}", "JPEG")
        assert "s0" in [path.stem for path in pictures(root / "images")]
        (root / f"images/s0.{suffix}").unlink()


def test_names_that_are_not_utf_8_are_named(root):
    base = os.fsencode(root / "images")
    os.rename(base + b"/s0.png", base + b"/caf\xe9.png")
    with pytest.raises(UserError, match=r"the file name b'caf\\xe9\.png' is not UTF-8"):
        folders.find(root)
    for given in (root / "images", root / "images" / os.fsdecode(b"caf\xe9.png")):
        summary = predict_folder(PREDICTOR, CLASSES, given, root.parent / "out")
        (failure,) = summary.failures
        assert r"the file name b'caf\xe9.png' is not UTF-8; rename it" in failure
        assert str(summary).isascii()
        assert len(summary.predicted) == (5 if given.is_dir() else 0)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_files_of_other_programs_are_read(root, encoding):
    (root / "classes.txt").write_text(NAMES.replace("\n", "\r\n"), encoding=encoding)
    (root / "train.txt").write_text("s0\r\nimages/s1.png\r\n", encoding=encoding)
    (root / "val.txt").write_text("s4\r\n", encoding=encoding)
    assert folders.find(root).classes.names == ("ground", "red", "blue")
    assert names(root) == {"train": ["s0", "s1"], "val": ["s4"]}
    (root / "classes.txt").unlink()
    (root / "classes.json").write_text(json.dumps({"names": ["a", "b", "c"]}), encoding=encoding)
    assert folders.find(root).classes.names == ("a", "b", "c")


def test_a_list_in_another_encoding_is_one_line(root):
    (root / "train.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(UserError, match=r"train\.txt: not UTF-8 at byte 3; save it as UTF-8"):
        folders.find(root)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("cam.7", "'cam.7' is not among the images"),
        (
            "berlin/s2.png\nparis/s2.png",
            "'paris/s2.png' and 'berlin/s2.png' both name the image s2",
        ),
        ("s1\ns1", "'s1' and 's1' both name the image s1"),
    ],
)
def test_lines_of_a_list_name_one_image_each(root, lines, words):
    for part in ("images", "labels"):
        (root / part / "s0.png").rename(root / part / "cam.png")
    (root / "train.txt").write_text(lines + "\n")
    with pytest.raises(UserError, match=words):
        folders.find(root)


def test_names_with_dots_are_whole_names(root):
    for part in ("images", "labels"):
        (root / part / "s0.png").rename(root / part / "cam.7.png")
    (root / "train.txt").write_text("cam.7\n")
    (root / "val.txt").write_text("s4.PNG\n")
    assert names(root) == {"train": ["cam.7"], "val": ["s4"]}


@pytest.mark.parametrize(("train", "val"), [("train", "valid"), ("training", "validation")])
@pytest.mark.parametrize("is_list", [False, True])
def test_folders_and_lists_have_the_usual_names(root, train, val, is_list):
    if is_list:
        to_lists(root, f"{train}.txt", f"{val}.txt")
    else:
        to_folders(root, train, val)
    assert names(root) == {"train": ["s0", "s1", "s2", "s3"], "val": ["s4", "s5"]}
    if is_list:
        (root / "dev.txt").write_text("s0\n")
        with pytest.raises(UserError, match="both list val; remove one"):
            folders.find(root)


def to_folders(root, train="train", val="val"):
    for part in ("images", "labels"):
        for split, numbers in ((train, range(4)), (val, range(4, 6))):
            (root / part / split).mkdir()
            for i in numbers:
                (root / part / f"s{i}.png").rename(root / part / split / f"s{i}.png")


def to_lists(folder, train="train.txt", val="val.txt"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / train).write_text("s0\ns1\ns2\ns3\n")
    (folder / val).write_text("s4\ns5\n")


@pytest.mark.parametrize("layout", ["inner", "outer", "lists", "ImageSets"])
def test_splits_are_found_in_capitals_too(root, layout):
    if layout == "inner":
        to_folders(root, "Train", "VAL")
        (root / "labels/Train").rename(root / "labels/train")
    elif layout == "outer":
        to_folders(root, "Train", "VAL")
        for split in ("Train", "VAL"):
            (root / split).mkdir()
            for part in ("images", "labels"):
                (root / part / split).rename(root / split / part)
    elif layout == "lists":
        to_lists(root, "Train.txt", "VAL.TXT")
    else:
        to_lists(root / "ImageSets/Segmentation")
    assert names(root) == {"train": ["s0", "s1", "s2", "s3"], "val": ["s4", "s5"]}
    assert not report(root).errors


def test_splits_of_two_kinds_are_refused(root):
    to_lists(root)
    to_lists(root / "ImageSets/Segmentation")
    with pytest.raises(UserError, match=r"lists in two places, train\.txt and .*remove those of"):
        folders.find(root)
    (root / "val.txt").unlink()
    (root / "train.txt").unlink()
    to_folders(root)
    with pytest.raises(
        UserError, match=r"train\.txt: a list beside images/train, which .*; remove"
    ):
        folders.find(root)


@pytest.mark.parametrize("make", [to_folders, to_lists])
def test_splits_whose_names_differ_in_capitals_are_refused(root, make):
    make(root)
    suffix = ".txt" if make is to_lists else ""
    one, other = (root / ("" if suffix else "images") / f"{x}{suffix}" for x in ("train", "Train"))
    other.mkdir() if one.is_dir() else other.write_text("s4\n")
    if one.stat().st_ino == other.stat().st_ino:
        pytest.skip("capitals are one here")
    with pytest.raises(UserError, match=f"Train{suffix} and train{suffix} are one split; remove"):
        folders.find(root)


@pytest.mark.parametrize("part", ["images", "labels"])
def test_pictures_in_no_split_are_told(root, part):
    to_folders(root)
    Image.fromarray(scene(9)[0]).save(root / part / "s9.png")
    words = rf"{part}/s9\.png: beside images/train, and in no split \(1 such files\); move it"
    with pytest.raises(UserError, match=words):
        folders.find(root)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("images/s0.png labels/s0.png", "s0"),
        ("images/s0.jpg,labels/s0.png", "s0"),
        ("images/s0.png labels/s3.png", "names files of different names"),
        ("images/s0 labels/s3", "names files of different names"),
        ("images/gone.png labels/s3.png", "names files of different names"),
        ("images/s0.png labels/s3.png edges/s3.png", "names files of different names"),
        ("s0.png 1", "names files of different names"),
        ("my folder/s3.png", "s3"),
        ("images/s2 and s3.png", "s2 and s3"),
        ("s5.tif", r"'s5\.tif' may be s5\.png and s5\.tif\.png; write the whole name of the file"),
        ("s5.png", "s5"),
        ("s5.tif.png", "s5.tif"),
    ],
)
def test_a_line_of_a_list_is_one_image(root, line, found):
    for part in ("images", "labels"):
        for name in ("s2 and s3", "s5.tif"):
            (root / part / f"{name}.png").write_bytes((root / part / "s2.png").read_bytes())
    (root / "train.txt").write_text(f"{line}\n")
    if " of " in found or "may be" in found:
        with pytest.raises(UserError, match=found):
            folders.find(root)
    else:
        assert names(root) == {"train": [found]}


@pytest.mark.parametrize(
    "first",
    ["name", "Class", "label,r,g,b", "Klasse", "Class Name", "className", '"name"', "names:",
     "name;r;g;b", "label_name,red,green,blue", "class\tr"],
)  # fmt: skip
def test_a_heading_is_no_class(root, first):
    (root / "classes.txt").write_text(f"{first}\n{NAMES}")
    with pytest.raises(UserError, match=r"classes\.txt.*line 1, .* name of class 0: remove it"):
        folders.find(root)


@pytest.mark.parametrize("comment", ["# my classes", "#", "// classes", "% classes"])
def test_a_comment_is_no_class(root, comment):
    for text, number in ((f"{comment}\n{NAMES}", 1), (f"ground\n\n{comment}\nred\nblue\n", 3)):
        (root / "classes.txt").write_text(text)
        with pytest.raises(UserError, match=rf"line {number}, '{comment}', is a comment.*remove"):
            folders.find(root)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0 ground\n1 red\n2 blue\n", "line 1, '0 ground', begins with a number, as all lines do"),
        ("2 blue\n1 red\n0 ground\n", "line 1, '2 blue', begins with a number"),
        ("0: ground\n1: red\n2: blue\n", "begins with a number.*as values in classes.json"),
        ("0,ground\n1,red\n2,blue\n", "begins with a number"),
        ("ground;0;0;0\nred;9;9;9\n", "line 1, 'ground;0;0;0', has a colour without commas"),
        ("ground\nred 9 9 9\n", "line 2, 'red 9 9 9', has a colour without commas: write name,r"),
        ("0 0 0 ground\n9 9 9 red\n", "line 1, '0 0 0 ground', has a colour without commas"),
        (",name\n0,ground\n", "line 1, ',name', has no name"),
        ("ground,red,blue\n", "line 1, 'ground,red,blue', has 3 parts between commas"),
        (f"{'a' * 200_000}\nb\n", "not a class table"),
    ],
)
def test_lines_that_are_no_names_are_named(root, text, words):
    (root / "classes.txt").write_text(text)
    with pytest.raises(UserError, match=words):
        folders.read_classes(root)


@pytest.mark.parametrize(
    "plausible",
    [
        ["background", "2 wheeler", "4 wheeler"],
        ["0", "1", "2"],
        ["building;edifice", "C#", "50% grey", "5.5 mm pipe", "stop // go"],
        ["1st floor", "2nd floor"],
        ["other", "names", "class 7", "boeing 747", "id"],
    ],
)
def test_plausible_names_are_read(root, plausible):
    (root / "classes.txt").write_text("\n".join(plausible))
    assert folders.read_classes(root).names == tuple(plausible)


def test_quotes_of_a_spreadsheet_are_no_part_of_a_name(root):
    (root / "classes.txt").write_text('"ground","0","0","0"\n"red, dark",9,0,0\n')
    assert folders.read_classes(root).names == ("ground", "red, dark")


def test_a_class_table_of_many_brackets_is_one_line(root):
    (root / "classes.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"classes\.json: not a class table"):
        folders.read_classes(root)


def test_whole_numbers_of_a_spreadsheet_are_values(root):
    (root / "classes.txt").unlink()
    table = {"names": ["a", "b", "c"], "values": [0.0, 1.0, 2.0], "colours": [[0.0, 1, 2]] * 3}
    (root / "classes.json").write_text(json.dumps(table))
    assert folders.find(root).classes.values == (0, 1, 2)
    for change in ({"values": [0.5, 1, 2]}, {"values": ["0", 1, 2]}, {"values": [True, 1, 2]},
                   {"values": [float("inf"), 1, 2]},
                   {"names": [1, 2, 3]}, {"colours": [[0, 0, "x"]] * 3}):  # fmt: skip
        (root / "classes.json").write_text(json.dumps(table | change))
        with pytest.raises(UserError, match="not a class table"):
            folders.find(root)


def fitting_table(text):
    """The class table that check-data prints."""
    (found,) = re.findall(r"classes\.json: (\{.*\})$", text, re.MULTILINE)
    return found


FOREIGN = {  # names, what becomes of the values 0, 1, 2; expected values, void values, new names
    "mask": ("ground,object", [0, 255, 0], [0, 255], [], ""),
    "one of three in void": ("a,b,c", [0, 255, 2], [0, 255, 2], [], ""),
    "from 1": ("a,b,c", [1, 2, 3], [1, 2, 3], [255], ""),
    "greys": ("a,b,c", [0, 128, 255], [0, 128, 255], [], ""),
    "more": ("a,b", [0, 1, 9], [0, 1, 9], [255], "value_9"),
    "far apart": ("a,b,c,d", [0, 7, 9], [0, 1, 2, 3, 7, 9], [255], "value_7,value_9"),
    "void is unnamed": (
        '{"names": ["a", "b"], "void_values": []}',
        [0, 1, 255], [0, 1], [255], "",
    ),
    "a table of values": (
        '{"names": ["a", "b"], "values": [7, 8], "colours": [[0, 0, 0], [9, 9, 9]]}',
        [7, 8, 26], [7, 8, 26], [255], "value_26",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
def test_the_printed_class_table_reads_the_labels(root, kind):
    names, becomes, values, void, new = FOREIGN[kind]
    (root / "classes.txt").unlink()
    name = "classes.json" if names.startswith("{") else "classes.txt"
    (root / name).write_text(names if name == "classes.json" else names.replace(",", "\n"))
    for i in range(6):
        Image.fromarray(np.array(becomes, np.uint8)[scene(i)[1]]).save(root / f"labels/s{i}.png")
    table = folders.read_classes(root)
    (root / "classes.json").write_text(fitting_table(str(report(root))))
    fitting = folders.read_classes(root)
    assert list(fitting.names) == [*table.names, *filter(None, new.split(","))]
    assert (list(fitting.values), list(fitting.void_values)) == (values, void)
    assert fitting.colours[: table.num_classes] == table.colours
    found = report(root)
    assert not found.errors
    assert "classes.json" not in str(found)
    assert len(dataset.load("folder", root).split("train")[0]["label"])


INKS = np.array([(0, 0, 0), (220, 40, 40), (40, 60, 220)], np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_labels_in_the_colours_of_the_class_table_are_read(root, mode):
    (root / "classes.txt").write_text("ground,0,0,0\nred,220,40,40\nblue,40,60,220\n")
    (root / "classes.json").unlink(missing_ok=True)
    label = scene(0)[1]
    colours = INKS[label]
    colours[0, 0] = (224, 224, 192)  # void, as this library draws it
    Image.fromarray(colours).convert(mode).save(root / "labels/s0.png")
    table = folders.read_classes(root)
    label[0, 0] = 255
    np.testing.assert_array_equal(read_label(root / "labels/s0.png", table), label)
    other = dataclasses.replace(table, values=(7, 0, 3))
    np.testing.assert_array_equal(read_label(root / "labels/s0.png", other), label)
    colours[1, 1:3] = [(1, 2, 3), (4, 5, 6)]
    Image.fromarray(colours).save(root / "labels/s0.png")
    words = r"label colour \(1, 2, 3\) is not in the class table, nor are 1 others; correct the"
    with pytest.raises(UserError, match=words):
        read_label(root / "labels/s0.png", table)
    half = Image.fromarray(INKS[scene(0)[1]])
    half.putalpha(128)
    half.save(root / "labels/s0.png")
    with pytest.raises(UserError, match="transparent in parts"):
        read_label(root / "labels/s0.png", table)
    Image.fromarray(np.indices((64, 64, 3))[0].astype(np.uint8) * 4).save(root / "labels/s0.png")
    with pytest.raises(UserError, match=r"label colour \(4, 4, 4\)"):
        read_label(root / "labels/s0.png", table)


@pytest.mark.parametrize(
    ("names", "inks", "new"),
    [
        ("ground\nred\nblue\n", INKS, "colour_0_0_0,colour_40_60_220,colour_220_40_40"),
        ("ground\nred\nblue\n", INKS[[0, 0, 0]] + [[0, 0, 0], [128, 0, 0], [0, 0, 0]],
         "colour_0_0_0,colour_128_0_0"),  # as in VOC
        ("ground,0,0,0\nred,220,40,40\n", INKS, "ground,red,colour_40_60_220"),
        ('{"names": ["a", "b"], "colours": [[0, 0, 0], [220, 40, 40]], "values": [7, 255],'
         ' "void_values": [0]}', INKS, "a,b,colour_40_60_220"),
    ],
)  # fmt: skip
def test_the_printed_class_table_reads_labels_in_colours(root, names, inks, new):
    if names.startswith("{"):
        (root / "classes.json").write_text(names)
    else:
        (root / "classes.txt").write_text(names)
    for i in range(6):
        Image.fromarray(inks.astype(np.uint8)[scene(i)[1]]).save(root / f"labels/s{i}.png")
    text = str(report(root))
    assert "6 files, such as" in text
    (root / "classes.json").write_text(fitting_table(text))
    table = folders.read_classes(root)
    assert list(table.names) == new.split(",")
    assert not report(root).errors
    read = read_label(root / "labels/s0.png", table)
    np.testing.assert_array_equal(np.array(table.colours)[read], inks[scene(0)[1]])


def test_smoothed_labels_in_colours_get_no_class_table(root):
    for i in range(6):
        Image.fromarray(scene(i)[0]).save(root / f"labels/s{i}.png")
    text = str(report(root))
    assert "6 files, such as" in text
    assert "classes.json" not in text


def test_smoothed_labels_get_no_class_table(root):
    for i in range(6):
        Image.fromarray(scene(i)[0][..., 0]).save(root / f"labels/s{i}.png")
    text = str(report(root))
    assert "6 labels hold values that are no class (files by value: " in text
    assert "classes.json" not in text


def test_more_classes_than_a_table_holds_get_none(root):
    wide = np.arange(256, dtype=np.uint8).reshape(16, 16)
    table = {"names": [f"c{i}" for i in range(240)], "void_values": [0], "values": [*range(1, 241)]}
    (root / "classes.json").write_text(json.dumps(table))
    for i in range(6):
        Image.fromarray(wide).save(root / f"labels/s{i}.png")
        Image.fromarray(scene(i)[0]).resize((16, 16)).save(root / f"images/s{i}.png")
    assert json.loads(fitting_table(str(report(root))))["names"][-1] == "value_254"
    table |= {"void_values": [], "values": [*range(1, 240), 255]}
    (root / "classes.json").write_text(json.dumps(table))
    assert "no class (files by value: " in str(report(root))
    assert "classes.json" not in str(report(root))


def test_wrong_files_are_told_by_cause(root):
    for i in range(6, 40):
        for part, array in zip(("images", "labels"), scene(i), strict=True):
            Image.fromarray(array).save(root / f"{part}/s{i}.png")
    for i in range(20):
        label = scene(i)[1]
        label[0, 0] = 3 if i else 7
        Image.fromarray(label).save(root / f"labels/s{i}.png")
        Image.new("L", (5 + i, 6)).save(root / f"labels/s{20 + i}.png")
    (root / "labels/s39.png").write_bytes(b"no picture")
    found = report(root)
    assert len(found.errors) == 40
    lines = found.errors_by_cause()
    assert len(lines) == 4
    text = str(found)
    assert "40 wrong files:" in text
    assert "20 labels hold values that are no class (files by value: 3: 19, 7: 1), such as" in text
    assert "19 files, such as" in text
    assert "s39.png: the file is not an image" in text
    assert json.loads(fitting_table(text))["values"] == [0, 1, 2, 3, 7]


def test_wrong_files_are_at_most_ten_lines(root):
    found = report(root)
    found.errors += [f"/a/b{i}.png: {'x' * i} is wrong" for i in range(30)]
    lines = found.errors_by_cause()
    assert len(lines) == 10
    assert lines[9] == "and files that are wrong in 21 other ways"


def test_one_class_is_told(root):
    (root / "classes.txt").write_text("object\n")
    for i in range(6):
        label = np.where(scene(i, 2)[1] == 1, 0, 255).astype(np.uint8)
        Image.fromarray(label).save(root / f"labels/s{i}.png")
    assert any(
        line.startswith("one class: nothing can be learned") for line in report(root).warnings()
    )


# Names that drive a terminal.

WILD = "s\x1b[2J\x9b31m\r\nerror: all is lost"


def is_tame(lines):
    return all(line.isprintable() for line in lines) and any(
        r"s\x1b[2J\x9b31m\r\n" in x for x in lines
    )


def test_wild_file_names_are_escaped(root, capsys, monkeypatch):
    for part in ("images", "labels"):
        for i, name in ((0, WILD), (1, f"{WILD} twin"), (2, f"{WILD} void")):
            (root / part / f"s{i}.png").rename(root / part / f"{name}.png")
    twin = (root / f"images/{WILD}.png").read_bytes()
    (root / f"images/{WILD} twin.png").write_bytes(twin)
    Image.new("L", (16, 12), 255).save(root / f"labels/{WILD} void.png")
    turned(root / f"images/{WILD} void.png", scene(2)[0], "PNG", 3)
    found = report(root)
    assert not found.errors
    assert len(found.warnings()) >= 3
    assert is_tame(found.warnings())
    assert is_tame(found.mostly_void())
    assert is_tame(str(found).splitlines())
    (root / f"labels/{WILD}.png").write_bytes(b"no picture")
    (root / f"images/{WILD} twin.png").unlink()
    assert len(report(root).errors) == 2
    assert is_tame(report(root).errors)
    summary = predict_folder(PREDICTOR, CLASSES, root / "labels", root.parent / "out")
    assert is_tame(summary.failures)
    (root / "train.txt").write_text("\x1b[31m\n")
    with pytest.raises(UserError) as caught:
        folders.find(root)
    assert str(caught.value).isprintable()
    monkeypatch.setattr(sys, "argv", ["dense_jax", "check-data", "--dataset=folder"])
    monkeypatch.setattr(sys, "argv", [*sys.argv, f"--data-dir={root / WILD}"])
    with pytest.raises(SystemExit):
        main()
    assert is_tame(capsys.readouterr().err.splitlines())


@pytest.mark.parametrize("name", ["\x1b[31mred", "r\ted", "re\x7fd", "\u2028red"])
def test_wild_class_names_are_refused(root, name):
    (root / "classes.json").write_text(json.dumps({"names": ["a", name]}))
    with pytest.raises(UserError, match="a class name has control characters: '") as caught:
        folders.find(root)
    assert str(caught.value).isprintable()
    (root / "classes.json").unlink()
    (root / "classes.txt").write_text("a\nb\x1b[31m\n")
    with pytest.raises(UserError, match=r"classes\.txt.*control characters: 'b\\x1b"):
        folders.find(root)


# Paths.


def test_projects_of_the_same_names_have_caches_of_their_own(root, monkeypatch):
    keys = []
    for project in ("one", "two"):
        other = root.parent / project
        other.mkdir()
        monkeypatch.chdir(other)
        pathlib.Path("data").mkdir()
        for part in ("images", "labels"):
            pathlib.Path("data", part).mkdir()
            for path in (root / part).iterdir():
                copy = pathlib.Path("data", part, path.name)
                copy.write_bytes(path.read_bytes())
                os.utime(copy, (1, 1))
        pathlib.Path("data/classes.txt").write_text(NAMES)
        keys.append(prepared._key(folders.find(pathlib.Path("data"))))
    assert keys[0] != keys[1]
    assert keys[1] == prepared._key(folders.find(root.parent / "two" / "data"))


def test_every_path_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = RunConfig(workdir="~/a", data_dir="~/b", init="run:~/c")
    assert (config.workdir, config.data_dir) == (f"{tmp_path}/a", f"{tmp_path}/b")
    assert config.init == f"run:{tmp_path}/c"
    assert RunConfig(init="hub:owner/name").init == "hub:owner/name"
    seen = {}
    expanded(lambda **arguments: seen.update(arguments))(
        run=pathlib.Path("~/r"), ensemble=(pathlib.Path("~/s"),), split="~"
    )
    assert seen == {"run": tmp_path / "r", "ensemble": (tmp_path / "s",), "split": "~"}


def test_results_do_not_go_among_the_images(tmp_path):
    Image.fromarray(scene(0)[0]).save(tmp_path / "a.png")
    for given in (tmp_path, tmp_path / "a.png"):
        with pytest.raises(UserError, match="is the folder of the images: give another"):
            predict_folder(PREDICTOR, CLASSES, given, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png"]


def test_a_split_is_loaded_by_other_names_too(root, monkeypatch):
    monkeypatch.chdir(root.parent)
    loaded = dataset.load("folder", "data")
    assert set(loaded.splits) == {"train", "val"}


# Links.


def links_to(victim, *paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(victim)


def test_predict_replaces_links_and_not_what_they_point_to(root, tmp_path):
    victim, out = tmp_path / "victim", tmp_path / "out"
    victim.write_text("mine")
    names = [f"{folder}/s0.png" for folder in ("labels", "overlays")]
    names += ["probabilities/s0.npz", "classes.json", "legend.png", "labels/s1.png.tmp"]
    links_to(victim, *(out / name for name in names))
    links_to(tmp_path / "absent", out / "labels/s2.png")
    predict_folder(PREDICTOR, CLASSES, root / "images", out, probabilities=True)
    assert victim.read_text() == "mine"
    assert not (tmp_path / "absent").exists()
    assert not [path for path in out.rglob("*") if path.is_symlink()]
    assert len(list((out / "labels").iterdir())) == 6


@pytest.mark.parametrize("name", ["labels", "overlays", "probabilities"])
def test_predict_writes_into_no_folder_elsewhere(root, tmp_path, name):
    links_to(root / "labels", tmp_path / "out" / name)
    with pytest.raises(UserError, match=rf"out/{name} is a link to .*labels, where files would be"):
        predict_folder(PREDICTOR, CLASSES, root / "images", tmp_path / "out", probabilities=True)
    np.testing.assert_array_equal(read_label(root / "labels/s0.png", CLASSES), scene(0)[1])


def test_an_output_folder_may_be_a_link(root, tmp_path):
    (tmp_path / "disk").mkdir()
    links_to(tmp_path / "disk", tmp_path / "out")
    assert len(predict_folder(PREDICTOR, CLASSES, root / "images", tmp_path / "out").predicted) == 6


def test_a_sheet_replaces_a_link(root, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    links_to(victim, tmp_path / "sheet.png")
    check_data.run(dataset="folder", data_dir=str(root), sheet=tmp_path / "sheet.png")
    assert victim.read_text() == "mine"
    assert not (tmp_path / "sheet.png").is_symlink()
