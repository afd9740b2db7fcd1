"""The CRF behind predictions: in evaluation, prediction and ensembles, and the search for it."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

from dense_jax import runs, viz
from dense_jax.commands import crf_search, evaluate, predict
from dense_jax.commands.crf_flags import with_flags
from dense_jax.data import dataset as datasets
from dense_jax.data.datasets import shapes
from dense_jax.data.normalise import Normalise, PixelValues
from dense_jax.errors import UserError
from dense_jax.infer.crf import check_crf, with_crf
from dense_jax.infer.whole_image import whole_image
from dense_jax.ops import crf as ops_crf
from dense_jax.ops import permutohedral
from dense_jax.ops.crf import CrfParams
from dense_jax.tasks import semantic, trained
from dense_jax.tasks.semantic import Semantic
from experiments import fcn

SIDE = 24
CONFIG = dataclasses.replace(
    fcn.PRESETS["smoke"],
    shapes=shapes.ShapesSpec(
        size=(SIDE, SIDE), num_train=2, num_val=5, num_test=1, radius=(0.25, 0.4), noise=0.02
    ),
)
PARAMS = CrfParams(w1=4.0, sxy=8.0, srgb=20.0, w2=1.0, sg=1.0, iterations=5)
NOISE = np.random.default_rng(0).normal(0, 2.2, (64, 64, 6)).astype(np.float32)


class Noisy(nn.Module):
    """Scores by how near a colour is to that of a class, under noise that only places decide."""

    @nn.compact
    def __call__(self, images, *, train):
        del train
        rgb = PixelValues("torchvision")(images)[..., None, :]
        colours = np.array(shapes.CLASSES.colours, np.float32).reshape(1, 1, 1, 6, 3)
        distance = jnp.sum((rgb - colours) ** 2, axis=-1)
        noise = NOISE[None, : images.shape[1], : images.shape[2]]
        return {"logits": -distance / 3000 + noise + self.param("bias", lambda _: jnp.zeros(()))}


VARIABLES = {"params": {"bias": np.float32(0)}}
noisy = whole_image(Noisy())


@pytest.fixture
def exact(monkeypatch):
    """Sums over all pairs instead of the lattice, whose programs take long to compile."""

    def mean_field(logits, images, params, sizes):
        del sizes  # padding takes part, which no score here minds
        one = functools.partial(ops_crf.exact_mean_field, params=params)
        return jax.vmap(one)(logits, images)

    monkeypatch.setattr(ops_crf, "mean_field", mean_field)


@pytest.fixture
def run(tmp_path, monkeypatch, exact):
    """A run folder of the noisy network, which opens without a checkpoint."""
    workdir = tmp_path / "run"
    config = dataclasses.replace(CONFIG, workdir=str(workdir))
    options = dataclasses.asdict(config.shapes)
    dataset = datasets.load("shapes", **options)
    runs.prepare(config, dataset)
    task = Semantic(config, Noisy(), [])
    opened = trained.Run(workdir, task, VARIABLES, 2, dataset.classes, "experiments.fcn")
    monkeypatch.setattr(trained, "load", lambda *_, **__: opened)
    return opened


def batch_of(normalisation, sizes, side=SIDE, seed=0):
    """Padded batch: (normalised images, sizes, integer pixels)."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (len(sizes), side, side, 3), np.uint8)
    images = []
    for image, (height, width) in zip(pixels, sizes, strict=True):
        normal = Normalise(normalisation)({"image": image})["image"].astype(np.float32)
        normal[height:], normal[:, width:] = 0, 0
        images.append(normal)
    return jnp.asarray(np.stack(images)), jnp.array(sizes, jnp.int32), pixels


def test_images_without_pixel_values_are_refused():
    with pytest.raises(UserError, match="--normalisation=grey_image"):
        check_crf(PARAMS, "grey_image")


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"sxy": 0.0}, r"--crf\.sxy=0"),
        ({"srgb": -1.0}, r"--crf\.srgb=-1"),
        ({"sg": float("nan")}, r"--crf\.sg=nan"),
        ({"iterations": -1}, r"--crf\.iterations=-1"),
    ],
)
def test_impossible_parameters_name_themselves(values, match):
    with pytest.raises(UserError, match=match):
        check_crf(CrfParams(**values), "torchvision")


@pytest.mark.slow
def test_padding_and_neighbours_in_the_batch_change_nothing(monkeypatch):
    monkeypatch.setattr(permutohedral, "_SHARES", (1,))  # one program to compile, not five
    images, sizes, pixels = batch_of("torchvision", [(17, 20), (SIDE, 9), (0, 0)])
    found = jax.jit(with_crf(noisy, PARAMS, "torchvision"))(VARIABLES, images, sizes)["logits"]
    logits = noisy(VARIABLES, images, sizes)["logits"]
    height, width = sizes[0]
    alone = jax.jit(functools.partial(ops_crf.mean_field, params=PARAMS))(
        logits[:1, :height, :width], jnp.asarray(pixels[:1, :height, :width], jnp.float32)
    )
    # The probabilities of the picture itself, with nothing around it.
    np.testing.assert_allclose(np.exp(found[0, :height, :width]), np.exp(alone[0]), atol=1e-3)
    np.testing.assert_allclose(np.exp(found).sum(-1), 1, rtol=1e-5)


