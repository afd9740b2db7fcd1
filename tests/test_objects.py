"""The finder of objects gives what each former finder gave, on real images too."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dense_jax.data import border, boxes, crops, objects
from dense_jax.data.classes import IGNORE_LABEL
from dense_jax.data.datasets import camvid, nuclei, nuclei_border, shapes, voc2012
from dense_jax.errors import UserError
from dense_jax.metrics import instances as metrics

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


class Source:
    """A source of given examples."""

    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return self.examples[index]

    def size(self, index):
        return self.examples[index]["label"].shape


def check_equal_to_former(examples, least=8):
    for example in examples:
        former = boxes.find_objects(example)
        now = objects.find(example, 0, min_side=4)
        np.testing.assert_array_equal(now.boxes, former.boxes)
        np.testing.assert_array_equal(now.classes, former.categories + 1)
        np.testing.assert_array_equal(now.numbers, former.numbers)
        np.testing.assert_array_equal(now.map, former.map)
        assert [x.dtype for x in now[:3]] == [np.float32, np.int32, np.int32]
        assert now.map.dtype == former.map.dtype
        for background in (0, None):
            numbered = objects.number(example, background)
            np.testing.assert_array_equal(numbered, crops.object_map(example, background))
        joined = objects.number(example, 0, by_class=False)
        np.testing.assert_array_equal(joined, border.objects(example))
        assert joined.dtype == border.objects(example).dtype
    for background in (0, None):
        try:
            former = crops.find_objects(Source(examples), background, least)
        except UserError:
            former = []
        now = [
            crops.Window(index, example["name"], crops._box(box), int(label), int(number))
            for index, example in enumerate(examples)
            for found in [objects.find(example, background, min_side=least, background_votes=True)]
            for box, label, number in zip(found.boxes, found.classes, found.numbers, strict=True)
        ]
        assert now == former


def test_equal_to_the_former_finders(examples):
    check_equal_to_former(examples)


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
def test_equal_to_the_former_finders_on_noise(example):
    check_equal_to_former([example], least=2)


def test_predictions_of_one_class_are_numbered_alike(examples):
    for example in examples:
        label = example["label"]
        for value in np.setdiff1d(label, [0, IGNORE_LABEL]):
            one = {"label": np.where(label == value, label, np.uint8(0))}
            np.testing.assert_array_equal(
                objects.number(one, 0), metrics.from_semantic(label, object_class=int(value))
            )
