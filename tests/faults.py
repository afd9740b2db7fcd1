"""Damages files and kills processes, and counts what is lost, silently wrong or a traceback.

    python -m tests.faults --damages 500 --kills 60

Damages: one file of a finished run, or of the cache of its dataset, gets a flipped bit, loses its
end or some bytes, or is removed. Then the run is resumed, used for predictions, reported, or its
data are read. The result must be that of the undamaged run, or a message must say why not.

Kills: training, saving, evaluation, preparation of data, export and a sweep are killed with
SIGKILL, after a random time or at the moment at which a file appears. The same command, started
again, must end with the result of an undisturbed one.
"""

import contextlib
import dataclasses
import functools
import io
import json
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import numpy as np
import tqdm
import tyro
from flax import traverse_util
from PIL import Image

import dense_jax
from dense_jax.data import dataset
from dense_jax.errors import UserError
from dense_jax.evaluation import report
from dense_jax.tasks import training
from dense_jax.train.checkpoint import Checkpoints
from dense_jax.train.log import read_metrics
from dense_jax.weights import files
from experiments import fcn

STEPS = 6
_TOLD = re.compile(r"damaged|has changed|is missing|cannot be read|lacks|prepared again|is no pict")


@dataclasses.dataclass
class Tally:
    """Outcomes of one kind of fault.

    Attributes:
      tried: number of faults.
      result: the result is that of sound files.
      told: it is another, or none, and a message says so.
      lost: what was there is not used, such as an older step.
      silent: the result is another without a word.
      traceback: an error without a message of its own.
    """

    tried: int = 0
    result: int = 0
    told: int = 0
    lost: int = 0
    silent: int = 0
    traceback: int = 0


class Scene:
    """A dataset, its cache and a finished run: what faults spoil, and what is done with it."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.data, self.spoilt, self._sound = folder / "data", folder / "spoilt", folder / "sound"
        self.run = self.spoilt / "run"
        os.environ["DENSE_JAX_CACHE"] = str(self.spoilt / "cache")
        shapes = dataset.load("shapes", size=(24, 24), num_train=8, num_val=2, num_test=1)
        for part in ("images", "labels"):
            (self.data / part).mkdir(parents=True)
        (self.data / "classes.txt").write_text("\n".join(shapes.classes.names) + "\n")
        for split in ("train", "val"):
            for i in range(len(shapes.split(split))):
                example, name = shapes.split(split)[i], f"{split}{i}.png"
                Image.fromarray(example["image"]).save(self.data / "images" / name)
                Image.fromarray(example["label"]).save(self.data / "labels" / name)
        self.train(STEPS)
        shutil.copytree(self.spoilt, self._sound)

    def restore(self) -> None:
        """Makes everything sound again."""
        shutil.rmtree(self.spoilt)
        shutil.copytree(self._sound, self.spoilt)

    def files(self, area: str) -> list[pathlib.Path]:
        """The files of an area, such as "run/checkpoints", without those of longer areas."""
        inner = [self.spoilt / other for other in USES if other != area and area in other]
        return sorted(
            path
            for path in [self.spoilt / area, *(self.spoilt / area).rglob("*")]
            if path.is_file() and not any(path.is_relative_to(other) for other in inner)
        )

    def train(self, num_steps: int) -> Any:
        """Trains or resumes; returns the state, the position and the rows of the log."""
        config = dataclasses.replace(
            fcn.PRESETS["smoke"],
            dataset="folder",
            data_dir=str(self.data),
            workdir=str(self.run),
            num_steps=num_steps,
            save_every=2,
            eval_every=3,
        )
        with jax.numpy_dtype_promotion("standard"):  # AdamW raises a float to an integer power
            training.run(fcn.build, config)
        with Checkpoints(self.run) as checkpoints:
            state, position = checkpoints.read()
        rows = [
            (row["step"], row["kind"], row["loss"])
            for row in read_metrics(self.run / "metrics.jsonl")
        ]
        arrays: dict[str, Any] = traverse_util.flatten_dict(state, sep="/")
        return {name: array.tobytes() for name, array in arrays.items()}, position, rows

    def resume(self) -> Any:
        """Trains for one more step."""
        return self.train(STEPS + 1)

    def predict(self, checkpoint: str = "last") -> Any:
        """Returns the probabilities for an image."""
        image = np.arange(24 * 24 * 3, dtype=np.uint8).reshape(24, 24, 3)
        return dense_jax.load(self.run, checkpoint).predict(image).probabilities.tobytes()

    def predict_best(self) -> Any:
        """The same with the best parameters."""
        return self.predict("best")

    def report(self) -> Any:
        """Returns the page of the run."""
        return report.write_report(self.run).read_text()

    def read_data(self) -> Any:
        """Returns all that the dataset says of its examples."""
        data = dataset.load("folder", self.data)
        splits = sorted(data.splits.items())
        sizes = [source.size(i) for _, source in splits for i in range(len(source))]
        examples = [source[i] for _, source in splits for i in range(len(source))]
        arrays = [(e["name"], e["image"].tobytes(), e["label"].tobytes()) for e in examples]
        return data.fingerprint, sizes, arrays


# What is done after the damage of a file, by the beginning of its path.
USES: dict[str, list[Callable[[Scene], Any]]] = {
    "run/checkpoints": [Scene.predict, Scene.predict_best, Scene.resume],
    "run/config.json": [Scene.predict, Scene.resume, Scene.report],
    "run/metrics.jsonl": [Scene.resume, Scene.report],
    "run/evaluation.json": [Scene.report],
    "run/pictures": [Scene.report],
    "run": [Scene.resume, Scene.report],
    "cache/datasets": [Scene.read_data],
}


def spoil(path: pathlib.Path, rng: random.Random) -> str:
    """Damages a file; returns how."""
    data = bytearray(path.read_bytes())
    kind = rng.choice(["bit flipped", "bit flipped", "end cut", "bytes removed", "file removed"])
    if kind == "file removed" or not data:
        path.unlink()
        return "file removed"
    at = rng.randrange(len(data))
    if kind == "bit flipped":
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "end cut":
        del data[at:]
    else:
        del data[at : at + rng.randrange(1, 30)]
    path.write_bytes(bytes(data))
    return kind


def attempt(use: Callable[[], Any]) -> tuple[str, Any, str]:
    """Returns "result", "error" or "traceback"; the result; and all that was printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            kind, result = "result", use()
        except UserError as error:
            return "error", None, f"{printed.getvalue()}error: {error}"
        except Exception:
            return "traceback", None, printed.getvalue() + traceback.format_exc()
    said = printed.getvalue()
    return ("traceback" if "Traceback" in said else kind), result, said


