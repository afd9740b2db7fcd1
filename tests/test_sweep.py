"""A sweep: what it plans, refuses, runs, leaves alone, and tabulates."""

import csv
import fcntl
import html.parser
import json
import math
import os
import pathlib
import signal
import sys
import threading
import time
import xml.etree.ElementTree

import pytest

from dense_jax import __main__ as program
from dense_jax import scripts
from dense_jax.analysis import cost
from dense_jax.commands import sweep as command
from dense_jax.data.classes import ClassTable, voc_colours
from dense_jax.errors import UserError
from dense_jax.evaluation.record import Score
from dense_jax.sweep import plan, results, tables
from dense_jax.train import cli
from experiments import fcn

ROOT = pathlib.Path(__file__).parent.parent
SCRIPT = "experiments.fcn"
DEFAULT = results.Scoring("val", "skip", "distance")


def planned(out="out", flags=(), vary=(), seeds=1):
    return plan.plan(scripts.load(SCRIPT), "smoke", flags, vary, seeds, pathlib.Path(out))


def leave_run(item, mean_iou=0.5, folder=None, **protocol):
    """Writes what a finished run leaves."""
    workdir = item.final
    (workdir / "checkpoints" / str(item.stages[-1].num_steps)).mkdir(parents=True, exist_ok=True)
    classes = ClassTable(("sky", "sea & air"), voc_colours(2))
    record = {"script": SCRIPT, "config": item.stages[-1].to_json(), "fingerprint": "f"}
    (workdir / "config.json").write_text(json.dumps({**record, "classes": classes.to_json()}))
    protocol = {
        **{"step": item.stages[-1].num_steps, "input_shape": [32, 32, 3], "dataset": "shapes"},
        **{"split": "val", "images_scored": 6, "absent_classes": "left out", "device": "cpu"},
        **{"commit": "abc"},
    } | protocol
    scores = {"mean_iou": mean_iou, "boundary_f1": math.nan, "loss": 1.0, "rand_error": 0.03}
    about = {
        "mean_iou": {"title": "Mean IoU", "unit": "%", "main": True},
        "boundary_f1": {"title": "Boundary F1", "unit": "%", "main": True},
        "loss": {"title": "Loss", "unit": "", "main": False},
        "rand_error": {"title": "", "unit": "", "main": True},
    }
    table = {
        "title": "Classes",
        "columns": [{"title": "Class", "unit": ""}, {"title": "IoU", "unit": "%"}],
        "rows": [["sky", mean_iou + 0.1], ["sea & air", None]],
        "log": "iou",
        "note": "",
    }
    evaluation = {"protocol": protocol, "scores": scores, "about_scores": about, "tables": [table]}
    folder = folder or workdir
    folder.mkdir(exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    rows = [{"step": 1, "rate": 4.0}, {"step": 2, "rate": 16.0}]
    lines = [{"step": r["step"], "kind": "train", "images_per_second": r["rate"]} for r in rows] + [
        {"step": 2, "kind": "eval"}
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def ran(monkeypatch):
    """Replaces the processes: runs of stride 16 fail, others leave scores; lists their words."""
    calls = []

    def run(self, words, log):
        calls.append(list(words))
        values = dict(word[2:].split("=", 1) for word in words if "=" in word)
        if values.get("stride") == "16":
            return "the loss is nan"
        flags = [f for f in words[2:] if not f.startswith(("--stride", "--seed", "--workdir"))]
        item = next(
            item
            for item in planned(log.parent.parent, flags, ("stride=8,16,32",), 2)
            if item.log == log
        )
        leave_run(item, 0.5 + 0.1 * item.seed + (0.2 if values["stride"] == "32" else 0))
        return None

    monkeypatch.setattr(command.Children, "run", run)
    return calls


def test_every_combination_has_its_folder_and_its_command():
    runs = planned("o/p", ["--num-steps=3"], ("stride=32,8", "fuse=sum,max"), 2)
    assert [item.workdir.name for item in runs[:4]] == [
        "stride=32_fuse=sum_seed=0",
        "stride=32_fuse=max_seed=0",
        "stride=8_fuse=sum_seed=0",
        "stride=8_fuse=max_seed=0",
    ]
    assert [item.seed for item in runs] == [0] * 4 + [1] * 4
    assert runs[5].settings == {"stride": "32", "fuse": "max"}
    assert runs[5].command == (
        "python -m experiments.fcn smoke --num-steps=3 --stride=32 --fuse=max --seed=1 "
        "--workdir=o/p/stride=32_fuse=max_seed=1"
    )
    config = runs[5].stages[-1]
    wanted = {"stride": 32, "fuse": "max", "num_steps": 3, "seed": 1}
    assert wanted.items() <= config.to_json().items()


def test_values_of_several_words_and_strange_letters_are_kept_apart():
    runs = planned(vary=("crop=16 16,None", "init=run:a/b,run:a:b"))
    assert runs[0].stages[0].to_json()["crop"] == (16, 16)
    assert runs[2].stages[0].to_json()["crop"] is None
    assert len({item.workdir for item in runs}) == 4
    assert all("/" not in item.workdir.name for item in runs)


def test_without_varied_flags_the_preset_is_the_row():
    assert [item.workdir.name for item in planned(seeds=2)] == [
        "preset=smoke_seed=0",
        "preset=smoke_seed=1",
    ]


def test_the_last_stage_of_staged_training_is_scored():
    (item,) = planned(flags=["--train=staged", "--stride=16"])
    assert [stage.to_json()["stride"] for stage in item.stages] == [32, 16]
    assert item.final == item.workdir / "fcn16s"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"vary": ("nothing=1,2",)}, "Unrecognized options: --nothing=1.*smoke --nothing"),
        ({"vary": ("stride=8,5",)}, "invalid choice '5' for argument '--stride'"),
        ({"vary": ("num-steps=x",)}, "--num-steps: invalid literal"),
        ({"vary": ("num-steps=0",)}, "--num-steps=0: give at least 1"),
        ({"vary": ("crop=5",)}, "--crop: no type matching"),
        ({"vary": ("backbone=vgg16,alexnet",)}, "--backbone=alexnet does not go with --stride=8"),
        ({"vary": ("stride",)}, "--vary=stride: give FLAG=VALUE"),
        ({"vary": ("stride=8,",)}, "--vary=stride=8,: give FLAG=VALUE"),
        ({"vary": ("stride=8,8",)}, "a value comes twice"),
        ({"vary": ("loss_norm=sum", "loss-norm=batch")}, "--loss-norm is given twice"),
        ({"vary": ("stride=8",), "flags": ["--stride", "16"]}, "--stride is given twice"),
        ({"vary": ("seed=1,2",)}, "--seed belongs to the sweep"),
        ({"flags": ["--workdir=x"]}, "--workdir belongs to the sweep"),
        ({"flags": ["extra"]}, "Unrecognized options: extra"),
        ({"seeds": 0}, "--seeds=0"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(options, match):
    with pytest.raises(UserError, match=match) as error:
        planned(**options)
    assert "\n" not in str(error.value)


def test_unknown_scripts_and_presets_are_refused(tmp_path):
    for script, preset, match in [
        ("experiments.nothing", "smoke", "cannot be imported"),
        ("os", "smoke", "os trains no network"),
        (SCRIPT, "nothing", "has no preset nothing: give paper"),
    ]:
        with pytest.raises(UserError, match=match):
            command.run(script, preset, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_lists_the_commands(tmp_path, monkeypatch, capsys, ran):
    monkeypatch.setattr(cli, "set_up_jax", lambda: None)
    words = ["sweep", SCRIPT, "smoke", "--vary", "stride=8,32", "--vary", "fuse=max"]
    words += ["--out", str(tmp_path / "out"), "--dry-run", "--", "--num-steps=5"]
    monkeypatch.setattr(sys, "argv", ["dense_jax", *words])
    program.main()
    expected = planned(tmp_path / "out", ["--num-steps=5"], ("stride=8,32", "fuse=max"))
    assert capsys.readouterr().out.splitlines() == [item.command for item in expected]
    assert not ran
    assert not (tmp_path / "out").exists()


def test_a_failure_stops_nothing_and_only_it_is_run_again(tmp_path, ran, capsys):
    options = {"vary": ("stride=8,16,32",), "seeds": 2, "out": tmp_path}
    for expected in (6, 2):
        ran.clear()
        with pytest.raises(SystemExit) as ended:
            command.run(SCRIPT, "smoke", **options)
        assert ended.value.code == 1
        assert len(ran) == expected
        told = capsys.readouterr().err
        assert told.count("the loss is nan") == 2
        assert str(tmp_path / "stride=16_seed=1" / "log.txt") in told
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert [row["runs_finished"] for row in rows] == ["2", "0", "2"]
    first, failed, last = rows
    assert float(first["mean_iou_mean"]) == pytest.approx(0.55)
    assert float(first["mean_iou_sd"]) == pytest.approx(0.1 / math.sqrt(2))
    assert failed["mean_iou_mean"] == failed["parameters"] == ""
    assert float(last["iou/sky"]) == pytest.approx(0.85)
    assert float(last["iou_difference/sky"]) == pytest.approx(0.2)
    assert float(last["train_seconds"]) == pytest.approx(8 / 4 + 8 / 16)
    assert float(last["images_per_second"]) == 16
    for item in planned(tmp_path, vary=("stride=8,16,32",), seeds=2):
        row = next(row for row in rows if row["stride"] == item.settings["stride"])
        assert item.command in row["commands"]
    layers = cost.summarise(fcn.build(fcn.PRESETS["smoke"], 2).model, (1, 32, 32, 3))
    assert int(first["parameters"]) == sum(layer.num_params for layer in layers)
    assert int(first["flops"]) == sum(layer.flops for layer in layers)


def test_tables_say_the_same_in_every_format(tmp_path, ran):
    with pytest.raises(SystemExit):
        command.run(SCRIPT, "smoke", vary=("stride=8,16,32",), seeds=2, out=tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "| 8 | 55.0 ± 7.1 |" in text
    assert "| 32 | +20.0 |" in text
    assert "| 16 | \N{EN DASH} |" in text
    assert "* failed: stride=16_seed=0: the loss is nan" in text
    assert "6 images of shapes, val split" in text
    assert "rand error" in text  # a score that only this script has
    assert "| loss" not in text
    latex = (tmp_path / "table.tex").read_text()
    assert r"8 & 55.0 $\pm$ 7.1 & -- &" in latex
    assert r"sea \& air" in latex
    picture = xml.etree.ElementTree.parse(tmp_path / "plot.svg")
    assert len(picture.findall(".//{*}circle")) == 8  # four runs, two scores
    page = Page()
    page.feed((tmp_path / "index.html").read_text())
    assert not page.open
    assert "stride=32_seed=1/report.html" in page.links
    assert all((tmp_path / link).exists() for link in page.links if "report" not in link)


class Page(html.parser.HTMLParser):
    """Links, and tags that are still open."""

    def __init__(self):
        super().__init__()
        self.open, self.links = [], []

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name == "href"]
        if tag not in ("meta", "br", "path", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("path", "circle"):
            assert self.open.pop() == tag


def test_nothing_finished_is_still_a_table(tmp_path):
    row = tables.Row({"a_b": "x|y~"}, ["python -m s"], [], [])
    tables.write(tmp_path, "t", [], [row])
    assert r"| x\|y~ | " in (tmp_path / "table.md").read_text()
    assert r"x|y\textasciitilde{} & --" in (tmp_path / "table.tex").read_text()


def test_the_score_without_crf_is_shown_where_there_is_one(tmp_path):
    scores = (Score("mean_iou", 0.5), Score("before", 0.475, "Mean IoU without CRF"))
    found = {score.name: score for score in scores}
    refined = tables.Result(0, found, {}, "", 1.0, 1.0, tmp_path)
    rows = [tables.Row({"post": "none"}, ["c"], [], []), tables.Row({"post": "crf"}, ["c"], [], [])]
    tables.write(tmp_path, "t", [], rows[:1])
    assert "CRF" not in (tmp_path / "table.md").read_text()
    rows[1].results.append(refined)
    tables.write(tmp_path, "t", [], rows)
    written = (tmp_path / "table.md").read_text()
    assert "| Mean IoU without CRF % |" in written
    assert "| 47.5 |" in written


def test_other_rules_are_scored_by_evaluate(tmp_path, ran, monkeypatch):
    scoring = results.Scoring("test", "zero", "distance")
    (item,) = planned(tmp_path, vary=("stride=8",))
    leave_run(item)
    folder = item.workdir / "evaluate-test-last-zero-distance"
    assert scoring.folder(item) == folder
    words = [
        *("dense_jax", "evaluate", f"--run={item.workdir}", "--split=test", "--absent=zero"),
        *("--bf-match=distance", f"--output={folder}"),
    ]

    def evaluate(self, words, log):
        ran.append(words)
        leave_run(item, 0.7, folder, split="test")

    monkeypatch.setattr(command.Children, "run", evaluate)
    for _ in range(2):
        command.run(SCRIPT, "smoke", vary=("stride=8",), out=tmp_path, split="test", absent="zero")
    assert ran == [words]
    assert "| 8 | 70.0 |" in (tmp_path / "table.md").read_text()


def test_only_a_whole_run_of_the_same_flags_counts_as_finished(tmp_path):
    (item,) = planned(tmp_path)
    assert not results.is_trained(SCRIPT, item)
    leave_run(item)
    assert results.is_trained(SCRIPT, item)
    assert not results.is_trained("experiments.other", item)
    for flag in ("--learning-rate=1", "--num-steps=3", "--shapes.num-train=9"):
        (other,) = planned(tmp_path, [flag])
        assert not results.is_trained(SCRIPT, other)
    leave_run(item, step=1)  # killed after the evaluation in the middle
    assert not results.is_trained(SCRIPT, item)
    assert DEFAULT.read(item) is None
    leave_run(item)
    (item.workdir / "checkpoints" / "2").rmdir()  # killed while saving
    assert not results.is_trained(SCRIPT, item)
    leave_run(item)
    (item.workdir / "evaluation.json").write_text("{")
    assert not results.is_trained(SCRIPT, item)


def test_a_stopped_sweep_starts_no_more_runs(tmp_path, monkeypatch, capsys):
    def stop(self, words, log):
        self.stopped_by = signal.SIGTERM

    monkeypatch.setattr(command.Children, "run", stop)
    with pytest.raises(SystemExit) as ended:
        command.run(SCRIPT, "smoke", vary=("stride=8,16",), out=tmp_path)
    assert ended.value.code == 128 + signal.SIGTERM
    told = capsys.readouterr()
    assert "[1/2]" in told.out
    assert "[2/2]" not in told.out
    assert "the same command resumes" in told.err


def test_a_run_that_leaves_no_scores_has_failed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command.Children, "run", lambda self, words, log: None)
    with pytest.raises(SystemExit) as ended:
        command.run(SCRIPT, "smoke", out=tmp_path)
    assert ended.value.code == 1
    assert "ended without an evaluation" in capsys.readouterr().err
    leave_run(*planned(tmp_path))
    with pytest.raises(SystemExit):
        command.run(SCRIPT, "smoke", out=tmp_path, split="test")
    assert "has no evaluation" in capsys.readouterr().err


def test_a_signal_is_passed_on_to_the_child(tmp_path, monkeypatch):
    (tmp_path / "sleeper.py").write_text(
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit('ValueError: stopped'))\n"
        "pathlib.Path('ready').touch()\n"
        "time.sleep(60)\n"
    )
    monkeypatch.chdir(tmp_path)

    def kill():
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=kill)
    with command.Children() as children:
        thread.start()
        reason = children.run(["sleeper"], tmp_path / "log.txt")
    thread.join()
    assert children.stopped_by == signal.SIGTERM
    assert reason == "ValueError: stopped"
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
def test_two_processes_never_share_a_folder(tmp_path):
    log = tmp_path / "log.txt"
    children = command.Children()
    with log.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process" in (children.run(["platform"], log) or "")
    assert children.run(["platform"], log) is None


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\n  5%|\r 10%|\rerror: no disk\n\n", "no disk"),
        ("Traceback\nx.y.SomeError: bad\n-----\nFor simplicity, JAX hides\n", "x.y.SomeError: bad"),
        ("no module\n", "no module"),
        ("", "it printed nothing"),
    ],
)
def test_the_last_error_is_shown(text, line):
    assert command._last_error(text) == line


@pytest.mark.slow  # the other tests have scripts that only print
def test_a_real_sweep_trains_scores_and_survives_a_failure(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        command.run(
            SCRIPT,
            "smoke",
            ("--num-steps=1",),
            vary=("dataset=folder,shapes",),
            out=tmp_path,
            split="test",
        )
    assert ended.value.code == 1
    text = (tmp_path / "table.md").read_text()
    assert "failed: dataset=folder_seed=0: " in text
    assert "--data-dir" in text
    assert "2 images of shapes, test split" in text
    failed, good = csv.DictReader((tmp_path / "table.csv").read_text().splitlines())
    assert failed["runs_finished"] == "0"
    assert 0 < float(good["mean_iou_mean"]) <= 1
    assert int(good["parameters"]) > 0
    assert (tmp_path / "dataset=shapes_seed=0" / "evaluate-test-last" / "report.html").exists()
