"""Published weights into a folder, and from there or at once into a run."""

import dataclasses
import functools
import json
import logging
import pathlib
import re
import runpy
import shutil
import sys
from typing import Any

import chex
import jax
import numpy as np
import optax
import pytest

from dense_jax import runs, start
from dense_jax.commands import import_weights
from dense_jax.data import dataset
from dense_jax.errors import UserError
from dense_jax.models import deeplabv3, resnet
from dense_jax.releases import catalogue
from dense_jax.releases import resnet as resnet_releases
from dense_jax.tasks import training
from dense_jax.train import cli
from dense_jax.train.state import TrainState
from dense_jax.weights import hub, rules
from experiments import deconvnet, dilated, fcn, segnet, unet
from tests import contract, npz


def thin(name, num_classes=None, aux=False):
    """In place of `catalogue.build`."""
    shape = dict(depths=(1, 1, 1, 1), width=1 / 16)
    if name.startswith("res"):
        return resnet.ResNet(num_classes=num_classes or 5, **shape)
    trunk = functools.partial(resnet.ResNet, depths=shape["depths"])
    return deeplabv3.ResNetSegmenter(num_classes or 4, "fcn", trunk=trunk, aux=aux, width=1 / 16)


@pytest.fixture
def resnet_file(tmp_path, monkeypatch) -> tuple[pathlib.Path, Any]:
    """A file of a thin ResNet under torchvision's names, and its variables."""
    monkeypatch.setattr(catalogue, "build", thin)
    variables = contract.random_variables(thin("resnet50"), (1, 32, 32, 3))
    tensors: Any = rules.unload(variables, resnet_releases.TORCHVISION.rules)
    path = tmp_path / "resnet.npz"
    np.savez(path, **tensors, **{"bn1.num_batches_tracked": 3})
    return path, variables


def started(template_model, source, normalisation="torchvision"):
    shapes = rules.template_of(template_model)
    zeros = jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape), shapes)
    params, tx = zeros.pop("params"), optax.sgd(0.1)
    state = TrainState.create(
        apply_fn=template_model.apply,
        params=params,
        tx=tx,
        model_state=zeros,
        ema_params=None,
        seed=jax.numpy.uint32(0),
    )
    return training._initialise_from(source, state, tx, normalisation)


def test_imported_weights_start_a_run(resnet_file, tmp_path, capsys):
    path, variables = resnet_file
    out = tmp_path / "out"
    import_weights.run(model="resnet50", source=str(path), out=out)
    said = capsys.readouterr().out
    assert "permuted" in said
    assert "--normalisation=torchvision" in said
    record = json.loads((out / "weights.json").read_text())
    assert (record["model"], record["normalisation"]) == ("resnet50", "torchvision")
    state = started(thin("resnet50"), f"run:{out}")
    chex.assert_trees_all_equal(state.params, variables["params"])
    chex.assert_trees_all_equal(state.model_state["batch_stats"], variables["batch_stats"])
    assert "warning" not in capsys.readouterr().out
    started(thin("resnet50"), f"run:{out}", "caffe")
    assert "expect --normalisation=torchvision, and this run has" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds weights already"):
        import_weights.run(model="resnet50", source=str(path), out=out)


def test_a_file_starts_a_run_whose_head_is_another(resnet_file, capsys):
    path, variables = resnet_file
    state = started(thin("fcn_resnet50"), f"file:{path}", "caffe")
    said = capsys.readouterr().out
    assert "torchvision's ResNet" in said
    assert re.search("new here: .* classifier_0/kernel", said)
    assert "expect --normalisation=torchvision" in said
    ours, theirs = state.params["backbone"], variables["params"]
    chex.assert_trees_all_equal(ours, {name: theirs[name] for name in ours})
    ours = state.model_state["batch_stats"]["backbone"]
    chex.assert_trees_all_equal(ours, {name: variables["batch_stats"][name] for name in ours})
    with pytest.raises(UserError, match=r"resnet\.npz does not fit.*85 mismatch: bn1\.running"):
        started(thin("resnet50").clone(width=1 / 8), f"file:{path}")
    for wrong in ("file:", "hub:", "x"):
        with pytest.raises(UserError, match="give run:PATH"):
            started(thin("resnet50"), wrong)


