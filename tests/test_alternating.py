"""Alternating training: what learns in each of the four runs, and the proposals between them."""

import dataclasses
import json
import pathlib
import re
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from PIL import Image

from dense_jax.commands import propose
from dense_jax.data import proposals as proposal_file
from dense_jax.errors import UserError
from dense_jax.evaluation import proposals
from dense_jax.layers.conv import Conv
from dense_jax.models.rcnn import faster_rcnn as models
from dense_jax.ops import boxes as box_ops
from dense_jax.tasks import trained, training
from dense_jax.train.checkpoint import read_variables
from experiments import faster_rcnn as script
from experiments import mask_rcnn
from tests.test_detection_task import SHAPES, Trunk, config, data

RUNS: dict[str, Any] = dict(
    train_mode="alternating",
    num_steps=3,
    head_steps=2,
    eval_every=9,
    batch_size=4,
    neck="c5",
    anchor_sizes=(16, 32),
    test_proposals=5,
)


class WithConv1(nn.Module):
    """The small trunk, with all parts that a ResNet can freeze."""

    @nn.compact
    def __call__(self, images, *, train):
        nn.share_scope(self, trunk := Trunk())
        return trunk(nn.relu(Conv(8, 3, name="conv1")(images)), train=train)


@pytest.fixture(autouse=True, scope="module")
def _small():
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.setattr(models.FasterRCNN, "_trunk", lambda self: WithConv1(name="backbone"))
        yield


@pytest.mark.slow  # four runs one after another; their parts are tried in test_given_proposals
def test_four_short_runs(tmp_path, capsys):
    """One test, so that one process trains them."""
    own = config(**RUNS, workdir=str(tmp_path / "all"))
    training.run(script.build, own)
    runs = tmp_path / "all", list(own.each_stage())
    check_what_learns_in_each_run(runs)
    check_no_run_is_trained_further_that_another_started_from(runs)
    check_proposals_of_the_first_run_train_the_second(runs)
    check_a_proposal_network_is_scored_by_boxes_of_any_class(runs)
    check_the_command_writes_proposals_of_splits_and_folders(runs, tmp_path, capsys)


@pytest.mark.slow
def test_masks_learn_with_the_head(tmp_path):
    """Mask R-CNN on proposals that a network before it has found (Section 3.1 of the paper)."""
    fields = dataclasses.asdict(config(**RUNS, workdir=str(tmp_path / "all")))
    own = mask_rcnn.Config(**fields | {"shapes": SHAPES})
    training.run(mask_rcnn.build, own)
    first, second, _, fourth = own.each_stage()
    parts = [set(variables_of(stage)) for stage in (first, second, fourth)]
    assert all({"mask_head", "mask_predictor"} <= part for part in parts)
    before, after = (variables_of(stage)["mask_head"] for stage in (first, second))
    assert not any(jax.tree.leaves(jax.tree.map(np.array_equal, before, after)))
    names = {path.name for path in pathlib.Path(fourth.workdir or "").glob("results_*.json")}
    assert names == {"results_box.json", "results_mask.json"}
    assert "mask_ap" in trained.load(fourth.workdir or "").task.headline


def proposed(opened, image):
    propose = opened.task.proposer()
    assert propose is not None
    return propose(opened.variables, image)


def variables_of(stage):
    return read_variables(stage.workdir, "last")[0]["params"]


