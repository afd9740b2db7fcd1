"""Run folders: one writer, damaged records noticed, and nothing compared with guesses."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import jax
import pytest

from dense_jax import runs
from dense_jax.data import dataset
from dense_jax.errors import UserError
from dense_jax.evaluation import record
from dense_jax.tasks import training
from dense_jax.train import loop
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


@pytest.mark.parametrize(
    "name", [".lock", "metrics.jsonl", "train.csv", "eval.csv", "checkpoints", "tensorboard"]
)
def test_a_training_follows_no_link_out_of_its_folder(name, tmp_path):
    run, target = tmp_path / "run", tmp_path / "target"
    run.mkdir()
    target.mkdir() if name in ("checkpoints", "tensorboard") else target.write_text("mine\n")
    (run / name).symlink_to(target)
    with pytest.raises(UserError, match=rf"{name} is a link: remove it"), runs.writing(run):
        pass
    assert target.is_dir() or target.read_text() == "mine\n"


def test_rows_are_rewritten_beside_a_link_and_not_through_it(tmp_path):
    (tmp_path / "target").write_text("mine\n")
    (tmp_path / "metrics.tmp").symlink_to(tmp_path / "target")
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, "train", {"loss": 1.0})
    assert (tmp_path / "target").read_text() == "mine\n"
    assert not (tmp_path / "metrics.jsonl").is_symlink()


def test_a_row_that_stands_twice_counts_once(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, "train", {"loss": 1.0})
        writer.write(1, "eval", {"loss": 2.0})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() * 2)
    with MetricsWriter(tmp_path, 1):
        pass
    assert len(list(read_metrics(path))) == 2
    assert len((tmp_path / "eval.csv").read_text().splitlines()) == 2


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "config.json", "evaluation.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_is_one_line_and_waits_for_nothing(name, kind, tmp_path):
    path = tmp_path / name
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    read = {
        ".lock": lambda: runs.writing(tmp_path).__enter__(),
        "metrics.jsonl": lambda: list(read_metrics(path)),
        "config.json": lambda: runs.read_config(tmp_path),
        "evaluation.json": lambda: record.read(tmp_path),
    }[name]
    with pytest.raises(UserError, match="is not a file"):
        read()


def test_a_signal_before_the_loop_interrupts_and_is_kept():
    """Python drops an exception that a callback raises, as some of JAX do."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with loop.Signals() as signals:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signals.asked.is_set()
    with loop.Signals() as signals, signals.saving():
        signal.raise_signal(signal.SIGTERM)
        assert signals.asked.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with loop.Signals() as signals, signals.saving():
        signal.raise_signal(signal.SIGINT)
        assert signals.asked.is_set()
    after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert after == before
