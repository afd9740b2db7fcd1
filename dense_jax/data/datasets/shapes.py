"""Generated images of solid shapes on a textured background: a dataset without files.

Each example is a function of (seed, split, index). The code only uses correctly rounded arithmetic
on NumPy's documented random bits, so all machines and all processes draw the same pixels.
"""

import colorsys
import dataclasses
import functools
import hashlib
import math
import pathlib
from typing import Any

import numpy as np

from dense_jax.data.classes import IGNORE_LABEL, ClassTable
from dense_jax.data.dataset import Dataset, Example
from dense_jax.data.keypoints import Keypoints, KeypointTable
from dense_jax.errors import UserError

# The tips of a star, each in its fifth of the directions around the centre; the names go clockwise.
TIPS = KeypointTable(
    ("top", "upper right", "lower right", "lower left", "upper left"),
    ((0, 2), (2, 4), (4, 1), (1, 3), (3, 0)),
    classes=(4,),
)
CLASSES = ClassTable(
    names=("background", "disc", "square", "triangle", "star", "ring"),
    colours=(
        (38, 38, 46),
        (230, 85, 70),
        (245, 190, 65),
        (95, 185, 95),
        (70, 140, 220),
        (170, 105, 205),
    ),
    keypoints=TIPS,
)
_SPLITS = ("train", "val", "test")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapesSpec:
    """Content and difficulty of the images.

    Attributes:
      size: height and width in pixels.
      num_train: number of training examples; likewise ``num_val``, ``num_test``.
      num_objects: smallest and largest number of objects in an image; later objects may occlude
        earlier ones.
      radius: smallest and largest radius of an object, as a share of the image's shorter side.
      occlusion: 0 keeps objects apart, 1 lets them overlap anywhere.
      contrast: 0 draws objects in the colours of the background, 1 in their own.
      hue_spread: largest difference of an object's hue from that of its class, in turns; with 0.5
        the colour carries no information about the class.
      noise: amplitude of the pixel noise, as a share of the full range.
      void_border: half width in pixels of the void band on outlines, as in PASCAL VOC.
      seed: another seed gives another dataset of the same kind.
    """

    size: tuple[int, int] = (96, 96)
    num_train: int = 4000
    num_val: int = 200
    num_test: int = 200
    num_objects: tuple[int, int] = (2, 5)
    radius: tuple[float, float] = (0.13, 0.26)
    occlusion: float = 0.4
    contrast: float = 1.0
    hue_spread: float = 0.12
    noise: float = 0.08
    void_border: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if min(self.size) < 1 or min(self.num_train, self.num_val, self.num_test) < 0:
            raise UserError(f"shapes: sizes and counts must be positive, got {self}")
        if not 0 <= self.num_objects[0] <= self.num_objects[1] <= 254:
            raise UserError(f"shapes: num_objects={self.num_objects} is not a range in 0..254")


@dataclasses.dataclass(frozen=True)
class Shapes:
    """One split as a random-access source; see `ShapesSpec`."""

    spec: ShapesSpec
    split: str

    def __len__(self) -> int:
        return getattr(self.spec, f"num_{self.split}")

    def size(self, index: int) -> tuple[int, int]:
        """Returns the height and width, the same for all."""
        del index
        return self.spec.size

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        rng = np.random.default_rng([self.spec.seed, _SPLITS.index(self.split), index])
        example = draw(self.spec, rng)
        return {**example, "name": f"{self.split}_{index:05d}"}


