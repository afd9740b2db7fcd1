"""Weight files: safetensors and npz against their packages, and what no file of any kind may do."""

import contextlib
import io
import json
import os
import pathlib
import random
import subprocess
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest

from dense_jax.errors import UserError
from dense_jax.weights import files, rules, zips
from tests.weight_files import (
    KERNEL,
    WHOLE,
    integer,
    items,
    old_form,
    refused,
    same,
    tensor,
    text,
    write,
    zip_form,
)

KINDS = ["?", "u1", "i1", "<i2", "<u2", "<i4", "<i8", "<f2", "<f4", "<f8", ml_dtypes.bfloat16]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.bin"  # names tell nothing


def safetensors(header, num_bytes, length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (length or len(header)).to_bytes(8, "little") + header + bytes(num_bytes)


def entry(shape=(2,), begin=0, end=8, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_safetensors(path):
    package = pytest.importorskip("safetensors.numpy")
    expected = {f"kind{i}": np.arange(6).reshape(2, 3).astype(kind) for i, kind in enumerate(KINDS)}
    expected |= {"empty": np.zeros((0, 3), np.float32), "scalar": np.array(2.5)}
    path.write_bytes(package.save(expected, {"from": "here"}))
    file = files.read(path)
    assert (file.format, file.info) == ("safetensors", {"from": "here"})
    assert file.tensors.keys() == expected.keys()
    for key, values in expected.items():
        same(file.tensors[key], values)
    assert not file.tensors["kind8"].flags.owndata
    assert not file.tensors["kind8"].flags.writeable


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (safetensors({"a": entry()}, 8, 10**10), "10000000000 bytes"),
        (safetensors({"a": entry((2**31,), 0, 2**33)}, 8), "8589934592 bytes"),
        (safetensors({"a": entry((2**60, 2**60), 0, 8)}, 8), "whole number"),
        (safetensors({"a": entry((0, 2**60), 0, 0)}, 0), "whole number"),
        (safetensors({"a": entry((-2, -1))}, 8), "whole number"),
        (safetensors({"a": entry((2.0,))}, 8), "whole number"),
        (safetensors({"a": entry((1,) * 40, 0, 4)}, 4), "axes"),
        (safetensors({"a": entry((3,))}, 8), "damaged"),
        (safetensors({"a": entry((1,))}, 8), "does not match"),
        (safetensors({"a": entry(dtype="F33")}, 8), "unknown dtype"),
        (safetensors({"a": entry(begin=4, end=12)}, 12), "gap"),
        (safetensors({"a": entry(), "b": entry(begin=4, end=12)}, 12), "overlap"),
        (safetensors({"a": entry()}, 12), "do not end with"),
        (safetensors({"a": {}}, 0), "dtype"),
        (safetensors({"a": 3}, 0), "damaged"),
        (safetensors(b'{"a": {}, "a": {}}', 0), "twice"),
        (safetensors(b'{"__metadata__": {"x": {}}}', 0), "not text"),
        (safetensors(b"{" * 100_000, 0), "damaged"),
        (safetensors({}, 0), "no arrays"),
    ],
)
def test_damaged_safetensors(path, content, reason):
    assert reason in refused(write(path, content))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(path, save):
    kinds = [np.dtype(kind) for kind in [*KINDS[:-1], ">f4", "<c8"]]
    expected = {f"kind{i}": np.arange(6).reshape(2, 3).astype(kind) for i, kind in enumerate(kinds)}
    expected |= {"columns": np.asfortranarray(KERNEL), "scalar": np.array(7)}
    expected |= {"empty": np.zeros((0, 3)), "a.b": KERNEL[:, ::2]}
    with path.open("wb") as file:
        save(file, **expected)
    file = files.read(path)
    assert file.format == "npz"
    assert file.tensors.keys() == expected.keys()
    for key, values in expected.items():
        same(file.tensors[key], values)
    assert file.tensors["kind8"].flags.writeable is False
    assert file.tensors["columns"].flags.f_contiguous


def test_npz_with_more_than_numbers(path):
    with path.open("wb") as file:
        np.savez(file, good=KERNEL, bad=np.array([{}, None], dtype=object), day=np.array(["x"]))
    tensors = files.read(path).tensors
    same(tensors["good"], KERNEL)
    for key in ("bad", "day"):
        with pytest.raises(UserError, match="no numbers"):
            tensors[key]


def test_a_few_packed_bytes_do_not_fill_the_memory(path, monkeypatch):
    with path.open("wb") as file:
        np.savez_compressed(file, a=np.zeros(2**22))
    assert "to 34 MB: save it without compression" in refused(path)
    with path.open("wb") as file:
        np.savez_compressed(file, a=KERNEL)
    tensors = files.read(path).tensors
    monkeypatch.setattr(zips.Member, "unpack", None)  # a shape is read without the values
    assert rules.outline(tensors)["a"].shape == KERNEL.shape


def test_what_a_reader_did_is_not_said_by_a_file(path):
    metadata = {"__metadata__": {"container": "no", "prefix": "no", "left out": "no", "by": "us"}}
    file = files.read(write(path, safetensors(metadata | {"a": entry()}, 8)))
    assert file.info == {"by": "us"}
    file = files.read(write(path, zip_form(items(container=text("no"), epoch=integer(3), a=WHOLE))))
    assert file.info == {"epoch": "3"}
    checkpoint = items(state_dict=items(a=WHOLE), **{"b\x1b[2J": items(a=WHOLE)})
    assert list(files.read(write(path, zip_form(checkpoint))).tensors) == ["a"]


