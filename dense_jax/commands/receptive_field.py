"""``python -m dense_jax receptive-field``: receptive fields of a network, in a table and a picture.

A field of a map is the part of the image that one of its units depends on.
"""

import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from dense_jax import viz
from dense_jax.analysis import receptive_field as fields
from dense_jax.analysis import receptive_field_figures as figures
from dense_jax.commands.networks import Network, network
from dense_jax.data.files import read_image
from dense_jax.data.normalise import Normalise, num_channels
from dense_jax.errors import UserError

_WHOLE = 512  # Side of the image for a map whose field is any whole image.


def run(
    *,
    run: pathlib.Path | None = None,
    script: str = "experiments.fcn",
    preset: str = "paper",
    flags: str = "",
    num_classes: int = 21,
    output: tuple[str, ...] = (),
    effective: bool = False,
    image: tuple[pathlib.Path, ...] = (),
    num_noise: int = 8,
    side: int | None = None,
    out: pathlib.Path = pathlib.Path("receptive_field.png"),
) -> None:
    """Print the receptive fields of a network: size, stride and centre in pixels, and branches.

    The table comes from the traced program, without running the network. --effective runs it: the
    gradient of the unit in the middle shows how much each pixel matters, with random weights and,
    for a run, with its trained weights. The result is a picture.

    Args:
      run: folder of a training run; with it, the next four flags have no effect.
      script: script that defines the network.
      preset: one of its presets.
      flags: more of its flags, in one string, such as "--stride=32 --pad-mode=same".
      num_classes: number of classes.
      output: names of maps. Default: all maps in the table, logits in the picture.
      effective: measure and draw effective fields.
      image: images to average over; the picture shows the first. Default: noise.
      num_noise: number of noise images.
      side: side of the image in pixels. Default: the field of the unit and a margin.
      out: the picture, a PNG.
    """
    if out.suffix.lower() != ".png":
        raise UserError(f"--out={out}: give a name that ends in .png")
    if num_noise < 1:
        raise UserError(f"--num-noise={num_noise}: give at least 1")
    chosen = network(run, script, preset, flags, num_classes)
    channels = num_channels(chosen.task.config.normalisation)
    analysis = fields.analyse(chosen.task.model, channels=channels)
    print(format_analysis(analysis, output))
    if not effective:
        return
    panels = []
    for name in output or ("logits",):
        least = side or max(_room(axis) for axis in analysis.field(name))
        least = fields.fitting_side(chosen.task.model, least, channels)
        panels += _panels(
            chosen, name, _inputs(image, num_noise, least, chosen.task.config.normalisation)
        )
    Image.fromarray(
        viz.contact_sheet(panels, columns=len(panels) // len(output or "1"), gap=12)
    ).save(out)
    print(f"picture: {out}")


def format_analysis(found: fields.Analysis, names: Sequence[str] = ()) -> str:
    """Returns a table of the named maps (default: all), and lines on the branches."""
    lines: list[tuple[str, ...]] = [("map", "size", "stride", "centre of unit 0")]
    for name in names or found.fields:
        field = found.field(name) if names else found.fields[name]
        if isinstance(field, str):
            lines.append((name, f"not known: {field}", "", ""))
        elif field.rows.size is None or field.columns.size is None:
            lines.append((name, "whole image", "", ""))
        else:
            lines.append((name, *map(_both, zip(*map(_numbers, field), strict=True))))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = [
        "  ".join([f"{line[0]:{widths[0]}}", *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in lines
    ]
    return "\n".join([*table, *_branches(found)])


def _numbers(axis: fields.Axis) -> tuple[str, str, str]:
    about = "" if axis.is_even else "~"
    return str(axis.size), f"{about}{axis.stride:g}", f"{about}{axis.first:g}"


def _both(pair: tuple[str, str]) -> str:
    return pair[0] if pair[0] == pair[1] else " x ".join(pair)


def _branches(found: fields.Analysis) -> Iterator[str]:
    shifted = [m for m in found.meetings if not m.is_aligned()]
    if found.meetings:
        aligned = len(found.meetings) - len(shifted)
        yield f"branches meet at {len(found.meetings)} places, aligned at {aligned}"
    for meeting in shifted:
        down, right = meeting.offset
        sees = " and ".join(str(field.rows.size) for field in meeting.fields)
        yield (
            f"shifted by {down:g} down, {right:g} right: {meeting.primitive} of fields of {sees} "
            f"in {meeting.scope or 'the network'}"
        )


def _room(axis: fields.Axis) -> int:
    """Returns the side of an image whose edges are outside the field of the unit in the middle."""
    return _WHOLE if axis.size is None else 32 * (axis.size // 32 + 3)


def _inputs(
    paths: Sequence[pathlib.Path], num_noise: int, side: int, normalisation: str
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images [N, side, side, C], and the first of them as uint8 for the picture."""
    if not paths:
        shape = (num_noise, side, side, num_channels(normalisation))
        noise = np.random.default_rng(0).standard_normal(shape, np.float32)
        return noise, np.zeros((side, side, 3), np.uint8)
    normalise = Normalise(normalisation)
    images = [_fitted(read_image(path)[1].pixels, side) for path in paths]
    inputs = [normalise({"image": picture})["image"] for picture in images]
    return np.stack(inputs).astype(np.float32), images[0]


def _fitted(image: np.ndarray, side: int) -> np.ndarray:
    """Crops the middle of an image; reflects it at its edges if it is too small."""
    for axis in (0, 1):
        spare = side - image.shape[axis]
        edges = [(0, 0)] * image.ndim
        edges[axis] = (max(spare, 0) // 2, max(spare, 0) - max(spare, 0) // 2)
        image = np.pad(image, edges, "symmetric")
        start = max(-spare, 0) // 2
        image = image.take(range(start, start + side), axis)
    return image


def _panels(chosen: Network, name: str, inputs: tuple[np.ndarray, np.ndarray]) -> list[np.ndarray]:
    images, picture = inputs
    size, channels = images.shape[1:3], images.shape[3]
    box = fields.box(chosen.task.model, size, output=name, channels=channels)
    weights = {"random weights": fields.random_variables(chosen.task.model, size, channels)}
    if chosen.run is not None:
        weights[f"trained, step {chosen.run.step}"] = chosen.run.variables
    panels = []
    for title, variables in weights.items():
        field = fields.effective_field(chosen.task.model, variables, images, output=name)
        if not field.any():
            raise UserError(f"no gradient of {name!r} reaches the image: choose another --output")
        spread = fields.spread(field)
        print(f"{name}, {title}: {figures.sizes(box, spread)} (2 sigma); side {spread.side:.0f}")
        panels.append(figures.panel(picture, field, box, f"{name}: {title}"))
    return panels
