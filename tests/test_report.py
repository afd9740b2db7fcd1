import functools
import html.parser
import itertools
import json
import math
import re
import shutil

import numpy as np
import pytest

from dense_jax import viz
from dense_jax.data.classes import ClassTable
from dense_jax.errors import UserError
from dense_jax.evaluation import labels, report
from dense_jax.evaluation.record import Findings, Picture, Record, Score
from dense_jax.metrics import semantic

CLASSES = ClassTable(["sky & <sea>", "road", "absent"], ((1, 2, 3), (200, 0, 0), (0, 0, 200)))


class Balance(html.parser.HTMLParser):
    """Fails on tags that are closed in the wrong order; collects references and words."""

    void = frozenset({"meta", "img", "path", "circle", "th"})

    def __init__(self):
        super().__init__()
        self.open, self.links, self.words, self.tags = [], [], [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "action")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


LABELS = np.array([[0, 0, 1, 255], [1, 1, 1, 0]])
PREDICTIONS = np.array([[0, 1, 1, 0], [1, 1, 0, 0]])
CONFUSION = np.asarray(semantic.confusion_counts(LABELS, PREDICTIONS, 3))


@pytest.fixture
def run_dir(tmp_path):
    image = np.zeros((2, 4, 3), np.uint8)
    summary = semantic.summarise(CONFUSION, CLASSES.names)
    triplet = viz.comparison(image, LABELS, PREDICTIONS, CLASSES.palette())
    parts = ("image", "label", "prediction", "errors")
    found = Findings(
        [
            Score("mean_iou", summary["mean_iou"], "Mean IoU"),
            Score("boundary_f1", math.nan, "Boundary F1"),
            Score("v_rand", 0.87654, unit="", main=False),
        ],
        [labels.class_table(summary, CONFUSION)],
        [
            Picture("a.png", lambda: triplet, "Worst", "<b>.png, 50.0 %", parts),
            Picture("b.png", lambda: triplet, "Best", "c", parts),
            Picture("cells.png", lambda: image, "Objects & more"),
        ],
    )
    protocol = {"dataset": "tiny", "images_scored": 1, "images_in_split": 1, "split": "val"}
    Record("mean_iou", [found], protocol).write(tmp_path, 3)
    write(tmp_path / "config.json", script="experiments.fcn", classes=CLASSES.to_json())
    rows: list[dict[str, object]] = [
        {"step": s, "kind": "train", "loss": 2 / s, "learning_rate": 0.1} for s in range(1, 100)
    ]
    rows.append({"step": 99, "kind": "eval", "loss": 0.1, "mean_iou": 0.4, "iou/road": None})
    lines = [json.dumps(row) for row in rows] + ['{"step": 100, "ki']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    return tmp_path


@pytest.fixture
def old_run_dir(run_dir):
    """The same as versions before the record wrote it."""
    summary = semantic.summarise(CONFUSION, CLASSES.names)
    protocol = {"dataset": "tiny", "images_scored": 1, "images_in_split": 1, "split": "val"}
    write(
        run_dir / "evaluation.json",
        protocol=protocol | {"step": 3},
        scores={"mean_iou": summary["mean_iou"], "boundary_f1": float("nan"), "v_rand": 0.87654},
        per_class=summary["per_class"],
        confusion=CONFUSION.tolist(),
        images=[
            {"name": "<b>.png", "kind": kind, "score": 0.5, "triplet": f"pictures/{name}.png"}
            for kind, name in (("best", "b"), ("worst", "a"))
        ],
    )
    return run_dir


def write(path, **values):
    path.write_text(json.dumps({"config": {"dataset": "tiny", "lr": 0.1}} | values))


def parse(path):
    parser = Balance()
    parser.feed(path.read_text(encoding="utf-8"))
    assert not parser.open
    return parser


def test_page_is_complete_and_self_contained(run_dir):
    page = parse(report.write_report(run_dir))
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert len(page.links) == 3  # best, worst, objects
    assert not page.tags & {"script", "link", "iframe"}
    words = " ".join(page.words)
    for expected in ("fcn on tiny", "1 of 1 val images", "sky & <sea>", "<b>.png", "55.0 %"):
        assert expected in words
    assert "url(" not in words
    assert page.words.count("Loss") == 1


def test_a_record_says_what_it_holds(run_dir):
    found = json.loads((run_dir / "evaluation.json").read_text())
    assert found["headline"] == "mean_iou"
    assert found["scores"]["boundary_f1"] is None  # JSON has no NaN
    assert found["about_scores"]["mean_iou"] == {"title": "Mean IoU", "unit": "%", "main": True}
    assert [picture["group"] for picture in found["pictures"]] == [
        "Worst",
        "Best",
        "Objects & more",
    ]
    assert found["tables"][0]["rows"][0][0] == "sky & <sea>"
    page = parse(report.write_report(run_dir))
    assert {"v rand", "0.8765", "Objects & more"} <= set(page.words)  # its name for a title


