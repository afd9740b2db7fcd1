"""A run opened from Python, wherever the script that trained it lies."""

import dataclasses
import json
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from PIL import Image

import dense_jax
from dense_jax import viz
from dense_jax.commands import predict
from dense_jax.errors import UserError
from dense_jax.tasks import trained, training
from experiments import fcn
from tests import ROOT, npz


def python(code, cwd, *, stdin=False):
    """Runs a program in its own process, by `python -c` or `python -`; returns what it prints."""
    words = [sys.executable, *(["-"] if stdin else ["-c", code])]
    done = subprocess.run(
        words, cwd=cwd, input=code if stdin else None, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished smoke run whose network sees images at half their size."""
    workdir = tmp_path_factory.mktemp("load") / "run"
    config = dataclasses.replace(fcn.PRESETS["smoke"], scale=0.5, workdir=str(workdir))
    with jax.numpy_dtype_promotion("standard"):  # AdamW raises a float to an integer power
        training.run(fcn.build, config)
    return workdir


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, dense_jax; print(dense_jax.__version__, 'jax' in sys.modules)"
    assert python(code, ROOT).split() == [dense_jax.__version__, "False"]


def test_a_run_labels_arrays_files_and_lists_as_the_command_does(run, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (41, 35, 3), np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(image).save(path)
    predict.run(run=run, input=path, output=tmp_path / "out", probabilities=True)
    labels = viz.load_label_png(tmp_path / "out" / "labels" / "a.png")
    soft = npz(tmp_path / "out" / "probabilities" / "a.npz")["probabilities"]
    opened = dense_jax.load(run)
    one = opened.predict(image)
    np.testing.assert_array_equal(one.labels, labels)
    np.testing.assert_allclose(one.probabilities, soft, atol=1e-3)
    np.testing.assert_allclose(one.probabilities.sum(-1), 1, rtol=1e-5)
    assert one.overlay().shape == image.shape
    for same in (path, str(path), Image.fromarray(image)):
        np.testing.assert_array_equal(opened.predict(same).labels, labels)
    several = opened.predict([image[:20], path])
    assert [found.labels.shape for found in several] == [(20, 35), (41, 35)]
    np.testing.assert_array_equal(several[1].labels, labels)


def test_turned_pictures_are_told(run, tmp_path, capsys):
    exif = Image.Exif()
    exif[274] = 6
    path, image = tmp_path / "a.jpg", Image.new("RGB", (35, 41))
    image.save(path, exif=exif)
    opened = dense_jax.load(run)
    assert opened.predict([image, path])[1].labels.shape == (41, 35)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"1 image carries an EXIF orientation ({path}: 6) that is not applied")
    with Image.open(path) as picture:
        opened.predict(picture)
    assert "(image 0: 6)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 3), np.float32),  # 0 to 1 or 0 to 255?
        np.zeros((4, 4), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
    ],
)
def test_what_is_no_picture_of_0_to_255_is_refused(run, image):
    with pytest.raises(UserError, match="give uint8 RGB"):
        dense_jax.load(run).predict(image)


@pytest.mark.parametrize("size", [(0, 5, 3), (5, 0, 3)])
def test_an_image_without_pixels_is_refused(run, size):
    with pytest.raises(UserError, match="give uint8 RGB"):
        dense_jax.load(run).predict(np.zeros(size, np.uint8))


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_pictures_of_more_than_8_bits_are_refused_as_files_are(run, dtype):
    picture = Image.fromarray(np.full((4, 4), 40_000, dtype))
    with pytest.raises(UserError, match="more than 8 bits per channel"):
        dense_jax.load(run).predict(picture)


@pytest.mark.slow
def test_a_network_that_the_script_does_not_build_is_asked_for(tmp_path):
    config = dataclasses.replace(fcn.PRESETS["smoke"], workdir=str(tmp_path), num_steps=1)
    task = fcn.build(config, 6)
    task = dataclasses.replace(task, model=task.model.clone(fuse="max"))
    with jax.numpy_dtype_promotion("standard"):
        training.train(task)
    with pytest.raises(UserError, match="its network, FCN, is not the one that its script builds"):
        dense_jax.load(tmp_path)
    assert dense_jax.load(tmp_path, task=task).task.model.fuse == "max"


def test_files_that_are_not_there_are_named(run, tmp_path):
    opened = dense_jax.load(run)
    with pytest.raises(UserError, match=r"no\.png cannot be read"):
        opened.predict(tmp_path / "no.png")
    with pytest.raises(UserError, match="takes no boxes"):
        opened.predict(np.zeros((4, 4, 3), np.uint8), boxes=[])
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        dense_jax.load(tmp_path)
    with pytest.raises(UserError, match="'last' or 'best'"):
        dense_jax.load(run, "first")


# A network of a user's own, in a file outside of the library.
SCRIPT = '''
import dataclasses
import flax.linen as nn
from dense_jax.tasks import training
from dense_jax.tasks.semantic import Semantic, SemanticConfig
from dense_jax.train.config import smoke

@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(SemanticConfig):
    """One flag."""
    features: int = 3
    """Channels of the only layer."""

class Pixels(nn.Module):
    num_classes: int
    features: int

    @nn.compact
    def __call__(self, images, *, train):
        x = nn.relu(nn.Dense(self.features, name="hidden")(images))
        return {"logits": nn.Dense(self.num_classes, name="score")(x)}

PRESETS = {"smoke": smoke(Config())}

def build(config: Config, num_classes: int) -> Semantic:
    return Semantic(config, Pixels(num_classes, config.features), config.whole_images())
'''
MAIN = 'if __name__ == "__main__":\n    training.main(build, PRESETS, "Pixels alone.")\n'
TRAIN = "training.run(build, dataclasses.replace(PRESETS['smoke'], workdir={!r}))\n"
OPEN = textwrap.dedent(
    """
    import dense_jax, numpy as np
    from dense_jax.errors import UserError
    try:
        run = dense_jax.load({!r})
        print(run.predict(np.zeros((5, 6, 3), np.uint8)).labels.shape, run.task.model.features)
    except UserError as error:
        print(error)
    """
)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["path", pytest.param("module", marks=pytest.mark.slow)])
def test_runs_of_a_script_outside_of_the_library_open_from_anywhere(how, tmp_path):
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    (home / "net.py").write_text(SCRIPT + MAIN)
    workdir = tmp_path / "run"
    words = [str(home / "net.py")] if how == "path" else ["-m", "net"]
    flags = ["smoke", "--features=4", f"--workdir={workdir}"]
    environment = {"cwd": home, "capture_output": True, "text": True}
    subprocess.run([sys.executable, *words, *flags], check=True, **environment)
    opened = subprocess.run(
        [sys.executable, "-c", OPEN.format(str(workdir))],
        cwd=elsewhere,
        capture_output=True,
        text=True,
        check=True,
    )
    assert opened.stdout.strip() == "(5, 6) 4"
    assert f"the run's own script is imported: {home / 'net.py'}\n" in opened.stderr
    (home / "net.py").unlink()
    if how == "path":
        said = python(OPEN.format(str(workdir)), elsewhere)
        assert "net.py" in said
        assert "dense_jax.load(folder, task=task)" in said


OTHER_SCRIPTS = [
    {"script": "os"},
    {"script": "os", "script_file": None},
    {"script": "evil", "script_file": None},
    {"script": "net.train", "script_file": None},  # where Python is started
    {"script": "evil", "script_file": "HERE/evil.py"},
    {"script": "experiments.fcn", "script_file": "HERE/evil.py"},
    {"script": "experiments.fcn", "script_file": "HERE/experiments/fcn.py"},
    {"script": "experiments.fcn", "script_file": "HERE/net/../experiments/fcn.py"},
    {"script": "net.train", "script_file": "../../../../../../../../HERE/net/train.py"},
    {"script": "evil", "script_file": "HERE/net/train.py"},
    {"script": "broken", "script_file": "HERE/broken.py"},
    {"script": "gone", "script_file": "HERE/gone.py"},
    {"script": "net", "script_file": "HERE/net"},
    {"script": "\x1b[2J", "script_file": "HERE/\x1b[2J.py"},
    {"script": "a\0b", "script_file": "a\0b.py"},
    {"script": ".evil", "script_file": None},
    {"script": "", "script_file": ""},
    {"script": "json", "script_file": json.__file__},
]


def test_an_edited_record_imports_nothing_else(run, tmp_path):
    mark = f"import pathlib\npathlib.Path({str(tmp_path / 'imported')!r}).touch()\n"
    for file in ("evil.py", "experiments/__init__.py", "experiments/fcn.py", "net/__init__.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(mark)
    (tmp_path / "net/train.py").write_text(mark + SCRIPT)
    (tmp_path / "broken.py").write_text("Config = build = (")
    record, code = json.loads((run / "config.json").read_text()), ""
    for i, changes in enumerate(OTHER_SCRIPTS):
        here = {k: v and v.replace("HERE", str(tmp_path)) for k, v in changes.items()}
        folder = tmp_path / f"run{i}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(record | here))
        code += OPEN.format(str(folder))
    lines = python(code, tmp_path).splitlines()
    assert len(lines) == len(OTHER_SCRIPTS)
    for i, line in enumerate(lines):
        assert line.startswith(f"{tmp_path / f'run{i}'}: it was trained by ")
        assert "cannot be imported" in line
        assert "dense_jax.load(folder, task=task)" in line
        assert line.isprintable()
    assert not (tmp_path / "imported").exists()


@pytest.mark.slow
def test_a_users_own_experiments_do_not_stand_in_front_of_ours(run, tmp_path):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "__init__.py").touch()
    (tmp_path / "experiments" / "fcn.py").write_text("raise RuntimeError('another fcn')\n")
    code = f"import dense_jax; print(type(dense_jax.load({str(run)!r}).task.model).__module__)"
    assert python(code, tmp_path).strip() == "dense_jax.models.fcn"


@pytest.mark.slow  # by path is tried above
def test_runs_of_typed_programs_say_how_to_open_them(tmp_path):
    workdir = str(tmp_path / "run")
    reopened = OPEN.format(workdir)  # in the program itself, as in a notebook, they open
    printed = python(SCRIPT + TRAIN.format(workdir) + reopened, tmp_path, stdin=True)
    assert printed.splitlines()[-1] == "(5, 6) 3"
    said = python(reopened, tmp_path, stdin=True)
    assert "it was trained from Python" in said
    assert "dense_jax.load(folder, task=task)" in said
    passed = (
        SCRIPT
        + reopened.replace("load(", "load(task=build, workdir=")
        + "task = build(PRESETS['smoke'], 6)\n"
        + reopened.replace("load(", "load(task=task, workdir=")
    )
    assert python(passed, tmp_path, stdin=True).split("\n") == ["(5, 6) 3", "(5, 6) 3", ""]


def test_a_task_of_the_librarys_own_configuration_is_asked_for(run, tmp_path):
    with pytest.raises(UserError, match="annotate its first argument"):
        trained.load(run, task=lambda config, num_classes: None)  # pyrefly: ignore
    with pytest.raises(UserError, match="task=5: give a task"):
        trained.load(run, task=5)  # pyrefly: ignore
