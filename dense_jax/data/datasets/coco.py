"""Images in COCO's layout: a JSON file of object annotations for each split.

T.-Y. Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014, arXiv:1405.0312;
https://cocodataset.org/#format-data. Your own data can have this layout too:

  annotations/instances_train2017.json, train2017/   COCO's own; also of 2014, and without a year
  train/_annotations.coco.json, train/, valid/, ...  as several labelling tools export it
  train.json, val.json, and images/ or the images beside them
  --train-json=FILE, --val-json=FILE                 any other names

The class ids are 1, 2, ... in the order of the category ids, after 0, the background. The label map
of an image shows its objects by area, the largest first, so that small ones stay visible. Where
categories name keypoints (COCO's person_keypoints_train2017.json), objects have them too.
"""

import collections
import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dense_jax.data import files as files_lib
from dense_jax.data import prepared, rle
from dense_jax.data.classes import IGNORE_LABEL, ClassTable
from dense_jax.data.dataset import Dataset
from dense_jax.data.files import Files, Pair, Sample
from dense_jax.data.keypoints import Keypoints, KeypointTable, from_coco
from dense_jax.data.objects import Objects
from dense_jax.data.polygons import Polygons
from dense_jax.errors import UserError, refuse
from dense_jax.ops import boxes as box_ops

_FILES = {
    "train": ("annotations/instances_train2017.json", "annotations/instances_train2014.json",
              "annotations/instances_train.json", "annotations/train.json",
              "train/_annotations.coco.json", "train.json"),
    "val": ("annotations/instances_val2017.json", "annotations/instances_val2014.json",
            "annotations/instances_val.json", "annotations/val.json",
            "valid/_annotations.coco.json", "val/_annotations.coco.json", "val.json"),
    "test": ("annotations/instances_test.json", "test/_annotations.coco.json", "test.json"),
}  # fmt: skip
_POINTS = 3  # Fewest points of a polygon.


def find(
    data_dir: pathlib.Path | None = None,
    *,
    train_json: str | None = None,
    val_json: str | None = None,
) -> Files:
    """Finds the annotations and the images of each split.

    Annotations that cannot be used are left out, and a warning counts them: of images or categories
    that the file does not list, and boxes without an area inside of their image. An object whose
    polygons are missing or have fewer than three points gets its box as its mask, which a warning
    counts too.

    Args:
      data_dir: a folder in one of the layouts above.
      train_json: annotations of train, in `data_dir` or anywhere.
      val_json: annotations of val.

    Raises:
      UserError: a file is missing or is not in COCO's format, or the files have other categories.
    """
    given = {"train": train_json, "val": val_json}
    if data_dir is None and not all(given.values()):
        raise UserError(
            "coco has no automatic download; get https://images.cocodataset.org/zips/"
            "train2017.zip, val2017.zip and annotations/annotations_trainval2017.zip, unpack them "
            "in one folder and give it with --data-dir"
        )
    parts = {
        split: _Part.read(split, path, data_dir or path.parent)
        for split, path in _find_files(data_dir, given).items()
    }
    first = parts["train"]
    for part in parts.values():
        if part.categories != first.categories:
            other = set(part.categories.items()) ^ set(first.categories.items())
            raise UserError(
                f"{part.path}: other categories than in {first.path} (such as {min(other)}): give "
                "files with the same ids and names"
            )
        refuse(
            part.keypoints != first.keypoints,
            f"{part.path}: other keypoints than in {first.path}: give files with the same names "
            "and lines",
        )
    names = ("background", *first.categories.values())
    try:
        classes = ClassTable(names, keypoints=first.keypoints)
    except ValueError as error:
        raise UserError(f"{first.path}: its categories are no class table ({error})") from None
    points = f" with {len(first.keypoints)} keypoints" if first.keypoints else ""
    return Files(
        "coco",
        classes,
        [pair for part in parts.values() for pair in part.pairs],
        f"{len(first.categories)} categories{points} in COCO's format, {first.path.name}",
        functools.partial(_read, {split: part.objects for split, part in parts.items()}),
        has_annotations=True,
        category_ids=(0, *first.categories),
        notes=[note for part in parts.values() for note in part.notes],
    )


def _find_files(
    root: pathlib.Path | None, given: Mapping[str, str | None]
) -> dict[str, pathlib.Path]:
    found = {}
    for split, candidates in _FILES.items():
        if own := given.get(split):
            path = pathlib.Path(own).expanduser()
            found[split] = path if path.is_absolute() or not root else root / path
            refuse(not found[split].is_file(), f"--{split}-json={own}: {found[split]} is missing")
        elif root and not (split == "test" and any(given.values())):
            existing = [root / name for name in candidates if (root / name).is_file()]
            if existing:
                found[split] = existing[0]
    for split in ("train", "val"):
        if split not in found:
            raise UserError(
                f"{root}: no annotations of {split} here (looked for {', '.join(_FILES[split])}); "
                f"give the file with --{split}-json"
            )
    return found