def test_a_record_replaces_the_pictures_of_an_earlier_one(run_dir):
    picture = Picture("a.png", lambda: np.ones((1, 1, 3), np.uint8), "Worst")
    protocol = {"images_scored": 1, "split": "val"}
    Record("x", [Findings(pictures=[picture])], protocol).write(run_dir, 4)
    assert [path.name for path in (run_dir / "pictures").iterdir()] == ["a.png"]


def test_links_of_a_run_folder_are_replaced_and_not_followed(run_dir, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    draw = functools.partial(np.ones, (1, 1, 3), np.uint8)
    found = Findings(pictures=[Picture("a.png", draw, "Worst")], files={"a.csv": "1"})
    record = Record("x", [found], {"images_scored": 1, "split": "val"})
    names = ["report.html", "evaluation.json", "pictures/a.png", "a.csv"]
    for name in names:
        (run_dir / name).unlink(missing_ok=True)
        (run_dir / name).symlink_to(victim)
    record.write(run_dir, 4)
    report.write_report(run_dir)
    assert victim.read_text() == "mine"
    assert not any((run_dir / name).is_symlink() for name in names)
    shutil.rmtree(run_dir / "pictures")
    (tmp_path / "photos").mkdir()
    (run_dir / "pictures").symlink_to(tmp_path / "photos")
    with pytest.raises(UserError, match=r"pictures is a link to .*photos"):
        record.write(run_dir, 5)


def test_wild_names_of_images_are_escaped_in_the_page(run_dir):
    draw = functools.partial(np.ones, (1, 1, 3), np.uint8)
    pictures = [Picture("a.png", draw, "Worst", "<script>\x1b[2J\x9b.png, 50 %")]
    protocol = {"images_scored": 1, "split": "val"}
    Record("x", [Findings(pictures=pictures)], protocol).write(run_dir, 4)
    path = report.write_report(run_dir)
    page, text = parse(path), path.read_text(encoding="utf-8")
    assert r"<script>\x1b[2J\x9b.png, 50 %" in page.words
    assert "script" not in page.tags
    assert not set(text) & set("\x1b\x9b")


def test_a_run_of_an_earlier_version_has_its_page(old_run_dir):
    page = parse(report.write_report(old_run_dir))
    words = " ".join(page.words)
    for expected in ("Mean iou", "<b>.png, 50.0 %", "V rand", "0.8765", "Cells", "sky & <sea>"):
        assert expected in words
    assert len(page.links) == 3


def test_run_that_was_never_evaluated_still_has_a_page(run_dir):
    (run_dir / "evaluation.json").unlink()
    (run_dir / "metrics.jsonl").unlink()
    words = parse(report.write_report(run_dir)).words
    assert "Settings" in words
    assert "Worst" not in words


@pytest.mark.parametrize("content", [b'{"a": ', b"[]", b"3", b"null", b"[" * 100_000, b"\xff{}"])
@pytest.mark.parametrize("name", ["config.json", "evaluation.json"])
def test_damaged_file_is_named(run_dir, name, content):
    (run_dir / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(name)):
        report.write_report(run_dir)


WRONG = [None, True, -1, 0.5, 10**400, float("nan"), "", "x", [], [1], ["a"], [[]], {}, {"a": 1}]


def places(value, path=()):
    """Yields the keys to each value within a JSON value."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key)
        if isinstance(item, dict | list):
            yield from places(item, (*path, key))


def spoilt(whole, path, wrong):
    """A copy with another value at a place; an ellipsis removes it."""
    copy = json.loads(json.dumps(whole))
    inside = copy
    for key in path[:-1]:
        inside = inside[key]
    if wrong is ...:
        del inside[path[-1]]
    else:
        inside[path[-1]] = wrong
    return copy


@pytest.mark.parametrize("form", ["run_dir", "old_run_dir"])
def test_each_value_of_a_record_is_shown_or_told(form, request):
    run_dir = request.getfixturevalue(form)
    path = run_dir / "evaluation.json"
    whole, told = json.loads(path.read_text()), 0
    for i, place in enumerate(places(whole)):
        for wrong in [..., *WRONG][i % 3 :: 3]:  # each of them in many places
            path.write_text(json.dumps(spoilt(whole, place, wrong)))
            try:
                parse(report.write_report(run_dir))
            except UserError as error:
                told += 1
                line = str(error)
                if not line.isprintable() or not line.endswith("evaluate the run again"):
                    pytest.fail(f"{place} {wrong}: {line}")
    assert told > 90


def test_each_value_of_a_row_is_shown_or_told(run_dir, capsys):
    path = run_dir / "metrics.jsonl"
    whole = json.loads(path.read_text().splitlines()[0])
    for key in whole:
        for wrong in [..., *WRONG]:
            path.write_text(json.dumps(spoilt(whole, (key,), wrong)) + "\n")
            is_right = isinstance(wrong, float | str | int | None) and type(wrong) is not bool
            if key == "step":
                is_right = wrong == -1
            elif key == "kind":
                is_right = isinstance(wrong, str)
            if wrong is ...:
                is_right = key not in ("step", "kind")
            report.write_report(run_dir)
            told = "metrics.jsonl: line 1 is damaged" in "".join(capsys.readouterr())
            assert told == (not is_right or wrong == 10**400), (key, wrong)


def test_missing_files_are_named(run_dir, tmp_path_factory):
    with pytest.raises(UserError, match=r"no config\.json"):
        report.write_report(tmp_path_factory.mktemp("empty"))
    (run_dir / "pictures" / "a.png").unlink()
    with pytest.raises(UserError, match=r"a\.png"):
        report.write_report(run_dir)


def rename_picture(run_dir, file):
    """Makes the record name another first picture."""
    path = run_dir / "evaluation.json"
    found = json.loads(path.read_text())
    found["pictures"][0]["file"] = str(file)
    path.write_text(json.dumps(found))


def record_again(run_dir):
    picture = Picture("new.png", lambda: np.ones((1, 1, 3), np.uint8), "Worst")
    protocol = {"images_scored": 1, "split": "val"}
    Record("x", [Findings(pictures=[picture])], protocol).write(run_dir, 4)


@pytest.mark.parametrize(
    "file",
    [
        *("../../x.png", "pictures/../../x.png", "../run/x.png", "HERE/x.png", "HERE/run/x.png"),
        *("x.png", "config.json", "pictures/", "", "..", "pictures//a.png", "pictures/./a.png"),
        *("pictures\\..\\x.png", "pictures/a\0.png", "pictures/\x1b[2J.png", "pictures/x.txt"),
        "checkpoints/a.png",
    ],
)
def test_pictures_elsewhere_are_neither_read_nor_deleted(file, run_dir, tmp_path_factory):
    here = tmp_path_factory.mktemp("here")
    folder = shutil.copytree(run_dir, here / "run")
    image = folder / "pictures" / "a.png"
    for other in ("x.png", "run/x.png", "run/pictures/x.txt", "run/checkpoints/a.png"):
        (here / other).parent.mkdir(exist_ok=True)
        shutil.copy(image, here / other)
    before = {path for path in here.rglob("*") if path.is_file()}
    rename_picture(folder, file.replace("HERE", str(here)))
    with pytest.raises(UserError, match=r"evaluation\.json.*evaluate the run again") as error:
        report.write_report(folder)
    assert str(error.value).isprintable()
    record_again(folder)
    after = {path for path in here.rglob("*") if path.is_file()}
    assert {path.name for path in before - after} <= {"b.png", "cells.png"}
    assert report.write_report(folder).exists()


def test_links_out_of_the_folder_are_not_followed(run_dir, tmp_path_factory):
    here = tmp_path_factory.mktemp("here")
    picture, secret = run_dir / "pictures/a.png", here / "a.png"
    picture.rename(secret)
    content = secret.read_bytes()
    for name in ("a.png", "new.png", "new.png.tmp"):
        (run_dir / "pictures" / name).symlink_to(secret)
    for name in ("report.html", "evaluation.json.tmp"):
        (run_dir / name).symlink_to(secret)
    with pytest.raises(UserError, match=r"a\.png is a link out of the run folder: remove it"):
        report.write_report(run_dir)
    record_again(run_dir)
    report.write_report(run_dir)
    assert not (run_dir / "pictures/new.png").is_symlink()
    assert secret.read_bytes() == content
    # Nor is anything deleted in a folder that a link puts in the place of pictures/.
    shutil.rmtree(run_dir / "pictures")
    (run_dir / "pictures").symlink_to(here)
    shutil.copy(secret, here / "new.png")
    for act in (record_again, report.write_report):
        with pytest.raises(UserError, match=r"is a link .*: remove it"):
            act(run_dir)
    assert {path.name for path in here.iterdir()} == {"a.png", "new.png"}


def test_a_users_own_picture_stays(run_dir):
    shutil.copy(run_dir / "pictures/a.png", run_dir / "pictures/mine.png")
    record_again(run_dir)
    assert {path.name for path in (run_dir / "pictures").iterdir()} == {"mine.png", "new.png"}


def test_damaged_pictures_are_named(run_dir):
    (run_dir / "pictures/a.png").write_bytes(b"GIF89a")
    with pytest.raises(UserError, match=r"a\.png is no picture .*: evaluate the run again"):
        report.write_report(run_dir)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.31, 0.87), (-3, 4e5), (2, 2), (0, 0), (1e-9, 3e-9), (5, 5 + 1e-13)]
)
def test_ticks_enclose_the_values_in_round_steps(low, high):
    ticks = report.ticks(low, high)
    assert 3 <= len(ticks) <= 12
    assert ticks[0] <= low + 1e-9 * abs(low)
    assert high <= ticks[-1] + 1e-9 * abs(high)
    assert all(b > a for a, b in itertools.pairwise(ticks))


def test_smoothing_is_a_centred_mean_and_thinning_keeps_the_end():
    line = [(float(i), float(i % 2)) for i in range(1001)]
    smooth = report._smooth(line)
    assert smooth[500][1] == pytest.approx(np.mean([y for _, y in line[475:526]]))
    assert (smooth[0], smooth[-1]) == (line[0], line[-1])
    thin = report._thin(line)
    assert len(thin) <= 600
    assert thin[-1] == line[-1]
