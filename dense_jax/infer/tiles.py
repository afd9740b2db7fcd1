"""Overlap-tile prediction without seams, and averages over rotated and flipped images.

A prediction (`dense_jax.infer.whole_image.PredictFn`) is told the sizes of images before padding:
they are data, not shapes, so that all functions here can be compiled.

Reference: Ronneberger, Fischer, Brox, "U-Net: convolutional networks for biomedical image
segmentation", MICCAI 2015, arXiv:1505.04597, Figure 2 and Section 3.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from dense_jax.infer.whole_image import PredictFn

Mirror = Literal["reflect", "symmetric"]
Views = Literal["rot7", "d4"]

# Rotated and flipped images, as (whether to transpose first, [(flip rows, flip columns), ...]).
# The paper averages "7 rotated versions" and does not say which: here all symmetries of the square
# except the last, the reflection at the other diagonal.
_VIEWS: dict[Views, tuple[tuple[bool, tuple[tuple[bool, bool], ...]], ...]] = {
    "rot7": (
        (False, ((False, False), (True, True), (False, True), (True, False))),
        (True, ((False, True), (True, False), (False, False))),
    ),
    "d4": (
        (False, ((False, False), (True, True), (False, True), (True, False))),
        (True, ((False, True), (True, False), (False, False), (True, True))),
    ),
}


def overlap_tile(
    model: nn.Module,
    *,
    tile: int,
    context: int,
    grid: int,
    mirror: Mirror = "reflect",
    output: str = "logits",
    stride: int = 1,
) -> PredictFn:
    """Predicts images of any size in tiles with ``context`` pixels of image on each side.

    Missing context is reflected at the true edges of each image. Output tiles have T = tile - 2
    context pixels. They start at multiples of the largest multiple of ``grid`` up to T, so that the
    poolings of all tiles are in phase. Where tiles overlap, the later tile wins, without blending.
    If the network only depends on its tile (convolutions without padding), the result is that of
    one tile as large as the image, for any ``tile``.

    Args:
      model: maps [B, tile, tile, C] to "logits" that are 2 context pixels smaller. Larger logits,
        such as those of a network with padding, are cut.
      tile: side of the network's input, in pixels.
      context: width of the border of the input without output, in pixels.
      grid: stride of the network's deepest level.
      mirror: "reflect" does not repeat the edge pixel, "symmetric" does.
      output: name of the predicted output, also in the result.
      stride: of this output, in pixels, a divisor of ``grid``; for images [B, H, W, C] the output
        has ceil(H / stride) rows.

    Raises:
      ValueError: the tile leaves less output than one grid step.
    """
    out = tile - 2 * context
    step = out - out % grid
    kept = step // stride
    if step < 1:
        raise ValueError(
            f"A tile of {tile} pixels has {out} pixels of output; the network needs {grid}: "
            f"give at least {2 * context + grid}."
        )

    def predict(variables: Any, images: jax.Array, sizes: jax.Array) -> dict[str, jax.Array]:
        batch, height, width, _ = images.shape
        counts = -(-height // step), -(-width // step)
        rows, columns = (
            _mirrored(jnp.arange((n - 1) * step + tile) - context, sizes[:, axis], mirror)
            for axis, n in enumerate(counts)
        )
        canvas = jax.vmap(lambda image, r, c: image[r][:, c])(images, rows, columns)

        def one_tile(place: tuple[jax.Array, jax.Array]) -> jax.Array:
            top, left = place[0] * step, place[1] * step
            zero = jnp.zeros_like(top)
            inputs = lax.dynamic_slice(
                canvas, (zero, top, left, zero), (batch, tile, tile, canvas.shape[3])
            )
            outputs: Any = model.apply(variables, inputs, train=False)
            units = outputs[output]
            edge = (units.shape[1] - out // stride) // 2
            return units[:, edge : edge + kept, edge : edge + kept]

        tiles = lax.map(one_tile, jnp.divmod(jnp.arange(counts[0] * counts[1]), counts[1]))
        tiles = tiles.reshape(*counts, batch, kept, kept, -1).transpose(2, 0, 3, 1, 4, 5)
        units = tiles.reshape(batch, counts[0] * kept, counts[1] * kept, -1)
        return {output: units[:, : -(-height // stride), : -(-width // stride)]}

    return predict


def in_two_parts(
    front: nn.Module,
    finish: Callable[[Any, jax.Array, tuple[int, int], jax.Array], jax.Array],
    refine: Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array] | None = None,
    *,
    tile: int,
    context: int,
    stride: int,
) -> PredictFn:
    """Predicts the first part of a network in tiles, and the second on all of them together.

    Args:
      front: the first part; its output is "final".
      finish: (variables, scores of all tiles, height and width, sizes) -> logits.
      refine: (variables, logits, images, sizes) -> logits, such as a learned CRF.
      tile: see `overlap_tile`.
      context: likewise.
      stride: likewise.
    """
    scores = overlap_tile(
        front, tile=tile, context=context, grid=stride, output="final", stride=stride
    )

    def predict(variables: Any, images: jax.Array, sizes: jax.Array) -> dict[str, jax.Array]:
        final, (height, width) = scores(variables, images, sizes)["final"], images.shape[1:3]
        logits = finish(variables, final, (height, width), sizes)
        return {"logits": refine(variables, logits, images, sizes) if refine else logits}

    return predict


def _mirrored(index: jax.Array, size: jax.Array, mirror: Mirror) -> jax.Array:
    """Returns the index in [0, size) of each index, reflected at both ends, [B, N].

    Args:
      index: [N].
      size: [B]; size 0 (padding of a batch) counts as 1.
      mirror: see `overlap_tile`.
    """
    index, size = index[None], jnp.maximum(size, 1)[:, None]
    if mirror == "symmetric":
        index = index % (2 * size)
        return jnp.minimum(index, 2 * size - 1 - index)
    period = jnp.maximum(2 * (size - 1), 1)
    index = index % period
    return jnp.minimum(index, period - index)


def average_views(predict: PredictFn, views: Views) -> PredictFn:
    """Averages the class probabilities of rotated and flipped images, mapped back.

    Args:
      predict: gets each image rotated and flipped inside its padding, which stays at the bottom and
        on the right.
      views: "d4", all 8 symmetries of the square, or "rot7", 7 of them (Section 4 of the paper).

    Returns:
      A prediction whose logits are log probabilities.
    """
    num_views = sum(len(flips) for _, flips in _VIEWS[views])

    def average(variables: Any, images: jax.Array, sizes: jax.Array) -> dict[str, jax.Array]:
        total = jnp.zeros((), jnp.float32)
        for transposed, flips in _VIEWS[views]:
            seen, seen_sizes = (
                (images.swapaxes(1, 2), sizes[:, ::-1]) if transposed else (images, sizes)
            )

            def probabilities(
                flip: jax.Array, seen: jax.Array = seen, seen_sizes: jax.Array = seen_sizes
            ) -> jax.Array:
                turn = functools.partial(_flip, sizes=seen_sizes, flip=flip)
                logits = predict(variables, turn(seen), seen_sizes)["logits"]
                return turn(jax.nn.softmax(logits))

            summed = jnp.sum(lax.map(probabilities, jnp.array(flips)), axis=0)
            total = total + (summed.swapaxes(1, 2) if transposed else summed)
        return {"logits": jnp.log(jnp.maximum(total / num_views, jnp.finfo(jnp.float32).tiny))}

    return average


def _flip(x: jax.Array, *, sizes: jax.Array, flip: jax.Array) -> jax.Array:
    """Flips rows and columns (two booleans) of each image inside its padding; its own inverse.

    Pixels of the padding are permuted among themselves.
    """
    places = []
    for axis, length in enumerate(x.shape[1:3]):
        index = jnp.arange(length)[None]
        turned = (sizes[:, axis, None] - 1 - index) % length
        places.append(jnp.where(flip[axis], turned, index))
    return jax.vmap(lambda image, rows, columns: image[rows][:, columns])(x, *places)
