"""Checkpoints on disk: damages are noticed and told, and readers go beside a training."""

import json
import multiprocessing
import pathlib
import random
import shutil
import time

import numpy as np
import pytest

from dense_jax.errors import UserError
from dense_jax.train import checkpoint
from dense_jax.train.checkpoint import Checkpoints, read_variables


def state(step):
    w = np.arange(300, dtype=np.float32).reshape(30, 10) + step
    return {
        "params": {"conv": {"kernel": w, "bias": w[0] / 7}},
        "opt_state": {"count": np.int32(step)},
        "step": np.int32(step),
    }


def save(workdir, scores):
    with Checkpoints(workdir, "mean_iou") as checkpoints:
        for step, score in scores.items():
            metrics = None if score is None else {"mean_iou": score}
            checkpoints.save(step, state(step), {"next_batch": 3 * step}, metrics)
            checkpoints.wait()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 1 to 5, of which 2 is the best; steps 2, 4 and 5 are on disk."""
    folder = tmp_path_factory.mktemp("saved")
    save(folder, {1: None, 2: 0.9, 3: 0.2, 4: 0.3, 5: 0.4})
    return folder


@pytest.fixture
def run(saved, tmp_path):
    return pathlib.Path(shutil.copytree(saved, tmp_path / "run"))


def steps(workdir):
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def test_two_steps_and_the_best_stay(run):
    assert steps(run) == ["2", "4", "5"]
    save(run, {6: 0.95, 7: 0.1})
    assert steps(run) == ["6", "7"]  # the last two, of which one is the best


def flip(path, position, bit=0):
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(bytes(data))


def set_position(path):
    record = json.loads(path.read_text())
    record["position"]["next_batch"] += 1
    path.write_text(json.dumps(record))


def test_each_flipped_byte_is_noticed_or_without_effect(run, capsys, monkeypatch):
    """A damage of the last step leads to the step before, or changes nothing that is read."""
    monkeypatch.setattr(checkpoint, "_changes", lambda *_: False)  # no training goes on
    rng = random.Random(0)
    folder = run / "checkpoints" / "5"
    told = 0
    for path in [p for p in folder.rglob("*") if p.is_file() and p.stat().st_size]:
        whole = path.read_bytes()
        for _ in range(4):
            flip(path, rng.randrange(len(whole)), rng.randrange(8))
            capsys.readouterr()
            with Checkpoints(run, "mean_iou") as checkpoints:
                tree, position = checkpoints.read()
            said = "5 is damaged" in capsys.readouterr().out
            told += said
            step = 4 if said else 5
            assert position == {"next_batch": 3 * step}, path
            np.testing.assert_array_equal(
                tree["params"]["conv"]["kernel"], state(step)["params"]["conv"]["kernel"]
            )
            path.write_bytes(whole)
    assert told > 10


@pytest.mark.parametrize("name", ["data/metadata", "state/_METADATA", "state/manifest.ocdbt"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_the_step_before_a_damaged_one_is_read_with_a_word(run, name, damage, capsys):
    path = run / "checkpoints" / "5" / name
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        path.unlink()
    variables, step = read_variables(run)
    assert step == 4
    np.testing.assert_array_equal(
        variables["params"]["conv"]["bias"], state(4)["params"]["conv"]["bias"]
    )
    assert "checkpoints/5 is damaged" in capsys.readouterr().out
    assert steps(run) == ["2", "4", "5"]  # reading changes nothing


def test_a_renamed_step_is_not_read_as_another(run, capsys):
    folder = run / "checkpoints"
    (folder / "5").rename(folder / "9")
    variables, step = read_variables(run)
    assert step == 4
    assert "9 is damaged (it is of step 5, so somebody has renamed it)" in capsys.readouterr().out
    del variables


def test_a_data_position_that_moved_is_noticed(run, capsys):
    set_position(run / "checkpoints" / "5" / "data" / "metadata")
    with Checkpoints(run) as checkpoints:
        assert checkpoints.read()[1] == {"next_batch": 12}
    assert "position is not what was saved" in capsys.readouterr().out


def test_training_goes_on_from_the_step_before(run, capsys):
    set_position(run / "checkpoints" / "5" / "data" / "metadata")
    with Checkpoints(run, "mean_iou") as checkpoints:
        restored, position = checkpoints.restore(state(0))
        assert (int(restored["step"]), position) == (4, {"next_batch": 12})
        assert checkpoints.latest_step == 4
        checkpoints.save(5, state(5), {"next_batch": 15}, {"mean_iou": 0.4})
    assert "damaged-5, which may be removed" in capsys.readouterr().out
    assert steps(run) == ["2", "4", "5", "damaged-5"]
    assert read_variables(run)[1] == 5


def test_only_damaged_steps_stop_with_one_line(run):
    for step in (2, 4, 5):
        (run / "checkpoints" / str(step) / "data" / "metadata").write_bytes(b"{")
    with pytest.raises(UserError, match=r"checkpoints/5 is damaged.*so is each other one"):
        read_variables(run)
    with Checkpoints(run) as checkpoints, pytest.raises(UserError, match="is damaged"):
        checkpoints.restore(state(0))
    assert steps(run) == ["2", "4", "5"]


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b'{"mean_iou": 0.1}', None])
def test_damaged_metrics_stop_nothing_and_are_not_the_best(run, text, capsys):
    path = run / "checkpoints" / "2" / "metrics" / "metrics"
    if text is None:
        path.unlink()
    else:
        path.write_bytes(text)
    assert read_variables(run, "last", "mean_iou")[1] == 5
    assert capsys.readouterr().out == ""
    assert read_variables(run, "best", "mean_iou")[1] == 5  # 0.4, the best of the others
    assert "2/metrics/metrics is damaged" in capsys.readouterr().out
    save(run, {6: 0.1})
    assert "this step is not taken as the best" in capsys.readouterr().out
    assert steps(run) == ["5", "6"]


def test_the_best_of_the_sound_steps_is_read(run, capsys):
    (run / "checkpoints" / "2" / "state" / "manifest.ocdbt").write_bytes(b"{")
    assert read_variables(run, "best", "mean_iou")[1] == 5
    assert "checkpoints/2 is damaged" in capsys.readouterr().out


def test_a_step_that_is_being_read_stays(run, monkeypatch):
    """A reader holds its step while a training saves others."""
    seen = {}
    monkeypatch.setattr(checkpoint.ocp, "Checkpointer", _slow(run, seen))
    assert read_variables(run)[1] == 5
    assert seen["steps"] == ["2", "5", "6", "7"]
    save(run, {8: 0.1})
    assert steps(run) == ["2", "7", "8"]


def _slow(run, seen):
    """Orbax's reader, during whose first reading a training saves two steps."""
    reader = checkpoint.ocp.Checkpointer

    class Slow(reader):
        def restore(self, *args, **kwargs):
            if "steps" not in seen:
                seen["steps"] = []
                save(run, {6: 0.1, 7: 0.1})
                seen["steps"] = steps(run)
            return super().restore(*args, **kwargs)

    return Slow


def _save_many(workdir, num_steps):
    with Checkpoints(workdir, "mean_iou") as checkpoints:
        for step in range(1, num_steps + 1):
            checkpoints.save(step, state(step), {"next_batch": 3 * step}, {"mean_iou": step % 7})
            time.sleep(0.02)


@pytest.mark.slow
def test_reading_beside_a_training_never_fails(tmp_path, capsys):
    context = multiprocessing.get_context("spawn")
    training = context.Process(target=_save_many, args=(tmp_path, 30))
    training.start()
    while not checkpoint.has_checkpoint(tmp_path):
        time.sleep(0.05)
    reads, newest = 0, 0
    while training.is_alive():
        which = "best" if reads % 2 else "last"
        variables, step = read_variables(tmp_path, which, "mean_iou")
        expected = state(step)["params"]["conv"]["kernel"]
        np.testing.assert_array_equal(variables["params"]["conv"]["kernel"], expected)
        if which == "last":
            assert step >= newest
            newest = step
        reads += 1
    training.join()
    assert training.exitcode == 0
    assert reads > 5
    assert "damaged" not in capsys.readouterr().out