def draw(spec: ShapesSpec, rng: np.random.Generator) -> Example:
    """Draws one example.

    Returns:
      uint8 "image" [H, W, 3], uint8 "label" [H, W], int32 "instances" [H, W], 0 = background, and
      the "keypoints" of each of their numbers: the tips of stars.
    """
    image = _ground(spec.size, rng)
    label = np.zeros(spec.size, np.uint8)
    instances = np.zeros(spec.size, np.int32)
    rows, columns = np.ogrid[: spec.size[0], : spec.size[1]]
    points = [np.zeros((len(TIPS), 3), np.float32)]
    for number, (y, x, radius) in enumerate(_places(spec, rng), 1):
        kind = int(rng.integers(1, CLASSES.num_classes))
        angle = 2 * math.pi * rng.random()
        # The first six digits of sine and cosine are the same in every mathematics library.
        cos, sin = round(math.cos(angle), 6), round(math.sin(angle), 6)
        u = cos * (columns - x) + sin * (rows - y)
        v = cos * (rows - y) - sin * (columns - x)
        outside = _distance(kind, u, v, radius)
        paint = _paint(spec, kind, u, v, outside, radius, rng)
        # A soft dark rim separates the object from a background of any colour.
        image *= 1 - 0.4 * np.clip(1 - outside / 4, 0, 1)[..., None]
        cover = spec.contrast * np.clip(0.5 - outside, 0, 1)[..., None]
        image += cover * (paint - image)
        inside = outside < 0
        label[inside], instances[inside] = kind, number
        label[np.abs(outside) < spec.void_border] = IGNORE_LABEL
        points.append(_tips(kind, (y, x), (cos, sin), radius))
    image += spec.noise * (rng.random(image.shape) - 0.5)
    return {
        "image": (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8),
        "label": label,
        "instances": instances,
        "keypoints": Keypoints(_seen(np.stack(points), instances), TIPS.mirror),
    }


def _tips(
    kind: int, centre: tuple[float, float], turn: tuple[float, float], radius: float
) -> np.ndarray:
    """Returns the tips of a star, float32 [5, 3], or zeros for another shape."""
    points = np.zeros((len(TIPS), 3), np.float32)
    if CLASSES.names[kind] != "star":
        return points
    (y, x), (cos, sin) = centre, turn
    # Two of the five lines that are not neighbours cross there; a tenth less is inside of the star.
    reach = 0.9 * 0.42 * radius / round(math.cos(math.pi * 2 / 5), 6)
    for k in range(5):
        angle = 2 * math.pi * k / 5
        u, v = reach * round(math.cos(angle), 6), reach * round(math.sin(angle), 6)
        right, down = cos * u - sin * v, sin * u + cos * v
        place = round(math.atan2(right, -down) * 5 / (2 * math.pi)) % 5
        points[place] = x + right + 0.5, y + down + 0.5, 2  # of pixels, x and y are the numbers
    return points


def _seen(points: np.ndarray, instances: np.ndarray) -> np.ndarray:
    """Marks tips behind later objects as hidden, and drops those outside of the image."""
    height, width = instances.shape
    for number, k in np.argwhere(points[..., 2] > 0).tolist():
        column, row = (math.floor(at) for at in points[number, k, :2])
        if not (0 <= row < height and 0 <= column < width):
            points[number, k] = 0
        elif instances[row, column] > number:
            points[number, k, 2] = 1
    return points


