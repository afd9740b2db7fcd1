"""Keras files: the forms of its versions, what a file may not make us do, and two real networks."""

import importlib
import itertools
import json
import sys
import tracemalloc

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from dense_jax.errors import UserError
from dense_jax.weights import files
from tests.weight_files import refused

h5py = pytest.importorskip("h5py")
keras_file = importlib.import_module("dense_jax.weights.keras_file")

KERNEL = np.arange(2 * 2 * 3 * 4, dtype=np.float32).reshape(2, 2, 3, 4) / 8 - 1
BIAS = np.array([0.5, -0.25, 4, 0], np.float32)


def write(path, layers, top=None, encode=np.bytes_):
    """Writes layers, a name to weights by name, in the form of Keras 1 and 2."""
    with h5py.File(path, "a") as file:
        group = file.create_group(top) if top else file
        group.attrs["layer_names"] = [encode(name) for name in layers]
        for name, weights in layers.items():
            layer = group.create_group(name)
            layer.attrs["weight_names"] = [encode(weight) for weight in weights]
            for weight, values in weights.items():
                layer[weight] = values
    return path


def conv(name, kernel="/kernel:0", bias="/bias:0"):
    return {f"{name}{kernel}": KERNEL, f"{name}{bias}": BIAS}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.h5"


@pytest.mark.parametrize("encode", [np.bytes_, str])
def test_weights_alone(path, encode):
    # The order is the file's, not that of the names.
    layers = {"pool": {}, "conv_2": conv("conv_2"), "conv_1": conv("conv_1")}
    write(path, layers, encode=encode)
    tensors, info = keras_file.read_tensors(path)
    assert list(tensors) == ["conv_2.kernel", "conv_2.bias", "conv_1.kernel", "conv_1.bias"]
    assert info == {"layers": json.dumps({"pool": "", "conv_2": "", "conv_1": ""})}
    np.testing.assert_array_equal(tensors["conv_1.kernel"], KERNEL)
    np.testing.assert_array_equal(tensors["conv_1.bias"], BIAS)
    with pytest.raises(KeyError):
        tensors["conv_3.kernel"]
    file = files.read(path)
    assert (file.format, list(file.tensors), file.info) == ("keras", list(tensors), info)


@pytest.mark.parametrize("is_sequential", [False, True])
def test_whole_models(path, is_sequential):
    classes = {"conv": "Conv2D", "code": "Lambda", "up": "Conv2DTranspose"}
    layers = [{"class_name": kind, "config": {"name": name}} for name, kind in classes.items()]
    config = {"class_name": "Model", "config": {"name": "m", "layers": layers}}
    if is_sequential:  # of the versions before 2.2.3
        config = {"class_name": "Sequential", "config": layers}
    weights = {"conv": conv("conv"), "code": {}, "up": conv("up")}
    with h5py.File(write(path, weights, "model_weights"), "a") as file:
        file.attrs["model_config"] = json.dumps(config).encode()
        file.attrs["keras_version"] = "the root's is not that of the weights"
        file["model_weights"].attrs["keras_version"] = b"2.3.1"
        file["model_weights"].attrs["backend"] = "tensorflow"
        file["optimizer_weights/Adam/iteration:0"] = 3
    tensors, info = keras_file.read_tensors(path)
    assert list(tensors) == ["conv.kernel", "conv.bias", "up.kernel", "up.bias"]
    versions = {"keras_version": "2.3.1", "backend": "tensorflow"}
    assert info == {"layers": json.dumps(classes)} | versions


@pytest.mark.parametrize("config", ["{}", "[]", "3", '{"config": 1}', '{"config": [{}]}'])
def test_a_config_of_an_unknown_form_does_not_matter(path, config):
    write(path, {"conv": conv("conv")})
    with h5py.File(path, "a") as file:
        file.attrs["model_config"] = config
    tensors, info = keras_file.read_tensors(path)
    assert (len(tensors), info) == (2, {"layers": '{"conv": ""}'})


