"""Figures of receptive fields and effective fields, drawn over the image."""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dense_jax import viz
from dense_jax.analysis import receptive_field
from dense_jax.analysis.receptive_field import Box, Spread
from dense_jax.layers.conv import Conv

_WHITE, _CYAN, _INK = (255, 255, 255), (94, 234, 212), (31, 41, 55)


def panel(
    image: np.ndarray,
    field: np.ndarray,
    box: Box,
    title: str,
    *,
    width: int = 360,
    words: str | None = None,
) -> np.ndarray:
    """Draws an effective field over an image, uint8 [h, width, 3].

    Brightness shows the square root of the field's value, since tails would otherwise be black. The
    white box is the receptive field. The dashed green ellipse shows two standard deviations around
    the mean (`spread`).

    Args:
      image: uint8 [H, W, 3].
      field: nonnegative [H, W], such as from `effective_field`.
      box: receptive field of the unit.
      title: text above the picture.
      width: width of the panel in pixels.
      words: text below the title. None: both sizes.
    """
    found = receptive_field.spread(field)
    share = np.sqrt(field / field.max())
    grey = 0.35 * (image @ np.array([0.299, 0.587, 0.114]))[..., None]
    blended = grey * (1 - share[..., None]) + viz.heat(share, 1.0) * share[..., None]
    scale, gap = width / image.shape[1], 44
    height = round(image.shape[0] * scale)
    kind = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX
    picture = Image.new("RGB", (width, height + gap), "white")
    pixels = np.clip(np.rint(blended), 0, 255).astype(np.uint8)
    picture.paste(Image.fromarray(pixels).resize((width, height), kind), (0, gap))
    draw = ImageDraw.Draw(picture)
    corners = np.array([box.left, box.top, box.right + 1, box.bottom + 1]) * scale
    corners = np.clip(corners, 0, [width - 1, height - 1] * 2)
    corners[1::2] += gap
    draw.rectangle([float(c) for c in corners], outline=_WHITE, width=2)
    _draw_ellipse(draw, found, scale, gap)
    draw.text((2, 2), title, _INK, ImageFont.load_default(16))
    draw.text((2, 23), words or sizes(box, found), _INK, ImageFont.load_default(13))
    return np.asarray(picture)


def sizes(box: Box, found: Spread) -> str:
    """Returns a text with the sizes of the receptive field and of the effective field."""
    rows, columns = (4 * sigma for sigma in found.deviation)
    return f"sees {box.height} x {box.width}, mostly {rows:.0f} x {columns:.0f} pixels"


def _draw_ellipse(draw: ImageDraw.ImageDraw, found: Spread, scale: float, top: int) -> None:
    (y, x), (high, wide) = found.centre, found.deviation
    middle = ((x + 0.5) * scale, (y + 0.5) * scale + top)
    reach = (2 * wide * scale, 2 * high * scale)
    edges = [m + sign * r for sign in (-1, 1) for m, r in zip(middle, reach, strict=True)]
    for start in range(0, 360, 20):
        draw.arc(edges, start, start + 12, fill=_CYAN, width=2)


class Dilated(nn.Module):
    """3x3 convolutions with the given dilations, each followed by a ReLU."""

    dilations: tuple[int, ...]
    features: int = 16

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        """Returns "out", [B, H, W, features]."""
        x = images
        for i, dilation in enumerate(self.dilations, 1):
            x = nn.relu(Conv(self.features, 3, dilation=dilation, name=f"conv{i}")(x))
        return {"out": x}


def growth(
    stacks: Sequence[tuple[int, ...]], *, size: int = 81, num_images: int = 16
) -> np.ndarray:
    """Draws how the fields of stacks of layers grow with dilation, uint8 with a panel each.

    Images are noise. Weights have He's initialisation, drawn anew for each image.

    Args:
      stacks: for each stack the dilations of its layers, in order.
      size: side of the images in pixels.
      num_images: number of images to average.
    """
    black = np.zeros((size, size, 3), np.uint8)
    noise = np.random.default_rng(0).standard_normal((num_images, 1, size, size, 3), np.float32)
    panels = []
    for dilations in stacks:
        model = Dilated(dilations)
        measure = functools.partial(receptive_field.effective_field, model, output="out")
        fields = [
            measure(receptive_field.random_variables(model, (size, size), seed=i), images, seed=i)
            for i, images in enumerate(noise)
        ]
        box = receptive_field.box(model, (size, size), output="out")
        rates = " ".join(map(str, dilations if len(set(dilations)) > 1 else dilations[:1]))
        title = f"{len(dilations)} layers, dilation {rates}"
        panels.append(panel(black, np.mean(fields, axis=0), box, title, width=300))
    return viz.contact_sheet(panels, columns=len(panels), gap=12)
