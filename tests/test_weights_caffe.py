"""Caffe's files: each form of the format from a writer of a few lines, and each kind of damage."""

import contextlib
import itertools
import json
import os
import struct
import tracemalloc

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from dense_jax.errors import UserError
from dense_jax.weights import caffe_file, files

KERNEL = np.arange(2 * 3 * 2 * 2, dtype=np.float32).reshape(2, 3, 2, 2) / 8 - 1
BIAS = np.array([0.5, -0.25], np.float32)


def varint(value):
    value %= 2**64  # negative numbers take ten bytes
    groups = bytearray()
    while True:
        value, low = divmod(value, 128)
        groups.append(low | (128 if value else 0))
        if not value:
            return bytes(groups)


def field(number, value):
    """A field of the format: an int, a float, text, or the bytes of a message."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    value = value.encode() if isinstance(value, str) else bytes(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def packed(values):
    return field(5, np.asarray(values, "<f4").tobytes())


def unpacked(values):
    return b"".join(field(5, float(value)) for value in np.ravel(values))


def doubles(values):
    return field(8, np.asarray(values, "<f8").tobytes())


def unpacked_doubles(values):
    return b"".join(varint(8 << 3 | 1) + struct.pack("<d", value) for value in np.ravel(values))


def in_two_pieces(values):
    first, second = np.split(np.ravel(values), [1])
    return packed(first) + packed(second)


def shape(*dims):
    return field(7, field(1, b"".join(map(varint, dims))))


def unpacked_shape(*dims):
    return field(7, b"".join(field(1, dim) for dim in dims))


def old_shape(*dims):
    dims = (1,) * (4 - len(dims)) + dims
    return b"".join(field(number, dim) for number, dim in enumerate(dims, 1))


def blob(values, write_shape=shape, write=packed):
    values = np.asarray(values)
    return write_shape(*values.shape) + write(values)


def layer(name, kind, *blobs):
    """A `layer` with some fields that weights do not need, among them one of each wire type."""
    extra = field(3, "bottom") + field(5, 1.0) + varint(9 << 3 | 1) + bytes(8) + field(10, 1)
    body = field(1, name) + field(2, kind) + extra + b"".join(field(7, b) for b in blobs)
    return field(100, body + field(106, field(1, 64)))


def old_layer(name, kind, *blobs):
    """A `layers` message, whose type is a number."""
    body = b"".join(field(6, b) for b in blobs) + field(2, "bottom")
    return field(2, body + field(5, kind) + field(4, name) + field(7, 1.0))


def norm_layers():
    batch_norm = layer("bn", "BatchNorm", blob([1.0, 2.0]), blob([4.0, 8.0]), blob([0.5]))
    return batch_norm + layer("scale", "Scale", blob([3.0, 3.0]), blob([0.0, 1.0]))


def network():
    convolution = layer("conv1_1", "Convolution", blob(KERNEL), blob(BIAS))
    return field(1, "tiny") + convolution + layer("relu1_1", "ReLU") + norm_layers()


def read(tmp_path, content):
    path = tmp_path / "x.caffemodel"
    path.write_bytes(content)
    return caffe_file.read_tensors(path)


def message(tmp_path, content):
    with pytest.raises(UserError) as error:
        read(tmp_path, content)
    assert "x.caffemodel" in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_layers_and_blobs(tmp_path):
    tensors, info = read(tmp_path, network())
    assert list(tensors) == [*("conv1_1.0", "conv1_1.1", "bn.0", "bn.1", "scale.0", "scale.1")]
    np.testing.assert_array_equal(tensors["conv1_1.0"], KERNEL)
    np.testing.assert_array_equal(tensors["conv1_1.1"], BIAS)
    types = {"conv1_1": "Convolution", "relu1_1": "ReLU", "bn": "BatchNorm", "scale": "Scale"}
    assert info == {"net": "tiny", "layers": json.dumps(types)}
    file = files.read(tmp_path / "x.caffemodel")
    assert (file.format, list(file.tensors), file.info) == ("caffe", list(tensors), info)


def test_old_layers(tmp_path):
    content = (
        old_layer("data", 5)
        + old_layer("conv", 4, blob(KERNEL, old_shape), blob(BIAS, old_shape))
        + old_layer("up", 39, blob(KERNEL, old_shape))
        + old_layer("odd", 77)
    )
    tensors, info = read(tmp_path, content)
    assert {name: array.shape for name, array in tensors.items()} == {
        "conv.0": (2, 3, 2, 2),
        "conv.1": (1, 1, 1, 2),
        "up.0": (2, 3, 2, 2),
    }
    np.testing.assert_array_equal(tensors["conv.0"], KERNEL)
    types = {"data": "V1 type 5", "conv": "Convolution", "up": "Deconvolution", "odd": "V1 type 77"}
    assert json.loads(info["layers"]) == types


@pytest.mark.parametrize(
    ("write", "write_shape"),
    [
        *itertools.product((packed, unpacked, in_two_pieces), (shape, unpacked_shape, old_shape)),
        (doubles, shape),
        (unpacked_doubles, shape),
    ],
)
def test_forms_of_a_blob(tmp_path, write, write_shape):
    diff = field(6, np.zeros(24, "<f4").tobytes())
    tensors, _ = read(tmp_path, layer("a", "X", blob(KERNEL, write_shape, write) + diff))
    np.testing.assert_array_equal(tensors["a.0"], KERNEL)
    assert tensors["a.0"].dtype == (np.float64 if "doubles" in write.__name__ else np.float32)


def test_long_runs_of_single_numbers(tmp_path):
    values = np.arange(1000) / 4
    mixed = unpacked(values[:300]) + field(99, 1) + unpacked(values[300:990]) + packed(values[990:])
    tensors, _ = read(tmp_path, layer("a", "X", shape(1000) + mixed))
    np.testing.assert_array_equal(tensors["a.0"], values)


def test_a_tag_may_be_longer_than_it_needs(tmp_path):
    content = layer("a", "X", shape(1) + bytes([5 << 3 | 5 | 128, 0]) + struct.pack("<f", 2.5))
    np.testing.assert_array_equal(read(tmp_path, content)[0]["a.0"], [2.5])


def test_one_number_has_no_axes(tmp_path):
    tensors, _ = read(tmp_path, layer("a", "X", shape() + packed([3.0]), packed([4.0])))
    assert [tensors[name].shape for name in ("a.0", "a.1")] == [(), ()]


def test_arrays_are_mapped(tmp_path):
    # 300 MB that the file system does not store either, and that nobody reads.
    count = 75 * 2**20
    head = shape(count) + varint(5 << 3 | 2) + varint(4 * count)
    name = field(1, "big")
    inside = name + varint(7 << 3 | 2) + varint(len(head) + 4 * count) + head
    path = tmp_path / "big.caffemodel"
    path.write_bytes(varint(100 << 3 | 2) + varint(len(inside) + 4 * count) + inside)
    os.truncate(path, path.stat().st_size + 4 * count)
    tracemalloc.start()
    tensors, _ = caffe_file.read_tensors(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert tensors["big.0"].shape == (count,)
    assert not tensors["big.0"].flags.owndata
    assert not tensors["big.0"].flags.writeable
    assert tensors["big.0"][-1] == 0
    assert peak < 2**20


def test_batch_norm_statistics(tmp_path):
    tensors, _ = read(tmp_path, norm_layers())
    np.testing.assert_array_equal(tensors["bn.0"], [2, 4])
    np.testing.assert_array_equal(tensors["bn.1"], [8, 16])
    assert tensors["bn.0"].dtype == tensors["bn.1"].dtype == np.float32
    # A layer that has seen no batch, in another form.
    unseen = layer("bn", "BatchNorm", blob(BIAS), blob(BIAS), blob(np.zeros((1, 1, 1, 1))))
    tensors, _ = read(tmp_path, unseen)
    np.testing.assert_array_equal([tensors["bn.0"], tensors["bn.1"]], np.zeros((2, 2)))
    # A layer of this type that keeps nothing else, or more, is somebody's own.
    tensors, _ = read(tmp_path, layer("bn", "BatchNorm", blob(BIAS), blob(BIAS)))
    np.testing.assert_array_equal(tensors["bn.1"], BIAS)


# Of caffe.proto, what weights need: the number, type and label of each field.
MESSAGES = {
    "BlobShape": {"dim": (1, "INT64", "REPEATED")},
    "BlobProto": {
        "num": (1, "INT32", "OPTIONAL"),
        "channels": (2, "INT32", "OPTIONAL"),
        "height": (3, "INT32", "OPTIONAL"),
        "width": (4, "INT32", "OPTIONAL"),
        "data": (5, "FLOAT", "REPEATED"),
        "diff": (6, "FLOAT", "REPEATED"),
        "shape": (7, "BlobShape", "OPTIONAL"),
        "double_data": (8, "DOUBLE", "REPEATED"),
    },
    "V1LayerParameter": {
        "name": (4, "STRING", "OPTIONAL"),
        "type": (5, "INT32", "OPTIONAL"),
        "blobs": (6, "BlobProto", "REPEATED"),
    },
    "LayerParameter": {
        "name": (1, "STRING", "OPTIONAL"),
        "type": (2, "STRING", "OPTIONAL"),
        "blobs": (7, "BlobProto", "REPEATED"),
    },
    "NetParameter": {
        "name": (1, "STRING", "OPTIONAL"),
        "layers": (2, "V1LayerParameter", "REPEATED"),
        "layer": (100, "LayerParameter", "REPEATED"),
    },
}


def test_files_of_protobuf(tmp_path):
    """What protobuf's own writer makes of the same messages."""
    json_format = pytest.importorskip("google.protobuf.json_format")
    descriptors = pytest.importorskip("google.protobuf.descriptor_pb2")
    factory = pytest.importorskip("google.protobuf.message_factory")

    def described(name, number, kind, label):
        is_message = kind in MESSAGES
        return {
            **{"name": name, "number": number, "label": f"LABEL_{label}"},
            "type": "TYPE_MESSAGE" if is_message else f"TYPE_{kind}",
            **({"typeName": f".caffe.{kind}"} if is_message else {}),
            "options": {"packed": label == "REPEATED" and not is_message and kind != "STRING"},
        }

    schema = {
        "name": "caffe.proto",
        "package": "caffe",
        "messageType": [
            {"name": name, "field": [described(field, *facts) for field, facts in fields.items()]}
            for name, fields in MESSAGES.items()
        ],
    }
    file = json_format.ParseDict(schema, descriptors.FileDescriptorProto())
    net = factory.GetMessages([file])["caffe.NetParameter"](name="a net")
    kernel = {"data": KERNEL.ravel(), "diff": BIAS, "shape": {"dim": KERNEL.shape}}
    net.layer.add(name="conv", type="Convolution", blobs=[kernel])
    net.layer.add(name="pool", type="Pooling")
    sizes = dict(zip(("num", "channels", "height", "width"), KERNEL.shape, strict=True))
    net.layers.add(name="old", type=4, blobs=[{"double_data": KERNEL.ravel(), **sizes}])
    tensors, info = read(tmp_path, net.SerializeToString())
    types = {"old": "Convolution", "conv": "Convolution", "pool": "Pooling"}
    assert info == {"net": "a net", "layers": json.dumps(types)}
    for name in ("conv.0", "old.0"):
        np.testing.assert_array_equal(tensors[name], KERNEL)