def check_what_learns_in_each_run(runs):
    _, stages = runs
    assert [stage.num_steps for stage in stages] == [3, 2, 3, 2]
    first, second, third, fourth = map(variables_of, stages)
    heads = ("box_head", "box_predictor")
    assert set(first) == {"backbone", "rpn", *heads}
    assert set(second) == set(first) - {"rpn"}

    def same(one, other, *names):
        equal = (jax.tree.map(np.array_equal, one[name], other[name]) for name in names)
        return [all(jax.tree.leaves(tree)) for tree in equal]

    assert same(first, second, "backbone", *heads) == [False] * 3
    assert same(second, third, "backbone", *heads) == [True] * 3
    assert same(third, fourth, "backbone", "rpn") == [True] * 2
    assert same(third, fourth, *heads) == [False] * 2
    assert same(first, third, "rpn") == [False]
    # What does not learn does not decay either.
    parts = {"trunk": "backbone/layer1_0/kernel", "rpn": "rpn/conv1/kernel"}
    parts |= {"head": "box_head/fc6/kernel"}
    for stage in stages:
        groups = script.build(stage, data().classes.num_classes).groups
        for part in set(parts) - ({"rpn"} if stage is stages[1] else set()):
            is_frozen = any(g.lr == 0 and re.search(g.pattern, parts[part]) for g in groups)
            assert is_frozen == (part not in stage.learn), (stage.learn, part)


def check_no_run_is_trained_further_that_another_started_from(runs):
    folder, _ = runs
    for flags in ({"head_steps": 3}, {"num_steps": 4}):
        own = config(**{**RUNS, **flags}, workdir=str(folder))
        with pytest.raises(UserError, match="has started from it: give the old --num-steps"):
            next(own.each_stage())


def check_proposals_of_the_first_run_train_the_second(runs):
    folder, stages = runs
    path = folder / "1_proposals" / "proposals-3.json"
    assert stages[1].proposals == str(path)
    table = proposal_file.read(path)
    names = {source[i]["name"] for source in data().splits.values() for i in range(len(source))}
    assert set(table) == names
    opened = trained.load(folder / "1_proposals")
    example = data().split("train")[3]
    found = proposed(opened, example["image"])
    large = (np.diff(np.round(found, 2).reshape(-1, 2, 2), axis=1) > 0).all(axis=(1, 2))
    np.testing.assert_allclose(table[example["name"]], found[large], atol=6e-3)
    assert len(found) > 5  # as many as train a head, not as many as are evaluated
    before = path.stat().st_mtime_ns
    opened.task.after_training(opened.variables, data())  # it is there
    assert path.stat().st_mtime_ns == before


def check_a_proposal_network_is_scored_by_boxes_of_any_class(runs):
    folder, _ = runs
    record = json.loads((folder / "1_proposals" / "evaluation.json").read_text())
    (table,) = record["tables"]
    assert [row[0] for row in table["rows"]] == ["object"]
    last = json.loads((folder / "4_detector" / "evaluation.json").read_text())
    assert len(last["tables"][0]["rows"]) == data().classes.num_classes - 1
    opened = trained.load(folder / "1_proposals")
    image = data().split("val")[0]["image"]
    found = opened.predict(image)
    assert found.classes.names == ("background", "object")
    assert set(found.class_ids) == {1}
    every = proposed(opened, image)
    overlap = np.asarray(box_ops.iou(found.boxes, every.astype(np.float32)))
    assert overlap.max(axis=1).min() > 0.999
    assert (np.diff(found.scores) <= 0).all()
    task: Any = opened.task
    logits = task._propose(task.first_stage, opened.variables, image)[1]
    np.testing.assert_allclose(found.scores, 1 / (1 + np.exp(-logits)), rtol=1e-5)


