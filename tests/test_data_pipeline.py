"""Batches are a function of (seed, number); evaluation shows every image once."""

import json
from typing import Any

import chex
import numpy as np
import pytest

from dense_jax.data import dataset, padded, pipeline
from dense_jax.data.classes import IGNORE_LABEL
from dense_jax.data.normalise import Normalise
from dense_jax.data.transforms import (
    ColourJitter,
    RandomCrop,
    RandomFlip,
    RandomScale,
    Resize,
)
from dense_jax.errors import UserError

TRANSFORMS = (RandomScale(0.5, 2), ColourJitter(), Normalise(), RandomCrop(40), RandomFlip())


@pytest.fixture(scope="module")
def source():
    return dataset.load("shapes", size=(32, 48), num_train=10).split("train")


def _take(batches, number):
    taken = [next(batches) for _ in range(number)]
    batches.close()
    return taken


def test_batches_have_the_shared_layout(source):
    batches = pipeline.train_batches(source, TRANSFORMS, 4, seed=0)
    (batch,) = _take(batches, 1)
    assert set(batch) == {"images", "labels", "valid", "index"}
    chex.assert_shape(batch["images"], (4, 40, 40, 3))
    chex.assert_shape(batch["labels"], (4, 40, 40))
    chex.assert_type(
        [batch[k] for k in ("images", "labels", "valid", "index")],
        [np.float32, np.int32, bool, np.int32],
    )
    chex.assert_trees_all_equal(batches.example, batch)


def test_each_epoch_shows_each_example_once_in_another_order(source):
    batches = _take(pipeline.train_batches(source, TRANSFORMS, 5, seed=0), 4)
    first, second = (np.concatenate([b["index"] for b in batches[i : i + 2]]) for i in (0, 2))
    np.testing.assert_array_equal(np.sort(first), np.arange(10))
    np.testing.assert_array_equal(np.sort(second), np.arange(10))
    assert (first != second).any()


@pytest.mark.parametrize("workers", [{"num_threads": 1}, {"num_threads": 3}, {"num_workers": 2}])
def test_threads_and_worker_processes_do_not_change_a_batch(source, workers):
    expected = _take(pipeline.train_batches(source, TRANSFORMS, 3, seed=5), 8)
    batches = pipeline.train_batches(source, TRANSFORMS, 3, seed=5, **workers)
    batches.set_state({"next_batch": 2})
    chex.assert_trees_all_equal(_take(batches, 6), expected[2:])


def test_batches_are_in_c_order(source):
    """Grain hands over only such arrays in shared memory; others go through a pipe."""
    examples: Any = [source[0] | {"image": np.asfortranarray(source[0]["image"])}] * 4
    batch = next(pipeline.train_batches(examples, [Normalise()], 2, seed=0))
    assert all(array.flags.c_contiguous for array in batch.values())


def test_state_is_json_and_goes_on_with_the_very_next_batch(source):
    whole = _take(pipeline.train_batches(source, TRANSFORMS, 4, seed=1), 7)
    batches = pipeline.train_batches(source, TRANSFORMS, 4, seed=1)
    _take(batches, 3)
    state = json.loads(json.dumps(batches.get_state()))
    resumed = pipeline.train_batches(source, TRANSFORMS, 4, seed=1)
    resumed.set_state(state)
    chex.assert_trees_all_equal(_take(resumed, 4), whole[3:])
    chex.assert_trees_all_equal(_take(batches, 4), whole[3:])  # after close() too


def test_processes_share_one_order(source):
    whole = _take(pipeline.train_batches(source, TRANSFORMS, 2, seed=0), 4)
    for process in range(2):
        share = pipeline.train_batches(
            source, TRANSFORMS, 2, seed=0, process_index=process, process_count=2
        )
        chex.assert_trees_all_equal(_take(share, 2), whole[process::2])


class _Mixed:
    """Seven blank images of four sizes; the label of image i is i everywhere."""

    sizes = ((30, 40), (40, 30), (1, 1), (30, 40), (33, 65), (30, 40), (100, 20))

    def __len__(self):
        return len(self.sizes)

    def size(self, index):
        return self.sizes[index]

    def __getitem__(self, index):
        label = np.full(self.sizes[index], index, np.uint8)
        return {"image": np.zeros((*label.shape, 3), np.uint8), "label": label, "name": "x"}


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("how", ["exact", "buckets"])
def test_evaluation_shows_every_pixel_of_every_image_once(batch_size, how):
    source, seen = _Mixed(), []
    batches = pipeline.eval_batches(source, [Normalise()], batch_size, shapes=how)
    shapes = set()
    for batch in batches:
        shapes.add(batch["images"].shape)
        for label, valid, index, size in zip(
            *(batch[k] for k in ("labels", "valid", "index", "size")), strict=True
        ):
            assert valid == (index >= 0)
            if not valid:
                assert (label == IGNORE_LABEL).all()
                continue
            seen.append(int(index))
            assert tuple(size) == source.size(index)
            assert (label == index).sum() == size.prod()
            assert (label[: size[0], : size[1]] == index).all()
    assert sorted(seen) == list(range(len(source)))
    own = {source.size(i) for i in range(len(source))}
    assert (
        {shape[1:3] for shape in shapes} == own
        if how == "exact"
        else len(shapes) <= padded.MAX_BUCKETS
    )
    assert len(batches) == len(list(batches))


def test_evaluation_processes_step_together():
    shares = [
        list(
            pipeline.eval_batches(
                _Mixed(), [Normalise()], 2, process_index=process, process_count=3
            )
        )
        for process in range(3)
    ]
    for batches in zip(*shares, strict=True):
        assert len({batch["images"].shape for batch in batches}) == 1
    indices = np.concatenate([batch["index"] for share in shares for batch in share])
    np.testing.assert_array_equal(np.sort(indices[indices >= 0]), np.arange(7))


def test_evaluation_at_another_resolution():
    (batch,) = pipeline.eval_batches(_Mixed(), [Resize((20, 24)), Normalise()], 7)
    chex.assert_shape(batch["images"], (7, 20, 24, 3))
    assert (batch["size"] == [20, 24]).all()


class _Raises:
    def __call__(self, example, rng):
        raise UserError(f"bad.png is bad: mend {rng is not None}")


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1])
def test_errors_of_users_pass_through_threads_and_workers(source, num_workers):
    batches = pipeline.train_batches(source, [_Raises()], 2, 0, num_workers=num_workers)
    with pytest.raises(UserError, match=r"bad\.png"):
        _take(batches, 1)
    batches.close()


def test_wrong_pipelines_say_what_to_change(source):
    with pytest.raises(ValueError, match="put Normalise among"):
        _take(pipeline.train_batches(source, [], 2, 0), 1)
    with pytest.raises(UserError, match="--crop"):
        _take(pipeline.train_batches(source, [RandomScale(0.5, 2), Normalise()], 5, 0), 1)


def test_batches_of_one_go_on_beyond_an_epoch(source):
    batches = _take(pipeline.train_batches(source, [Normalise()], 1, seed=0), 20)
    order = [int(batch["index"][0]) for batch in batches]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
