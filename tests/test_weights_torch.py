"""Files of PyTorch: against torch itself or written by hand, and what their pickles may not do."""

import collections
import io
import os
import pathlib
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

from dense_jax.weights import files, torch_file
from tests.weight_files import (
    KERNEL,
    STORAGES,
    WHOLE,
    integer,
    items,
    name,
    old_form,
    refused,
    row,
    same,
    tensor,
    text,
    write,
    zip_form,
)

both_forms = pytest.mark.parametrize("form", [zip_form, old_form])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.bin"  # names tell nothing


def test_of_two_sets_of_weights_the_first_kind_is_taken(path):
    checkpoint = items(model=items(a=WHOLE), state_dict=items(**{"module._orig_mod.b": WHOLE}))
    file = files.read(write(path, zip_form(checkpoint)))
    assert list(file.tensors) == ["b"]
    assert file.info == {
        "container": "state_dict",
        "left out": "model (1)",
        "prefix": "module._orig_mod.",
    }


def test_containers_lie_in_containers(path):
    inner = items(state_dict=items(net=items(a=WHOLE)), optimizer=items(b=WHOLE))
    file = files.read(write(path, zip_form(items(epoch=integer(2), model=inner))))
    assert list(file.tensors) == ["a"]
    assert file.info == {
        "epoch": "2",
        "container": "model.state_dict.net",
        "left out": "optimizer (1)",
    }


@both_forms
def test_torch_views(path, form):
    content = items(
        whole=WHOLE,
        tied=WHOLE,
        turned=tensor("7", 4, (2, 4), (1, 2)),
        scalar=tensor("8", 1, (), (), "Long"),
        empty=tensor("8", 0, (0, 5), (5, 1), "Long"),
    )
    file = files.read(write(path, form(content)))
    assert (file.format, file.info) == ("torch", {})
    assert list(file.tensors) == ["whole", "tied", "turned", "scalar", "empty"]
    same(file.tensors["whole"], KERNEL)
    same(file.tensors["turned"], KERNEL.ravel()[4:12].reshape(4, 2).T[:, :4])
    same(file.tensors["scalar"], np.array(-6))
    same(file.tensors["empty"], np.zeros((0, 5), int))
    assert np.shares_memory(file.tensors["whole"], file.tensors["tied"])
    assert np.shares_memory(file.tensors["whole"], file.tensors["turned"])


def test_torch_view_of_a_storage(path):
    view = row(text("70"), integer(2), integer(6))
    content = items(a=tensor("7", 1, (3,), (1,), view=(view,)), b=WHOLE)
    tensors = files.read(write(path, old_form(content))).tensors
    same(tensors["a"], KERNEL.ravel()[3:6])


@both_forms
def test_torch_checkpoint(path, form):
    norm = items(weight=tensor("8", 0, (3,), (1,), "Long"))
    state = row(WHOLE, b"N", name("collections", "OrderedDict") + b")R", b"\x88", b"\x89")
    old = name("torch.nn.parameter", "Parameter") + b")\x81" + state + b"b"  # as of 2017
    weights = name("collections", "OrderedDict") + b")R(" + text("module.conv") + old
    weights += text("module.norm.weight") + norm.removeprefix(b"}(" + text("weight"))[:-1] + b"u"
    weights += items(_metadata=b"}") + b"b"
    content = items(
        epoch=integer(7),
        state_dict=weights,
        optimizer=row(WHOLE, WHOLE),
        best=tensor("7", 0, (), ()),
    )
    file = files.read(write(path, form(content)))
    assert list(file.tensors) == ["conv", "norm.weight"]
    same(file.tensors["conv"], KERNEL)
    same(file.tensors["norm.weight"], STORAGES["8"])
    assert file.info == {
        "epoch": "7",
        "container": "state_dict",
        "left out": "optimizer (2), best (1)",
        "prefix": "module.",
    }