def test_a_file_of_the_hub_is_taken_by_its_name(resnet_file, tmp_path, monkeypatch, capsys):
    path, variables = resnet_file
    monkeypatch.setattr(hub, "download", {"timm/resnet50": path}.__getitem__)
    state = started(thin("resnet50"), "hub:timm/resnet50")
    chex.assert_trees_all_equal(state.params, variables["params"])
    import_weights.run(model="resnet50", source="hub:timm/resnet50", out=tmp_path / "out")
    record = json.loads((tmp_path / "out/weights.json").read_text())
    assert record["from"] == "hub:timm/resnet50"
    assert "init: hub:timm/resnet50 (torchvision's" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(resnet_file, tmp_path, capsys):
    path, _ = resnet_file
    options: Any = dict(model="fcn_resnet50", source=str(path), out=tmp_path / "out", dry_run=True)
    with pytest.raises(UserError, match=r"7 missing: .*2 unexpected: fc\.bias"):
        import_weights.run(**options)
    assert "missing" in capsys.readouterr().out  # the table, all the same
    import_weights.run(**options, new_head=True)
    assert not (tmp_path / "out").exists()
    import_weights.run(
        model="resnet50", source=str(path), dry_run=True, num_classes=9, new_head=True
    )
    assert "(5, 128) does not become (128, 9)" in capsys.readouterr().out
    with pytest.raises(UserError, match="--out"):
        import_weights.run(model="resnet50", source=str(path))


def test_nothing_is_overwritten_or_taken_for_what_it_is_not(resnet_file, tmp_path):
    path, _ = resnet_file
    options: Any = dict(model="resnet50", source=str(path), out=tmp_path / "out")
    for wrong, match in (
        (dict(ignore=("bn1.*", "nothing.*")), r"--ignore=nothing\.\*: .* has no tensor"),
        (dict(model="vgg16", num_classes=5), "vgg16 has no classes"),
    ):
        with pytest.raises(UserError, match=match):
            import_weights.run(**options | wrong)
    own = tmp_path / "own/weights.npz"
    own.parent.mkdir()
    path.rename(own)
    with pytest.raises(UserError, match="holds weights already"):
        import_weights.run(model="resnet50", source=str(own), out=own.parent)
    tensors = npz(own)
    tensors["conv1.weight"][0, 0, 0, 0] = np.nan
    np.savez(own, **tensors)
    with pytest.raises(UserError, match=r"own/weights\.npz: conv1\.weight holds NaN"):
        import_weights.run(model="resnet50", source=str(own), dry_run=True)


@pytest.mark.parametrize(
    "wrappers",
    [
        "model.",
        "net.",
        "model._orig_mod.",
        "_orig_mod.model.",
        "model.module.",
        "module._orig_mod.model.",
        "model._orig_mod.module.",
        "state_dict.model.net.module.",
        "_forward_module._fsdp_wrapped_module.lightning_module.",
    ],
)
def test_wrappers_in_front_of_all_names_are_taken_off(wrappers, resnet_file, tmp_path, capsys):
    path, variables = resnet_file
    np.savez(tmp_path / "x.npz", **{f"{wrappers}{name}": x for name, x in npz(path).items()})
    import_weights.run(model="resnet50", source=f"file:{tmp_path / 'x.npz'}", dry_run=True)
    assert "x.npz: prefix: " in capsys.readouterr().out
    state = started(thin("resnet50"), f"file:{tmp_path / 'x.npz'}")
    chex.assert_trees_all_equal(state.params, variables["params"])


def test_wrappers_of_a_part_are_taken_off(resnet_file, tmp_path):
    path, variables = resnet_file
    tensors = npz(path)
    for wrapper in ("module", "_orig_mod", "module._checkpoint_wrapped_module"):
        inside = {n.replace("layer1.", f"layer1.{wrapper}."): x for n, x in tensors.items()}
        np.savez(tmp_path / "x.npz", **inside)
        state = started(thin("resnet50"), f"file:{tmp_path / 'x.npz'}")
        chex.assert_trees_all_equal(state.params, variables["params"])


def test_what_lies_beside_a_wrapped_network_is_told(resnet_file, tmp_path):
    tensors = npz(resnet_file[0])
    wrapped = {f"model.module.{name}": x for name, x in tensors.items()}
    np.savez(tmp_path / "x.npz", n_averaged=np.ones(()), **wrapped)
    run = functools.partial(
        import_weights.run, model="resnet50", source=str(tmp_path / "x.npz"), dry_run=True
    )
    with pytest.raises(UserError, match="1 unexpected: n_averaged"):
        run()
    run(ignore=("n_averaged",))
    # Without a wrapper a name would be that of another tensor: nothing is overwritten.
    np.savez(tmp_path / "x.npz", **tensors, **{"model.fc.bias": tensors["fc.bias"]})
    with pytest.raises(UserError, match=r"1 unexpected: model\.fc\.bias"):
        run()


