"""Image and label files, checked once and packed into array records by TFDS.

TFDS runs without TensorFlow here: images keep their encoding, Pillow decodes them, and
`as_data_source` reads any record directly. The key of the cache is the class table and the names,
sizes and times of the files, so changed files are checked and prepared again. Labels and instances
are stored as 8-bit and 16-bit PNG, which is lossless.
"""

import contextlib
import dataclasses
import hashlib
import io
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from dense_jax.data.check import Report, SplitReport, scan
from dense_jax.data.dataset import Dataset, Example
from dense_jax.data.files import (
    Files,
    decode_image,
    decode_instances,
    decode_label,
    encode_instances,
    encode_label,
)
from dense_jax.errors import UserError

_VERSION = "1.0.0"  # of the content of a record
_ENCODED = ("image", "label", "instances")


class _Builder(tfds.core.GeneratorBasedBuilder):
    """Packs `Files`; reads and checks every file completely."""

    VERSION = tfds.core.Version(_VERSION)

    def __init__(self, files: Files, data_dir: pathlib.Path):
        self.name, self._files = files.name, files
        self._report = Report(files.name, files.classes)
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.Image(shape=(None, None, 1)),  # class ids, as PNG
            "name": tfds.features.Text(),
        }
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
            record = {"image": sample.image, "label": label, "name": pair.name}
            if sample.instances is not None:
                record["instances"] = encode_instances(sample.instances)
            yield i, record
        self._report.raise_if_broken()
        self.info.metadata.update(self._report.to_json())  # saved with the records


@dataclasses.dataclass(frozen=True)
class Records:
    """One prepared split as a random-access source."""

    records: Any
    sizes: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.sizes)

    def size(self, index: int) -> tuple[int, int]:
        """Returns the height and width, stored by the preparation."""
        height, width = self.sizes[index]
        return height, width

    def __getitem__(self, index: int) -> Example:
        record = self.records[index]
        name = record["name"].decode()
        example = {
            "image": decode_image(record["image"], name),
            "label": decode_label(record["label"]),
            "name": name,
        }
        if "instances" in record:
            example["instances"] = decode_instances(record["instances"])
        return example


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
    if not records.exists():
        _prepare(files, folder, records)
    # Unlike `_Builder`, this one can be pickled for worker processes.
    reader: Any = tfds.builder_from_directory(records)
    report = Report.from_json(reader.info.metadata)
    raw = {key: tfds.decode.SkipDecoding() for key in _ENCODED if key in reader.info.features}
    splits = {
        split: Records(reader.as_data_source(split, decoders=raw), found.sizes)
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
    )


def _prepare(files: Files, folder: pathlib.Path, records: pathlib.Path) -> None:
    """Fills ``folder``; at the very end, TFDS moves the finished files to ``records``."""
    tfds.disable_progress_bar()  # `scan` has its own
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints what it does
            _Builder(files, folder).download_and_prepare()
    except (OSError, RuntimeError) as error:  # RuntimeError: of the record writer
        if records.exists():  # another process was faster
            return
        raise UserError(
            f"{folder}: cannot write the prepared dataset ({_reason(error)});"
            " set DENSE_JAX_CACHE to a writable folder with enough space"
        ) from error


def _reason(error: Exception) -> str:
    strerror = getattr(error, "strerror", None)
    return "No space left on device" if "No space left" in str(error) else strerror or str(error)


def _key(files: Files) -> str:
    """Returns a hash that changes when the files change, without reading them."""
    kept = [field.name for field in dataclasses.fields(SplitReport)]
    variant = (_VERSION, kept, files.classes, files.options)
    state = hashlib.blake2b(repr(variant).encode(), digest_size=8)
    for pair in files.pairs:
        paths = [str(path.resolve()) for path in (pair.image, pair.label)]
        stamps = _stamp(pair.image), _stamp(pair.label)
        state.update(repr((pair.split, pair.name, paths, stamps)).encode())
    return state.hexdigest()


def _stamp(path: pathlib.Path) -> tuple | None:
    if path.is_dir():  # the masks of one image
        return tuple((inner.name, _stamp(inner)) for inner in sorted(path.iterdir()))
    with contextlib.suppress(OSError):
        stat = path.stat()
        return stat.st_size, stat.st_mtime_ns
    return None