def test_zip_of_something_else(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.weights.h5", b"")
    assert "not an array" in refused(path)


def test_npz_that_unpacks_to_much(path):
    with path.open("wb") as file:
        np.savez_compressed(file, a=np.zeros(2000), b=np.zeros(2000))
    content = bytearray(path.read_bytes())
    at = [i for i in range(len(content)) if content[i : i + 4] == b"PK\x01\x02"]
    assert len(at) == 2
    for i in at:  # the size that the directory declares
        content[i + 24 : i + 28] = (0xF0000000).to_bytes(4, "little")
    assert "to 8,053 MB" in refused(write(path, content))
    for i in at:
        content[i + 24 : i + 28] = (1000).to_bytes(4, "little")
    assert "damaged" in refused(write(path, content))


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04", b"version https://git-lfs", b"\x80\x04N.", b"PK\x05\x06" + bytes(18)],
)
def test_no_weight_file(path, content):
    refused(write(path, content))


def test_names_that_would_write_to_the_terminal(path):
    bad = safetensors({"a\x1b[2J": entry()}, 8)
    assert "unprintable" in refused(write(path, bad))


def test_no_file_at_all(tmp_path):
    assert "is not a file" in refused(tmp_path)
    assert "is not a file" in refused(tmp_path / "none.pth")
    assert "cannot be read (File name too long)" in refused(tmp_path / ("x" * 300))


def test_a_caffemodel_may_look_like_safetensors(tmp_path):
    path = write(tmp_path / "x.caffemodel", b"\x0a\x20" + b"abcdef{" + bytes(40))
    assert "header" not in refused(path)


def test_an_item_costs_no_memory(tmp_path):
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        pytest.skip("the peak of memory is read from /proc")
    size = 300_000_000
    header = {"a": entry((10,), 0, 40), "b": entry((size // 4 - 10,), 40, size)}
    content = items(a=tensor("7", 20, (10,), (1,)), b=tensor("7", 0, (size // 4,), (1,)))
    old = old_form(content, {"7": np.zeros(0, np.float32)})[:-8] + (size // 4).to_bytes(8, "little")
    for file, head in (("x.safetensors", safetensors(header, 0)), ("old.pth", old)):
        with (tmp_path / file).open("wb") as target:
            target.write(head)
            target.truncate(len(head) + size)
    with zipfile.ZipFile(tmp_path / "new.pth", "w") as archive:
        member = zipfile.ZipInfo("net/data/7")
        member.file_size = member.compress_size = size
        member.CRC = member.header_offset = 0
        assert archive.fp is not None
        archive.fp.write(member.FileHeader())
        archive.start_dir = archive.fp.seek(size, os.SEEK_CUR)  # where the next member goes
        archive.filelist.append(member)
        archive.writestr("net/data.pkl", b"\x80\x02" + content + b".")
    script = """
import re, sys
from dense_jax.weights import files, npz_file, safetensors_file, torch_file
def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
before = peak()
for path in sys.argv[1:]:
    tensors = files.read(path).tensors
    assert tensors["b"].nbytes > 299_000_000 and tensors["b"][-1] == 0
    assert not tensors["a"].any() and tensors["a"].shape == (10,)
print(peak() - before)
"""
    paths = [tmp_path / file for file in ("x.safetensors", "old.pth", "new.pth")]
    assert all(path.stat().st_blocks < 1000 for path in paths)
    root = pathlib.Path(files.__file__).parents[2]
    command = [sys.executable, "-c", script, *map(str, paths)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert int(run.stdout) < 20_000  # of 1024 bytes


def samples():
    weights = {"a": KERNEL, "b": np.arange(5)}
    stored, packed = io.BytesIO(), io.BytesIO()
    np.savez(stored, **weights)
    np.savez_compressed(packed, **weights)
    content = items(epoch=integer(1), model=items(a=WHOLE, b=tensor("8", 0, (3,), (1,), "Long")))
    header = {
        "a": entry((24,), 0, 96),
        "b": entry((5,), 96, 136, "I64"),
        "__metadata__": {"x": "y"},
    }
    return {
        "npz": stored.getvalue(),
        "packed npz": packed.getvalue(),
        "zip": zip_form(content, byteorder="little"),
        "old": old_form(content),
        "safetensors": safetensors(header, 136),
    }


@pytest.mark.filterwarnings("ignore")  # Python's parsers warn of odd text on the way to an error
@pytest.mark.parametrize("kind", samples())
def test_damage_is_said_or_harmless(path, kind):
    draw, content = random.Random(0), samples()[kind]
    whole = dict(files.read(write(path, content)).tensors)
    assert len(whole) == 2
    for _ in range(200):
        bad = bytearray(content)
        for _ in range(draw.choice((1, 1, 2, 5))):
            bad[draw.randrange(len(bad))] = draw.choice((0, 1, 127, 128, 255, draw.randrange(256)))
        if draw.random() < 0.3:
            del bad[draw.randrange(len(bad)) :]
        write(path, bad)
        with contextlib.suppress(UserError):
            for array in files.read(path).tensors.values():
                assert array.nbytes <= len(content)
                array.tobytes()
