"""Sizes, strides and centres of receptive fields, derived from a network's traced program.

`analyse` traces a network on an image that is so large that padding does not affect its middle. It
follows the image through the program (`reach`) and reads the receptive field of each named output
from the units in the middle. It needs no list of layers: branches, dilation, fractional strides,
crops, pooling and resizing are part of the program. Where branches meet, it compares their centres.
This detects a crop that is one unit off.

`effective_field` measures how strongly a unit responds to each pixel: its gradient, averaged over
images.

Reference: Araujo, Norris, Sim, "Computing receptive fields of convolutional neural networks",
Distill 2019; Luo, Li, Urtasun, Zemel, "Understanding the effective receptive field in deep
convolutional neural networks", NIPS 2016, arXiv:1701.04128.
"""

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dense_jax.analysis import reach
from dense_jax.analysis.reach_rules import NOTHING, Free, Opaque, Seen
from dense_jax.errors import UserError
from dense_jax.layers import init

_FIRST_SIDE, _LAST_SIDE = 1024, 16384
_MARGIN = 4  # No field may exceed a quarter of the image, no window a quarter of its map.
_MAX_PERIOD = 128


class Axis(NamedTuple):
    """Receptive fields of a map's units along one axis of the image, in pixels.

    Units may differ, as they do behind an interpolation. Then `size` is the maximum, and `stride`
    and `first` are means over one period.

    Attributes:
      size: number of pixels from the first to the last that a unit sees. None: the whole side.
      stride: distance between the centres of neighbouring units; NaN if units see the whole side.
      first: centre of unit 0 in an image without borders; NaN if units see the whole side. Pixel
        centres are whole numbers.
      is_even: whether the units repeat periodically. They do not if a map is enlarged by a factor
        that is not a whole number.
    """

    size: int | None
    stride: float
    first: float
    is_even: bool

    def centre(self, unit: float) -> float:
        """Returns the centre of a unit, in pixels."""
        return self.first + self.stride * unit


class Field(NamedTuple):
    """Receptive field of a map's units."""

    rows: Axis
    columns: Axis

    @property
    def is_even(self) -> bool:
        """Whether the units repeat periodically along both axes."""
        return self.rows.is_even and self.columns.is_even


