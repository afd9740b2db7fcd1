"""Every script runs, and the commands work on what a run leaves."""

import dataclasses
import functools
import json
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from dense_jax import viz
from dense_jax.commands import check_data, evaluate, predict, summary
from dense_jax.data.datasets.shapes import ShapesSpec
from dense_jax.data.transforms import RandomPixelKeep
from dense_jax.errors import UserError
from dense_jax.tasks import training
from dense_jax.train.checkpoint import Checkpoints
from dense_jax.train.log import read_metrics
from dense_jax.train.step import AXIS
from tests import ROOT, SCRIPTS, members, script


@pytest.fixture(autouse=True)
def _optax_counts_in_integers():
    """AdamW's bias correction raises a float to an integer power."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def smoke_runs(tmp_path_factory):
    """Runs a script's smoke preset once; returns its run folder."""

    @functools.cache
    def run(name):
        workdir = tmp_path_factory.mktemp(name) / "run"
        module = script(name)
        config = dataclasses.replace(module.PRESETS["smoke"], workdir=str(workdir))
        training.run(module.build, config)
        return workdir

    return run


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_documents_its_paper(name):
    module = script(name)
    assert re.search(r"arXiv:\d{4}\.\d{4,5}", module.__doc__ or "")
    assert {"paper", "demo", "smoke"} <= set(module.PRESETS)


# test_detection_task and test_box_masks look at runs of detectors and of boxes.
@pytest.mark.parametrize("name", members(SCRIPTS, ("fcn",)))
def test_smoke_run_leaves_scores_pictures_and_report(name, smoke_runs):
    workdir = smoke_runs(name)
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    protocol = evaluation["protocol"]
    assert protocol["images_scored"] == protocol["images_in_split"] == 6
    assert all(key in protocol for key in ("command", "versions", "device", "fingerprint"))
    if not evaluation["headline"].endswith("_ap"):
        assert np.sum(evaluation["confusion"]) > 0
    kinds = {row["kind"] for row in read_metrics(workdir / "metrics.jsonl")}
    assert kinds == {"train", "eval"}
    page = (workdir / "report.html").read_text()
    assert "data:image/png;base64" in page
    assert not re.search(r'(src|href)="https?:', page)
    assert list(workdir.glob("tensorboard/*"))
    assert {p.name for p in workdir.glob("*.csv")} == {"train.csv", "eval.csv"}


def test_the_average_that_is_scored_is_not_the_last_step(smoke_runs):
    with Checkpoints(smoke_runs("fcn")) as checkpoints:
        saved, _ = checkpoints.read()
    last, average = (saved[name]["score_fr"]["kernel"] for name in ("params", "ema_params"))
    assert np.any(last != average)


@pytest.mark.parametrize("name", SCRIPTS)
def test_batch_statistics_are_those_of_all_devices(name):
    for config in script(name).PRESETS.values():
        model = script(name).build(config, 6).model
        assert getattr(model, "axis_name", AXIS) == AXIS


@pytest.mark.slow  # test_alternating trains in stages too
def test_fcn_stages_start_from_one_another(tmp_path, capsys):
    fcn = script("fcn")
    config = dataclasses.replace(
        fcn.PRESETS["smoke"],
        train="staged",
        stride=16,
        class_balance="on",
        workdir=str(tmp_path / "staged"),
    )
    rates = [stage.learning_rate for stage in config.each_stage()]
    np.testing.assert_allclose(rates, [config.learning_rate, config.learning_rate / 100])
    training.run(fcn.build, config)
    printed = capsys.readouterr().out
    assert "new here: score_pool4/bias, score_pool4/kernel" in printed
    assert (tmp_path / "staged" / "fcn16s" / "report.html").exists()
    # Scores start at zero, where without weights each pixel costs ln C.
    first = next(read_metrics(tmp_path / "staged" / "fcn32s" / "metrics.jsonl"))
    assert abs(first["loss"] - np.log(6)) > 0.1


def test_fcn_pixel_keep_ignores_a_share():
    example = {"label": np.zeros((64, 64), np.uint8)}
    kept = RandomPixelKeep(0.25)(example, np.random.default_rng(0))["label"]
    assert np.mean(kept == 0) == pytest.approx(0.25, abs=0.03)
    assert set(np.unique(kept)) == {0, 255}


def test_a_finished_run_is_not_run_again_and_other_settings_are_refused(smoke_runs, capsys):
    fcn, workdir = script("fcn"), smoke_runs("fcn")
    config = dataclasses.replace(fcn.PRESETS["smoke"], workdir=str(workdir))
    training.run(fcn.build, config)
    assert "at step 2 of 2" in capsys.readouterr().out
    with pytest.raises(UserError, match="--stride was 8 and is now 16"):
        training.run(fcn.build, dataclasses.replace(config, stride=16))


