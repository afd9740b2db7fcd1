"""Mistakes of users: each is one UserError that names the culprit and the remedy."""

import dataclasses
import errno
import pathlib
import shlex
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import dense_jax
from dense_jax import __main__ as commands
from dense_jax import runs, scripts
from dense_jax.commands import summary
from dense_jax.data import dataset, pipeline
from dense_jax.data.normalise import Normalise
from dense_jax.errors import UserError
from dense_jax.tasks import training
from dense_jax.train import checkpoint, cli
from dense_jax.train.state import load_matching
from experiments import fcn

SMOKE = fcn.PRESETS["smoke"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A prepared run folder with a small checkpoint of something else."""
    workdir = tmp_path_factory.mktemp("run")
    config = dataclasses.replace(SMOKE, workdir=str(workdir))
    runs.prepare(config, dataset.load("shapes", size=(8, 8), num_train=2, num_val=2, num_test=1))
    with checkpoint.Checkpoints(workdir) as checkpoints:
        checkpoints.save(1, {"params": {"w": jnp.ones(3)}}, {"next_batch": 1})
        checkpoints.wait()
    return workdir


@pytest.fixture
def own(tmp_path):
    """Two pairs of different sizes."""
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    (tmp_path / "classes.txt").write_text("a\nb\n")
    for i, size in enumerate([(8, 8), (1, 1)]):
        Image.fromarray(np.zeros((*size, 3), np.uint8)).save(tmp_path / f"images/{i}.png")
        Image.fromarray(np.zeros(size, np.uint8)).save(tmp_path / f"labels/{i}.png")
    return tmp_path


def test_parameters_of_another_network_are_one_line(run, own, tmp_path, monkeypatch, capsys):
    words = ["predict", f"--run={run}", f"--input={own / 'images'}", f"--output={tmp_path / 'out'}"]
    monkeypatch.setattr(sys, "argv", ["dense_jax", *words])
    with pytest.raises(SystemExit):
        commands.main()
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "belong to another network" in line] == lines[-1:]
    assert 'parameter named "kernel" in scope "/conv1_1"' in lines[-1]
    with pytest.raises(UserError, match="belong to another network"):
        dense_jax.load(run).predict(np.zeros((8, 8, 3), np.uint8))


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ({"width": 0.0}, "--width=0"),
        ({"dropout_rate": 1.0}, "--dropout-rate=1"),
        ({"pixel_keep": 0.0}, "--pixel-keep=0"),
        ({"crop": (0, 5)}, "--crop 0 5"),
        ({"scale": 0.0}, "--scale=0"),
        ({"seed": -1}, "--seed=-1"),
        ({"num_workers": -1}, "--num-workers=-1"),
        ({"warmup_steps": -1}, "--warmup-steps=-1"),
        ({"single_skip": "pool4"}, "--stride=16"),
        ({"backbone": "alexnet"}, "--stride=32"),
    ],
)
def test_impossible_flags_name_themselves(flags, match):
    with pytest.raises(UserError, match=match):
        dataclasses.replace(SMOKE, **flags)


def test_an_untrained_folder_takes_other_settings_and_a_trained_one_does_not(run, tmp_path):
    data = dataset.load("shapes", size=(8, 8), num_train=2, num_val=2, num_test=1)
    for stride in (8, 16):
        runs.prepare(dataclasses.replace(SMOKE, workdir=str(tmp_path), stride=stride), data)
    with pytest.raises(UserError, match="--stride was 8 and is now 16"):
        runs.prepare(dataclasses.replace(SMOKE, workdir=str(run), stride=16), data)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"{}", b'{"script": "x"}', b"\xff\xfe"])
def test_a_damaged_config_is_named(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        summary.run(run=tmp_path)


@pytest.mark.parametrize("name", ["state/_METADATA", "state/manifest.ocdbt", "data/metadata"])
def test_a_damaged_checkpoint_is_named(run, name, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "checkpoints" / "1" / name).write_bytes(b"{")
    with pytest.raises(UserError, match=r"checkpoints/1 is damaged.*restore that folder"):
        checkpoint.read_variables(folder)


def test_biases_alone_do_not_initialise_a_network():
    ours = {"conv": {"bias": jnp.zeros(2), "kernel": jnp.zeros((1, 1, 3, 2))}}
    theirs = {"conv": {"bias": jnp.ones(2), "kernel": jnp.ones((3, 3, 3, 2))}}
    with pytest.raises(UserError, match="--init: no kernel"):
        load_matching(ours, theirs)


def test_staged_training_starts_from_init():
    config = dataclasses.replace(SMOKE, train="staged", workdir="w", init="run:x")
    assert [s.init for s in config.each_stage()] == ["run:x", "run:w/fcn32s", "run:w/fcn16s"]


def test_images_of_many_sizes_ask_for_a_crop(own):
    assert {"train", "val"} == set(dataset.load("folder", own).splits)  # two images are enough
    (own / "train.txt").write_text("0\n1\n")
    data = dataset.load("folder", own)
    batches = pipeline.train_batches(data.split("train"), [Normalise("none")], 2, 0)
    with pytest.raises(UserError, match=r"1x1, 8x8.*--crop"):
        _ = batches.example
    with pytest.raises(UserError, match=r"no split 'val'.*docs/data"):
        data.split("val")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("wrong"), 2),
        (OSError(errno.ENOSPC, "No space left on device", "/full/x"), 2),
        (UserError("\x1b[31mred\x07 of a file"), 2),
        (MemoryError("Unable to allocate 9 TiB"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_end_in_a_line_and_a_status(error, status, capsys):
    with pytest.raises(SystemExit) as ended, cli.exit_on_user_error():
        raise error
    assert ended.value.code == status
    line = capsys.readouterr().err
    assert line.endswith("\n")
    assert line[:-1].isprintable()


def test_only_what_resumes_promises_to_go_on(capsys):
    for said in ("interrupted", "interrupted; the same command goes on"):
        with pytest.raises(SystemExit), cli.exit_on_user_error(said):
            raise KeyboardInterrupt
        assert capsys.readouterr().err == f"{said}\n"


@pytest.mark.slow
def test_output_that_nobody_reads_on_is_no_error():
    code = (
        "from dense_jax.train import cli\nwith cli.exit_on_user_error():\n  print('x\\n' * 2**20)"
    )
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} | head -1"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (ended.stdout, ended.stderr) == ("x\n", "")


def test_of_a_file_that_cannot_be_written_nothing_is_left(tmp_path):
    path = tmp_path / "x.json"
    runs.write_json(path, [1])

    def fill_the_disk():
        with runs.replacing(path) as stream:
            stream.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device.*x\.json"):
        fill_the_disk()
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]
    assert path.read_text() == "[\n  1\n]\n"
    with pytest.raises(UserError, match=r"cannot make .*x\.json/y"):
        runs.make_folder(path / "y")


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="needs a disk that is full")
@pytest.mark.parametrize("full", ["x.bin", "x.json"])
def test_of_a_file_and_its_record_both_are_left_or_neither(full, tmp_path, monkeypatch):
    paths = tmp_path / "x.bin", tmp_path / "x.json"
    whole = pathlib.Path.open

    def fill(path, mode):
        return whole(pathlib.Path("/dev/full") if path.name == f"{full}.tmp" else path, mode)

    monkeypatch.setattr(pathlib.Path, "open", fill)
    with (
        pytest.raises(OSError, match="No space left"),
        runs.replacing_with_record(*paths, {"a": 1}) as stream,
    ):
        stream.write(b"so little that it stays in the buffer")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    with runs.replacing_with_record(*paths, {"a": 1}) as stream:
        stream.write(b"x")
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_bugs_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), cli.exit_on_user_error():
        raise ZeroDivisionError


def test_commands_refuse_what_they_cannot_use(tmp_path):
    with pytest.raises(UserError, match="os trains no network"):
        summary.run(script="os")
    with pytest.raises(UserError, match="--size 0 5"):
        summary.run(size=(0, 5))
    with pytest.raises(UserError, match="holds no checkpoints"):
        checkpoint.read_variables(tmp_path)
    config = dataclasses.replace(SMOKE, workdir=str(tmp_path), batch_size=jax.device_count() + 1)
    with pytest.raises(UserError, match="cannot be shared by"):
        training.run(fcn.build, config)


def test_the_commit_of_a_run_tells_of_files_that_it_lacks(tmp_path, monkeypatch):
    def git(*words):
        own = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *own, *words], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "dense_jax").mkdir()
    library = tmp_path / "dense_jax" / "runs.py"
    library.touch()
    git("init")
    git("add", ".")
    git("commit", "-m", "a")
    monkeypatch.setattr(runs, "__file__", str(library))
    commit = runs.provenance()["commit"]
    assert len(commit) == 12
    (tmp_path / "notes.txt").touch()
    assert runs.provenance()["commit"] == commit
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "new.py").touch()
    assert runs.provenance()["commit"] == f"{commit}+"
    shutil.rmtree(tmp_path / "models")
    library.write_text("changed")
    assert runs.provenance()["commit"] == f"{commit}+"


def test_a_script_without_a_preset_names_those_it_has():
    with pytest.raises(UserError, match="has no preset '': give paper"):
        scripts.load("experiments.fcn").parse([])
