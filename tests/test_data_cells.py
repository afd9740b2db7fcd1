"""Slices of membranes and images of nuclei: layouts, splits, instances, borders, damage."""

import shutil

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from dense_jax.data import check, dataset, files
from dense_jax.data.datasets import em_membrane, nuclei, nuclei_border
from dense_jax.errors import UserError

SIZE = (12, 16)


def _save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


def _noise(seed, shape=SIZE):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _names(data):
    return {k: [source[i]["name"] for i in range(len(source))] for k, source in data.splits.items()}


def _write_stack(root, numbers, pattern="{:02d}", images="images", labels="labels"):
    for i in numbers:
        _save(root / images / f"{pattern.format(i)}.png", _noise(i))
        _save(root / labels / f"{pattern.format(i)}.png", 255 * (_noise(100 + i) > 80).astype("u1"))


@pytest.fixture
def stack(tmp_path):
    _write_stack(tmp_path, range(12))
    return tmp_path


def test_the_end_of_the_stack_is_val(stack):
    data = dataset.load("em_membrane", stack, val_slices=3)
    assert _names(data) == {"train": [f"{i:02d}" for i in range(9)], "val": ["09", "10", "11"]}
    example = data.split("val")[0]
    assert example["image"].shape == (*SIZE, 3)
    np.testing.assert_array_equal(example["image"][..., 0], _noise(9))
    np.testing.assert_array_equal(example["label"], _noise(109) > 80)
    assert example["instances"].dtype == np.int32
    np.testing.assert_array_equal(example["instances"], ndimage.label(_noise(109) > 80)[0])
    assert len(dataset.load("em_membrane", stack, val_slices=12).splits["val"]) == 12
    with pytest.raises(UserError, match="12 slices cannot give 13"):
        dataset.load("em_membrane", stack, val_slices=13)


def test_the_public_layout_is_the_same_stack(stack, tmp_path_factory):
    root = tmp_path_factory.mktemp("public")
    _write_stack(root / "data/membrane/train", range(12), "{}", "image", "label")
    ours, theirs = dataset.load("em_membrane", stack), dataset.load("em_membrane", root)
    assert ours.fingerprint == theirs.fingerprint
    for inner in ("data/membrane", "data/membrane/train"):
        found = em_membrane.find(root / inner)
        assert [pair.name for pair in found.pairs] == [f"{i:02d}" for i in range(12)]


def test_a_diagonal_contact_is_two_cells(tmp_path):
    _save(tmp_path / "images/0.png", _noise(0, (2, 2)))
    _save(tmp_path / "labels/0.png", np.diag(np.array([255, 255], np.uint8)))
    found = em_membrane.find(tmp_path, val_slices=0)
    sample = found.read(found.pairs[0], found.classes)
    np.testing.assert_array_equal(sample.instances, [[1, 0], [0, 2]])


STACK_DAMAGE = {
    "a third value": (
        lambda r: _save(r / "labels/03.png", np.full(SIZE, 128, np.uint8)),
        r"labels/03\.png: label value 128 \(100.*neither a class \(0, 255\)",
    ),
    "missing label": (lambda r: (r / "labels/03.png").unlink(), r"labels/03\.png: .*missing"),
    "truncated": (lambda r: _truncate(r / "labels/03.png"), r"labels/03\.png: .*(trunc|damaged)"),
    "size": (
        lambda r: _save(r / "labels/03.png", np.zeros((12, 15), np.uint8)),
        r"labels/03\.png: the label is 15x12 but its image 03\.png is 16x12",
    ),
    "name": (
        lambda r: shutil.copy(r / "images/03.png", r / "images/x.png"),
        r"x\.png: the name is not a slice num",
    ),
    "nothing": (lambda r: shutil.rmtree(r / "labels"), "no em_membrane dataset here"),
}


@pytest.mark.parametrize("damage", STACK_DAMAGE)
def test_damage_to_a_stack(stack, damage):
    act, message = STACK_DAMAGE[damage]
    act(stack)
    with pytest.raises(UserError, match=message):
        dataset.load("em_membrane", stack)


def _cells(seed):
    """Three nuclei, the first two of which touch; one number above what 8 bits hold."""
    instances = np.zeros(SIZE, np.uint16)
    instances[1:6, 1:5], instances[1:6, 5:9] = 1, 2
    instances[8:11, 2 + seed % 4 : 12] = 3 + 300 * (seed % 2)
    return instances


def _write_numbered(root, names, splits):
    rows = ["image_id,split,width,height,kind,n_nuclei"]
    for i, (name, split) in enumerate(zip(names, splits, strict=True)):
        _save(root / f"images/{name}.png", _noise(i) if i % 2 else _noise(i, (*SIZE, 3)))
        _save(root / f"instances/{name}.png", _cells(i))
        rows.append(f"{name},{split},16,12,gray,3")
    (root / "image_info.csv").write_text("\n".join(rows) + "\n")