def damage_files(number: int, rng: random.Random, folder: pathlib.Path) -> dict[str, Tally]:
    """Damages one file at a time; returns the outcomes by area."""
    kind, scene, said = attempt(lambda: Scene(folder))
    assert kind == "result", said
    sound = {}
    tallies = {area: Tally() for area in USES}
    for i in tqdm.trange(number, desc="damages"):
        if i % 20 == 0:
            jax.clear_caches()  # a process cannot hold the programs of hundreds of runs
        area = rng.choice(list(USES))
        path, use = rng.choice(scene.files(area)), rng.choice(USES[area])
        if use not in sound:
            _, sound[use], _ = attempt(functools.partial(use, scene))
            scene.restore()
        how = spoil(path, rng)
        kind, result, said = attempt(functools.partial(use, scene))
        tally = tallies[area]
        tally.tried += 1
        if kind == "error" and area == "cache/datasets":  # it may ask for the command again
            kind, result, _ = attempt(functools.partial(use, scene))
            kind = "result" if kind == "result" and result == sound[use] else "lost"
        elif kind == "error" and area == "run/checkpoints":
            kind = "lost"  # sound steps are beside it
        elif kind == "result" and result != sound[use]:
            kind = "told" if _TOLD.search(said) else "silent"
        elif kind == "error":
            kind = "told"
        setattr(tally, kind, getattr(tally, kind) + 1)
        if kind in ("lost", "silent", "traceback"):
            name = path.relative_to(scene.spoilt)
            tqdm.tqdm.write(f"{kind}: {name}, {how}, {use.__name__}: {said[-600:]}")
        scene.restore()
    return tallies


KilledCommand = Literal["train, save, evaluate", "evaluate", "prepare", "export", "sweep"]


@dataclasses.dataclass
class Target:
    """A command to kill.

    Attributes:
      words: the arguments of ``python -m``.
      starts: paths relative to the folder of results, as patterns; the kill comes after one of them
        appears. None stands for a random time from the start.
      result: (folder of results) -> what must be as without the kill.
    """

    words: list[str]
    starts: list[str | None]
    result: Callable[[pathlib.Path], Any]


