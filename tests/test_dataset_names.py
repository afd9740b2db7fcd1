"""A dataset is a module in one folder: no list names it."""

import subprocess
import sys
import typing

import pytest

from dense_jax.data import dataset
from dense_jax.train.config import RunConfig

MODULE = """
import numpy as np

from dense_jax.data.classes import ClassTable
from dense_jax.data.dataset import Dataset


class Source:
    def __len__(self):
        return 3

    def size(self, index):
        return 4, 5

    def __getitem__(self, index):
        label = np.full((4, 5), index % 2, np.uint8)
        image = np.full((4, 5, 3), 100 * index, np.uint8)
        return {"image": image, "label": label, "name": str(index)}


def load(data_dir=None):
    classes = ClassTable(["even", "odd"])
    splits = {"train": Source(), "val": Source()}
    return Dataset("dropped_in", classes, splits, "abc", "three images")
"""

# The folder of the new module is on the package's path before anything else is imported.
CHILD = """
import sys
import dense_jax.data.datasets

dense_jax.data.datasets.__path__.append(sys.argv.pop(1))
from dense_jax import __main__ as commands
from dense_jax.train import cli
from experiments import fcn

if sys.argv[1] == "check-data":
    commands.main()
else:
    cli.run(lambda config: print("trains on", config.dataset), fcn.PRESETS, fcn.__doc__)
"""


@pytest.fixture(scope="module")
def child(tmp_path_factory):
    """Runs a command line in a process that finds one more dataset."""
    folder = tmp_path_factory.mktemp("datasets")
    (folder / "dropped_in.py").write_text(MODULE)

    def run(*words):
        command = [sys.executable, "-c", CHILD, str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return run


@pytest.mark.slow
def test_a_module_in_the_folder_is_a_choice_of_every_command(child):
    checked = child("check-data", "--dataset", "dropped_in")
    assert checked.returncode == 0, checked.stderr
    assert "dataset dropped_in" in checked.stdout
    assert "66.67%" in checked.stdout  # of the pixels are of the first class
    trained = child("smoke", "--dataset=dropped_in")
    assert trained.stdout == "trains on dropped_in\n", trained.stderr


@pytest.mark.slow
def test_other_names_are_refused_with_the_known_ones(child):
    refused = child("smoke", "--dataset=no_such_set")
    assert refused.returncode == 2
    printed = refused.stderr + refused.stdout
    assert "dropped_in" in printed
    assert "voc2012_sbd" in printed


def test_the_flag_offers_the_datasets_that_are_there():
    choices = typing.get_args(typing.get_type_hints(RunConfig)["dataset"])
    assert list(choices) == dataset.names()
    assert {"shapes", "folder", "camvid", "nuclei_border"} <= set(choices)
