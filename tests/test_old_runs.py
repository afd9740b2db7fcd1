"""Runs of the version before tasks were values still open, evaluate, predict and resume.

The records in old_runs/ were written by that version (commit e0a3f22); checkpoints have the same
form as today.
"""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from dense_jax import scripts
from dense_jax.commands import evaluate, predict
from dense_jax.evaluation import report
from dense_jax.tasks import trained, training
from dense_jax.train.checkpoint import Checkpoints
from tests import members

RECORDS = pathlib.Path(__file__).parent / "old_runs"
# What the record is of, and what it is resumed by.
RUNS = {
    "fcn": ("experiments.fcn", ["smoke"]),
    "bayesian_segnet": ("experiments.segnet", ["smoke"]),
    "staged_dilated": (
        "experiments.dilated",
        ["smoke", "--first.train-mode=front", "--train-mode=context"],
    ),
}


def train(name, workdir, num_steps):
    """Runs the record's command; returns the folder of its last stage."""
    script, words = RUNS[name]
    found = scripts.load(script)
    config = found.parse([*words, f"--workdir={workdir}", f"--num-steps={num_steps}"])
    with jax.numpy_dtype_promotion("standard"):  # AdamW raises a float to an integer power
        training.run(found.build, config)
    return pathlib.Path(list(config.each_stage())[-1].workdir or "")


def state(folder):
    """The arrays of the last checkpoint, and the position in the data."""
    with Checkpoints(folder) as checkpoints:
        return checkpoints.read()


def make_old(folder, name, workdir):
    """Puts the records of the earlier version in the place of today's."""
    text = (RECORDS / f"{name}.json").read_text().replace("WORKDIR", str(workdir))
    for key, value in json.loads(text).items():
        file = {"config": "config.json", "evaluation": "evaluation.json"}[key]
        (folder / file).write_text(json.dumps(value))
    for picture in json.loads(text)["evaluation"]["images"]:
        Image.new("RGB", (4, 4)).save(folder / picture["triplet"])


@pytest.mark.slow
@pytest.mark.parametrize("name", members(RUNS, ("fcn",)))
def test_an_old_run_opens_evaluates_predicts_and_resumes(name, tmp_path, capsys):
    workdir = tmp_path / "run"
    folder = train(name, workdir, 1)
    record = json.loads((RECORDS / f"{name}.json").read_text())
    assert "script_file" not in record["config"]  # of the earlier form indeed
    assert "about_scores" not in record["evaluation"]
    make_old(folder, name, workdir)
    page = report.write_report(folder).read_text()
    assert "Mean iou" in page  # a title that is missing is the name
    assert page.count('class="images"') >= 8

    image = np.random.default_rng(0).integers(0, 256, (33, 20, 3), np.uint8)
    opened = trained.load(folder)
    assert opened.step == 1
    assert opened.predict(image).labels.shape == (33, 20)
    Image.fromarray(image).save(tmp_path / "a.png")
    predict.run(run=folder, input=tmp_path / "a.png", output=tmp_path / "out")
    evaluate.run(run=folder)
    again = json.loads((folder / "evaluate-val-last" / "evaluation.json").read_text())
    assert np.sum(again["confusion"]) == np.sum(record["evaluation"]["confusion"])
    assert set(record["evaluation"]["scores"]) <= set(again["scores"])

    # A copy goes on with today's records: the old ones change nothing.
    capsys.readouterr()
    train(name, workdir, 2)
    assert f"resumed {folder} at step 1 of 2" in capsys.readouterr().out
    saved, position = state(folder)
    assert (saved["step"], position) == (2, {"next_batch": 2})


@pytest.mark.slow
def test_old_settings_that_changed_are_named(tmp_path):
    workdir = tmp_path / "run"
    folder = train("fcn", workdir, 1)
    make_old(folder, "fcn", workdir)
    script = scripts.load("experiments.fcn")
    config = script.parse(["smoke", f"--workdir={workdir}", "--stride=16"])
    with pytest.raises(Exception, match="--stride was 8 and is now 16"):
        training.run(script.build, dataclasses.replace(config))