def test_names(path):
    norm = {f"bn_1_{kind}": BIAS for kind in ("gamma", "beta", "running_mean", "running_std")}
    layers = {
        "conv_1": conv("conv_1", "_W", "_b"),  # Keras 1
        "bn_1": norm,
        "dense": {"dense/kernel": KERNEL, "bias": BIAS},
        "vgg16": conv("block1_conv1") | conv("block1_conv2"),  # a model in a model
        "conv_2": conv("conv_2_3"),  # a scope that was taken when the layer was made
    }
    assert list(keras_file.read_tensors(write(path, layers))[0]) == [
        *("conv_1.W", "conv_1.b", "bn_1.gamma", "bn_1.beta", "bn_1.running_mean"),
        *("bn_1.running_std", "dense.kernel", "dense.bias"),
        *("vgg16.block1_conv1.kernel", "vgg16.block1_conv1.bias"),
        *("vgg16.block1_conv2.kernel", "vgg16.block1_conv2.bias"),
        *("conv_2.conv_2_3.kernel", "conv_2.conv_2_3.bias"),
    ]


def test_numbered_layers(path):
    with h5py.File(path, "w") as file:
        file.attrs["nb_layers"] = 12
        for i in range(12):
            file.create_group(f"layer_{i}").attrs["nb_params"] = 2 * (i % 2)
        for i in range(1, 12, 2):
            file[f"layer_{i}/param_0"], file[f"layer_{i}/param_1"] = KERNEL, BIAS + i
    tensors, info = keras_file.read_tensors(path)
    names = itertools.product(range(1, 12, 2), range(2))
    assert list(tensors) == [f"layer_{i}.param_{j}" for i, j in names]
    np.testing.assert_array_equal(tensors["layer_11.param_1"], BIAS + 11)
    assert list(json.loads(info["layers"])) == [f"layer_{i}" for i in range(12)]


def test_lists_spread_over_attributes(path):
    write(path, {name: conv(name) for name in "abc"})
    with h5py.File(path, "a") as file:
        del file.attrs["layer_names"]
        file.attrs["layer_names0"], file.attrs["layer_names1"] = [b"a", b"b"], [b"c"]
        del file["c"].attrs["weight_names"]
        file["c"].attrs["weight_names0"] = [b"c/kernel:0"]
        file["c"].attrs["weight_names1"] = [b"c/bias:0"]
    names = [f"{layer}.{kind}" for layer in "abc" for kind in ("kernel", "bias")]
    assert list(keras_file.read_tensors(path)[0]) == names


def test_kinds_of_numbers(path):
    kinds = [">f4", "f2", "f8", "i8", "u1", "?"]
    write(path, {"a": {f"a/{i}": BIAS.astype(kind) for i, kind in enumerate(kinds)}})
    for kind, values in zip(kinds, dict(keras_file.read_tensors(path)[0]).values(), strict=True):
        assert values.dtype == np.dtype(kind).newbyteorder("=")
        assert values.dtype.isnative
        np.testing.assert_array_equal(values, BIAS.astype(kind))


def test_compressed_values(path):
    write(path, {"a": {}})
    with h5py.File(path, "a") as file:
        for name in ("gzip", "lzf"):
            options = {"shuffle": True, "fletcher32": True, "compression": name}
            file["a"].create_dataset(name, data=np.arange(100.0), chunks=(7,), **options)
        file["a"].attrs["weight_names"] = [b"gzip", b"lzf"]
    for values in dict(keras_file.read_tensors(path)[0]).values():
        np.testing.assert_array_equal(values, np.arange(100))


def test_zeros_are_no_bomb(path):
    write(path, {"a": {}})
    with h5py.File(path, "a") as file:  # a bias that has not been trained
        file["a"].create_dataset("bias", data=np.zeros(4096), chunks=(4096,), compression="gzip")
        file["a"].create_dataset("none", data=np.zeros((0, 3)))
        file["a"].attrs["weight_names"] = [b"bias", b"none"]
        assert file["a/bias"].id.get_storage_size() < 4096 * 8 / 64
    tensors, _ = keras_file.read_tensors(path)
    np.testing.assert_array_equal(tensors["a.bias"], np.zeros(4096))
    assert tensors["a.none"].shape == (0, 3)


def test_only_what_is_asked_for_is_read(path):
    write(path, {"a": {"small": BIAS}})
    with h5py.File(path, "a") as file:
        creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        space = h5py.h5s.create_simple((75 * 2**20,))  # 300 MB that no one has written
        h5py.h5d.create(file["a"].id, b"large", h5py.h5t.IEEE_F32LE, space, creation)
        file["a"].attrs["weight_names"] = [b"small", b"large"]
    assert path.stat().st_size > 300 * 2**20
    tracemalloc.start()
    tensors, _ = keras_file.read_tensors(path)
    np.testing.assert_array_equal(tensors["a.small"], BIAS)
    assert tensors["a.large"].shape == (75 * 2**20,)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    assert not tensors["a.large"].flags.owndata
    assert not tensors["a.large"].flags.writeable


