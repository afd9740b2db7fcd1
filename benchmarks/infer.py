"""Times whole predictions of our detectors against torchvision's, and shows their memory.

    python -m benchmarks.infer --model maskrcnn_r50_fpn --size 320

From a uint8 image to boxes and scores, of Mask R-CNN also to masks in pixels of the image, cut at
one half: normalisation, network, suppression and pasting. Both sides have the same weights and the
same image, and find about a hundred objects; their results are compared first. They are timed in
turns in one process, and their memory is that of a process of each. The parts that both sides share
with training, and what torchvision needs, are in `benchmarks.detectors`.
"""

import sys

import numpy as np
import tyro

from benchmarks import detectors, timing
from dense_jax.ops import boxes as box_ops


def main(model: str = "maskrcnn_r50_fpn", size: int = 320, repeats: int = 5) -> None:
    """Compares one detector with torchvision's.

    Args:
      model: a name in `benchmarks.detectors.MODELS`.
      size: height and width of the image, a multiple of 32 pixels, which is not resized.
      repeats: timed turns of each side; the medians are shown.
    """
    if model not in detectors.MODELS:
        sys.exit(f"error: no model {model!r}: choose one of {', '.join(detectors.MODELS)}")
    if size % 32:
        sys.exit(f"error: --size {size}: give a multiple of 32")
    timing.import_torch(threads=2)
    detectors.print_memory(model, size, "infer")
    own, other = (make() for make in detectors.sides(model, size).values())
    found, expected = own.infer(), other.infer()
    apart = np.abs(found.scores - expected.scores[: len(found.scores)]).max(initial=0)
    print(f"{model}, 1 x {size} x {size}: {len(found.scores)} detections, scores differ by", end="")
    print(f" {apart:.1e}", end="")
    if len(found.masks):
        # Where scores tie, the order may differ.
        same = box_ops.iou(found.boxes, expected.boxes[: len(found.boxes)]).diagonal() > 0.99
        pixels = np.mean(found.masks[same] != expected.masks[: len(same)][same])
        print(f", of pixels of {same.sum()} masks {pixels:.1e}", end="")
    print()
    if len(found.scores) != len(expected.scores) or not apart < 1e-3:
        raise SystemExit("error: not the same network")
    detectors.print_times("infer", own.infer, other.infer, repeats)


if __name__ == "__main__":
    tyro.cli(main, prog="python -m benchmarks.infer")