def kill_processes(
    number: int, rng: random.Random, folder: pathlib.Path, only: str | None = None
) -> dict[str, Tally]:
    """Kills a command once, starts it again and compares; returns the outcomes by command."""
    run, out = folder / "run", folder / "out"
    train = ["experiments.fcn", "smoke", "--num-steps=12", "--save-every=2", "--eval-every=4"]
    command(folder, [*train, f"--workdir={run}"])
    prepare = [f"--data-dir={folder / 'data'}", f"--workdir={out}", "--num-steps=1"]
    weights, vary = out / "weights.safetensors", ["--vary", "fuse=sum,max"]
    targets = {
        "train, save, evaluate": Target(
            [*train, f"--workdir={out}"],
            [None, "config.json", "checkpoints/2", "checkpoints/*tmp*", "pictures/*", "*.tmp"],
            state_of,
        ),
        "evaluate": Target(
            ["dense_jax", "evaluate", f"--run={run}", f"--output={out}"],
            [None, "config.json", "pictures", "evaluation.json*"],
            lambda folder: json.loads((folder / "evaluation.json").read_text())["scores"],
        ),
        "prepare": Target(
            ["experiments.fcn", "smoke", "--dataset=folder", *prepare],
            [None, "../cache/datasets/*", "../cache/datasets/*/*/incomplete*"],
            state_of,
        ),
        "export": Target(
            ["dense_jax", "export", f"--run={run}", "--to=safetensors", f"--out={weights}"],
            [None, "weights*"],
            lambda folder: {
                name: array.tobytes()
                for name, array in files.read(folder / "weights.safetensors").tensors.items()
            },
        ),
        "sweep": Target(
            ["dense_jax", "sweep", "experiments.fcn", "smoke", f"--out={out}", *vary],
            [None, "index.html", "*/config.json", "*/checkpoints/*"],
            lambda folder: [
                state_of(path.parent) for path in sorted(folder.glob("*/evaluation.json"))
            ],
        ),
    }
    (folder / "data/images").mkdir(parents=True)
    (folder / "data/labels").mkdir()
    (folder / "data/classes.txt").write_text("ground\nthing\n")
    for i in range(40):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"data/images/{i}.png")
        Image.fromarray(pixels[..., 0] // 128).save(folder / f"data/labels/{i}.png")
    targets = {name: target for name, target in targets.items() if only in (None, name)}
    tallies, sound = {name: Tally() for name in targets}, {}
    for i in tqdm.trange(number, desc="kills"):
        name, target = list(targets.items())[i % len(targets)]
        if name not in sound:
            reset(folder, name)
            command(folder, target.words)
            sound[name] = target.result(out)
        reset(folder, name)
        kill_once(folder, target, rng)
        errors = ""
        for _ in range(5 if name == "sweep" else 1):  # the child of a killed sweep goes on
            status, errors = command(folder, target.words, check=False)
            if status == 0:
                break
            time.sleep(5)
        tally = tallies[name]
        tally.tried += 1
        try:  # a command that had ended before may refuse to overwrite its result
            kind = "result" if target.result(out) == sound[name] else "silent"
        except Exception:
            kind = "silent"
        if "Traceback" in errors:
            kind = "traceback"
        elif status and kind == "silent":
            kind = "lost"
        setattr(tally, kind, getattr(tally, kind) + 1)
        if kind != "result":
            tqdm.tqdm.write(f"{kind}: {name}: {errors[-600:]}")
    return tallies


def reset(folder: pathlib.Path, name: str) -> None:
    """Removes the results; where the data are to be prepared, also the cache."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    (folder / "out").mkdir()
    if name == "prepare":
        shutil.rmtree(folder / "cache" / "datasets", ignore_errors=True)


def command(folder: pathlib.Path, words: list[str], check: bool = True) -> tuple[int, str]:
    """Runs a command to its end; returns its status and its errors."""
    done = subprocess.run(
        [sys.executable, "-m", *words],
        env=os.environ | {"DENSE_JAX_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not (check and done.returncode), done.stderr
    return done.returncode, done.stderr


def kill_once(folder: pathlib.Path, target: Target, rng: random.Random) -> None:
    """Starts a command and kills it: at a random time, or just after a file has appeared."""
    start = rng.choice(target.starts)
    with subprocess.Popen(
        [sys.executable, "-m", *target.words],
        env=os.environ | {"DENSE_JAX_CACHE": str(folder / "cache")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        if start is None:
            time.sleep(rng.uniform(1, 12))
        else:
            while process.poll() is None and not any((folder / "out").glob(start)):
                time.sleep(0.005)
            time.sleep(rng.choice([0, 0, rng.uniform(0, 0.3)]))
        process.kill()


def state_of(workdir: pathlib.Path) -> dict[str, bytes]:
    """Returns the arrays of the last checkpoint."""
    with Checkpoints(workdir) as checkpoints:
        state, _ = checkpoints.read()
    arrays: dict[str, Any] = traverse_util.flatten_dict(state, sep="/")
    return {name: array.tobytes() for name, array in arrays.items()}


def main(
    damages: int = 500, kills: int = 60, seed: int = 0, only: KilledCommand | None = None
) -> None:
    """Prints a table of the outcomes; status 1 if anything is lost, silent or a traceback.

    Args:
      damages: number of damaged files.
      kills: number of killed processes.
      seed: of the choice of files, damages and moments.
      only: the command to kill. Default: all in turn.
    """
    rng, tallies = random.Random(seed), {}
    with tempfile.TemporaryDirectory() as folder, unchanged_environment():
        root = pathlib.Path(folder)
        (root / "damages").mkdir()
        (root / "kills").mkdir()
        if damages:
            tallies |= damage_files(damages, rng, root / "damages")
        if kills:
            tallies |= kill_processes(kills, rng, root / "kills", only)
    columns = [field.name for field in dataclasses.fields(Tally)]
    print(f"{'':24}" + "".join(f"{name:>11}" for name in columns))
    total = Tally()
    for area, tally in tallies.items():
        print(f"{area:24}" + "".join(f"{getattr(tally, name):11}" for name in columns))
        for name in columns:
            setattr(total, name, getattr(total, name) + getattr(tally, name))
    print(f"{'all':24}" + "".join(f"{getattr(total, name):11}" for name in columns))
    if total.lost or total.silent or total.traceback:
        sys.exit(1)


@contextlib.contextmanager
def unchanged_environment() -> Iterator[None]:
    """Puts the environment back at the end."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


if __name__ == "__main__":
    tyro.cli(main, prog="python -m tests.faults")
