"""Run folders: the files of a training run besides its checkpoints."""

import contextlib
import datetime
import fcntl
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import IO, Any

import jax
import numpy as np
from PIL import Image

from dense_jax import scripts
from dense_jax.data.classes import ClassTable
from dense_jax.data.dataset import Dataset
from dense_jax.errors import UserError
from dense_jax.train import cli
from dense_jax.train.checkpoint import has_checkpoint
from dense_jax.train.config import RunConfig, check_resumable, from_json

_DIGEST = "digest"  # of the other entries of a JSON object


def prepare(
    config: RunConfig, dataset: Dataset, notes: Mapping[str, Any] | None = None
) -> pathlib.Path:
    """Makes the run folder with its ``config.json``, or checks that it belongs to the same run.

    Args:
      config: the configuration of the run.
      dataset: the training data.
      notes: everything else that the results depend on, as plain JSON values.

    Raises:
      UserError: the folder cannot be written, or holds a run with other settings or data.
    """
    workdir = pathlib.Path(config.workdir or "")
    path = workdir / "config.json"
    record: dict[str, Any] = {
        "script": script_of(config),
        "script_file": scripts.file_of(config),
        "config": config.to_json(),
        "classes": dataset.classes.to_json(),
        "fingerprint": dataset.fingerprint,
        **(notes or {}),
        **provenance(),
    }
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if has_checkpoint(workdir):  # otherwise nothing is trained yet
            old = read_config(workdir)
            if old["script"] != record["script"]:
                raise UserError(f"{workdir} holds a run of {old['script']}: give another --workdir")
            before = from_json(type(config), old["config"], path)
            check_resumable(before, config, str(workdir))
            for key in ("own_loss", "own_optimizer", "own_model"):
                before, now = old.get(key), (notes or {}).get(key)
                # Optimisers of optax have no name; their state has a form, which is compared.
                if before != now and not (key == "own_optimizer" and before and now):
                    words = key.replace("_", " ")
                    raise UserError(
                        f"{workdir} holds a run with {words} {before or 'none'}, and now it is "
                        f"{now or 'none'}: give the same, or another --workdir"
                    )
            if old["fingerprint"] != dataset.fingerprint:
                raise UserError(
                    f"{workdir} was trained on other data: the files or labels of {dataset.name} "
                    "have changed since; give another --workdir"
                )
        write_json(path, record)
    except OSError as error:
        raise UserError(
            f"cannot write the run folder {workdir} ({error.strerror}): give another --workdir"
        ) from error
    return workdir


def read_config(workdir: pathlib.Path) -> dict[str, Any]:
    """Reads ``config.json`` of a run folder.

    Raises:
      UserError: the file is missing or damaged.
    """
    kinds = {"script": str, "config": dict, "classes": dict, "fingerprint": str}
    path, advice = workdir / "config.json", "restore it, or give the folder of another training run"
    record = read_json(path, kinds, advice)
    for key in ("script_file", "own_loss", "own_optimizer", "own_model"):
        if not isinstance(record.get(key), str | None):
            raise UserError(f"{path} is damaged ({key} is no text): {advice}")
    return record


def classes_of(workdir: pathlib.Path, record: Mapping[str, Any]) -> ClassTable:
    """Returns the class table in the record of ``config.json``.

    Raises:
      UserError: it is no class table.
    """
    try:
        return ClassTable.from_json(record["classes"])
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{workdir / 'config.json'} is damaged (classes: {error}): restore it, or give the "
            "folder of another training run"
        ) from error


