"""PASCAL VOC 2012 and SBD: which images train, which labels they get, what a lack is called."""

import contextlib
import shutil
import struct
import zlib

import numpy as np
import pytest
import scipy.io
import scipy.sparse
from PIL import Image

from dense_jax.data import check, dataset, files, sbd
from dense_jax.data.classes import IGNORE_LABEL
from dense_jax.data.datasets import voc2012
from dense_jax.data.files import Pair
from dense_jax.errors import UserError

SBD = "benchmark_RELEASE/dataset"
SIZE = (5, 6)  # height, width


def _write_mat(path, label, **fields):
    scipy.io.savemat(path, {"GTcls": {"Segmentation": label, **fields}}, do_compression=True)


@pytest.fixture
def both(tmp_path):
    """VOC trains on a, b and scores c; SBD has a, d to train and c, e to validate."""
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / "VOCdevkit/VOC2012" / folder).mkdir(parents=True)
    voc = tmp_path / "VOCdevkit/VOC2012"
    for split, names in (("train", "ab"), ("val", "c")):
        (voc / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names))
        for name in names:
            Image.new("RGB", SIZE[::-1], (ord(name), 0, 0)).save(voc / f"JPEGImages/{name}.jpg")
            Image.new("L", SIZE[::-1], 20).save(voc / f"SegmentationClass/{name}.png")
    sbd = tmp_path / SBD
    for folder in ("img", "cls"):
        (sbd / folder).mkdir(parents=True)
    (sbd / "train.txt").write_text("a\nd\n")
    (sbd / "val.txt").write_text("c\ne\n")
    for name in "acde":
        Image.new("RGB", SIZE[::-1], (0, ord(name), 0)).save(sbd / f"img/{name}.jpg")
        boundaries = np.empty((20, 1), object)  # as published, beside what is read
        boundaries[:, 0] = [np.zeros(SIZE, np.uint8)] * 20
        _write_mat(sbd / f"cls/{name}.mat", np.full(SIZE, 3, np.uint8), Boundaries=boundaries)
    return tmp_path


def test_voc_alone(both):
    data = dataset.load("voc2012", both)
    assert {split: len(source) for split, source in data.splits.items()} == {"train": 2, "val": 1}
    assert data.classes.num_classes == 21
    assert voc2012.CLASSES.names[15] == "person"
    assert voc2012.CLASSES.colours[15] == (192, 128, 128)
    for inner in ("VOCdevkit", "VOCdevkit/VOC2012"):
        assert voc2012.find(both / inner).pairs == voc2012.find(both).pairs


def test_sbd_adds_what_is_in_neither_list_of_voc(both):
    data = dataset.load("voc2012_sbd", both)
    train, val = data.split("train"), data.split("val")
    # "a" is trained on already, and with VOC's label; "c" is scored.
    assert [train[i]["name"] for i in range(len(train))] == ["a", "b", "d", "e"]
    assert [int(np.unique(train[i]["label"])[0]) for i in range(4)] == [20, 20, 3, 3]
    assert train[2]["label"].shape == SIZE
    assert [val[i]["name"] for i in range(len(val))] == ["c"]
    assert (val[0]["label"] == 20).all()


def test_published_lists_give_10582_images(both):
    """Sizes and overlaps of the published lists, with made-up names."""
    names = [f"n{i:05d}" for i in range(11355 + 330 + (1449 - 1103))]
    sbd, only_train, only_val = names[:11355], names[11355:11685], names[11685:]
    val, train = [*sbd[:1103], *only_val], [*sbd[1103 : 1103 + 1464 - 330], *only_train]
    order = np.random.default_rng(0).permutation(sbd)
    lists = both / "VOCdevkit/VOC2012/ImageSets/Segmentation"
    for path, listed in (
        (lists / "train.txt", train),
        (lists / "val.txt", val),
        (both / SBD / "train.txt", order[:8498]),
        (both / SBD / "val.txt", order[8498:]),
    ):
        path.write_text("\n".join(listed))
    found = voc2012.find(both, sbd=True)
    trained = [pair.name for pair in found.pairs if pair.split == "train"]
    assert len(trained) == len(set(trained)) == 10582
    assert sum(pair.split == "val" for pair in found.pairs) == 1449
    assert not set(trained) & set(val)
    assert "10,582 of 10,582" in found.description


def test_names_in_both_lists_of_sbd_train_once(both):
    (both / SBD / "val.txt").write_text("c\ne\nd\n")
    assert [pair.name for pair in voc2012.find(both, sbd=True).pairs] == list("abcde")


