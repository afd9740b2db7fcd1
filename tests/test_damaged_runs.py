"""Records of a run that somebody edited or a disk spoilt: a right load, or one line that tells."""

import contextlib
import dataclasses
import importlib
import json
from types import NoneType

import pytest

from dense_jax import runs
from dense_jax.commands import crf_search
from dense_jax.data import crops, given_boxes
from dense_jax.data.datasets import shapes
from dense_jax.errors import UserError
from dense_jax.tasks import trained
from dense_jax.train.config import from_plain
from tests.test_report import places, spoilt

SCRIPTS = [
    "deconvnet",
    "deeplab",
    "dilated",
    "faster_rcnn",
    "fcn",
    "hypercolumns",
    "segnet",
    "unet",
]
WRONG = [
    *(None, True, False, -1, 1, 2**70, 10**400, 0.5, -0.5, float("nan"), float("inf"), "", "8"),
    *("none", "\x1b[2J", [], [1], ["a"], [1, 2], [1, "b"], [[1], [2]], [None, None], [0.5, 0.5]),
    *({}, {"a": 1}, {"size": 3}, {"size": [True, 1]}, {"train_mode": "all"}),
]


@pytest.fixture
def record(tmp_path, monkeypatch):
    """Returns the path and the content of a script's `config.json` before its first step."""
    monkeypatch.setattr(trained, "read_variables", lambda *_: ({}, 0))
    dataset = shapes.load(None, size=(8, 8), num_train=1, num_val=1, num_test=1)

    def write(name):
        script = importlib.import_module(f"experiments.{name}")
        folder = tmp_path / name
        runs.prepare(dataclasses.replace(script.PRESETS["smoke"], workdir=str(folder)), dataset)
        content = json.loads((folder / "config.json").read_text())
        del content["digest"]  # as of somebody who means the edit
        return folder / "config.json", content

    return write


def opened(path, content):
    """Opens a run; returns its configuration as JSON, or the one line."""
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    said = ""
    try:
        return json.loads(json.dumps(trained.load(path.parent).config.to_json()))
    except UserError as error:
        said = str(error)
    assert said.isprintable()
    return said


def is_same(found, given):
    """Whether a configuration has what its record has; 1 is not true, nor 1.0."""
    if isinstance(found, dict) and isinstance(given, dict):
        return given.keys() <= found.keys() and all(is_same(found[k], given[k]) for k in given)
    return json.dumps(found) == json.dumps(given)


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_field_of_a_configuration_is_right_or_told(name, record, capsys):
    path, whole = record(name)
    config = whole["config"]
    assert opened(path, whole) == config
    told = 0
    # Fields that all scripts share are tried with one of them.
    own = importlib.import_module(f"experiments.{name}").Config.__annotations__
    tried = [key for key in config if name == "fcn" or key in own]
    nested = [
        (key, field) for key in tried if isinstance(config[key], dict) for field in config[key]
    ]
    for key, field in [*((key, "") for key in tried), *nested]:
        for value in WRONG:
            changed = config | {key: config[key] | {field: value} if field else value}
            found = opened(path, whole | {"config": changed})
            if isinstance(found, str):
                assert found.startswith(f"{path}")
                assert any(name in found for name in (key, key.replace("_", "-"), field or key))
                told += 1
                continue
            assert is_same(found, changed)
            assert (found == changed) == ("lacks" not in capsys.readouterr().err)
    assert told > 12 * len(tried)


def test_fields_that_are_missing_are_told(record, capsys):
    path, whole = record("fcn")
    del whole["config"]["width"], whole["config"]["shapes"]["noise"]
    assert not isinstance(opened(path, whole), str)
    said = f"{path} lacks shapes.noise, width: the defaults are taken"
    assert sorted(capsys.readouterr().err.split()) == sorted(said.split())


def test_a_field_of_an_earlier_version_is_right_or_told(record):
    path, whole = record("segnet")
    del whole["config"]["input_lrn"]
    for value in WRONG:
        found = opened(path, whole | {"config": whole["config"] | {"input_norm": value}})
        assert isinstance(found, str) == (value != "none")