@dataclasses.dataclass(frozen=True)
class _Entry:
    """The objects of one image, with its number and size as annotated."""

    image_id: int
    size: tuple[int, int]
    annotations: list[dict[str, Any]]


class _Objects(NamedTuple):
    """What `_read` needs of a split.

    Attributes:
      entries: images by name.
      class_of: class ids by the ids of categories.
      has_polygons: whether all objects but crowds have polygons, or their boxes as masks.
    """

    entries: Mapping[str, _Entry]
    class_of: Mapping[int, int]
    has_polygons: bool


@dataclasses.dataclass
class _Part:
    """One split: the images of a JSON file and their objects, by name."""

    path: pathlib.Path
    categories: dict[int, str]
    pairs: list[Pair]
    objects: _Objects
    keypoints: KeypointTable | None
    notes: list[str]

    @classmethod
    def read(cls, split: str, path: pathlib.Path, root: pathlib.Path) -> "_Part":
        try:
            content = json.loads(files_lib.read_text(path))
            content["images"][0]["file_name"]  # anything else is reported below
        except (ValueError, RecursionError, TypeError, KeyError, IndexError) as error:
            reason = "no images" if isinstance(error, KeyError | IndexError) else error
            raise UserError(
                f"{path}: not annotations in COCO's format ({reason}): it needs images, "
                "annotations and categories"
            ) from None
        try:
            return cls._parse(split, path, root, content)
        except (KeyError, TypeError, ValueError) as error:
            what = f"an entry has no {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{path}: not in COCO's format ({what}): correct it") from None

    @classmethod
    def _parse(
        cls, split: str, path: pathlib.Path, root: pathlib.Path, content: dict[str, Any]
    ) -> "_Part":
        categories = _unique(
            path, "category", ((c["id"], c["name"]) for c in content["categories"])
        )
        refuse(not categories, f"{path}: no categories: add those of its annotations")
        class_of = {category: i for i, category in enumerate(sorted(categories), 1)}
        keypoints = _keypoint_table(path, content["categories"], class_of)
        for image in content["images"]:
            file = pathlib.PurePosixPath(image["file_name"])
            refuse(
                file.is_absolute() or ".." in file.parts,
                f"{path}: file_name {str(file)!r} leaves the folder of the images: correct it",
            )
        folder = _image_folder(path, root, content["images"])
        entries: dict[str, _Entry] = {}
        by_id: dict[int, _Entry] = {}
        pairs = []
        for image in content["images"]:
            file = pathlib.PurePosixPath(image["file_name"])
            name = str(file.with_suffix(""))
            entry = _Entry(int(image["id"]), (int(image["height"]), int(image["width"])), [])
            refuse(entry.image_id in by_id, f"{path}: two images have the id {image['id']}")
            refuse(name in entries, f"{path}: two images are named {name}: rename one")
            entries[name] = by_id[entry.image_id] = entry
            pairs.append(Pair(split, name, folder / file, path))
        counts: collections.Counter[str] = collections.Counter()
        if "annotations" not in content:
            counts["no list of annotations: its images are taken to show no object"] += 1
        seen: set[Any] = set()
        for annotation in content.get("annotations") or ():
            entry = by_id.get(annotation["image_id"])
            if entry is None:
                counts["annotations of images that it does not list, left out"] += 1
            elif annotation["category_id"] not in class_of:
                counts["annotations of categories that it does not list, left out"] += 1
            else:
                if "id" in annotation:
                    counts["annotations with the id of another one"] += annotation["id"] in seen
                    seen.add(annotation["id"])
                for reason in _flaws(annotation, entry.size, len(keypoints or ())):
                    counts[reason] += 1
                entry.annotations.append(annotation)
        notes = [f"{split}: {count} {reason}" for reason, count in counts.items() if count]
        empty = [name for name, entry in entries.items() if not entry.annotations]
        if empty and "annotations" in content:
            notes.append(f"{split}: {len(empty)} images without objects, such as {empty[0]}")
        ordered = {category: categories[category] for category in sorted(categories)}
        drawn = [
            isinstance(annotation.get("segmentation"), Mapping)
            for entry in entries.values()
            for annotation in entry.annotations
            if not annotation.get("iscrowd")
        ]
        if any(drawn) and not all(drawn):
            notes.append(
                f"{split}: {sum(drawn)} objects have run-length codes, others polygons: masks "
                "train as bitmaps"
            )
        objects = _Objects(entries, class_of, not any(drawn))
        return cls(path, ordered, pairs, objects, keypoints, notes)


