"""The finder of objects against a slow twin, on real images too."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dense_jax.data import objects
from dense_jax.data.classes import IGNORE_LABEL
from dense_jax.data.datasets import camvid, nuclei, nuclei_border, shapes, voc2012
from dense_jax.metrics import instances as metrics
from dense_jax.ops import boxes

REAL = ("camvid", "nuclei", "nuclei_border", "voc2012", "voc2012 objects")


def real(name, root, count=6):
    """Examples of a dataset, evenly picked, without their images."""
    if name == "camvid":
        files = camvid.find(root)
    elif name.startswith("nuclei"):
        files = (nuclei if name == "nuclei" else nuclei_border).find(root)
    else:
        files = voc2012.find(root / "voc2012_sample" / "VOCdevkit")
    pairs = files.pairs
    numbers = {pair.name: pair.label.parents[1] / "SegmentationObject" for pair in pairs}
    if name == "voc2012 objects":
        pairs = [p for p in pairs if (numbers[p.name] / f"{p.name}.png").exists()]
    for i in np.linspace(0, len(pairs) - 1, count).astype(int):
        sample = files.read(pairs[i], files.classes)
        example = {"label": sample.label, "name": pairs[i].name}
        if sample.instances is not None:
            example["instances"] = sample.instances.astype(np.int32)
        if name == "voc2012 objects":
            with Image.open(numbers[pairs[i].name] / f"{pairs[i].name}.png") as image:
                found = np.asarray(image).astype(np.int32)
            example["instances"] = np.where(found == IGNORE_LABEL, 0, found)
        yield example


def generated():
    """Examples of the generated dataset, with their object numbers and without."""
    source = shapes.load(num_train=6, size=(60, 80), occlusion=0.8).split("train")
    for i in range(len(source)):
        example = source[i]
        yield example
        yield {key: example[key] for key in ("label", "name")}


@pytest.fixture(scope="module", params=["shapes", *REAL])
def examples(request):
    """Some examples of a dataset, real or generated."""
    if request.param == "shapes":
        return list(generated())
    return list(real(request.param, request.getfixturevalue("data_root")))


def slow_number(label, is_object, by_class):
    """Visits the neighbours of each pixel, and theirs, as long as there are any."""
    result, count = np.zeros(label.shape, np.int32), 0
    for start in np.argwhere(is_object):
        if result[tuple(start)]:
            continue
        count += 1
        result[tuple(start)] = count
        queue = [tuple(start)]
        while queue:
            y, x = queue.pop()
            for at in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if (
                    0 <= at[0] < label.shape[0]
                    and 0 <= at[1] < label.shape[1]
                    and is_object[at]
                    and not result[at]
                    and (not by_class or label[at] == label[y, x])
                ):
                    result[at] = count
                    queue.append(at)
    return result


def slow_find(numbers, label, background, min_side, background_votes):
    """Box and class by the pixels of each object."""
    result = {}
    for number in np.unique(numbers[numbers > 0]):
        rows, columns = np.nonzero(numbers == number)
        x0, y0, x1, y1 = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        votes = [int(v) for v in label[rows, columns] if v != IGNORE_LABEL]
        if not background_votes:
            votes = [v for v in votes if v != background]
        if min(x1 - x0, y1 - y0) >= min_side and votes:
            winner = max(sorted(set(votes)), key=votes.count)
            if winner != background:
                result[int(number)] = (x0, y0, x1, y1), winner
    return result


def check_against_slow_twins(example, min_side=8):
    label = example["label"]
    for background, by_class in itertools.product((0, None), (True, False)):
        numbers = objects.number(example, background, by_class=by_class)
        if "instances" in example:
            assert numbers is example["instances"]
            continue
        is_object = (label != IGNORE_LABEL) & (label != (-1 if background is None else background))
        expected = slow_number(label, is_object, by_class)
        # The same parts, numbered 1, 2, ... in one order or another.
        pairs = np.unique(np.stack([numbers.ravel(), expected.ravel()]), axis=1)
        assert pairs.shape[1] == len(np.unique(numbers)) == len(np.unique(expected))
        assert numbers.max() == expected.max()
        assert numbers.dtype == np.int32
        np.testing.assert_array_equal(numbers > 0, is_object)
    for background, votes in itertools.product((0, None), (True, False)):
        found = objects.find(example, background, min_side=min_side, background_votes=votes)
        assert found.boxes.dtype == np.float32
        assert found.classes.dtype == np.int32
        numbers = objects.number(example, background)
        expected = slow_find(numbers, label, background, min_side, votes)
        assert found.ids.tolist() == list(expected)
        for i, (box, value) in enumerate(expected.values()):
            assert tuple(found.boxes[i]) == box
            assert found.classes[i] == value
            np.testing.assert_array_equal(found.boxes[i], boxes.of_mask(found.mask(i)))
            np.testing.assert_array_equal(found.mask(i), numbers == found.ids[i])
            assert found.areas[i] == np.count_nonzero(found.mask(i))


@pytest.mark.slow
def test_slow_twins(examples):
    for example in examples:
        small = {key: example[key][::3, ::3] for key in ("label", "instances") if key in example}
        check_against_slow_twins(small)


def test_by_hand():
    label = np.array(
        [[0, 1, 1, 0, 0, 0], [0, 1, 1, 0, 0, 1], [0, 255, 2, 2, 0, 1], [0, 0, 2, 2, 0, 0]], np.uint8
    )
    numbers = objects.number({"label": label}, 0)
    np.testing.assert_array_equal(
        numbers, [[0, 1, 1, 0, 0, 0], [0, 1, 1, 0, 0, 2], [0, 0, 3, 3, 0, 2], [0, 0, 3, 3, 0, 0]]
    )
    # Without a background its two parts are objects too: touching corners do not connect.
    assert objects.number({"label": label}, None).max() == 5
    joined = objects.number({"label": label}, 0, by_class=False)
    np.testing.assert_array_equal(joined, np.where(numbers == 3, 1, numbers))
    found = objects.find({"label": label}, 0, min_side=1)
    assert found.boxes.tolist() == [[1, 0, 3, 2], [5, 1, 6, 3], [2, 2, 4, 4]]
    assert found.classes.tolist() == [1, 1, 2]
    assert len(objects.find({"label": label}, 0, min_side=2).boxes) == 2
    assert objects.find({"label": label}, 0, min_side=3).boxes.shape == (0, 4)


def test_votes_by_hand():
    """Object 1 has most pixels of background, object 2 none with a label, object 3 a tie."""
    example = {
        "instances": np.array([[1, 1, 1, 0, 2, 2, 0, 3, 3]], np.int32),
        "label": np.array([[0, 0, 5, 0, 255, 255, 0, 7, 4]], np.uint8),
    }
    found = objects.find(example, 0, min_side=1)
    assert (found.ids.tolist(), found.classes.tolist()) == ([1, 3], [5, 4])
    assert found.mask(1).tolist() == [[False] * 7 + [True] * 2]
    found = objects.find(example, 0, min_side=1, background_votes=True)
    assert (found.ids.tolist(), found.classes.tolist()) == ([3], [4])
    found = objects.find(example, None, min_side=1)
    assert (found.ids.tolist(), found.classes.tolist()) == ([1, 3], [0, 4])


def drawn(height, width, num, seed, has_instances):
    """Overlapping boxes whose labels are others than their numbers, void and background too."""
    rng = np.random.default_rng(seed)
    label = rng.choice([0, 1, 2, 254, 255], (height, width)).astype(np.uint8)
    if not has_instances:
        return {"label": label, "name": "a"}
    numbers = np.zeros((height, width), np.int32)
    for k in range(1, num + 1):
        top, left = rng.integers(height), rng.integers(width)
        numbers[top : top + rng.integers(1, 9), left : left + rng.integers(1, 9)] = 2 * k
    return {"label": label, "instances": numbers, "name": "a"}


@given(
    st.builds(
        drawn,
        st.integers(1, 14),
        st.integers(1, 14),
        st.integers(0, 5),
        st.integers(0, 999),
        st.booleans(),
    )
)
def test_slow_twins_on_noise(example):
    check_against_slow_twins(example, min_side=2)


def test_predictions_of_one_class_are_numbered_alike(examples):
    for example in examples:
        label = example["label"]
        for value in np.setdiff1d(label, [0, IGNORE_LABEL]):
            one = {"label": np.where(label == value, label, np.uint8(0))}
            np.testing.assert_array_equal(
                objects.number(one, 0), metrics.from_semantic(label, object_class=int(value))
            )