@pytest.fixture
def numbered(tmp_path):
    _write_numbered(tmp_path, "fabcde", ["val", "train", "train", "val", "train", "train"])
    return tmp_path


def test_numbered_nuclei_round_trip(numbered):
    data = dataset.load("nuclei", numbered)
    assert data.classes.names == ("background", "nucleus")
    assert _names(data) == {"val": ["f", "c"], "train": ["a", "b", "d", "e"]}
    example = data.split("train")[0]
    assert example["instances"].dtype == np.int32
    np.testing.assert_array_equal(example["instances"], _cells(1))
    assert example["instances"].max() == 303
    np.testing.assert_array_equal(example["label"], _cells(1) > 0)
    text = str(check.check_dataset("nuclei", numbered))
    assert "no errors" in text
    assert [line.split()[1:] for line in text.splitlines() if "objects" in line] == [["6", "12"]]


def test_without_a_list_every_fifth_is_val(numbered):
    (numbered / "image_info.csv").unlink()
    data = dataset.load("nuclei", numbered)
    assert {split: len(source) for split, source in data.splits.items()} == {"train": 5, "val": 1}


def test_changed_instances_change_the_fingerprint(numbered):
    first = dataset.load("nuclei", numbered)
    instances = _cells(1)
    instances[instances == 2] = 1  # the same label, one nucleus less
    _save(numbered / "instances/a.png", instances)
    assert dataset.load("nuclei", numbered).fingerprint != first.fingerprint


def _write_masks(root, name, instances, image):
    _save(root / f"stage1_train/{name}/images/{name}.png", image)
    for number in np.unique(instances[instances > 0]):
        mask = 255 * (instances == number).astype(np.uint8)
        _save(root / f"stage1_train/{name}/masks/{number:05d}.png", mask)


@pytest.fixture
def masks(tmp_path):
    for i, name in enumerate("abcde"):
        _write_masks(tmp_path, name, _cells(i), _noise(i, (*SIZE, 4)))
    return tmp_path


def test_the_original_layout(masks):
    for root in (masks, masks / "stage1_train"):
        data = dataset.load("nuclei", root)
        assert sorted(len(source) for source in data.splits.values()) == [1, 4]
        for source in data.splits.values():
            example = source[0]
            i = "abcde".index(example["name"])
            np.testing.assert_array_equal(example["instances"], np.minimum(_cells(i), 3))
            np.testing.assert_array_equal(example["image"], _noise(i, (*SIZE, 4))[..., :3])


def test_a_shared_pixel_stays_with_the_first_mask(masks):
    path = masks / "stage1_train/b/masks/00002.png"
    mask = np.asarray(Image.open(path)).copy()
    mask[1, 1] = 255
    _save(path, mask)
    found = nuclei.find(masks)
    pair = next(pair for pair in found.pairs if pair.name == "b")
    sample = found.read(pair, found.classes)
    assert sample.instances is not None
    assert sample.instances[1, 1] == 1


def test_a_changed_mask_is_noticed(masks):
    first = dataset.load("nuclei", masks)
    path = masks / "stage1_train/b/masks/00002.png"
    path.write_bytes(path.read_bytes() + b"more")
    assert dataset.load("nuclei", masks).fingerprint == first.fingerprint
    _save(path, np.zeros(SIZE, np.uint8))
    assert dataset.load("nuclei", masks).fingerprint != first.fingerprint


NUMBERED_DAMAGE = {
    "missing instances": (
        lambda r: (r / "instances/a.png").unlink(),
        r"instances/a\.png: the file is missing; add it",
    ),
    "both missing": (
        lambda r: [(r / f"{kind}/a.png").unlink() for kind in ("images", "instances")],
        r"images/a\.png: the file is missing",
    ),
    "size": (
        lambda r: _save(r / "instances/a.png", _cells(0)[:, 1:]),
        r"instances/a\.png: the label is 15x12 but its image a\.png is 16x12",
    ),
    "truncated": (
        lambda r: _truncate(r / "instances/a.png"),
        r"instances/a\.png: the file is (truncated|not an image or damaged)",
    ),
    "colours": (
        lambda r: _save(r / "instances/a.png", _noise(0, (*SIZE, 3))),
        r"instances/a\.png: the file has RGB values, not object numbers; save",
    ),
    "one mask for all": (
        lambda r: _save(r / "instances/a.png", 255 * (_cells(0) > 0).astype(np.uint8)),
        r"instances/a\.png: one mask of value 255 for all objects",
    ),
    "32 bits": (
        lambda r: Image.fromarray(70000 * (_cells(0) > 0).astype(np.int32)).save(
            r / "instances/a.png", "TIFF"
        ),
        r"instances/a\.png: object number 70000 needs more than 16 bits",
    ),
    "JPEG": (
        lambda r: Image.new("L", (16, 12)).save(r / "instances/a.png", "JPEG"),
        r"instances/a\.png: JPEG changes object numbers",
    ),
    "unlisted": (
        lambda r: shutil.copy(r / "images/a.png", r / "images/z.png"),
        r"images/z\.png: not listed in .*image_info\.csv; add a row",
    ),
    "no table": (
        lambda r: (r / "image_info.csv").write_text("a,b\n1,2\n"),
        r"image_info\.csv: not a table with the columns image_id and split",
    ),
}
MASK_DAMAGE = {
    "no masks": (lambda r: shutil.rmtree(r / "a/masks"), r"a/masks: no masks here; restore"),
    "size": (
        lambda r: _save(r / "a/masks/00001.png", np.zeros((3, 4), np.uint8)),
        r"a/masks/00001\.png: the label is 4x3 but its image a\.png is 16x12",
    ),
    "smooth": (
        lambda r: _save(r / "a/masks/00001.png", _noise(0)),
        r"a/masks/00001\.png: a mask has 0 and one other value, but this one also has 1",
    ),
    "truncated": (
        lambda r: _truncate(r / "a/masks/00001.png"),
        r"a/masks/00001\.png: the file is (truncated|not an image or damaged)",
    ),
    "missing image": (
        lambda r: shutil.rmtree(r / "a/images"),
        r"a/images/a\.png: the file is missing; add it",
    ),
}


