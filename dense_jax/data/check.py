"""Checks a dataset: reads every file and reports errors and warnings.

Wrong data (a value that is not a class, a colour that no class has, damaged or missing files, sizes
that differ) stops a run: in JAX, a label out of range raises no error and only corrupts the loss.
Unusual data (classes that never occur, mostly void images, one image in two splits) is reported.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import tqdm

from dense_jax import viz
from dense_jax.data import dataset as dataset_lib
from dense_jax.data.classes import IGNORE_LABEL, ClassTable
from dense_jax.data.dataset import Dataset
from dense_jax.data.files import Files, NoClassError, Pair, Sample, digest
from dense_jax.data.pictures import turned_in_words
from dense_jax.errors import UserError, printable

_GENERATED_SAMPLE = 200
"""Number of examples that are checked in each split of a dataset without files."""


@dataclasses.dataclass
class SplitReport:
    """The findings of one split.

    Attributes:
      pixels: number of pixels of each class.
      void_pixels: number of void pixels.
      names, sizes, void_shares, image_digests, label_digests, num_objects: one for each valid
        image, in order; `num_objects` is empty without instances.
      orientations: of the images that viewers show turned, by name, as EXIF numbers them.
    """

    pixels: list[int]
    void_pixels: int = 0
    names: list[str] = dataclasses.field(default_factory=list)
    sizes: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    void_shares: list[float] = dataclasses.field(default_factory=list)
    image_digests: list[str] = dataclasses.field(default_factory=list)
    label_digests: list[str] = dataclasses.field(default_factory=list)
    num_objects: list[int] = dataclasses.field(default_factory=list)
    orientations: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Report:
    """The findings of all splits; `str` gives them as a table.

    Attributes:
      name: of the dataset.
      classes: its class table.
      splits: the findings of each split.
      errors: one line for each wrong file.
      values, colours: by error, all of a label that has some that are no class.
      notes: warnings of the dataset's own reader.
    """

    name: str
    classes: ClassTable
    splits: dict[str, SplitReport] = dataclasses.field(default_factory=dict)
    errors: list[str] = dataclasses.field(default_factory=list)
    values: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    colours: dict[str, list[list[int]]] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    def add(self, split: str, name: str, sample: Sample) -> None:
        """Adds one image and its label."""
        label = sample.label
        num_classes = self.classes.num_classes
        found = self.splits.setdefault(split, SplitReport([0] * num_classes))
        counts = np.bincount(label.ravel(), minlength=256)
        void = int(counts[IGNORE_LABEL])
        found.pixels = (counts[:num_classes] + found.pixels).tolist()
        found.void_pixels += void
        found.names.append(name)
        found.sizes.append((label.shape[0], label.shape[1]))
        found.void_shares.append(void / label.size)
        found.image_digests.append(sample.digest)
        found.label_digests.append(digest(label))
        if sample.orientation != 1:
            found.orientations[name] = sample.orientation
        if sample.annotations is not None:
            annotations = sample.annotations.to_json().encode()
            found.label_digests[-1] += digest(np.frombuffer(annotations, np.uint8))
            found.num_objects.append(len(sample.annotations))
        if sample.instances is not None:
            found.label_digests[-1] += digest(sample.instances)
            found.num_objects.append(int(np.count_nonzero(np.unique(sample.instances))))

    def add_error(self, error: UserError) -> None:
        """Adds a wrong file."""
        self.errors.append(str(error))
        if isinstance(error, NoClassError) and error.values:
            self.values[str(error)] = error.values
        if isinstance(error, NoClassError) and error.colours:
            self.colours[str(error)] = [list(colour) for colour in error.colours]

    @property
    def fingerprint(self) -> str:
        """A hash of the class table, the names, and the pixels of images and labels."""
        content = self.to_json()
        # Of wrong files, which no run has, and of what is left out.
        del content["values"], content["colours"], content["notes"]
        content["classes"].pop("has_chosen_colours", None)  # the labels are the same
        for found in content["splits"].values():
            del found["orientations"]  # not applied; runs of before this was noted go on
        return hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()

    def warnings(self) -> list[str]:
        """Returns one line for each finding that is unusual but may be intended."""
        lines = turned_in_words(
            {
                f"{split}/{name}": number
                for split, found in self.splits.items()
                for name, number in found.orientations.items()
            }
        )
        lines += self.notes
        if self.classes.num_classes == 1:
            lines.append("one class: nothing can be learned; add a class for the rest")
        for split, found in self.splits.items():
            absent = [n for n, k in zip(self.classes.names, found.pixels, strict=True) if not k]
            if absent:
                lines.append(f"{split}: no pixel of {', '.join(absent)}")
            void = [n for n, s in zip(found.names, found.void_shares, strict=True) if s == 1]
            if void:
                lines.append(
                    f"{split}: images without labelled pixels: {len(void)}, such as {void[0]}"
                )
        if not self.errors and (table := self.fitting_table()):
            void = sum(found.void_pixels for found in self.splits.values())
            share = void / (void + sum(sum(found.pixels) for found in self.splits.values()))
            lines.append(
                f"{share:.0%} of the pixels are void (file value"
                f" {', '.join(map(str, self.classes.void_values))}), and not all classes occur; if"
                f" void is none here, write classes.json: {table.as_file()}"
            )
        first: dict[str, str] = {}
        twins = []
        for split, found in self.splits.items():
            for name, pixels in zip(found.names, found.image_digests, strict=True):
                here, there = f"{split}/{name}", first.setdefault(pixels, f"{split}/{name}")
                if there != here:
                    twins.append(f"{here} has the same pixels as {there}: remove one of them")
        more = [f"{len(twins) - 10} more pairs of images with the same pixels"]
        lines += twins[:10] + (more if len(twins) > 10 else [])
        return [printable(line, 10_000) for line in lines]

    def fitting_table(self) -> ClassTable | None:
        """Returns a likely class table of the user's labels if the present one does not fit."""
        if self.name != "folder":
            return None  # the dataset has its own
        seen = {value for values in self.values.values() for value in values}
        for found in self.splits.values():
            seen |= {v for v, k in zip(self.classes.values, found.pixels, strict=True) if k}
            seen |= set(self.classes.void_values[:1]) if found.void_pixels else set()
        colours = {(r, g, b) for found in self.colours.values() for r, g, b in found}
        try:
            return self.classes.for_colours(colours) if colours else self.classes.for_values(seen)
        except ValueError:  # more than a table holds
            return None

    def errors_by_cause(self, number: int = 10) -> list[str]:
        """Returns at most ``number`` lines that stand for all errors, and the remedy."""
        groups: dict[str, list[str]] = {}
        for error in self.errors:
            foreign = [kind for kind in ("values", "colours") if error in getattr(self, kind)]
            groups.setdefault(foreign[0] if foreign else _cause(error), []).append(error)
        lines = []
        for errors in groups.values():
            if len(errors) == 1:
                lines += errors
            elif errors[0] in self.values:
                lines.append(self._foreign_values(errors))
            else:
                lines.append(f"{len(errors)} files, such as {errors[0]}")
        if len(lines) > number:
            rest = len(lines) - number + 1
            lines[number - 1 :] = [f"and files that are wrong in {rest} other ways"]
        if (self.values or self.colours) and (table := self.fitting_table()):
            fits = (
                f"to read them, write, with the right names, this classes.json: {table.as_file()}"
            )
            lines.append(printable(fits, 10_000))
        return lines

    def _foreign_values(self, errors: list[str]) -> str:
        known = {*self.classes.values, *self.classes.void_values}
        files = collections.Counter(v for e in errors for v in self.values[e] if v not in known)
        shown = ", ".join(f"{value}: {count}" for value, count in files.most_common(10))
        return (
            f"{len(errors)} labels hold values that are no class (files by value: {shown}"
            f"{', ...' if len(files) > 10 else ''}), such as {errors[0]}"
        )

    def mostly_void(self, number: int = 10) -> list[str]:
        """Returns one line for each image with the largest void shares, if above half."""
        shares = [
            (share, f"{split}/{name}: {share:.0%} of the pixels are void")
            for split, found in self.splits.items()
            for name, share in zip(found.names, found.void_shares, strict=True)
            if share > 0.5
        ]
        return [printable(line) for _, line in sorted(shares, reverse=True)[:number]]

    def raise_if_broken(self) -> None:
        """Stops a run on wrong data.

        Raises:
          UserError: with the first wrong file and the number of others.
        """
        if self.errors:
            more = len(self.errors) - 1
            rest = f" ({more} more; python -m dense_jax check-data lists them)" if more else ""
            raise UserError(self.errors[0] + rest)

    def to_json(self) -> dict[str, Any]:
        """Returns the findings as plain lists; `from_json` reads them."""
        return {**dataclasses.asdict(self), "classes": self.classes.to_json()}

    @classmethod
    def from_json(cls, report: dict[str, Any]) -> "Report":
        """Builds a report from the result of `to_json`."""
        splits = {split: SplitReport(**found) for split, found in report["splits"].items()}
        for found in splits.values():
            found.sizes = [(height, width) for height, width in found.sizes]
        classes = ClassTable.from_json(report["classes"])
        foreign = {key: report[key] for key in ("values", "colours", "notes") if key in report}
        return cls(report["name"], classes, splits, report["errors"], **foreign)

    def __str__(self) -> str:
        rows = [["", *self.splits]]
        for i, name in enumerate(self.classes.names):
            shares = (found.pixels[i] / max(1, sum(found.pixels)) for found in self.splits.values())
            rows.append([f"{i:3} {name}", *(f"{share:.2%}" for share in shares)])
        for title, values in (
            ("void", (f"{np.mean(s.void_shares):.2%}" for s in self.splits.values())),
            ("images", (str(len(s.names)) for s in self.splits.values())),
        ):
            rows.append([f"    {title}", *values])
        if any(found.num_objects for found in self.splits.values()):
            rows.append(["    objects", *(str(sum(s.num_objects)) for s in self.splits.values())])
        wide = max(len(row[0]) for row in rows) + 2
        lines = [f"dataset {self.name}: share of pixels by class (without void)"]
        lines += [row[0].ljust(wide) + "".join(cell.rjust(10) for cell in row[1:]) for row in rows]
        for title, found in (
            (f"{len(self.errors)} wrong files", self.errors_by_cause()),
            ("warnings", self.warnings()),
            ("mostly void", self.mostly_void()),
        ):
            lines += [f"{title}:", *(f"  {line}" for line in found)] if found else []
        return "\n".join(lines if self.errors else [*lines, "no errors"])