DAMAGED = {
    "empty": (b"", "cannot mmap an empty file"),
    "text": (b"not a network", "wire type"),
    "zeros": (bytes(1000), "field 0"),
    "no weights": (layer("relu", "ReLU"), "1 layers without weights"),
    "half": (network()[: len(network()) // 2], " are left"),
    "cut in a number": (network() + b"\xa2", "does not end"),
    "endless number": (field(1, "n") + b"\xff" * 20, "does not end"),
    "too long": (varint(100 << 3 | 2) + varint(10 * 2**30) + bytes(9), "10737418240 bytes"),
    "group": (varint(100 << 3 | 3), "wire type 3"),
    "layer is a number": (field(100, 7), "wire type 0, not 2"),
    "name is a number": (field(100, field(1, 7)), "wire type 0, not 2"),
    "name is no text": (field(100, field(1, b"\xff\xfe")), "can't decode byte 0xff"),
    "type is text": (old_layer("a", "Convolution"), "wire type 2, not 0"),
    "values are numbers": (layer("a", "X", shape(1) + field(5, 3)), "wire type 0, not 5"),
    "num is text": (layer("a", "X", field(1, "3")), "wire type 2, not 0"),
    "shape is a number": (layer("a", "X", field(7, 3)), "wire type 0, not 2"),
    "dim is a float": (layer("a", "X", field(7, field(1, 3.0))), "wire type 5, not 0"),
    "broken number": (layer("a", "X", shape(1) + field(5, b"123")), "inside a number"),
    "shape too large": (layer("a", "X", shape(2**40) + packed([1.0])), "holds 1 values"),
    "negative": (layer("a", "X", shape(-1, -1) + packed([1.0])), "holds 1 values"),
    "no values": (layer("a", "X", shape(2, 3)), "2x3 holds 0 values"),
    "empty values": (layer("a", "X", shape(2, 3) + packed([])), "2x3 holds 0 values"),
    "empty shape": (layer("a", "X", shape(0, 2**63)), "holds 0 values"),
    "no shape": (layer("a", "X", packed([1.0, 2.0])), "one number holds 2 values"),
    "33 axes": (layer("a", "X", shape(*[1] * 33) + packed([1.0])), "holds 1 values"),
    "many factors": (layer("a", "BatchNorm", *[blob(BIAS)] * 3), "has 2 factors"),
    "one name twice": (layer("a", "X", blob(BIAS)) * 2, "two layers are named 'a'"),
    "form of 2013": (field(2, field(1, field(1, "conv"))), "upgrade_net_proto_binary"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named(tmp_path, case):
    content, expected = DAMAGED[case]
    assert expected in message(tmp_path, content)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none.caffemodel cannot be read \(.*No such file"):
        caffe_file.read_tensors(tmp_path / "none.caffemodel")


def test_every_cut_is_noticed(tmp_path):
    content = layer("conv", "Convolution", blob(KERNEL), blob(BIAS))
    for size in range(len(content)):
        message(tmp_path, content[:size])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("changed")


@hypothesis.settings(max_examples=150)
@hypothesis.given(
    st.lists(st.tuples(st.integers(0, len(network()) - 1), st.integers(0, 255)), max_size=6)
)
def test_changed_bytes_do_no_harm(folder, changes):
    content = bytearray(network() + old_layer("old", 4, blob(KERNEL, old_shape, unpacked)))
    for at, byte in changes:
        content[at] = byte
    with contextlib.suppress(UserError):
        tensors, _ = read(folder, content)
        assert sum(array.nbytes for array in tensors.values()) <= len(content)