def test_values_that_are_not_simply_mapped(path):
    """Behind other bytes, within the header, of a kind that NumPy lacks."""
    with h5py.File(path, "w", userblock_size=512):
        pass
    write(path, {"a": {"plain": BIAS}})
    with h5py.File(path, "a") as file:
        creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        creation.set_layout(h5py.h5d.COMPACT)
        kind = h5py.h5t.IEEE_F32LE.copy()
        kind.set_fields(31, 22, 9, 0, 22)  # an exponent of 9 bits; the bias stays 127
        for name, place, numbers in (
            (b"compact", creation, h5py.h5t.IEEE_F32LE),
            (b"odd", None, kind),
        ):
            space = h5py.h5s.create_simple((4,))
            h5py.h5d.create(file["a"].id, name, numbers, space, place).write(space, space, BIAS)
        file["a"].attrs["weight_names"] = [b"plain", b"compact", b"odd"]
    tensors, _ = keras_file.read_tensors(path)
    for name in ("plain", "compact", "odd"):
        np.testing.assert_array_equal(tensors[f"a.{name}"], BIAS)


def _linked(path, link):
    with h5py.File(write(path, {"a": {}}), "a") as file:
        file["a"].attrs["weight_names"] = [b"w"]
        link(file["a"])
    return refused(path)


def test_nothing_outside_is_read(path, tmp_path):
    secret = tmp_path / "secret.h5"
    with h5py.File(write(secret, {"a": {"w": BIAS}}), "a") as file:
        file["model_weights"] = file["a"]
    raw = tmp_path / "raw"
    raw.write_bytes(bytes(16))

    def link_group(group):
        group["w"] = h5py.ExternalLink(secret, "/a/w")

    def store_outside(group):
        group.create_dataset("w", (4,), "f4", external=[(str(raw), 0, 16)])

    def assemble_outside(group):
        layout = h5py.VirtualLayout((4,), "f4")
        layout[:] = h5py.VirtualSource(secret, "/a/w", (4,))
        group.create_virtual_dataset("w", layout)

    def detour(group):
        group["outside"] = h5py.ExternalLink(secret, "/")
        group["w"] = h5py.SoftLink("/a/outside/a/w")

    for number, link in enumerate((link_group, store_outside, assemble_outside, detour)):
        assert "not followed" in _linked(path.with_stem(f"x{number}"), link)
    with h5py.File(write(path, {"a": {"w": BIAS}}), "a") as file:
        file["model_weights"] = h5py.ExternalLink(secret, "/")
    assert "model_weights is a link, and" in refused(path)


def _declared(shape, **options):
    return lambda group: group.create_dataset("w", shape, "f4", **options)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (_declared((2**20, 2560)), "needs 10737418240 bytes, and the file holds 0"),
        (_declared((2**20, 2560), chunks=(64, 64)), "bytes, and the file holds 0"),
        (_declared((4,), compression="gzip", chunks=(2**20,), maxshape=(None,)), "4194304 bytes"),
        (lambda group: group.create_dataset("w", data=h5py.Empty("f4")), "no numbers"),
        (lambda group: group.create_dataset("w", data=["some", "text"]), "no numbers"),
        (lambda group: group.create_dataset("w", (2,), "i4,f4"), "no numbers"),
        (lambda group: group.create_group("w"), "no numbers"),
        (lambda group: None, "w is missing"),
    ],
)
def test_values_that_are_not_there(path, make, expected):
    assert expected in _linked(path, make)


def test_a_little_that_unpacks_to_much(path):
    def make(group):
        data = group.create_dataset("w", (2**23,), "f4", chunks=(2**23,), compression="gzip")
        data[:] = 0

    assert "33554432 bytes" in _linked(path, make)
    assert path.stat().st_size < 2**16


def test_unknown_filters_are_not_looked_for(path):
    def make(group):
        creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        creation.set_chunk((4,))
        creation.set_filter(h5py.h5z.FILTER_SCALEOFFSET, 0, (2, 0))
        space = h5py.h5s.create_simple((4,))
        h5py.h5d.create(group.id, b"w", h5py.h5t.STD_I32LE, space, creation)

    assert "by an unknown filter" in _linked(path, make)