def check_the_command_writes_proposals_of_splits_and_folders(runs, tmp_path, capsys):
    folder, _ = runs
    run = folder / "4_detector"
    propose.run(run=run, output=tmp_path / "val.json", split=("val",))
    table = proposal_file.read(tmp_path / "val.json")
    source = data().split("val")
    assert set(table) == {source[i]["name"] for i in range(len(source))}
    assert "5 images" in capsys.readouterr().out
    images = tmp_path / "images"
    images.mkdir()
    Image.fromarray(source[0]["image"]).save(images / "x.png")
    propose.run(run=run, output=images / "proposals.json", input=images)
    found = proposal_file.read(images / "proposals.json")
    np.testing.assert_array_equal(found["x"], table[source[0]["name"]])
    (images / "broken.png").write_bytes(b"no image")
    with pytest.raises(SystemExit):
        propose.run(run=run, output=images / "others.json", input=images)
    assert "1 images, " in (words := capsys.readouterr().out)
    assert f"1 failed\n{images / 'broken.png'}: not an image or damaged" in words
    assert proposal_file.read(images / "others.json")["x"].tolist() == found["x"].tolist()
    with pytest.raises(UserError, match=r"no image of .*broken.png could be read: .*damaged"):
        propose.run(run=run, output=tmp_path / "x.json", input=images / "broken.png")
    (images / "broken.png").unlink()
    with pytest.raises(UserError, match="leave out --split"):
        propose.run(run=run, output=tmp_path / "x.json", input=images, split=("val",))
    propose.run(run=run, output=tmp_path / "new" / "x.json", input=images, checkpoint="best")
    with pytest.raises(UserError, match="is a folder: give a file"):
        propose.run(run=run, output=tmp_path, input=images)
    with pytest.raises(UserError, match="no network of proposals: give one of Faster R-CNN"):
        propose.run(run=folder / "2_head", output=tmp_path / "x.json")


def test_proposals_of_two_images_of_one_name():
    image = np.zeros((4, 4, 3), np.uint8)
    one: Any = [{"name": "a", "image": image}, {"name": "b", "image": image}]
    boxes = np.array([[0.123, 0, 2, 2], [1, 1, 1.001, 3]])
    assert list(proposals.of_sources(lambda _: boxes, [one])) == ["a", "b"]
    with pytest.raises(UserError, match="two images of the dataset are named 'a'"):
        proposals.of_sources(lambda _: boxes, [one, one[:1]])


def test_boxes_without_an_area_are_not_written(tmp_path):
    boxes = np.array([[0.123, 0, 2, 2], [1, 1, 1.001, 3]])
    proposals.write(tmp_path / "p.json", {"a": boxes, "b": np.zeros((0, 4))})
    found = proposal_file.read(tmp_path / "p.json")
    assert found["a"].tolist() == [[0.12, 0, 2, 2]]
    assert found["b"].shape == (0, 4)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"learn": ("trunk",)}, "add rpn or head"),
        ({"learn": ("trunk",), "proposal_source": "grid"}, "add head"),
        ({"train_mode": "alternating", "proposal_source": "grid"}, "makes its own proposals"),
        ({"train_mode": "alternating", "proposals": "a.json"}, "and --proposals"),
        ({"learn": ("rpn", "head", "rpn")}, "--learn rpn head rpn: a part is named twice"),
        (
            {"train_mode": "alternating", "learn": ("head",)},
            "all parts in turn: leave out",
        ),
        ({"train_mode": "alternating", "head_loss": "svm"}, "and --head-loss=svm"),
        ({"learn": ("rpn", "head"), "proposal_source": "grid"}, "there is no rpn"),
        ({"head_steps": 3}, "--train-mode=alternating"),
        ({"learn": ("rpn",), "head_loss": "box"}, "--head-loss is of the head: leave it out"),
        ({"learn": ("trunk", "head"), "rpn_lambda": 2.0}, "--rpn-lambda"),
    ],
)
def test_flags_that_do_not_go_together(flags, words):
    with pytest.raises(UserError, match=words):
        config(**flags)


def test_flags_of_what_does_not_learn_stay_out_of_its_runs():
    own = config(
        train_mode="alternating",
        rpn_lambda=10.0,
        rpn_cls="off",
        test_boxes="proposals",
        workdir="w",
    )
    first, second, third, fourth = own.each_stage()
    assert (first.rpn_lambda, second.rpn_lambda, third.rpn_lambda) == (10, 1, 10)
    assert (first.test_boxes, second.test_boxes, fourth.test_boxes) == ("moved", *2 * ["proposals"])
    assert (second.rpn_cls, fourth.rpn_cls) == ("on", "off")
    assert third.init == f"run:{second.workdir}" == "run:w/2_head"