def test_predict_labels_any_size_and_reports_the_bad_file(smoke_runs, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    sizes = {"a": (40, 33), "b": (1, 1), "c": (64, 20)}
    for name, size in sizes.items():
        Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(images / f"{name}.png")
    (images / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(SystemExit) as status:
        predict.run(run=smoke_runs("fcn"), input=images, output=tmp_path / "out")
    assert status.value.code == 1
    for name, size in sizes.items():
        assert viz.load_label_png(tmp_path / "out" / "labels" / f"{name}.png").shape == size


def test_evaluate_gives_the_score_of_the_run_again(smoke_runs):
    workdir = smoke_runs("fcn")
    evaluate.run(run=workdir)
    again = json.loads((workdir / "evaluate-val-last" / "evaluation.json").read_text())
    first = json.loads((workdir / "evaluation.json").read_text())
    assert again["confusion"] == first["confusion"]
    assert again["scores"] == first["scores"]
    assert (workdir / "evaluate-val-last" / "report.html").exists()
    with pytest.raises(UserError, match="no split 'dev'"):
        evaluate.run(run=workdir, split="dev")


def test_summary_prints_the_published_count(capsys):
    summary.run(script="experiments.fcn", preset="paper")
    assert "134,362,751" in capsys.readouterr().out
    with pytest.raises(UserError, match="has no preset nothing"):
        summary.run(preset="nothing")


def test_check_data_prints_frequencies(capsys):
    spec = ShapesSpec(size=(32, 32), num_train=4, num_val=2, num_test=2)
    check_data.run(dataset="shapes", shapes=spec)
    assert "background" in capsys.readouterr().out


def call(*arguments):
    """A command line as a user types it; returns (status, stdout, stderr)."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


def ended(name, arguments, capsys):
    """The same in this process."""
    module = script(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"experiments/{name}.py", *arguments])
        with pytest.raises(SystemExit) as end:
            training.main(module.build, module.PRESETS, module.__doc__)
    return end.value.code, *capsys.readouterr()


def test_help_lists_presets_and_ablations(capsys):
    status, listed, _ = ended("fcn", ["--help"], capsys)
    assert status == 0
    assert all(preset in listed for preset in script("fcn").PRESETS)
    status, flags, _ = ended("fcn", ["paper", "--help"], capsys)
    assert status == 0
    own = [f.replace("_", "-") for f in script("fcn").Config.__annotations__]
    assert all(f"--{flag}" in flags for flag in own)
    assert "Table 2" in flags


def test_a_users_mistake_is_one_line_without_traceback(tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.touch()
    for done, culprit in [
        (ended("fcn", ["smoke", f"--workdir={blocked}/run"], capsys), blocked),
        (ended("fcn", ["smoke", "--dataset=folder", f"--data-dir={tmp_path}"], capsys), tmp_path),
        (call("dense_jax", "evaluate", f"--run={tmp_path}"), tmp_path),
    ]:
        status, _, stderr = done
        lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
        assert status == 2
        assert len(lines) == 1, stderr
        assert str(culprit) in lines[0]
        assert "Traceback" not in stderr


@pytest.mark.slow
def test_a_run_decides_with_itself_as_it_does_alone(smoke_runs):
    workdir = smoke_runs("fcn")
    alone = json.loads((workdir / "evaluation.json").read_text())
    evaluate.run(run=workdir, ensemble=(workdir,), bf_match="none")
    record = json.loads((workdir / "ensemble-mean_prob-val-last" / "evaluation.json").read_text())
    assert record["confusion"] == alone["confusion"]
    assert record["protocol"]["ensemble"] == f"mean_prob of {workdir} and {workdir}"
    # The product of scores is another matter: negative ones of the second run count as zero.
    evaluate.run(run=workdir, ensemble=(workdir,), combine="product_score", bf_match="none")
    path = workdir / "ensemble-product_score-val-last" / "evaluation.json"
    assert np.sum(json.loads(path.read_text())["confusion"]) == np.sum(alone["confusion"])


@pytest.mark.slow
def test_runs_that_cannot_decide_together_are_refused(smoke_runs, tmp_path):
    workdir = smoke_runs("fcn")
    with pytest.raises(UserError, match="joins two runs"):
        evaluate.run(run=workdir, ensemble=(workdir, workdir), combine="product_score")
    other = tmp_path / "other"
    shutil.copytree(workdir, other)
    record = json.loads((other / "config.json").read_text())
    record["config"]["normalisation"] = "caffe"
    (other / "config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="has --normalisation=caffe"):
        evaluate.run(run=workdir, ensemble=(other,))
    record["classes"]["names"][0] = "sea"
    (other / "config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="label other classes"):
        evaluate.run(run=workdir, ensemble=(other,))