@pytest.fixture
def configurations(monkeypatch):
    """Returns what the main function of a script would get from a command line."""
    monkeypatch.setattr(cli, "set_up_jax", lambda: None)
    monkeypatch.setattr(logging.getLogger("absl"), "setLevel", lambda level: None)
    run, found = cli.run, []
    monkeypatch.setattr(cli, "run", lambda main, *rest, **more: run(found.append, *rest, **more))

    def parse(script, *flags):
        monkeypatch.setattr(sys, "argv", ["script", "smoke", *flags])
        runpy.run_path(script.__file__, run_name="__main__")
        return found.pop()

    return parse


def test_images_come_as_the_weights_expect_them(resnet_file, tmp_path, configurations, capsys):
    path, variables = resnet_file
    folder, workdir = tmp_path / "w", tmp_path / "run"
    start.save(folder, variables, {"normalisation": "caffe"})
    init = f"--init=run:{folder}"
    config = configurations(fcn, init, f"--workdir={workdir}")
    assert config.normalisation == "caffe"
    assert "init: --normalisation=caffe, as these weights expect" in capsys.readouterr().out
    assert configurations(fcn, init, "--normalisation=none").normalisation == "none"
    assert configurations(fcn, init, "--normalisation", "none").normalisation == "none"
    assert configurations(fcn).normalisation == "torchvision"
    file = f"--init=file:{path}"
    assert configurations(unet, file).normalisation == "torchvision"
    assert configurations(segnet, init).normalisation == "caffe"
    # SegNet-Basic brings pixels of 0 to 255 to a common contrast by itself.
    raw = ("--input-lrn=on", "--normalisation=none")
    assert configurations(segnet, init, *raw).normalisation == "none"
    # A run goes on as it began, when the weights have gone too.
    runs.prepare(config, dataset.load("shapes", size=(8, 8), num_train=2, num_val=2, num_test=1))
    (workdir / "checkpoints/1").mkdir(parents=True)
    shutil.rmtree(folder)
    again = configurations(fcn, init, f"--workdir={workdir}")
    assert again.to_json() == config.to_json()


@pytest.mark.parametrize(
    ("script", "flags", "first"),
    [
        (fcn, ["--train=staged", "--stride=16"], "fcn32s"),
        (dilated, ["--first.train-mode=front", "--train-mode=context"], "front"),
        (deconvnet, ["--stages=stage2_only"], "."),
    ],
)
def test_stages_go_on_as_the_first_began(script, flags, first, tmp_path, configurations):
    start.save(tmp_path / "w", {"a": np.zeros(1)}, {"normalisation": "none"})
    flags = [f"--init=run:{tmp_path / 'w'}", f"--workdir={tmp_path}", *flags]
    config = configurations(script, *flags, "--normalisation=caffe")
    data = dataset.load("shapes", size=(8, 8), num_train=2, num_val=2, num_test=1)
    runs.prepare(dataclasses.replace(config, workdir=str(tmp_path / first)), data)
    (tmp_path / first / "checkpoints/1").mkdir(parents=True)
    shutil.rmtree(tmp_path / "w")
    assert configurations(script, *flags).normalisation == "caffe"


@pytest.mark.parametrize(
    "record",
    ["", "[]", '{"normalisation": ["x"]}', '{"normalisation": "new"}', "{}"],
)
@pytest.mark.parametrize("name", ["weights.json", "config.json"])
def test_a_damaged_record_is_told(name, record, tmp_path):
    start.save(tmp_path, {"a": np.zeros(1)}, {})
    if name == "config.json":
        (tmp_path / "weights.json").unlink()
        if record.startswith("{"):
            record = f'{{"config": {record}, "script": "", "classes": {{}}, "fingerprint": ""}}'
    (tmp_path / name).write_text(record)
    with pytest.raises(UserError, match=name):
        start.normalisation_of(f"run:{tmp_path}")


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="needs a disk that is full")
@pytest.mark.parametrize("full", ["weights.npz", "weights.json"])
def test_of_weights_that_do_not_fit_on_the_disk_nothing_is_left(full, tmp_path):
    (tmp_path / f"{full}.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        start.save(tmp_path, {"a": np.zeros(1)}, {})
    assert not list(tmp_path.iterdir())


def test_a_start_that_fails_leaves_no_folder(tmp_path):
    config = dataclasses.replace(
        fcn.PRESETS["smoke"], init="run:nowhere", workdir=str(tmp_path / "run")
    )
    with pytest.raises(UserError, match="nowhere"):
        training.run(fcn.build, config)
    assert not (tmp_path / "run").exists()


def test_a_file_of_other_names_is_refused(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.ones(3))
    with pytest.raises(UserError, match=r"x\.npz has tensors of unknown names \(a, "):
        started(thin("resnet50"), f"file:{tmp_path / 'x.npz'}")
