"""Measures what padding changes in the detections of a trained run.

    python -m benchmarks.padding --run=runs/faster
    python -m benchmarks.padding --run=runs/faster --extra 32 64 --num-images=50

Each image is padded no more than the network needs, and then by more zeros below and beside it;
`dense_jax.evaluation.padding` says what counts as a change. For the shapes that images of a split
share, `evaluate --eval-shapes=buckets` says the same.
"""

import pathlib
from typing import Any

import numpy as np
import tyro

from dense_jax.evaluation import padding
from dense_jax.metrics.detections import Detections
from dense_jax.tasks import trained


def main(
    run: pathlib.Path,
    split: str = "val",
    data_dir: str | None = None,
    extra: tuple[int, ...] = (32, 64, 128, 256),
    num_images: int = 200,
) -> None:
    """Prints the share of detections that change, for each amount of padding.

    Args:
      run: folder of a run that finds objects.
      split: name of the split.
      data_dir: current folder of the dataset. Default: its folder in training.
      extra: pixels of zeros below and beside each image, besides those that the network needs.
      num_images: the first images of the split.
    """
    opened = trained.load(run)
    source = trained.dataset_of(opened, data_dir).split(split)
    images = [source[i]["image"] for i in range(min(num_images, len(source)))]

    def detect(image: np.ndarray, more: int) -> Detections:
        height, width = opened.task.input_size(image.shape[:2])
        rows, columns = (opened.task.padded_side(side) + more for side in (height, width))
        found: Any = opened.predictor(image, (rows, columns))
        return Detections.build(found.boxes, found.class_ids, found.scores)

    exact = [detect(image, 0) for image in images]
    for more in extra:
        counts = np.zeros((2, 2), int)
        for image, found in zip(images, exact, strict=True):
            size = image.shape[:2]
            other = detect(image, more)
            counts += padding.changes(found, other, size, opened.task.input_size(size))
        print(f"{more} pixels more: {padding.in_words(counts, len(images))}")


if __name__ == "__main__":
    tyro.cli(main, prog="python -m benchmarks.padding")