@both_forms
def test_what_lies_beside_the_weights_does_not_matter(path, form):
    pair = row(integer(1), integer(2))
    content = items(
        losses=b"](" + b"K\x01" * 300_000 + b"e",
        classes=b"}(" + b"N" + pair + integer(7) + b"N" + pair + pair + b"u",
        seen=name("__builtin__", "set") + row(b"](" + integer(1) + b"e") + b"R",
        times=name("collections", "defaultdict") + row(name("__builtin__", "list")) + b"R",
        device=name("torch", "device") + row(text("cuda"), integer(0)) + b"R",
        model=items(a=WHOLE),
    )
    file = files.read(write(path, form(content)))
    assert list(file.tensors) == ["a"]
    same(file.tensors["a"], KERNEL)
    assert file.info == {"container": "model", "device": "cuda"}


@pytest.mark.parametrize("is_zip", [True, False])
def test_torch_itself(path, is_zip):
    torch = pytest.importorskip("torch")
    kinds = [*torch_file.FLOATS, *torch_file.INTEGERS, "complex64"]
    whole = torch.arange(24.0).reshape(2, 3, 4)
    model = {kind: torch.arange(5).to(getattr(torch, kind)) for kind in kinds}
    model |= {"turned": whole.permute(2, 0, 1)[1:, :, ::2], "parameter": torch.nn.Parameter(whole)}
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    saved = {
        "model": {**model, **net.state_dict()},
        "array": np.asfortranarray(KERNEL),
        "score": np.float64(0.5),
        "rate": 0.1,
        "size": torch.Size((2, 3)),
        "dtype": torch.float16,
        "steps": [None, True, {3: "x"}],
        "losses": [0.5] * 300_000,
        "classes": {None: 0, 0.5: 1, (1, 2): 3},
        "seen": {1, 2},
        "times": collections.defaultdict(list, epoch=[1]),
        "device": torch.device("cuda", 0),
    }
    torch.save(saved, path, _use_new_zipfile_serialization=is_zip)
    file = files.read(path)
    assert file.info == {
        "score": "0.5",
        "rate": "0.1",
        "device": "cuda",
        "container": "model",
        "left out": "array (1)",
    }
    assert file.tensors.keys() == saved["model"].keys()
    for key, value in saved["model"].items():
        value = value.detach()
        if key == "bfloat16":
            assert file.tensors[key].dtype == ml_dtypes.bfloat16
            value, actual = value.float(), file.tensors[key].astype(np.float32)
        else:
            actual = file.tensors[key]
        same(actual, value.numpy())
    torch.save(net.state_dict(), path, _use_new_zipfile_serialization=is_zip)
    assert list(files.read(path).tensors) == list(net.state_dict())
    torch.save(saved["array"], path, _use_new_zipfile_serialization=is_zip)
    same(files.read(path).tensors[""], KERNEL)
    torch.save(net, path, _use_new_zipfile_serialization=is_zip)
    assert "refused to load torch.nn.modules.container.Sequential" in refused(path)


def test_a_real_file_of_the_old_form():
    data = os.environ.get("DENSE_JAX_DATA")
    root = os.environ.get("DENSE_JAX_WEIGHTS") or (data and f"{data}/../weights")
    path = pathlib.Path(root or "", "resnet20_cifar10/resnet20-12fca82f.th")
    if not path.exists():
        pytest.skip("set DENSE_JAX_WEIGHTS to a folder with resnet20_cifar10/ to run this")
    file = files.read(path)
    assert dict(file.info).pop("best_prec1")[:5] == "91.78"
    assert (file.info["container"], file.info["prefix"]) == ("state_dict", "module.")
    assert sum("running" not in key for key in file.tensors) == 59
    assert sum(v.size for key, v in file.tensors.items() if "running" not in key) == 269_722
    assert all(v.min() > 0 for key, v in file.tensors.items() if "running_var" in key)


