"""The cache of prepared datasets: damages are noticed, and it is made again."""

import multiprocessing
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
from PIL import Image

from dense_jax.data import dataset, prepared
from dense_jax.data.datasets import folder
from dense_jax.errors import UserError


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Ten pairs of several sizes, and a cache for them alone."""
    monkeypatch.setenv("DENSE_JAX_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "data"
    rng = np.random.default_rng(0)
    for part in ("images", "labels"):
        (root / part).mkdir(parents=True)
    (root / "classes.txt").write_text("ground\nroof\ntree\n")
    for i in range(10):
        size = (12 + i % 3, 16)
        image, label = rng.integers(0, 256, (*size, 3)), rng.integers(0, 3, size)
        Image.fromarray(image.astype(np.uint8)).save(root / f"images/tile{i}.png")
        Image.fromarray(label.astype(np.uint8)).save(root / f"labels/tile{i}.png")
    return root


def content(root):
    """All that a dataset says of its examples."""
    data = dataset.load("folder", root)
    found = []
    for name, source in sorted(data.splits.items()):
        for i in range(len(source)):
            example = source[i]
            arrays = example["image"].tobytes(), example["label"].tobytes()
            found.append((name, source.size(i), example["name"], *arrays))
    return found, data.classes, data.fingerprint


def cache_of(root):
    found = list((root.parent / "cache/datasets").glob("*/folder/1.0.0"))
    assert len(found) == 1
    return found[0]


def damage(path, rng):
    """Flips a bit, cuts the end off, or puts other bytes into a file; or removes it."""
    data = bytearray(path.read_bytes())
    kind = rng.choice(["flip", "flip", "cut", "other", "remove"])
    if kind == "remove" or not data:
        path.unlink()
        return
    at = rng.randrange(len(data))
    if kind == "flip":
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[at:]
    else:
        data[at : at + 40] = rng.randbytes(40)
    path.write_bytes(bytes(data))


def test_a_damaged_cache_is_prepared_again(own, capsys):
    sound = content(own)
    records, rng = cache_of(own), random.Random(0)
    whole = {path.name: path.read_bytes() for path in records.iterdir()}
    assert prepared._DIGESTS in whole
    for name in whole:
        for _ in range(3):
            damage(records / name, rng)
            capsys.readouterr()
            assert content(own) == sound, name
            assert "it is prepared again" in capsys.readouterr().out, name
    assert content(own) == sound
    assert "again" not in capsys.readouterr().out


def test_damage_behind_an_unchanged_time_is_noticed_on_reading(own, capsys, monkeypatch):
    """A large file is not read at each start: the reader of its blocks compares checksums."""
    monkeypatch.setattr(prepared, "_SMALL", 0)
    sound = content(own)
    records, rng = cache_of(own), random.Random(1)
    told = []
    for _ in range(30):
        path = rng.choice(sorted(records.glob("*.array_record*")))
        stat, data = path.stat(), bytearray(path.read_bytes())
        written = [i for i, byte in enumerate(data) if byte]  # the rest is padding
        data[rng.choice(written)] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(data))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        try:
            assert content(own) == sound
        except UserError as error:
            told.append(str(error))
        assert content(own) == sound  # prepared again, or as good as it was
    assert len(told) > 10
    assert all("is damaged" in line and "run the same command again" in line for line in told)


def _prepare(root, started):
    started.set()
    content(root)


@pytest.mark.slow
def test_a_killed_preparation_leaves_nothing(own):
    for delay in (0.0, 0.3):
        context = multiprocessing.get_context("spawn")
        started = context.Event()
        process = context.Process(target=_prepare, args=(own, started))
        process.start()
        started.wait(60)
        time.sleep(delay)
        assert process.pid
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    datasets = own.parent / "cache/datasets"
    old = datasets / "folder-0123456789abcdef" / "folder" / "incomplete.AB12CD_1.0.0"
    old.mkdir(parents=True)
    (own / "labels/tile1.png").touch()  # the files have changed since
    content(own)
    assert not list(datasets.glob("*/*/incomplete*"))


@pytest.mark.slow
def test_processes_prepare_a_dataset_once(own):
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    processes = [context.Process(target=_prepare, args=(own, started)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    cache_of(own)


def test_the_key_follows_content_behind_equal_sizes_and_times(own):
    pairs = folder.find(own)
    before, path = prepared._key(pairs), own / "labels/tile1.png"
    stat, size = path.stat(), path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == size
    assert path.stat().st_mtime_ns == stat.st_mtime_ns
    assert prepared._key(folder.find(own)) != before


def test_a_cache_that_may_only_be_read_is_used(own, monkeypatch):
    sound = content(own)
    monkeypatch.setattr(shutil, "rmtree", None)
    monkeypatch.setattr(prepared, "_prepare", None)
    assert content(own) == sound