def test_wrong_attributes(path):
    write(path, {"a": {"a/w": BIAS, "w": BIAS}})
    assert "two arrays are named 'a.w'" in refused(path)
    with h5py.File(path, "a") as file:
        file["a"].attrs["weight_names"] = [1, 2]
    assert "weight_names is not text" in refused(path)
    with h5py.File(path, "a") as file:
        lists = np.empty(1, object)
        lists[0] = np.arange(3, dtype=np.uint8)
        del file["a"].attrs["weight_names"]
        file["a"].attrs.create("weight_names", lists, dtype=h5py.vlen_dtype(np.uint8))
    assert "weight_names holds lists" in refused(path)
    with h5py.File(path, "a") as file:
        file.attrs["layer_names"] = ["a", "b\nc"]
        file["a"].attrs["weight_names"] = ["w"]
    assert "b c is missing" in refused(path)
    with h5py.File(path, "a") as file:
        file.attrs["nb_layers"] = 2**60
    assert "layer_0 is missing" in refused(path)
    with h5py.File(path, "w") as file:
        file["layers/conv2d/vars/0"] = KERNEL
    assert "model.save('NAME.h5')" in refused(path)


def test_a_heap_that_does_not_end(path):
    with h5py.File(write(path, {"a": {"w": BIAS}}), "a") as file:
        file.attrs["keras_version"] = "2.3.1"  # 5 bytes in a heap of 4096, the rest unused
    assert keras_file.read_tensors(path)[1]["keras_version"] == "2.3.1"
    content = path.read_bytes()
    unused = content.index(b"GCOL") + 16 + 16 + 8
    header = bytes(8) + (4096 - (16 + 16 + 8)).to_bytes(8, "little")
    assert content[unused:].startswith(header)
    path.write_bytes(content[:unused] + bytes(16) + content[unused + 16 :])
    assert "the heap at byte" in refused(path)


def test_without_h5py(path, monkeypatch):
    write(path, {"a": {"w": BIAS}})
    monkeypatch.setitem(sys.modules, "h5py", None)
    monkeypatch.delitem(sys.modules, "dense_jax.weights.keras_file")
    with pytest.raises(UserError, match="pip install h5py"):
        files.read(path)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = write(tmp_path_factory.mktemp("small") / "x.h5", {"a": conv("a"), "b": {}})
    return path, path.read_bytes()


@hypothesis.given(st.integers(0, 10**6))
def test_cuts_are_noticed(small, cut):
    path, content = small
    path.write_bytes(content[: cut % len(content)])
    refused(path)


@hypothesis.settings(max_examples=150)
@hypothesis.given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6))
def test_changed_bytes_do_no_harm(small, changes):
    path, content = small
    content = bytearray(content)
    for at, byte in changes:
        content[at % len(content)] = byte
    path.write_bytes(content)
    try:
        dict(keras_file.read_tensors(path)[0])
    except UserError as error:
        text = str(error)
    else:
        text = ""
    assert "\n" not in text


def test_a_real_file_of_keras_1(weights_root):
    file = files.read(weights_root / "retina_unet_drive/test_best_weights.h5")
    names = [f"convolution2d_{i}.{kind}" for i in range(1, 12) for kind in "Wb"]
    assert (file.format, list(file.tensors)) == ("keras", names)
    assert sum(array.size for array in file.tensors.values()) == 471_010
    shapes = {i: file.tensors[f"convolution2d_{i}.W"].shape for i in (1, 7, 9, 11)}
    # The up-sampled map comes before the skip: 128 + 64 and 64 + 32 channels.
    assert shapes == {1: (32, 1, 3, 3), 7: (64, 192, 3, 3), 9: (32, 96, 3, 3), 11: (2, 32, 1, 1)}
    assert list(file.info) == ["layers"]
    assert len(json.loads(file.info["layers"])) == 26


def test_a_real_model_of_keras_2(weights_root):
    path = weights_root / "unet_pancreatic_keras2/unet_pancreatic_cell_segmentation.h5"
    file = files.read(path)
    assert sum(array.size for array in file.tensors.values()) == 481_745
    assert file.tensors["conv2d_16.kernel"].shape == (3, 3, 1, 16)
    assert file.tensors["conv2d_transpose_4.kernel"].shape == (2, 2, 64, 128)  # out before in
    assert (file.info["keras_version"], file.info["backend"]) == ("2.3.1", "tensorflow")
    classes = list(json.loads(file.info["layers"]).values())
    assert [classes.count(kind) for kind in ("Conv2D", "Conv2DTranspose")] == [15, 3]
    assert len(file.tensors) == 2 * 18