class Runs:
    """An object whose pickle runs a command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@both_forms
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_commands_are_refused(path, tmp_path, form, protocol):
    trace = tmp_path / "trace"
    pickled = pickle.dumps(Runs(f"touch {trace}"), protocol)
    assert f"refused to load {os.system.__module__}.system" in refused(
        write(path, form(pickled.removesuffix(b".")))
    )
    pickle.loads(pickled)  # as it would have been
    assert trace.exists()


@both_forms
@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"(S'true'\nios\nsystem\n", "os.system"),
        (name("builtins", "eval") + row(text("1")) + b"R", "builtins.eval"),
        (text("os") + text("system") + b"\x93", "os.system"),
        (items(a=WHOLE, b=name("torch.hub", "load")), "torch.hub.load"),
        (name("torch._utils", "_rebuild_tensor.__globals__"), "torch._utils._rebuild_tensor.__gl"),
    ],
)
def test_names_are_refused(path, form, content, what):
    assert f"refused to load {what}" in refused(write(path, form(content)))


def deep(pairs):
    """Lists of two references to the list below: 2^pairs entries from a few bytes."""
    return b"]" + b"".join(b"q%c](h%ch%ce" % (i, i, i) for i in range(pairs))


@both_forms
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (tensor("7", 1, (24,), (1,)), "beyond its storage"),
        (tensor("7", -1, (2,), (1,)), "beyond its storage"),
        (tensor("7", 0, (2,), (-1,)), "whole number"),
        (tensor("7", 0, (2**30, 2**30), (0, 0)), "bytes"),
        (tensor("7", 0, (2,), (1, 1)), "damaged"),
        (tensor("7", 0, (2,), (1,), "Quantized"), "refused to load torch.QuantizedStorage"),
        (items(a=WHOLE, b=items(a=WHOLE, c=WHOLE)) + text("b.a") + WHOLE + b"s", "two tensors"),
        (b"]q\x00h\x00a", "without end"),
        (deep(30), "too many tensors"),
        (b"](" + text("x" * 600) + b"e" + row(text("y")), "no arrays"),
        (b"}" + row(row()) + integer(1) + b"s", "a key"),
        (b"}" + row(*[integer(1)] * 33) + integer(1) + b"s", "a key"),
        (integer(1) + integer(2) + b"R", "called"),
        (name("torch", "float32") + b")R", "called"),
        (name("torch", "Size") + b"}b", "a state"),
        (name("numpy", "dtype") + row(text("O8")) + b"R", "no numbers"),
        (name("torch.nn.parameter", "Parameter") + b")R", "no values"),
        (name("numpy.core.multiarray", "_reconstruct") + b")R", "no values"),
        (b"t", "damaged"),
        (b"\x85", "operands"),
        (b"h\x05", "damaged"),
        (b"r\xff\xff\xff\x7f", "damaged"),
        (b"]N]u", "damaged"),
        (b"\x8e" + (2**40).to_bytes(8, "little"), "damaged"),
        (b"\x96" + (2**40).to_bytes(8, "little"), "damaged"),
        (b"}", "no arrays"),
    ],
)
def test_damaged_torch(path, form, content, reason):
    assert reason in refused(write(path, form(content)))


@both_forms
def test_a_view_that_is_not_its_bytes(path, form):
    marked = WHOLE[:-2] + items(conj=b"\x88") + b"tR"
    assert refused(write(path, form(marked))).endswith("save its resolve_conj().resolve_neg()")


def test_damaged_torch_forms(path):
    assert "missing" in refused(write(path, zip_form(WHOLE, {})))
    assert "damaged" in refused(write(path, old_form(WHOLE, {})))
    assert "big-endian" in refused(write(path, zip_form(WHOLE, byteorder="big")))
    assert "big-endian" in refused(write(path, old_form(WHOLE, little_endian=False)))
    assert "cut off" in refused(write(path, old_form(WHOLE)[:-30]))
    assert "known" in refused(write(path, old_form(WHOLE).replace(b"M\xe9\x03", b"M\xea\x03")))
    assert "no tensor" in refused(
        write(path, old_form(WHOLE + text("8") + b"0", dict(reversed(STORAGES.items()))))
    )
    same(files.read(write(path, zip_form(WHOLE, byteorder="little"))).tensors[""], KERNEL)
    packed = io.BytesIO(zip_form(WHOLE))
    with zipfile.ZipFile(packed) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.namelist():
            new.writestr(member, old.read(member))
    assert "was compressed later" in refused(path)