class Box(NamedTuple):
    """The pixels from (top, left) to (bottom, right), inclusive."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def height(self) -> int:
        """Number of rows."""
        return self.bottom - self.top + 1

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.right - self.left + 1


class Meeting(NamedTuple):
    """An operation that adds, compares or concatenates branches.

    Attributes:
      primitive: name of the operation.
      scope: names of the modules that contain it.
      fields: receptive fields of the branches.
      offset: largest difference between the centres of another branch and of the first, in pixels
        down and to the right, in the middle of the image.
    """

    primitive: str
    scope: str
    fields: tuple[Field, ...]
    offset: tuple[float, float]

    def is_aligned(self, tolerance: float = 0.25) -> bool:
        """Whether the centres agree within `tolerance` pixels."""
        return max(map(abs, self.offset)) <= tolerance


class Analysis(NamedTuple):
    """Result of `analyse`.

    Attributes:
      side: height and width of the traced image.
      fields: receptive fields of those outputs that are maps, in the network's order. A string is
        the name of an unsupported operation that makes the field unknown.
      meetings: operations at which branches meet, in program order.
    """

    side: int
    fields: dict[str, Field | str]
    meetings: list[Meeting]

    def field(self, name: str) -> Field:
        """Returns the receptive field of one output.

        Raises:
          UserError: there is no such map, or its receptive field is unknown.
        """
        if name not in self.fields:
            raise UserError(f"the network has no map {name!r}: it has {', '.join(self.fields)}")
        found = self.fields[name]
        if isinstance(found, str):
            raise UserError(
                f"the receptive field of {name!r} is unknown, because the operation {found!r} is "
                "not supported: choose a map before it"
            )
        return found


def analyse(model: nn.Module, *, channels: int = 3) -> Analysis:
    """Returns the receptive fields of a network's maps, and where its branches meet.

    Args:
      model: a network, called as `model(images, train=False)`, that returns maps [B, h, w, ...] by
        name. The full-size network is only traced; nothing is computed or allocated.
      channels: number of image channels.

    Raises:
      UserError: the network accepts no image size, or none is large enough for its fields.
    """
    least = _FIRST_SIDE
    while least <= _LAST_SIDE:
        found, enough = _best(model, least, channels)
        if enough <= found.side:
            return found
        least = 32 * math.ceil(enough / 25)  # Extra, since a small image truncates fields.
    raise UserError(f"images of {_LAST_SIDE} pixels are too small for the network's fields")


def _best(model: nn.Module, least: int, channels: int) -> tuple[Analysis, int]:
    """Analyses an image with the first side from `least` that the network accepts, or the next.

    Half-pixel enlargement is even if the side is a multiple of the stride. Enlargement with aligned
    corners is even if the side is one more than a multiple.
    """
    found, enough = _analyse_at(model, least, channels)
    if all(field.is_even for field in found.fields.values() if isinstance(field, Field)):
        return found, enough
    other = _analyse_at(model, found.side + 1, channels)

    def number_even(analysis: Analysis) -> int:
        return sum(f.is_even for f in analysis.fields.values() if isinstance(f, Field))

    return other if number_even(other[0]) > number_even(found) else (found, enough)


def _analyse_at(model: nn.Module, least: int, channels: int) -> tuple[Analysis, int]:
    """Returns the analysis for one side, and the side that would be large enough."""
    side, variables = _fit(model, least, channels)
    names, trace = _trace(model, variables, (side, side), channels)
    enough = math.ceil(_MARGIN * trace.widest * side)
    fields: dict[str, Field | str] = {}
    for name, value in zip(names, trace.outputs, strict=True):
        if isinstance(value, Opaque):
            fields[name] = value.primitive
        elif isinstance(value, Seen):
            fields[name] = field = _field(value, side, trace.is_global)
            enough = max(enough, *(_MARGIN * (axis.size or 0) for axis in field))
    meetings = [_meeting(join, side, trace.is_global) for join in trace.joins]
    return Analysis(side, fields, [m for m in meetings if m is not None]), enough


def fitting_side(model: nn.Module, least: int, channels: int = 3) -> int:
    """Returns the smallest side from `least` to `least` + 63 pixels that a network accepts.

    Raises:
      UserError: the network accepts none of them.
    """
    return _fit(model, least, channels)[0]


def _fit(model: nn.Module, least: int, channels: int) -> tuple[int, Any]:
    """Returns the side, and the shapes of the network's variables."""
    problem: Exception | None = None
    for side in range(least, least + 64):
        try:
            return side, _shapes(model, (side, side), channels)[1]
        except ValueError as error:
            problem = error
    raise UserError(f"no image of {least} to {least + 63} pixels fits the network: {problem}")


def _shapes(model: nn.Module, size: tuple[int, int], channels: int) -> tuple[Any, Any]:
    """Returns the shapes of a network's outputs and variables."""
    images = jax.ShapeDtypeStruct((1, *size, channels), jnp.float32)
    run = functools.partial(model.init_with_output, train=False)
    return jax.eval_shape(run, jax.random.key(0), images)


def _trace(
    model: nn.Module, variables: Any, size: tuple[int, int], channels: int
) -> tuple[list[str], reach.Trace]:
    """Traces the image through a network; returns the names of the outputs and the trace."""
    names: list[str] = []

    def run(variables: Any, images: jax.Array) -> list[jax.Array]:
        outputs: Any = model.apply(variables, images, train=False)
        outputs = {name: x for name, x in outputs.items() if isinstance(x, jax.Array)}
        names[:] = outputs
        return list(outputs.values())

    images = jax.ShapeDtypeStruct((1, *size, channels), jnp.float32)
    program = jax.make_jaxpr(run)(variables, images)
    return names, reach.trace(program, len(program.jaxpr.invars) - 1)


