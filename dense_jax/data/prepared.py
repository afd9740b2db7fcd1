"""Image and label files, checked once and packed into array records by TFDS.

TFDS runs without TensorFlow here: images keep their encoding, Pillow decodes them, and
`as_data_source` reads any record directly. The key of the cache is the class table and the paths,
sizes and times of the files, so changed files are checked and prepared again. Labels and instances
are stored as 8-bit and 16-bit PNG, which is lossless.

A prepared dataset has digests of its own files. A damaged one is prepared again.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from dense_jax.data.check import Report, SplitReport, scan
from dense_jax.data.dataset import Dataset, Example
from dense_jax.data.files import (
    Files,
    decode_instances,
    decode_label,
    encode_instances,
    encode_label,
)
from dense_jax.data.objects import Objects
from dense_jax.data.pictures import decode_image
from dense_jax.errors import UserError

_VERSION = "1.0.0"  # of the content of a record
_ENCODED = ("image", "label", "instances")
_DIGESTS = "digests.json"  # of the files beside it, written last
_SMALL = 2**20  # bytes of a file that is read completely each time


class _Builder(tfds.core.GeneratorBasedBuilder):
    """Packs `Files`; reads and checks every file completely."""

    VERSION = tfds.core.Version(_VERSION)

    def __init__(self, files: Files, data_dir: pathlib.Path):
        self.name, self._files = files.name, files
        self._report = Report(files.name, files.classes, notes=list(files.notes))
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        features: dict[str, Any] = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.Image(shape=(None, None, 1)),  # class ids, as PNG
            "name": tfds.features.Text(),
        }
        if self._files.has_annotations:
            features["annotations"] = tfds.features.Text()  # see `Objects.to_json`
            features["image_id"] = np.int64
        if self._files.has_instances:
            features["instances"] = tfds.features.Image(shape=(None, None, 1), dtype=np.uint16)
        return tfds.core.DatasetInfo(
            builder=self,
            description=self._files.description,
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,  # index i is the i-th pair; training shuffles
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        del dl_manager  # nothing to download
        return {split: self._generate_examples(split) for split in self._files.splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, Example]]:
        for i, (pair, sample) in enumerate(scan(self._files, self._report, split)):
            label = encode_label(sample.label)
            record: Example = {"image": sample.image, "label": label, "name": pair.name}
            if sample.instances is not None:
                record["instances"] = encode_instances(sample.instances)
            if sample.annotations is not None:
                record["annotations"] = sample.annotations.to_json()
                record["image_id"] = sample.image_id
            yield i, record
        self._report.raise_if_broken()
        self.info.metadata.update(self._report.to_json())  # saved with the records


@dataclasses.dataclass(frozen=True)
class Records:
    """One prepared split as a random-access source."""

    records: Any
    sizes: list[tuple[int, int]]
    folder: pathlib.Path

    def __len__(self) -> int:
        return len(self.sizes)

    def size(self, index: int) -> tuple[int, int]:
        """Returns the height and width, stored by the preparation."""
        height, width = self.sizes[index]
        return height, width

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            record = self.records[index]
            name = record["name"].decode()
            example = {
                "image": decode_image(record["image"], name).pixels,
                "label": decode_label(record["label"]),
                "name": name,
            }
            if "instances" in record:
                example["instances"] = decode_instances(record["instances"])
            if "annotations" in record:
                example["annotations"] = Objects.from_json(record["annotations"])
                example["image_id"] = int(record["image_id"])
            return example
        except Exception as error:  # a damaged file makes the record reader raise almost anything
            with contextlib.suppress(OSError):
                (self.folder / _DIGESTS).unlink()
            reason = str(error).strip().split("\n")[0][:200]
            raise UserError(
                f"the prepared dataset {self.folder} is damaged ({reason}): run the same command "
                "again, which prepares it again"
            ) from error


def cache_dir() -> pathlib.Path:
    """Returns the folder of prepared datasets, under DENSE_JAX_CACHE or ~/.cache/dense_jax."""
    root = os.environ.get("DENSE_JAX_CACHE") or "~/.cache/dense_jax"
    return pathlib.Path(root).expanduser() / "datasets"


def open_files(files: Files) -> Dataset:
    """Opens a dataset of files; the first time, checks all files and packs them.

    Raises:
      UserError: a file is wrong (see `dense_jax.data.files`), or the cache cannot be written.
    """
    folder = cache_dir() / f"{files.name}-{_key(files)}"
    records = folder / files.name / _VERSION
    if _damage(records) is not None:
        _prepare(files, folder, records)
    # Unlike `_Builder`, this one can be pickled for worker processes.
    reader: Any = tfds.builder_from_directory(records)
    report = Report.from_json(reader.info.metadata)
    raw = {key: tfds.decode.SkipDecoding() for key in _ENCODED if key in reader.info.features}
    splits = {
        split: Records(reader.as_data_source(split, decoders=raw), found.sizes, records)
        for split, found in report.splits.items()
    }
    return Dataset(
        files.name,
        files.classes,
        splits,
        report.fingerprint,
        files.description,
        tuple(report.warnings()),
        files.absent,
        files.category_ids,
        {split: found.num_objects for split, found in report.splits.items() if found.num_objects},
    )


def _prepare(files: Files, folder: pathlib.Path, records: pathlib.Path) -> None:
    """Fills ``folder``; near the end, TFDS moves the finished files to ``records``."""
    tfds.disable_progress_bar()  # `scan` has its own
    try:
        with _alone(folder):
            if (damage := _damage(records)) is None:  # another process was faster
                return
            if records.exists():
                print(f"the prepared dataset {folder} {damage}: it is prepared again")
                shutil.rmtree(records)
            _remove_unfinished(folder)
            with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints what it does
                _Builder(files, folder).download_and_prepare()
            _write_digests(records)
    except (OSError, RuntimeError) as error:  # RuntimeError: of the record writer
        if _damage(records) is None:  # another process was faster, where there are no locks
            return
        for path in (records, *records.parents):
            if path.is_file() and path.is_relative_to(cache_dir()):
                raise UserError(f"{path} is in the way of a folder: remove it") from error
        raise UserError(
            f"{folder}: cannot write the prepared dataset ({_reason(error)});"
            " set DENSE_JAX_CACHE to a writable folder with enough space"
        ) from error


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[None]:
    """Holds the lock of a folder; waits while another process prepares it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process prepares {folder}: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: the faster process wins
            pass
        yield


