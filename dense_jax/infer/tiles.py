"""Overlap-tile prediction without seams, and averages over rotated and flipped images.

A prediction (`dense_jax.infer.whole_image.PredictFn`) is told the sizes of images before padding:
they are data, not shapes, so that all functions here can be compiled.

Reference: Ronneberger, Fischer, Brox, "U-Net: convolutional networks for biomedical image
segmentation", MICCAI 2015, arXiv:1505.04597, Figure 2 and Section 3.
"""

import functools
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from dense_jax.errors import refuse
from dense_jax.infer.whole_image import PredictFn, whole_image

Mirror = Literal["reflect", "symmetric"]
Views = Literal["none", "rot7", "d4"]

# Rotated and flipped images, as (whether to transpose first, [(flip rows, flip columns), ...]).
# The paper averages "7 rotated versions" and does not say which: here all symmetries of the square
# except the last, the reflection at the other diagonal.
_VIEWS: dict[str, tuple[tuple[bool, tuple[tuple[bool, bool], ...]], ...]] = {
    "rot7": (
        (False, ((False, False), (True, True), (False, True), (True, False))),
        (True, ((False, True), (True, False), (False, False))),
    ),
    "d4": (
        (False, ((False, False), (True, True), (False, True), (True, False))),
        (True, ((False, True), (True, False), (False, False), (True, True))),
    ),
}
VIEWS_IN_WORDS: dict[Views, str] = {
    "none": "no flips",
    "rot7": "7 turned and mirrored views",
    "d4": "all 8 views",
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


def check_tile(tile: int | None, context: int, grid: int) -> None:
    """Refuses a side of tiles that leaves nothing beside the context; see `overlap_tile`.

    Raises:
      UserError: names the flag and the least side.
    """
    least = 2 * context + grid
    refuse(
        tile is not None and tile < least,
        f"--tile={tile} leaves no step of {grid} beside {context} pixels of context on each side: "
        f"give at least {least}",
    )


def whole_or_tiles(
    model: nn.Module,
    scale: float,
    tile: int | None,
    *,
    context: int,
    grid: int,
    mirror: Mirror = "reflect",
    sized: bool = False,
) -> tuple[PredictFn, str]:
    """Predicts in tiles, or in one pass over each image, at its scale, if there is no tile.

    ``sized``: whether the network takes "sizes" in one pass; see `whole_image`.

    Returns:
      The prediction, and what it does in words.
    """
    if tile is None:
        return whole_image(model, scale, sized=sized), "one pass"
    forward = overlap_tile(model, tile=tile, context=context, grid=grid, mirror=mirror)
    return forward, f"tiles of {tile} pixels"


class TwoParts(Protocol):
    """A network whose first part needs context, and whose second may see the whole image."""

    def front_end(self) -> Any:
        """Returns the first part, whose output is "final"; has ``context`` and ``stride``."""
        ...

    def finish(
        self, variables: Any, scores: jax.Array, images: jax.Array, sizes: jax.Array
    ) -> jax.Array:
        """Returns logits of images from the first part's scores of them."""
        ...


def in_two_parts(model: TwoParts, tile: int) -> tuple[PredictFn, str]:
    """Predicts the first part of a network in tiles, and the second on all of them together.

    Returns:
      The prediction, and what it does in words.
    """
    front = model.front_end()
    context, stride = front.context, front.stride
    scores = overlap_tile(
        front, tile=tile, context=context, grid=stride, output="final", stride=stride
    )

    def predict(variables: Any, images: jax.Array, sizes: jax.Array) -> dict[str, jax.Array]:
        final = scores(variables, images, sizes)["final"]
        return {"logits": model.finish(variables, final, images, sizes)}

    words = f"tiles of {tile} pixels with reflected surroundings, no flips, no scales"
    return predict, words


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
      views: "d4", all 8 symmetries of the square, or "rot7", 7 of them (Section 4 of the paper);
        "none" leaves the prediction as it is.

    Returns:
      A prediction whose logits are log probabilities.
    """
    if views == "none":
        return predict
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