def _places(spec: ShapesSpec, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Draws (y, x, radius) of the objects; drops those too close to earlier ones."""
    places: list[tuple[float, float, float]] = []
    wanted = rng.integers(spec.num_objects[0], spec.num_objects[1] + 1)
    for _ in range(8 * wanted):
        radius = min(spec.size) * (
            spec.radius[0] + rng.random() * (spec.radius[1] - spec.radius[0])
        )
        y, x = (radius / 2 + rng.random() * (side - radius) for side in spec.size)
        near = (1 - spec.occlusion) ** 2
        if len(places) < wanted and all(
            (y - b) ** 2 + (x - a) ** 2 >= near * (radius + r) ** 2 for b, a, r in places
        ):
            places.append((y, x, radius))
    return places


def _half_planes(num: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Returns the coordinate of each pixel along ``num`` evenly spaced directions, [num, H, W]."""
    turns = [2 * math.pi * k / num for k in range(num)]
    return np.stack([round(math.cos(t), 6) * u + round(math.sin(t), 6) * v for t in turns])


def _distance(kind: int, u: np.ndarray, v: np.ndarray, radius: float) -> np.ndarray:
    """Returns the approximate signed distance in pixels to the outline, [H, W], negative inside."""
    match CLASSES.names[kind]:
        case "disc":
            return np.sqrt(u * u + v * v) - 0.9 * radius
        case "square":
            return np.maximum(np.abs(u), np.abs(v)) - 0.78 * radius
        case "triangle":
            return np.max(_half_planes(3, u, v), axis=0) - 0.6 * radius
        case "star":  # a pentagram: outside at most one of its five lines
            return np.sort(_half_planes(5, u, v), axis=0)[-2] - 0.42 * radius
        case _:  # ring
            return np.abs(np.sqrt(u * u + v * v) - 0.72 * radius) - 0.26 * radius


def _smooth(rng: np.random.Generator, size: tuple[int, int], cells: int) -> np.ndarray:
    """Interpolates random values on a grid of ``cells`` x ``cells`` squares, [H, W] in 0..1."""
    field = rng.random((cells + 1, cells + 1))
    for side in size:  # one axis at a time: interpolate, then transpose
        position = np.arange(side) * (cells / side)
        low = position.astype(int)
        weight = (position - low)[:, None]
        field = (field[low] * (1 - weight) + field[low + 1] * weight).T
    return field


def _colour(hue: float, saturation: float, value: float) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value))


def _ground(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Returns the background, two dull colours mixed in clouds, float64 [H, W, 3] in 0..1."""
    hue = rng.random()
    first = _colour(hue, 0.15 + 0.2 * rng.random(), 0.25 + 0.3 * rng.random())
    second = _colour(hue + 0.15, 0.15 + 0.2 * rng.random(), 0.45 + 0.35 * rng.random())
    clouds = 0.65 * _smooth(rng, size, 4) + 0.35 * _smooth(rng, size, 16)
    return first + clouds[..., None] * (second - first)


def _paint(
    spec: ShapesSpec,
    kind: int,
    u: np.ndarray,
    v: np.ndarray,
    outside: np.ndarray,
    radius: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Returns the shaded colour of an object (plain, striped or chequered), [H, W, 3] in 0..1."""
    hue = (kind - 1) / (CLASSES.num_classes - 1) + spec.hue_spread * (2 * rng.random() - 1)
    base = _colour(hue, 0.6 + 0.4 * rng.random(), 0.7 + 0.3 * rng.random())
    pattern, period = rng.integers(3), radius * (0.3 + 0.3 * rng.random())
    stripes = np.floor(u / period) + (np.floor(v / period) if pattern == 2 else 0)
    dark = 0.3 * (stripes % 2) if pattern else 0.0
    bevel = 0.7 + 0.3 * np.clip(-outside / (0.25 * radius), 0, 1)
    return base * (bevel * (1 - dark))[..., None]


@functools.cache
def _fingerprint(spec: ShapesSpec) -> str:
    """Returns a hash of the options and one example, which also changes with the drawing code."""
    example = draw(spec, np.random.default_rng(spec.seed))
    drawn = example["image"].tobytes() + example["label"].tobytes()
    return hashlib.blake2b(repr(spec).encode() + drawn).hexdigest()[:16]


def load(data_dir: pathlib.Path | None = None, **options: Any) -> Dataset:
    """Opens the generated dataset; ``options`` are attributes of `ShapesSpec`."""
    del data_dir  # nothing is read
    # A configuration that was read from JSON has lists in place of tuples.
    tuples: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    spec = ShapesSpec(**tuples)
    return Dataset(
        name="shapes",
        classes=CLASSES,
        splits={split: Shapes(spec, split) for split in _SPLITS},
        fingerprint=_fingerprint(spec),
        description=f"generated shapes, {spec.size[0]}x{spec.size[1]}, seed {spec.seed}",
    )
