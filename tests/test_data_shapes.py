"""The generated dataset: the same pixels everywhere, and pictures worth learning from."""

import zlib

import numpy as np
import pytest

from dense_jax.data import dataset
from dense_jax.data.classes import IGNORE_LABEL, ClassTable, voc_colours
from dense_jax.data.datasets import shapes
from dense_jax.errors import UserError


def _checksum(example):
    return [zlib.crc32(example[key].tobytes()) for key in ("image", "label", "instances")]


def test_examples_are_the_same_on_every_machine():
    train = dataset.load("shapes", size=(48, 64)).split("train")
    assert _checksum(train[0]) == [4199365442, 3947262689, 872630607]
    assert _checksum(train[3999]) == [1803483825, 2716553703, 891761082]


def test_splits_seeds_and_indices_differ():
    data, other = dataset.load("shapes"), dataset.load("shapes", seed=1)
    examples = [data.split("train")[0], data.split("val")[0], data.split("train")[1]]
    examples.append(other.split("train")[0])
    assert len({_checksum(example)[0] for example in examples}) == len(examples)
    assert data.fingerprint != other.fingerprint
    assert data.fingerprint == dataset.load("shapes").fingerprint


def test_arrays_agree_with_each_other():
    source = dataset.load("shapes", size=(64, 80)).split("val")
    seen = set()
    for i in range(40):
        example = source[i]
        image, label, instances = example["image"], example["label"], example["instances"]
        assert image.dtype == np.uint8
        assert image.shape == (*source.size(i), 3) == (64, 80, 3)
        assert label.shape == instances.shape == (64, 80)
        counted = label != IGNORE_LABEL
        np.testing.assert_array_equal(label[counted] > 0, instances[counted] > 0)
        for number in np.unique(instances[counted]):  # an object has one class
            assert len(np.unique(label[counted & (instances == number)])) == 1
        seen |= set(np.unique(label))
    assert seen == {*range(shapes.CLASSES.num_classes), IGNORE_LABEL}


def test_dials():
    def labels(**dials):
        source = dataset.load("shapes", **dials).split("train")
        return [source[i]["label"] for i in range(8)]

    assert not any((label == IGNORE_LABEL).any() for label in labels(void_border=0))
    assert not any(label.any() for label in labels(num_objects=(0, 0)))
    plain = dataset.load("shapes", contrast=0.0, noise=0.0).split("train")[0]["image"]
    assert plain.std() < dataset.load("shapes").split("train")[0]["image"].std()


def test_dials_from_json():
    data = dataset.load("shapes", size=[32, 40])
    assert data.fingerprint == dataset.load("shapes", size=(32, 40)).fingerprint
    assert data.split("val").size(0) == (32, 40)


def test_one_pixel_pictures_can_be_drawn():
    assert dataset.load("shapes", size=(1, 1)).split("val")[0]["image"].shape == (1, 1, 3)


def test_bad_requests_are_user_errors():
    with pytest.raises(UserError, match=r"unknown dataset 'shape'.*shapes"):
        dataset.load("shape")
    with pytest.raises(UserError, match=r"no split 'minival'.*train, val, test"):
        dataset.load("shapes").split("minival")
    with pytest.raises(UserError, match="no images"):
        dataset.load("shapes", num_val=0).split("val")
    with pytest.raises(IndexError):
        dataset.load("shapes", num_val=3).split("val")[3]


def test_voc_colours_are_the_published_ones():
    assert voc_colours(4) == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))
    assert voc_colours(21)[20] == (0, 64, 128)
    assert voc_colours(256)[255] == (224, 224, 192)


def test_class_table_maps_file_values_and_round_trips():
    table = ClassTable(["cell", "wall"], values=(255, 0), void_values=(7,))
    lookup = table.lookup()
    assert [lookup[v] for v in (255, 0, 7, 1)] == [0, 1, IGNORE_LABEL, -1]
    assert ClassTable.from_json(table.to_json()) == table
    assert table.palette().shape == (256, 3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"names": ()},
        {"names": ("a", "a")},
        {"names": ("a", "b"), "values": (0,)},
        {"names": ("a", "b"), "values": (0, 255)},
        {"names": ("a",), "colours": ((0, 0, 256),)},
    ],
)
def test_class_table_refuses(wrong):
    with pytest.raises(ValueError, match=r"class|names|colours"):
        ClassTable(**wrong)