def _remove_unfinished(folder: pathlib.Path) -> None:
    """Removes what preparations left that were killed, here and in folders nobody prepares."""
    for path in folder.parent.glob("*/*/incomplete.*"):
        with contextlib.suppress(OSError), (path.parents[1] / ".lock").open("a") as file:
            if path.parents[1] != folder:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path)


def _write_digests(records: pathlib.Path) -> None:
    digests = {}
    for path in sorted(records.iterdir()):
        stat = path.stat()
        digests[path.name] = [_digest_of(path), stat.st_size, stat.st_mtime_ns]
    text = json.dumps(digests)
    digest = hashlib.blake2b(text.encode()).hexdigest()
    partial = records / f"{_DIGESTS}.tmp"
    partial.write_text(f"{digest}\n{text}\n")
    partial.replace(records / _DIGESTS)


def _damage(records: pathlib.Path) -> str | None:
    """Says what is wrong with a prepared dataset; None if nothing is.

    A large file with the size and the time of its preparation is not read: the record reader
    compares checksums of each block.
    """
    try:
        digest, text = (records / _DIGESTS).read_bytes().splitlines()
    except FileNotFoundError:
        return "is unfinished"
    except (OSError, ValueError):
        return f"is damaged ({_DIGESTS})"
    if hashlib.blake2b(text).hexdigest().encode() != digest:
        return f"is damaged ({_DIGESTS})"
    for name, (wanted, size, time) in json.loads(text).items():
        try:
            stat = (records / name).stat()
            known = size > _SMALL and (stat.st_size, stat.st_mtime_ns) == (size, time)
            if not known and _digest_of(records / name) != wanted:
                return f"is damaged ({name})"
        except OSError as error:
            return f"is damaged ({name}: {error.strerror})"
    return None


def _digest_of(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _reason(error: Exception) -> str:
    strerror = getattr(error, "strerror", None)
    return "No space left on device" if "No space left" in str(error) else strerror or str(error)


def _key(files: Files) -> str:
    """Returns a hash that changes when the files change, without reading them."""
    kept = [field.name for field in dataclasses.fields(SplitReport)]
    variant = (_VERSION, kept, files.classes, files.options)
    if "has_chosen_colours" in files.classes.to_json():  # not in repr, but labels must fit them
        variant += ("chosen colours",)
    if files.classes.keypoints is not None:  # not in repr either
        variant += (files.classes.keypoints,)
    if files.has_annotations:  # older records have masks alone
        variant += ("polygons",)
    state = hashlib.blake2b(repr(variant).encode(), digest_size=8)
    for pair in files.pairs:
        own = [path for path in (pair.image, pair.label, pair.objects) if path]
        paths, stamps = [str(path.resolve()) for path in own], tuple(map(_stamp, own))
        state.update(repr((pair.split, pair.name, paths, stamps)).encode())
    return state.hexdigest()


def _stamp(path: pathlib.Path) -> tuple | None:
    if path.is_dir():  # the masks of one image
        return tuple((inner.name, _stamp(inner)) for inner in sorted(path.iterdir()))
    with contextlib.suppress(OSError):
        stat = path.stat()
        # The last is set at each change of the content, and no program can set it back.
        return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
    return None