def _keypoint_table(
    path: pathlib.Path, categories: Sequence[Mapping[str, Any]], class_of: Mapping[int, int]
) -> KeypointTable | None:
    """Returns the keypoints that categories name; those of all that have any must be the same."""
    table, classes = None, []
    for category in categories:
        if not category.get("keypoints"):
            continue
        try:
            edges = [(int(a) - 1, int(b) - 1) for a, b in category.get("skeleton") or ()]
            own = KeypointTable(category["keypoints"], edges)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the keypoints of {category['name']}: {error}") from None
        refuse(
            table is not None and own != table,
            f"{path}: the keypoints of {category['name']} differ from those of other categories: "
            "give a file for each",
        )
        table = own
        classes.append(class_of[category["id"]])
    return table and dataclasses.replace(table, classes=sorted(classes))


def _unique(path: pathlib.Path, kind: str, items: Any) -> dict[int, str]:
    found: dict[int, str] = {}
    for number, name in items:
        refuse(number in found, f"{path}: two {kind} entries have the id {number}: correct one")
        found[int(number)] = str(name)
    return found


def _image_folder(
    path: pathlib.Path, root: pathlib.Path, images: Sequence[Mapping[str, Any]]
) -> pathlib.Path:
    """Returns the first folder that holds an image of a JSON file."""
    name = path.stem.removeprefix("instances_").removeprefix("person_keypoints_")
    folders = [root / name, root / "images" / name, root / "images", path.parent, root]
    for folder in folders:
        if any((folder / image["file_name"]).is_file() for image in images[:20]):
            return folder
    raise UserError(
        f"{path}: its images, such as {images[0]['file_name']}, are in none of "
        f"{', '.join(dict.fromkeys(map(str, folders)))}; put them in {folders[0]}"
    )


def _flaws(annotation: Mapping[str, Any], size: tuple[int, int], num_keypoints: int) -> list[str]:
    """Returns what is wrong with an annotation, in words that count."""
    box = _box(annotation, size)
    if box is None:
        return ["boxes without an area inside of their image, left out"]
    flaws = []
    x, y, width, height = annotation.get("bbox") or (0, 0, 0, 0)
    if min(x, y) < -1 or x + width > size[1] + 1 or y + height > size[0] + 1:
        flaws.append("boxes that leave their image, cut at its edges")
    if not _has_mask(annotation):
        flaws.append("objects without a polygon of three points: their boxes are their masks")
    return flaws + (_keypoint_flaws(annotation, size, num_keypoints) if num_keypoints else [])


def _keypoint_flaws(annotation: Mapping[str, Any], size: tuple[int, int], count: int) -> list[str]:
    try:
        points = from_coco(annotation.get("keypoints") or [0] * 3 * count, count)
    except (ValueError, TypeError):
        return []  # an error where the image is read
    labelled = points[points[:, 2] > 0, :2]
    flaws = []
    if not ((labelled >= 0) & (labelled <= (size[1], size[0]))).all():
        flaws.append("objects with keypoints outside of their image")
    if annotation.get("num_keypoints", len(labelled)) != len(labelled):
        flaws.append("objects whose num_keypoints is not the number of labelled ones, which counts")
    return flaws


def _has_mask(annotation: Mapping[str, Any]) -> bool:
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, Mapping):
        return True
    return any(len(polygon) >= 2 * _POINTS for polygon in segmentation or ())


def _box(annotation: Mapping[str, Any], size: tuple[int, int]) -> np.ndarray | None:
    """Returns the box of an annotation inside of its image, or None if nothing is."""
    if "bbox" in annotation:
        x, y, width, height = map(float, annotation["bbox"])
        box = np.array([x, y, x + width, y + height])
    elif _has_mask(annotation):
        box = rle.to_box(_mask(annotation, size))
    else:
        return None
    if not all(map(math.isfinite, box)):
        return None
    box = box_ops.clip(np.asarray(box, np.float32), size)
    return box if box_ops.min_side(box) > 0 else None


