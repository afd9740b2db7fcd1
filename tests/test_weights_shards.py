"""Weights in several files with an index: read as one, and no file elsewhere is opened."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from dense_jax.errors import UserError
from dense_jax.weights import files, hub
from tests.weight_files import WHOLE, items, refused, same, tensor, write, zip_form

huggingface_hub = pytest.importorskip("huggingface_hub")

ARRAYS = {f"model.conv{i}.weight": np.full((2, 3), i, np.float32) for i in range(4)}
PARTS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"


def write_index(path, places):
    path.write_text(json.dumps({"metadata": {"total_size": 96}, "weight_map": places}))
    return path


@pytest.fixture
def index(tmp_path):
    """The index of two files with two arrays each."""
    names = list(ARRAYS)
    for part, mine in zip(PARTS, (names[:2], names[2:]), strict=True):
        save_file({name: ARRAYS[name] for name in mine}, tmp_path / part, {"format": "pt"})
    places = {name: PARTS[i // 2] for i, name in enumerate(names)}
    return write_index(tmp_path / INDEX, places)


def test_an_index_and_its_folder_are_read_as_one_file(index):
    for path in (index, index.parent):
        file = files.read(path)
        assert (file.path, file.format, file.info) == (str(index), "safetensors", {"format": "pt"})
        assert list(file.tensors) == list(ARRAYS)
        for name, array in ARRAYS.items():
            same(file.tensors[name], array)


def test_parts_of_pytorch_are_read(tmp_path):
    parts = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    contents = items(a=WHOLE), items(b=tensor("8", 0, (3,), (1,), "Long"))
    for part, content in zip(parts, contents, strict=True):
        write(tmp_path / part, zip_form(content))
    write_index(tmp_path / "pytorch_model.bin.index.json", {"a": parts[0], "b": parts[1]})
    assert list(files.read(tmp_path).tensors) == ["a", "b"]
    assert "is part 2 of 2: give " in refused(tmp_path / parts[1])


def test_one_part_says_what_to_give(index):
    part = index.parent / PARTS[0]
    assert refused(part) == f"{part} is part 1 of 2: give {index}"
    index.unlink()
    assert f"is part 1 of 2: download {INDEX} and all parts too" in refused(part)
    whole = part.rename(part.with_name("model-00001-of-00001.safetensors"))
    assert len(files.read(whole).tensors) == 2


def test_what_the_index_and_the_files_disagree_on_is_told(index):
    part = index.parent / PARTS[1]
    held = {name: ARRAYS[name] for name in list(ARRAYS)[2:]}
    save_file(dict(list(held.items())[:1]), part)
    assert f"lacks model.conv3.weight, against {INDEX}" in said(index)
    save_file(held | {"x": np.ones(3)}, part)
    assert f"also holds x, against {INDEX}" in said(index)
    part.unlink()
    assert f"{part} is missing, and {INDEX} names it" in said(index)
    part.write_bytes(b"no weights")
    assert f"{part} is not a weight file" in said(index)


def said(path):
    with pytest.raises(UserError) as error:
        files.read(path)
    assert str(error.value).isprintable()
    return str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/x.safetensors",
        "a/x.safetensors",
        "..\\x",
        "",
        ".",
        "..",
        "a\0b",
        "\x1b",
    ],
)
def test_names_elsewhere_are_refused(index, name):
    write_index(index, {"a": name})
    assert "is no file beside the index" in said(index)


def test_links_to_other_folders_are_not_followed(index, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / PARTS[0]
    part = (index.parent / PARTS[0]).rename(other)
    (index.parent / PARTS[0]).symlink_to(part)
    assert "is a link to another folder" in said(index)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "damaged"),
        (b"\xff\xfe", "damaged"),
        (b"[" * 100_000, "damaged"),
        (b"[]", "no weight_map"),
        (b'{"weight_map": []}', "no weight_map"),
        (b'{"weight_map": {}}', "no weight_map"),
        (b'{"weight_map": {"a": 3}}', "lies in 3"),
        (b'{"weight_map": {"a": null}}', "lies in None"),
        (b'{"weight_map": {"a": "x", "a": "y"}}', "twice"),
        (json.dumps({"weight_map": {str(i): str(i) for i in range(1001)}}).encode(), "1000 files"),
    ],
)
def test_damaged_indices(index, content, reason):
    assert reason in said(write(index, content))


def test_of_two_indices_one_is_asked_for(index):
    write_index(index.parent / "model.bin.index.json", {"a": "b"})
    assert len(files.read(index.parent).tensors) == 4  # the same weights in a second form
    write_index(index.parent / "model.fp16.safetensors.index.json", {"a": "b"})
    assert "give one of them" in said(index.parent)


def test_the_hub_gives_all_parts(index, tmp_path_factory, monkeypatch):
    """In its cache, names are links to files in another folder."""
    repo, asked = tmp_path_factory.mktemp("repo"), []
    (repo / "blobs").mkdir()
    (repo / "snapshot").mkdir()

    def give(repository, file, revision):
        asked.append((repository, file, revision))
        if not (index.parent / file).exists():
            raise OSError("404")
        (repo / "blobs" / file).write_bytes((index.parent / file).read_bytes())
        (repo / "snapshot" / file).unlink(missing_ok=True)
        (repo / "snapshot" / file).symlink_to(repo / "blobs" / file)
        return str(repo / "snapshot" / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", give)
    path = hub.download("a/b@v1")
    assert [file for _, file, _ in asked] == ["model.safetensors", INDEX, *PARTS]
    assert {where[::2] for where in asked} == {("a/b", "v1")}
    assert len(files.read(path).tensors) == 4
    (index.parent / PARTS[1]).unlink()
    with pytest.raises(UserError, match=f"no {PARTS[1]} "):
        hub.download("a/b")
    write_index(index, {"a": "../../x"})
    asked.clear()
    with pytest.raises(UserError, match="no file beside the index"):
        hub.download(f"a/b:{INDEX}")
    assert len(asked) == 1