@pytest.mark.parametrize("field", ["script", "script_file", "config", "classes", "fingerprint"])
def test_each_part_of_the_record_is_right_or_told(field, record):
    path, whole = record("fcn")
    for value in WRONG:
        found = opened(path, whole | {field: value})
        allowed = {"script_file": NoneType, "fingerprint": str, "config": dict}.get(field, bytes)
        if not isinstance(value, allowed) or value in ({"a": 1}, {"train_mode": "all"}):
            assert isinstance(found, str), value
            assert str(path.parent) in found
    if field != "script_file":
        del whole[field]
        assert f"it has no {field}" in opened(path, whole)


def test_class_tables_are_right_or_told(record):
    path, whole = record("fcn")
    for field in whole["classes"]:
        for value in WRONG:
            found = opened(path, whole | {"classes": whole["classes"] | {field: value}})
            is_empty = value in ([], "", {}) and field != "names"  # the default
            is_empty |= field == "keypoints" and value is None
            assert is_empty or isinstance(found, str) or field == "void_values", (field, value)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", "null", "NaN", "[" * 100_000, '"config"', "1" * 5000]
)
def test_what_is_no_record_is_told(content, record):
    path, _ = record("fcn")
    assert opened(path, content).startswith(f"{path} is damaged (")
    path.write_bytes(b"\xff\xfe" + json.dumps({}).encode("utf-16-le"))
    with pytest.raises(UserError, match="is damaged"):
        trained.load(path.parent)


@pytest.mark.parametrize(
    ("hint", "value", "words"),
    [
        (int, "8", 'x is "8", not a whole number'),
        (int | None, 1.0, "x is 1.0, not a whole number or null"),
        (tuple[int, int], [1], r"x is \[1\], not a list of 2, each a whole number"),
        (tuple[float, ...], [1, "a"], r'x\[1\] is "a", not a number'),
        (dict[str, float], {"a": None}, r"x\.a is null, not a number"),
    ],
)
def test_a_message_names_field_value_and_kind(hint, value, words):
    with pytest.raises(ValueError, match=words):
        from_plain(value, hint, "x")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("search.json", b"{"),
        ("search.json", b"[]"),
        ("search.json", b"\xff"),
        ("search.json", b'{"split": 3}'),
        ("table.csv", b"w1,sxy\n1,2\n"),
        ("table.csv", b"w1,sxy,srgb,w2,sg,mean_iou,pixel_accuracy,seconds\n1,2,3,4,x,6,7,8\n"),
        ("table.csv", b"w1,sxy,srgb,w2,sg,mean_iou,pixel_accuracy,seconds\n1,2,3,4,5,nan,7,8\n"),
        ("table.csv", b"\xff\n\xff\n"),
    ],
)
def test_a_damaged_search_is_told(file, content, tmp_path):
    crf_search.Table(tmp_path, {"split": "val"}).add((1, 2, 3, 4, 5), SCORES)
    assert crf_search.Table(tmp_path, {"split": "val"}).rows == {(1, 2, 3, 4, 5): SCORES}
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=f"{tmp_path}.*give another --output"):
        crf_search.Table(tmp_path, {"split": "val"})


SCORES = {"mean_iou": 0.5, "pixel_accuracy": 0.6, "seconds": 2.0}
BOXES = {
    "images": [{"id": 1, "file_name": "a.png"}],
    "annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}],
}


def test_each_value_of_given_boxes_is_read_or_told(tmp_path):
    path = tmp_path / "boxes.json"
    several = [BOXES, [{"file_name": "a.png", "category_id": 1, "bbox": [1, 2, 3, 4]}]]
    for whole in several:
        for place in places(whole):
            for wrong in [..., *WRONG]:
                path.write_text(json.dumps(spoilt(whole, place, wrong)))
                with contextlib.suppress(UserError):
                    for boxes, classes in given_boxes.read(path, 3).values():
                        assert boxes.shape == (len(classes), 4)
    for content in (b"[" * 100_000, b"\xff", b"null", b"3", b'"a"', b"{}", b"[[]]"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"boxes\.json"):
            given_boxes.read(path, 3)


def test_each_value_of_proposals_is_read_or_told(tmp_path):
    path, whole = tmp_path / "proposals.json", {"a": [[1, 2, 3, 4]]}
    for place in places(whole):
        for wrong in [..., *WRONG, 1e999, "5"]:
            path.write_text(json.dumps(spoilt(whole, place, wrong)))
            with contextlib.suppress(UserError):
                crops.read_proposals(path)
