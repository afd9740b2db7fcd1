"""Compares the fully connected CRF with sums over all pairs, and with the public C++ code.

    python -m benchmarks.crf --images=/data/VOCdevkit/VOC2012/JPEGImages [--num-images=4]

It first prints the accuracy: the mean absolute difference of probabilities and the share of equal
labels, on crops of 64 x 64 pixels with noisy scores of 21 classes. Then it prints the time on whole
images, with the construction of the lattice. If the C++ code is installed (lucasb-eyer/pydensecrf,
built from its source), it is measured too; it uses one thread.
"""

import dataclasses
import importlib
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from PIL import Image

from benchmarks.timing import alternate
from dense_jax.ops.crf import CrfParams, exact_mean_field, mean_field

NUM_CLASSES = 21
CROP = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The images and parameters to compare with."""

    images: pathlib.Path  # A folder of JPEG images.
    num_images: int = 4  # Number of images, the first in the folder.
    size: tuple[int, int] = (375, 500)  # Height and width of the resized whole images.
    repeats: int = 5  # Timed turns of each side; the medians are shown.
    crf: CrfParams = dataclasses.field(default_factory=CrfParams)


def noisy_logits(image: np.ndarray, seed: int) -> np.ndarray:
    """Returns float32 [H, W, C]: classes are levels of brightness, and the scores have noise."""
    classes = image.mean(axis=-1) * NUM_CLASSES / 256
    rng = np.random.default_rng(seed)
    scores = 2.0 * (classes.astype(int)[..., None] == np.arange(NUM_CLASSES))
    return (scores + rng.normal(size=scores.shape)).astype(np.float32)


def public(dense_crf: Any, logits: np.ndarray, image: np.ndarray, params: CrfParams) -> np.ndarray:
    """Returns the probabilities [H, W, C] of the C++ code."""
    height, width, channels = logits.shape
    norms = {
        "after": dense_crf.NORMALIZE_AFTER,
        "symmetric": dense_crf.NORMALIZE_SYMMETRIC,
    }
    kernel = {"normalization": norms[params.norm]}
    model = dense_crf.DenseCRF2D(width, height, channels)
    model.setUnaryEnergy(np.ascontiguousarray(-logits.reshape(-1, channels).T))
    model.addPairwiseGaussian(sxy=params.sg, compat=params.w2, **kernel)
    model.addPairwiseBilateral(
        sxy=params.sxy, srgb=params.srgb, rgbim=image, compat=params.w1, **kernel
    )
    probabilities = np.array(model.inference(params.iterations))
    return probabilities.T.reshape(height, width, channels)


def main(config: Config) -> None:
    """Prints accuracy and time for each image."""
    files = sorted(config.images.glob("*.jpg"))[: config.num_images]
    if not files:
        sys.exit(f"error: no .jpg in {config.images}: give --images a folder of .jpg images")
    try:
        dense_crf = importlib.import_module("pydensecrf.densecrf")
    except ImportError:
        dense_crf = None
        print("pydensecrf is not installed: measures our code alone")
    has_public = dense_crf is not None and config.crf.norm != "none"
    height, width = config.size
    images = [np.array(Image.open(f).convert("RGB").resize((width, height))) for f in files]

    print("mean difference from the exact form, and equal labels")
    exact = jax.jit(exact_mean_field, static_argnames="params")
    fast = jax.jit(
        lambda logits, image, params: mean_field(logits[None], image[None], params)[0],
        static_argnames="params",
    )
    for iterations in sorted({1, config.crf.iterations}):
        params = dataclasses.replace(config.crf, iterations=iterations)
        for file, image in zip(files, images, strict=True):
            top, left = (height - CROP) // 2, (width - CROP) // 2
            crop = np.ascontiguousarray(image[top : top + CROP, left : left + CROP])
            logits = noisy_logits(crop, seed=0)
            colours = jnp.asarray(crop, jnp.float32)
            expected = np.exp(exact(logits, colours, params))
            probabilities = {"ours": np.exp(fast(logits, colours, params))}
            if has_public:
                probabilities["public"] = public(dense_crf, logits, crop, params)
            row = "".join(
                f"   {name} {np.abs(p - expected).mean():.5f}"
                f" {np.mean(p.argmax(-1) == expected.argmax(-1)):7.2%}"
                for name, p in probabilities.items()
            )
            print(f"{file.stem:16} {iterations:3} iterations{row}", flush=True)

    print(f"median ms, {width} x {height}, {config.crf.iterations} iterations")
    for file, image in zip(files, images, strict=True):
        logits, colours = noisy_logits(image, seed=0), jnp.asarray(image, jnp.float32)
        arrays = jax.device_put((logits, colours))

        def ours(arrays=arrays):
            return jax.block_until_ready(fast(*arrays, config.crf))

        def theirs(logits=logits, image=image):
            return public(dense_crf, logits, image, config.crf)

        result = alternate(ours, theirs if has_public else ours, config.repeats, warmup=1)
        row = f"{file.stem:16} ours {result.ours * 1e3:6.0f}"
        if has_public:
            row += f"   public {result.theirs * 1e3:6.0f}   ratio {result.ratio:.2f}"
        print(row, flush=True)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, prog="python -m benchmarks.crf"))