@pytest.mark.slow
def test_a_crf_without_weights_or_iterations_is_the_softmax(exact):
    images, sizes, _ = batch_of("torchvision", [(SIDE, SIDE)])
    logits = noisy(VARIABLES, images, sizes)["logits"]
    for off in (CrfParams(w1=0.0, w2=0.0), CrfParams(iterations=0)):
        plain = with_crf(noisy, off, "torchvision")
        outputs = plain(VARIABLES, images, sizes)
        np.testing.assert_allclose(outputs["logits"], jax.nn.log_softmax(logits), atol=1e-5)
        np.testing.assert_array_equal(outputs["before_crf"], logits)


def own_crf(run):
    """The task of a script that ends in a CRF itself."""
    return dataclasses.replace(run.task, crf=PARAMS)


def test_the_command_decides_or_leaves_it_to_the_run(run):
    def found(task, crf, params=CrfParams()):  # noqa: B008
        task = semantic.labelling(with_flags(task, crf, params), "")
        expected: Any = task.crf
        assert task.card["crf"] == (dataclasses.asdict(expected) if expected else "none")
        return task.crf

    other = CrfParams(w1=1.0)
    choices = ((None,), (False,), (True, other))
    assert [found(run.task, *choice) for choice in choices] == [None, None, other]
    assert [found(own_crf(run), *choice) for choice in choices] == [PARAMS, None, other]


@pytest.mark.slow
def test_an_ensemble_is_refined_as_a_whole(run):
    images, sizes, _ = batch_of("torchvision", [(SIDE, SIDE)])
    members, names = [own_crf(run), run.task], ["a", "b"]
    variables = (VARIABLES, VARIABLES)
    each = semantic.together(members, names, "mean_prob")
    assert each.card["crf"] == "none"
    assert each.card["crf_of_each_member"].endswith("; none")
    refined = with_crf(noisy, PARAMS, "torchvision")(VARIABLES, images, sizes)["logits"]
    plain = noisy(VARIABLES, images, sizes)["logits"]
    mean = np.log((np.exp(refined) + jax.nn.softmax(plain)) / 2)
    found = each.predict(variables, images, sizes)["logits"]
    np.testing.assert_allclose(found, mean, atol=1e-4)
    without = [dataclasses.replace(task, crf=None) for task in members]
    whole = dataclasses.replace(semantic.together(without, names, "mean_prob"), crf=PARAMS)
    assert whole.card["crf"] == dataclasses.asdict(PARAMS)
    found = whole.predict(variables, images, sizes)["logits"]
    np.testing.assert_allclose(found, refined, atol=1e-3)


def test_evaluate_scores_before_and_after(run):
    evaluate.run(run=run.workdir, bf_match="none")
    plain = json.loads((run.workdir / "evaluate-val-last" / "evaluation.json").read_text())
    assert plain["protocol"]["crf"] == "none"
    assert "mean_iou_before_crf" not in plain["scores"]
    evaluate.run(run=run.workdir, bf_match="none", crf=True, crf_params=PARAMS)
    folder = run.workdir / "evaluate-val-last-crf"
    refined = json.loads((folder / "evaluation.json").read_text())
    assert refined["protocol"]["crf"] == dataclasses.asdict(PARAMS)
    assert refined["scores"]["mean_iou_before_crf"] == plain["scores"]["mean_iou"]
    assert refined["scores"]["mean_iou"] > plain["scores"]["mean_iou"] + 0.05
    page = (folder / "report.html").read_text()
    assert "sxy 8.0, srgb 20.0" in page
    assert "Where the CRF helped most" in page
    assert len(list((folder / "pictures").glob("crf_val_*.png"))) == 4
    with pytest.raises(UserError, match="give --crf too"):
        evaluate.run(run=run.workdir, crf_params=PARAMS)


def test_predict_refines_and_leaves_sizes_alone(run, tmp_path):
    source = datasets.load("shapes", **dataclasses.asdict(CONFIG.shapes)).split("val")
    image = source[0]["image"][:20, :17]
    Image.fromarray(image).save(tmp_path / "a.png")
    out = functools.partial(predict.run, run=run.workdir, input=tmp_path / "a.png")
    out(output=tmp_path / "plain", overlays=False)
    out(output=tmp_path / "crf", overlays=False, crf=True, crf_params=PARAMS)
    plain, refined = (
        viz.load_label_png(tmp_path / name / "labels" / "a.png") for name in ("plain", "crf")
    )
    truth = source[0]["label"][:20, :17]
    assert refined.shape == truth.shape
    assert np.sum(refined == truth) > np.sum(plain == truth)