def read_json(path: pathlib.Path, kinds: Mapping[str, type], advice: str) -> dict[str, Any]:
    """Reads a JSON object that `write_json` wrote.

    Args:
      path: the file.
      kinds: its required keys, and the types of their values.
      advice: the remedy for a bad file, for the message.

    Raises:
      UserError: the file cannot be read, or is damaged.
    """
    if path.exists() and not path.is_file():  # a pipe would wait for ever
        raise UserError(f"{path} is not a file: {advice}")
    try:
        record = parse_json(path.read_text(encoding="utf-8"), path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {advice}") from error
    except (ValueError, RecursionError) as error:  # not text, or not JSON
        raise UserError(f"{path} is damaged ({error}): {advice}") from error
    if not isinstance(record, dict):
        raise UserError(f"{path} is damaged (it is no object): {advice}")
    for key, kind in kinds.items():
        if key not in record:
            raise UserError(f"{path} is damaged (it has no {key}): {advice}")
        if not isinstance(record[key], kind):
            words = {str: "text", dict: "an object"}[kind]
            found = json.dumps(record[key])[:60]
            raise UserError(f"{path} is damaged ({key} is {found}, not {words}): {advice}")
    return record


def parse_json(text: str, path: pathlib.Path | None = None) -> Any:
    """Parses what `write_json` wrote. With a path, says where it has changed since.

    Files of earlier versions have no digest.

    Raises:
      ValueError: it is not JSON, or, without a path, has changed.
    """
    value = json.loads(text)
    digest = value.pop(_DIGEST, None) if isinstance(value, dict) else None
    if digest not in (None, _digest(value)):
        words = "has changed since it was written"
        if path is None:
            raise ValueError(words)
        print(
            f"warning: {path} {words}: if you did not do it, restore it; if you did, remove its "
            f'"{_DIGEST}"',
            file=sys.stderr,
        )
    return value


def provenance() -> dict[str, Any]:
    """Returns the facts for repeating a result: command, versions, device, commit, time."""
    packages = ("jax", "jaxlib", "flax", "optax", "grain", "numpy", "pillow")
    device = jax.devices()[0]
    return {
        "command": cli.command(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform}), "
        f"{os.cpu_count()} CPU cores",
        "commit": _commit(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def make_folder(path: pathlib.Path) -> None:
    """Makes a folder and its parents if they do not exist.

    Raises:
      UserError: the folder cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the folder {path} ({error.strerror}): give another"
        ) from error


def make_inner_folder(path: pathlib.Path) -> None:
    """Makes a folder for files that replace others, so that it may not be a link elsewhere.

    Raises:
      UserError: it is a link, or cannot be made.
    """
    if path.is_symlink():
        raise UserError(
            f"{path} is a link to {path.readlink()}, where files would be replaced: remove it, or"
            " give another folder"
        )
    make_folder(path)


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[IO[bytes]]:
    """Opens a file for writing that replaces ``path`` only when it is complete.

    A link is replaced itself; the file that it points to stays as it is.

    Raises:
      OSError: writing failed; the error names ``path``, and the old file is unchanged.
    """
    partial = path.with_name(f"{path.name}.tmp")
    try:
        # In a folder of others, a link may lead to any file of the user.
        if partial.is_symlink() and not partial.is_char_device():
            partial.unlink()
        with partial.open("wb") as stream:
            yield stream
        partial.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)
        raise


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file in UTF-8; a reader gets the old one or the new one, never a part."""
    with replacing(path) as stream:
        stream.write(text.encode())


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON file as `write_text` does.

    An object gets a digest of its content, which `parse_json` compares.
    """
    value = json.loads(json.dumps(value))  # such as a reader gets it: keys are text
    if isinstance(value, dict):
        value[_DIGEST] = _digest(value)
    write_text(path, f"{json.dumps(value, indent=2)}\n")


def write_png(path: pathlib.Path, picture: np.ndarray) -> None:
    """Writes a picture that Pillow takes, such as uint8 [H, W, 3], as `write_text` does."""
    with replacing(path) as stream:
        Image.fromarray(picture).save(stream, "PNG")


@contextlib.contextmanager
def replacing_with_record(
    path: pathlib.Path, record_path: pathlib.Path, record: Any
) -> Iterator[IO[bytes]]:
    """Opens ``path`` for writing and saves its JSON record with it.

    If the disk fills up, neither new file remains.

    Raises:
      OSError: writing failed; the error names one of the files.
    """
    with replacing(path) as stream:
        yield stream
        stream.flush()  # a full disk must fail here, before the record is written
        write_json(record_path, record)


# What a training writes to in its folder, other than by replacing.
_FILES = (".lock", "metrics.jsonl", "train.csv", "eval.csv")
_FOLDERS = ("checkpoints", "tensorboard", "pictures")


@contextlib.contextmanager
def writing(workdir: pathlib.Path) -> Iterator[None]:
    """Holds the lock of a run folder: one process at a time trains in it.

    The system frees the lock when the process ends, even if it is killed.

    Raises:
      UserError: another process holds it, or a file in the folder is a link or no file: in a folder
        of others, a link may lead to any file of the user.
    """
    make_folder(workdir)
    for name in (*_FILES, *_FOLDERS):
        entry = workdir / name
        is_kind = entry.is_dir() if name in _FOLDERS else entry.is_file()
        if entry.is_symlink() or (entry.exists() and not is_kind):
            wanted = "not a folder" if name in _FOLDERS else "not a file"
            found = "a link" if entry.is_symlink() else wanted
            raise UserError(f"{entry} is {found}: remove it, or give another --workdir")
    path = workdir / ".lock"
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise UserError(
                f"another training writes to {workdir} ({owner}): wait until it ends, or give "
                "another --workdir"
            ) from None
        except OSError as error:  # a file system without locks
            print(f"warning: {path} cannot be locked ({error.strerror}): train one run there")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


def script_of(config: RunConfig) -> str:
    """Returns the importable name of the module that defines the configuration's class."""
    module = type(config).__module__
    return cli.script_name() if module == "__main__" else module


def _commit() -> str | None:
    """Returns the commit of this library, or None without git.

    A "+" follows if files differ from it, or if there are Python files, such as a new network, that
    it does not hold.
    """
    root = pathlib.Path(__file__).parent
    try:
        commit, *changes = (
            subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
            ).stdout.strip()
            for arguments in (
                ["rev-parse", "--short=12", "HEAD"],
                ["status", "--porcelain", "-uno"],
                ["ls-files", "--others", "--exclude-standard", ":/*.py"],
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if any(changes) else "")


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