LACKS = {
    "no SBD": (
        lambda root: shutil.rmtree(root / "benchmark_RELEASE"),
        r"no SBD dataset here \(looked for img, cls\); unpack https.*benchmark\.tgz.*voc2012",
    ),
    "no list of SBD": (
        lambda root: (root / SBD / "val.txt").unlink(),
        r"benchmark_RELEASE/dataset/val\.txt: the list of images is missing; unpack",
    ),
    "no val list": (  # without it, its images would be trained on
        lambda root: (root / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").unlink(),
        r"Segmentation/val\.txt: the list of images is missing; unpack",
    ),
    "empty list": (
        lambda root: (root / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").write_text("\n"),
        r"Segmentation/val\.txt: the list of images is empty; unpack",
    ),
    "no VOC": (
        lambda root: shutil.rmtree(root / "VOCdevkit/VOC2012/SegmentationClass"),
        r"no PASCAL VOC dataset here \(looked for JPEGImages, SegmentationClass",
    ),
    "no label": (
        lambda root: (root / SBD / "cls/d.mat").unlink(),
        r"cls/d\.mat: the file is missing",
    ),
    "no image": (
        lambda root: (root / SBD / "img/e.jpg").unlink(),
        r"img/e\.jpg: the file is missing",
    ),
    "another size": (
        lambda root: _write_mat(root / SBD / "cls/d.mat", np.zeros((5, 7), np.uint8)),
        r"cls/d\.mat: the label is 7x5 but its image d\.jpg is 6x5",
    ),
    "no class": (
        lambda root: _write_mat(root / SBD / "cls/d.mat", np.full(SIZE, 21, np.uint8)),
        r"cls/d\.mat: label value 21 \(100\.00% of the pixels\) is neither a class \(0\.\.20\)",
    ),
    "fractions": (
        lambda root: _write_mat(root / SBD / "cls/d.mat", np.full(SIZE, 0.5)),
        r"cls/d\.mat: not a class file of SBD, or damaged; restore",
    ),
    "another file": (
        lambda root: scipy.io.savemat(root / SBD / "cls/d.mat", {"GTinst": np.zeros(3)}),
        r"cls/d\.mat: not a class file of SBD, or damaged; restore",
    ),
    "no MATLAB file": (
        lambda root: (root / SBD / "cls/d.mat").write_bytes(b"MATLAB, but not really"),
        r"cls/d\.mat: not a class file of SBD, or damaged; restore",
    ),
}


@pytest.mark.parametrize("lack", LACKS)
def test_a_lack_is_named_in_one_line(both, lack):
    act, message = LACKS[lack]
    act(both)
    with pytest.raises(UserError, match=message) as caught:
        dataset.load("voc2012_sbd", both)
    assert str(caught.value).startswith(str(both))
    assert "\n" not in str(caught.value)


def test_splits_without_public_labels_say_so(both):
    for name in ("voc2012", "voc2012_sbd"):
        with pytest.raises(UserError, match=f"{name}' has no split 'test': its labels are not pub"):
            dataset.load(name, both).split("test")


def test_damage_at_any_byte_of_a_mat_file_never_ends_in_a_traceback(both):
    label = both / SBD / "cls/d.mat"
    pair = Pair("train", "d", both / SBD / "img/d.jpg", label)
    whole = b"MATLAB 5.0 MAT-file".ljust(116) + label.read_bytes()[116:]  # without the time
    rng = np.random.default_rng(0)
    for _ in range(200):
        data = bytearray(whole)
        data[rng.integers(len(data))] = rng.integers(256)
        label.write_bytes(data[: rng.integers(len(data) // 2, len(data) + 1)])
        with contextlib.suppress(UserError):  # a change of the header can also go unseen
            files.read_pair(pair, voc2012.CLASSES)


@pytest.mark.parametrize("do_compression", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (3, 1), (366, 500)])
def test_mat_files_are_read_as_scipy_reads_them(tmp_path, size, do_compression):
    boundaries = np.empty((20, 1), object)
    boundaries[:, 0] = [scipy.sparse.csc_matrix(np.eye(3))] * 20
    fields = {"Boundaries": boundaries, "CategoriesPresent": np.array([[1.0, 15.0]])}
    label = np.random.default_rng(0).integers(0, 21, size, np.uint8)
    path = tmp_path / "a.mat"
    for content in ({**fields, "Segmentation": label}, {"Segmentation": label, **fields}):
        variables = {"x": np.zeros(3), "GTcls": content}
        scipy.io.savemat(path, variables, do_compression=do_compression)
        read = sbd.read_class_map(path.read_bytes(), path)
        np.testing.assert_array_equal(read, label)
        expected = scipy.io.loadmat(path)["GTcls"]["Segmentation"][0, 0]
        np.testing.assert_array_equal(read, expected)
        assert read.dtype == np.uint8


def _variable(data):
    """A compressed variable of a little-endian file."""
    packed = zlib.compress(data)
    return struct.pack("<II", 15, len(packed)) + packed


@pytest.mark.parametrize("is_compressed", [True, False])
def test_damage_under_a_right_checksum_is_one_line_or_the_label(tmp_path, is_compressed):
    path, rng = tmp_path / "a.mat", np.random.default_rng(0)
    label = rng.integers(0, 21, (7, 9), np.uint8)
    fields = {"Boundaries": np.zeros((20, 1)), "Segmentation": label}
    scipy.io.savemat(path, {"GTcls": fields})
    header, body = path.read_bytes()[:128], path.read_bytes()[128:]
    refused = 0
    for i in range(1500):
        data = bytearray(body)
        for _ in range(rng.integers(1, 4)):
            # Words of lengths and types are what can lead astray.
            start = 4 * rng.integers(len(data) // 4)
            word = int(rng.choice([0, 1, 8, 14, 15, 2**16 + 1, 2**31 - 1, 2**32 - 1]))
            data[start : start + 4] = struct.pack("<I", word)
        data = bytes(data[: rng.integers(1, len(data) + 1)] if i % 3 == 0 else data)
        try:
            read = sbd.read_class_map(header + (_variable(data) if is_compressed else data), path)
        except UserError:
            refused += 1
        else:
            assert (read.dtype, read.ndim) == (np.uint8, 2)
    assert refused > 500
    for _ in range(300):
        noise = rng.integers(0, 256, rng.integers(1, 400), np.uint8).tobytes()
        with pytest.raises(UserError, match="not a class file of SBD, or damaged; restore it"):
            sbd.read_class_map(header + (_variable(noise) if is_compressed else noise), path)


def test_a_mat_file_that_unpacks_to_far_more_is_refused(tmp_path):
    header = b"MATLAB 5.0".ljust(124) + struct.pack("<H", 0x0100) + b"IM"
    nested = b"".join([header, _variable(bytes(2**27))])
    assert len(nested) < 2**18
    for _ in range(3):
        with pytest.raises(UserError, match="not a class file of SBD"):
            sbd.read_class_map(nested, tmp_path / "a.mat")
        nested = header + _variable(nested[128:])


def test_a_mat_file_of_the_version_that_scipy_cannot_read(both):
    header = b"MATLAB 7.3 MAT-file".ljust(124) + struct.pack("<H", 0x0200) + b"IM"
    (both / SBD / "cls/d.mat").write_bytes(header + b"\x89HDF" + bytes(600))
    report = check.check_dataset("voc2012_sbd", both)
    assert [line.split(": ", 1)[1] for line in report.errors] == [
        "not a class file of SBD, or damaged; restore it"
    ]


def test_real_voc(data_root):
    found = voc2012.find(data_root / "voc2012_sample")
    assert len(found.pairs) == 400
    for pair in found.pairs[:3]:
        assert IGNORE_LABEL in files.read_pair(pair, found.classes).label


def _with_objects(both):
    """Object numbers of a, of VOC, and d, of SBD; b and c have none."""
    voc, own = both / "VOCdevkit/VOC2012", both / SBD
    (voc / "SegmentationObject").mkdir()
    (own / "inst").mkdir()
    numbers = np.zeros(SIZE, np.uint8)
    numbers[1:3, 1:3], numbers[3:, 4:], numbers[0] = 1, 2, 255
    Image.fromarray(numbers).save(voc / "SegmentationObject/a.png")
    Image.fromarray(np.where(numbers == 255, 255, 1).astype(np.uint8)).save(
        voc / "SegmentationObject/c.png"
    )
    path = own / "inst/d.mat"
    objects = {"Segmentation": numbers % 255, "Categories": np.array([[3], [3]], np.uint8)}
    scipy.io.savemat(path, {"GTinst": objects}, do_compression=True)
    return numbers % 255


def test_objects_of_voc_and_sbd(both):
    numbers = _with_objects(both)
    data = dataset.load("voc2012_objects", both)
    assert {split: len(source) for split, source in data.splits.items()} == {"train": 1, "val": 1}
    assert data.warnings[0].startswith("1 images without object numbers")
    example = data.split("train")[0]
    assert example["name"] == "a"
    np.testing.assert_array_equal(example["instances"], numbers)  # void belongs to no object
    # An object that fills its image up to the void is no mask of 0 and 255.
    assert set(np.unique(data.split("val")[0]["instances"])) == {0, 1}
    together = dataset.load("voc2012_sbd_objects", both)
    names = [together.split("train")[i]["name"] for i in range(2)]
    assert names == ["a", "d"]
    np.testing.assert_array_equal(together.split("train")[1]["instances"], numbers)


def test_changed_object_numbers_are_read_again(both):
    _with_objects(both)
    before = dataset.load("voc2012_objects", both).fingerprint
    path = both / "VOCdevkit/VOC2012/SegmentationObject/a.png"
    Image.fromarray(np.ones(SIZE, np.uint8)).save(path)
    assert dataset.load("voc2012_objects", both).fingerprint != before


def test_voc_without_object_numbers_is_refused(both):
    with pytest.raises(UserError, match="no object has a mask of its own here"):
        voc2012.find(both, objects=True)
    _with_objects(both)
    (both / SBD / "inst/d.mat").write_bytes(b"x" * 200)
    with pytest.raises(UserError, match=r"inst/d\.mat: not an object file of SBD"):
        dataset.load("voc2012_sbd_objects", both)