def _cause(error: str) -> str:
    """Returns what is the same in all lines of a cause: no path, no name and no number."""
    path, _, reason = error.partition(": ")
    return re.sub(r"\d+", "", reason.replace(pathlib.Path(path).stem, ""))


def scan(files: Files, report: Report, split: str) -> Iterator[tuple[Pair, Sample]]:
    """Reads the pairs of a split in order, adds all to the report and yields the valid ones.

    On all cores: threads are enough, because Pillow releases Python's lock to decode.
    """
    pairs = [pair for pair in files.pairs if pair.split == split]
    progress = tqdm.tqdm(desc=f"checking {files.name} {split}", total=len(pairs), disable=None)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool, progress:
        for i in range(0, len(pairs), 64):  # chunks, to limit the memory
            chunk = pairs[i : i + 64]
            read = [pool.submit(files.read, pair, files.classes) for pair in chunk]
            for pair, future in zip(chunk, read, strict=True):
                progress.update()
                try:
                    sample = future.result()
                except UserError as error:
                    report.add_error(error)
                    continue
                report.add(split, pair.name, sample)
                yield pair, sample


def check_dataset(name: str, data_dir: str | pathlib.Path | None = None, **options: Any) -> Report:
    """Checks every file of a dataset, or what it generates, without preparing it.

    Args:
      name: one of `dataset.names()`.
      data_dir: the folder with its files.
      **options: see `dataset.load`.

    Raises:
      UserError: the name is unknown, or the folder has no dataset. Wrong files are in the report.
    """
    module = dataset_lib.module(name)
    if hasattr(module, "find"):
        files = module.find(dataset_lib.folder(data_dir), **options)
        report = Report(name, files.classes, notes=list(files.notes))
        for split in files.splits:
            collections.deque(scan(files, report, split), maxlen=0)
        return report
    dataset = dataset_lib.load(name, data_dir, **options)
    report = Report(name, dataset.classes)
    for split, source in dataset.splits.items():
        for i in range(min(len(source), _GENERATED_SAMPLE)):
            example = source[i]
            label, instances = example["label"], example.get("instances")
            sample = Sample(b"", label, digest(example["image"]), instances)
            report.add(split, example["name"], sample)
    return report


def sheet(dataset: Dataset, split: str = "train", number: int = 12) -> np.ndarray:
    """Returns evenly chosen images with their labels on top and a legend, uint8 [H, W, 3].

    It shows at a glance whether the labels are in the right position and have the right names.
    """
    source, palette = dataset.split(split), dataset.classes.palette()
    picked = np.unique(np.linspace(0, len(source) - 1, number).astype(int))
    examples = [source[int(i)] for i in picked]
    overlays = [viz.overlay(e["image"], e["label"], palette) for e in examples]
    parts = [viz.contact_sheet(overlays, columns=4), viz.legend(dataset.classes.names, palette)]
    width = max(part.shape[1] for part in parts)
    return np.concatenate(
        [
            np.pad(part, ((0, 0), (0, width - part.shape[1]), (0, 0)), constant_values=255)
            for part in parts
        ]
    )