RANGES = [(0.0, 8.0), (10.0, 90.0), (1.0, 1.0), (3.0, 3.0), (2.0, 2.0)]
TOP = (5.0, 30.0, 1.0, 3.0, 2.0)


def hill(point):
    """A score with one top."""
    far = sum(((x - t) / t) ** 2 for x, t in zip(point, TOP, strict=True))
    return {"mean_iou": 1 / (1 + far), "pixel_accuracy": 0.5, "seconds": 0.1}


def test_search_goes_from_coarse_to_fine(tmp_path):
    table = crf_search.Table(tmp_path, {"run": "a"})
    assert list(crf_search.neighbours((4.0, 50.0, 1.0, 3.0, 2.0), RANGES, 0.5)) == [
        (w1, sxy, 1.0, 3.0, 2.0) for w1 in (0.0, 4.0, 8.0) for sxy in (10.0, 50.0, 90.0)
    ]
    assert crf_search.search(hill, RANGES, 3, table) == TOP
    # The best of round one, w1=4 and sxy=10, is known in round two and at the end of a range.
    assert len(table.rows) == 9 + (3 * 2 - 1) + (3 * 3 - 1)


def test_search_goes_on_where_it_was_killed(tmp_path):
    def killed(point):
        calls.append(point)
        if len(calls) > 11:
            raise KeyboardInterrupt
        return hill(point)

    calls: list[crf_search.Point] = []
    facts = {"run": "a", "split": "val"}
    with pytest.raises(KeyboardInterrupt):
        crf_search.search(killed, RANGES, 3, crf_search.Table(tmp_path, facts))
    with (tmp_path / "table.csv").open("a") as file:
        file.write("1.0,2.0")  # of another program's hand
    before = len(calls) - 1
    again: list[crf_search.Point] = []

    def counted(point):
        again.append(point)
        return hill(point)

    best = crf_search.search(counted, RANGES, 3, crf_search.Table(tmp_path, facts))
    assert best == TOP
    assert not set(again) & set(calls[:before])
    assert before + len(again) == 22
    with pytest.raises(UserError, match="split was 'val' and is now 'test'"):
        crf_search.Table(tmp_path, {"run": "a", "split": "test"})


def test_search_spreads_its_images():
    source = datasets.load("shapes", size=(8, 8), num_train=1, num_val=10, num_test=1).split("val")
    spread = crf_search.spread(source, 4)
    assert [spread[i]["name"] for i in range(len(spread))] == [
        source[i]["name"] for i in (0, 3, 6, 9)
    ]
    assert len(crf_search.spread(source, 99)) == 10
    assert spread.size(3) == (8, 8)


def test_search_command_finds_what_evaluate_confirms(run, capsys):
    search = functools.partial(
        crf_search.run, run=run.workdir, w1=(1.0, 5.0), sxy=None, srgb=None, rounds=2,
        crf_params=PARAMS,
    )  # fmt: skip
    search()
    printed = capsys.readouterr().out
    (command,) = [line for line in printed.splitlines() if line.startswith("python -m")]
    assert "--crf.w1=" in command
    assert "--crf.iterations=5" in command
    assert "--crf.norm" not in command
    w1 = float(command.partition("--crf.w1=")[2].split()[0])
    folder = run.workdir / "crf-search-val-last"
    assert {p.name for p in folder.iterdir()} == {"table.csv", "search.json"}
    rows = (folder / "table.csv").read_text().splitlines()
    assert len(rows) == 1 + 3 + 1  # the best of the first three is at an end
    assert "w1=5 is at the end of its range" in printed
    evaluate.run(
        run=run.workdir, crf=True, crf_params=dataclasses.replace(PARAMS, w1=w1), bf_match="none"
    )
    record = json.loads((run.workdir / "evaluate-val-last-crf" / "evaluation.json").read_text())
    scores = record["scores"]
    assert f"best: mean IoU {scores['mean_iou']:.4f} " in printed
    assert f"(without CRF {scores['mean_iou_before_crf']:.4f})" in printed
    search()  # Nothing is scored again.
    assert (folder / "table.csv").read_text().splitlines() == rows


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ({"w1": (5.0, 1.0)}, "--w1 5 1: give the lesser value first"),
        ({"sxy": (0.0, 9.0)}, r"--crf\.sxy=0"),
        ({"num_images": 0}, "--num-images=0"),
        ({"rounds": 0}, "--rounds=0"),
    ],
)
def test_search_refuses_impossible_ranges(run, flags, match):
    with pytest.raises(UserError, match=match):
        crf_search.run(run=run.workdir, **flags)
