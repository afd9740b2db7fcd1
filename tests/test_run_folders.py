"""Run folders: one writer, damaged records noticed, and nothing compared with guesses."""

import dataclasses
import json
import subprocess
import sys

import jax
import pytest

from dense_jax import runs
from dense_jax.data import dataset
from dense_jax.errors import UserError
from dense_jax.tasks import training
from dense_jax.train.log import MetricsWriter, read_metrics
from experiments import fcn

HOLDER = """
import pathlib, sys, time
from dense_jax import runs
with runs.writing(pathlib.Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_one_process_at_a_time_trains_in_a_folder(tmp_path):
    """A second one is refused with the number of the first; a kill frees the folder."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "locked\n"
        words = rf"another training writes to .*run \(process {holder.pid} on .*another --workdir"
        try:
            with pytest.raises(UserError, match=words), runs.writing(tmp_path / "run"):
                pass
        finally:
            holder.kill()
    with runs.writing(tmp_path / "run"):
        pass


def train(workdir):
    config = dataclasses.replace(fcn.PRESETS["smoke"], workdir=str(workdir))
    with jax.numpy_dtype_promotion("standard"):  # AdamW raises a float to an integer power
        training.run(fcn.build, config)


def test_a_second_training_is_refused_before_it_changes_anything(tmp_path):
    workdir = tmp_path / "run"
    with (
        runs.writing(workdir),
        pytest.raises(UserError, match=f"another training writes to {workdir}"),
    ):
        train(workdir)
    assert [path.name for path in workdir.iterdir()] == [".lock"]


def test_checkpoints_without_a_configuration_are_not_trained_on(tmp_path):
    (tmp_path / "checkpoints/2").mkdir(parents=True)
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        train(tmp_path)


def test_a_changed_configuration_is_told(tmp_path, capsys):
    config = dataclasses.replace(fcn.PRESETS["smoke"], workdir=str(tmp_path))
    runs.prepare(config, dataset.load("shapes", size=(8, 8), num_train=1, num_val=1, num_test=1))
    run, path = tmp_path, tmp_path / "config.json"
    path.write_text(path.read_text().replace('"scale": 1.0', '"scale": 2.0'))
    assert runs.read_config(run)["config"]["scale"] == 2.0
    assert "config.json has changed since it was written" in capsys.readouterr().err
    record = json.loads(path.read_text())
    del record["digest"]  # of a user who meant it
    path.write_text(json.dumps(record))
    assert runs.read_config(run)["config"]["scale"] == 2.0
    assert capsys.readouterr().err == ""


def write_rows(folder, num_rows):
    with MetricsWriter(folder) as writer:
        for step in range(1, num_rows + 1):
            writer.write(step, "train", {"loss": 1 / step})
    return folder / "metrics.jsonl"


@pytest.mark.parametrize("line", [b"{\n", b"\xff\n", b"[]\n", b"\n", b'{"step": 3}\n', b"changed"])
def test_a_damaged_line_of_the_log_costs_that_line_only(tmp_path, capsys, line):
    path = write_rows(tmp_path, 5)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b"0.33", b"0.43") if line == b"changed" else line
    path.write_bytes(b"".join(lines))
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 4, 5]
    assert "line 3 is damaged" in "".join(capsys.readouterr())
    with MetricsWriter(tmp_path, 4):
        pass
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 4]
    assert len((tmp_path / "train.csv").read_text().splitlines()) == 4


@pytest.mark.parametrize(("kept", "words"), [(3, "rows of steps 4 to 5"), (5, "evaluation of st")])
def test_rows_that_are_gone_are_told(tmp_path, capsys, kept, words):
    path = write_rows(tmp_path, 5)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:kept]))
    with MetricsWriter(tmp_path, 5, 1, is_evaluated=True):
        pass
    assert words in capsys.readouterr().out


def test_a_line_that_a_kill_cut_short_is_no_damage(tmp_path, capsys):
    path = write_rows(tmp_path, 3)
    path.write_bytes(path.read_bytes()[:-9])
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    assert "damaged" not in "".join(capsys.readouterr())
    path.write_text('{"step": 1, "kind": "train", "loss": 2.0}\n')  # of an earlier version
    assert list(read_metrics(path)) == [{"step": 1, "kind": "train", "loss": 2.0}]