@pytest.mark.parametrize("damage", NUMBERED_DAMAGE)
def test_damage_to_numbered_nuclei(numbered, damage):
    act, message = NUMBERED_DAMAGE[damage]
    act(numbered)
    with pytest.raises(UserError, match=message) as caught:
        dataset.load("nuclei", numbered)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", MASK_DAMAGE)
def test_damage_to_masks(masks, damage):
    act, message = MASK_DAMAGE[damage]
    act(masks / "stage1_train")
    with pytest.raises(UserError, match=message):
        dataset.load("nuclei", masks)


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="no nuclei dataset here"):
        dataset.load("nuclei", tmp_path)
    for name in ("nuclei", "em_membrane"):
        with pytest.raises(UserError, match="give its folder with --data-dir"):
            dataset.load(name)
    with pytest.raises(UserError, match="border_radius=0"):
        nuclei_border.find(tmp_path, border_radius=0)


def _border_twin(instances, radius):
    """Looks from each pixel at every nucleus."""
    label = (instances > 0).astype(np.uint8)
    for y, x in np.ndindex(*instances.shape):
        near = {
            int(instances[v, u])
            for v, u in np.argwhere(instances)
            if (v - y) ** 2 + (u - x) ** 2 <= radius**2
        }
        if len(near) > 1:
            label[y, x] = 2
    return label


@pytest.mark.parametrize("radius", [1, 2, 3])
def test_borders_are_where_two_nuclei_are_near(radius):
    for seed in range(3):
        instances = _cells(seed)
        expected = _border_twin(instances, radius)
        np.testing.assert_array_equal(nuclei.border_label(instances, radius), expected)
    # Columns 4 and 5 are the two sides of a contact.
    row = nuclei.border_label(_cells(0), radius)[3]
    assert list(np.flatnonzero(row == 2)) == list(range(5 - radius, 5 + radius))


def test_border_labels_are_a_dataset_of_their_own(numbered):
    data = dataset.load("nuclei_border", numbered)
    assert data.classes.names == ("background", "nucleus", "border")
    label = data.split("train")[0]["label"]
    np.testing.assert_array_equal(label, nuclei.border_label(_cells(1), 2))
    assert ndimage.label(label == 1)[1] == 3  # the touching pair came apart
    wider = dataset.load("nuclei_border", numbered, border_radius=3)
    assert (wider.split("train")[0]["label"] == 2).sum() > (label == 2).sum()


def test_real_membranes(data_root):
    found = em_membrane.find(data_root)
    assert [pair.split for pair in found.pairs] == ["train"] * 20 + ["val"] * 4
    sample = found.read(found.pairs[0], found.classes)
    assert sample.label.shape == (512, 512)
    np.testing.assert_allclose((sample.label == 0).mean(), 0.2193, atol=1e-4)
    assert sample.instances is not None
    assert 50 < sample.instances.max() < 1000


def test_real_nuclei(data_root):
    found = nuclei.find(data_root)
    assert [sum(p.split == s for p in found.pairs) for s in ("train", "val")] == [338, 60]
    original = nuclei.find(data_root / "dsb2018_nuclei/original_layout")
    assert len(original.pairs) == 10
    by_name = {pair.name: pair for pair in found.pairs}
    for pair in original.pairs[:4]:  # both layouts hold the same pictures and nuclei
        masks = original.read(pair, original.classes)
        numbers = found.read(by_name[pair.name], found.classes)
        assert masks.digest == numbers.digest
        np.testing.assert_array_equal(masks.instances, numbers.instances)


def test_files_of_instances_keep_every_number():
    instances = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    decoded = files.decode_instances(files.encode_instances(instances))
    np.testing.assert_array_equal(decoded, instances)