def _mask(annotation: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Returns the mask of an annotation as run-length codes."""
    segmentation = annotation["segmentation"]
    if isinstance(segmentation, Mapping):
        if tuple(segmentation["size"]) != size:
            raise ValueError(f"a mask of {segmentation['size']} on an image of {list(size)}")
        counts = segmentation["counts"]
        if isinstance(counts, list) and sum(counts) != math.prod(size):
            raise ValueError(f"runs of {sum(counts)} pixels on an image of {math.prod(size)}")
        return rle.encode(rle.decode(segmentation))
    return rle.from_polygons(_long_enough(segmentation), *size)


def _polygons(annotation: Mapping[str, Any], box: np.ndarray) -> list[list[float]]:
    """Returns the polygons of an annotation without run lengths, or else its box as one."""
    if _has_mask(annotation):
        return _long_enough(annotation["segmentation"])
    x0, y0, x1, y1 = box.tolist()
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


def _long_enough(polygons: Sequence[list[float]]) -> list[list[float]]:
    return [polygon for polygon in polygons if len(polygon) >= 2 * _POINTS]


def _read(
    objects: Mapping[str, _Objects],
    pair: Pair,
    classes: ClassTable,
) -> Sample:
    """Reads an image, and draws its objects as a label map."""
    entries, class_of, has_polygons = objects[pair.split]
    entry = entries[pair.name]
    data, image = files_lib.read_image(pair.image)
    height, width = image.pixels.shape[:2]
    if (height, width) != entry.size:
        raise UserError(
            f"{pair.image}: {width}x{height} pixels, but {pair.label.name} says "
            f"{entry.size[1]}x{entry.size[0]}; correct one"
        )
    rows, points, outlines = [], [], []
    for annotation in entry.annotations:
        box = _box(annotation, entry.size)
        if box is None:
            continue
        try:
            mask = (
                _mask(annotation, entry.size) if _has_mask(annotation) else _filled(box, entry.size)
            )
        except (ValueError, KeyError, TypeError, IndexError) as error:
            number = annotation.get("id")
            raise UserError(
                f"{pair.label}: the segmentation of annotation {number} ({pair.name}) cannot be "
                f"read ({error}); correct it"
            ) from None
        if classes.keypoints is not None:
            points.append(_points(annotation, len(classes.keypoints), pair))
        area = float(annotation.get("area") or rle.area(mask))
        is_crowd = bool(annotation.get("iscrowd", 0))
        number = int(annotation.get("id", 0))
        rows.append((box, class_of[annotation["category_id"]], number, is_crowd, area, mask))
        outlines.append([] if is_crowd or not has_polygons else _polygons(annotation, box))
    boxes, ids, numbers, crowd, areas, masks = zip(*rows, strict=True) if rows else ((),) * 6
    found = Objects(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(ids, np.int32),
        np.array(numbers, np.int64),
        np.array(crowd, bool),
        np.array(areas, np.float32),
        list(masks),
        polygons=Polygons.from_json(outlines) if has_polygons else None,
    )
    if (table := classes.keypoints) is not None:
        stacked = np.array(points, np.float32).reshape(-1, len(table), 3)
        found = dataclasses.replace(found, keypoints=Keypoints(stacked, table.mirror))
    label = label_map(found, entry.size)
    digest = files_lib.digest(image.pixels)
    return Sample(
        data,
        label,
        digest,
        orientation=image.orientation,
        annotations=found,
        image_id=entry.image_id,
    )


def _points(annotation: Mapping[str, Any], count: int, pair: Pair) -> np.ndarray:
    """Returns the keypoints of an annotation, float32 [K, 3]; without any, none is labelled."""
    numbers = annotation.get("keypoints")
    if not numbers:
        return np.zeros((count, 3), np.float32)
    try:
        return from_coco(numbers, count)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{pair.label}: the keypoints of annotation {annotation.get('id')} ({pair.name}) "
            f"cannot be read ({error}); correct them"
        ) from None


def _filled(box: np.ndarray, size: tuple[int, int]) -> dict[str, Any]:
    x0, y0, x1, y1 = (int(edge) for edge in np.rint(box))
    mask = np.zeros(size, bool)
    mask[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)] = True
    return rle.encode(mask)


def label_map(objects: Objects, size: tuple[int, int]) -> np.ndarray:
    """Returns class ids, uint8 [H, W]: objects painted by area, the largest first."""
    label = np.zeros(size, np.uint8)
    for i in np.argsort(-objects.areas, kind="stable"):
        label[objects.mask(int(i))] = objects.classes[i]
    assert label.max(initial=0) < IGNORE_LABEL
    return label


def load(
    data_dir: pathlib.Path | None = None,
    *,
    train_json: str | None = None,
    val_json: str | None = None,
) -> Dataset:
    """Opens images in COCO's layout; see `find`."""
    return prepared.open_files(find(data_dir, train_json=train_json, val_json=val_json))