def _field(value: Seen, side: int, is_global: bool) -> Field:
    return Field(_axis(value.rows, side, is_global), _axis(value.columns, side, is_global))


def _line(bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first and the last pixel that each unit sees, along the first axis that varies.

    Along other axes that vary, such as channels of a concatenation, the union is taken.
    """
    vary = [axis for axis, size in enumerate(bounds.shape) if axis > 0 and size > 1]
    low, high = bounds.min(tuple(a for a in range(1, bounds.ndim) if a not in vary[:1]))
    return np.atleast_1d(low), -np.atleast_1d(high)


def _axis(bounds: np.ndarray, side: int, is_global: bool) -> Axis:
    low, high = _line(bounds)
    sees = low < NOTHING
    if is_global and np.all((high - low)[sees] >= 0.9 * side):
        return Axis(None, math.nan, math.nan, True)
    # Units in the middle quarter do not see the edges: no field exceeds a quarter of the image.
    middle = np.arange(3 * len(low) // 8, max(5 * len(low) // 8, 3 * len(low) // 8 + 1))
    middle = middle[sees[middle]]
    if not len(middle):
        return Axis(0, math.nan, math.nan, True)
    low, high = low[middle], high[middle]
    size, centres = int((high - low).max()) + 1, (low + high) / 2
    for period in range(1, min(_MAX_PERIOD, len(middle) // 2) + 1):
        steps = np.stack([low[period:] - low[:-period], high[period:] - high[:-period]])
        if np.all(steps == steps[0, 0]) and np.all(np.diff(middle) == 1):
            stride = float(steps[0, 0]) / period
            first = np.mean(centres[:period] - stride * middle[:period])
            return Axis(size, stride, round(float(first), 6) + 0.0, True)  # Never minus zero.
    if len(middle) == 1:
        return Axis(size, math.nan, float(centres[0]), True)
    stride, first = np.polyfit(middle, centres, 1)
    return Axis(size, float(stride), float(first), False)


def _meeting(join: reach.Join, side: int, is_global: bool) -> Meeting | None:
    """Compares the centres of branches; returns None if at most one sees less than the image."""
    fields, offset = [_field(part, side, is_global) for part in join.parts], []
    for axis in ("rows", "columns"):
        lines = [
            (getattr(field, axis), len(_line(getattr(part, axis))[0]))
            for field, part in zip(fields, join.parts, strict=True)
        ]
        centres = [line.centre(count // 2) for line, count in lines if line.size and count > 1]
        if len(centres) < 2:
            return None
        offset.append(max((c - centres[0] for c in centres[1:]), key=abs))
    return Meeting(join.primitive, join.scope, tuple(fields), (offset[0], offset[1]))


def box(
    model: nn.Module,
    size: tuple[int, int],
    unit: tuple[int, int] | None = None,
    *,
    output: str = "logits",
    channels: int = 3,
) -> Box:
    """Returns the pixels of an image that one unit sees.

    Args:
      model: the network.
      size: height and width of the image.
      unit: (row, column) in the map. None: the unit in the middle.
      output: name of the map.
      channels: number of image channels.

    Raises:
      UserError: there is no such map, its receptive field is unknown, or the unit sees no pixel.
    """
    names, trace = _trace(model, _shapes(model, size, channels)[1], size, channels)
    known = {n: v for n, v in zip(names, trace.outputs, strict=True) if not isinstance(v, Free)}
    if output not in known:
        raise UserError(f"the network has no map {output!r}: it has {', '.join(known)}")
    value = known[output]
    if isinstance(value, Opaque):
        raise UserError(
            f"the receptive field of {output!r} is unknown, because the operation "
            f"{value.primitive!r} is not supported"
        )
    assert isinstance(value, Seen)
    ends = []
    for bounds, place in zip(value, unit or (None, None), strict=True):
        low, high = _line(bounds)
        place = len(low) // 2 if place is None else min(place, len(low) - 1)
        ends.append((int(low[place]), int(high[place])))
    (top, bottom), (left, right) = ends
    if top == NOTHING or left == NOTHING:
        raise UserError(f"unit {unit} of {output!r} sees no pixel of an image of {size} pixels")
    return Box(top, left, bottom, right)


def random_variables(model: nn.Module, size: tuple[int, int], channels: int = 3, seed: int = 0):
    """Returns a network's initial variables; kernels that start at zero get He's initialisation."""
    variables = _start(model, (1, *size, channels), jax.random.key(seed))
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return tree.unflatten(
        init.he(key, x.shape, x.dtype) if x.ndim > 1 and not np.any(x) else x
        for key, x in zip(keys, leaves, strict=True)
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _start(model: nn.Module, shape: tuple[int, ...], key: jax.Array) -> Any:
    return model.init(key, jnp.zeros(shape), train=False)


def effective_field(
    model: nn.Module,
    variables: Any,
    images: np.ndarray,
    unit: tuple[int, int] | None = None,
    *,
    output: str = "logits",
    seed: int = 0,
) -> np.ndarray:
    """Returns how strongly one unit responds to each pixel: the root mean square of its gradient.

    The gradient is that of the sum of the unit's channels with random signs, drawn anew for each
    image. Channels thus do not cancel, and the expected square is the sum over all channels.

    Args:
      model: the network.
      variables: parameters and statistics of the network.
      images: normalised images [N, H, W, C].
      unit: (row, column) in the map. None: the unit in the middle.
      output: name of the map, [B, h, w, C'].
      seed: seed of the signs.

    Returns:
      Nonnegative float64 [H, W]. Squares are summed over colours and averaged over images.
    """
    _, *places, channels = _shapes(model, images.shape[1:3], images.shape[3])[0][output].shape
    row, column = unit or tuple(place // 2 for place in places)
    rng = np.random.default_rng(seed)

    total = np.zeros(images.shape[1:3])
    for image in images:
        signs = rng.choice(np.array([-1, 1], np.float32), channels)
        total += np.asarray(_squares(model, output, (row, column), variables, image, signs))
    return np.sqrt(total / len(images))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _squares(
    model: nn.Module,
    output: str,
    unit: tuple[int, int],
    variables: Any,
    image: jax.Array,
    signs: jax.Array,
) -> jax.Array:
    """Returns the squared gradient of one unit's signed sum, [H, W]."""

    def answer(image: jax.Array) -> jax.Array:
        outputs: Any = model.apply(variables, image[None], train=False)
        return jnp.sum(outputs[output][0, *unit] * signs)

    return jnp.sum(jnp.square(jax.grad(answer)(image)), axis=-1)


class Spread(NamedTuple):
    """Size of an effective field, in pixels.

    Attributes:
      centre: mean (row, column), where the weight of a pixel is the square of its value.
      deviation: standard deviation of (rows, columns) with these weights. Two standard deviations
        to each side contain 95.45 % of a Gaussian. Random weights spread squares as a uniform
        kernel spreads values: n layers of k x k taps have the variance n (k^2 - 1) / 12 (Luo et
        al., Section 2).
      side: square root of the number of pixels with more than 4.55 % of the largest value, which is
        1 - 95.45 % of the value at the centre in Luo et al., Section 3.
    """

    centre: tuple[float, float]
    deviation: tuple[float, float]
    side: float


def spread(field: np.ndarray) -> Spread:
    """Measures an effective field [H, W].

    Raises:
      ValueError: the field is zero everywhere, as behind a layer that is zero or dead.
    """
    if not field.sum() > 0:
        raise ValueError("no gradient reaches the image")
    centre, deviation, energy = [], [], np.square(field / field.max())
    for axis in (1, 0):
        share = energy.sum(axis) / energy.sum()
        pixels = np.arange(len(share))
        centre.append(float(share @ pixels))
        deviation.append(float(np.sqrt(share @ (pixels - centre[-1]) ** 2)))
    side = float(np.sqrt(np.sum(field > 0.0455 * field.max())))
    return Spread((centre[0], centre[1]), (deviation[0], deviation[1]), side)
