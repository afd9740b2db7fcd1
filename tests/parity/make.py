"""Makes the reference arrays by torch and torchvision, and prints how far we are from them.

    python -m tests.parity.make                       # everything
    python -m tests.parity.make resnet50 vgg16        # some networks of torchvision
    python -m tests.parity.make training              # losses of training steps; torch alone
    python -m tests.parity.make detections            # proposals, detections, losses of detectors

The wheel of torchvision may be built for another torch: pip install --no-deps torchvision. Then the
operators nms and roi_align, which detections need, do not load: compile them from
torchvision/csrc/ops, and name the library in DENSE_JAX_TORCHVISION_OPS.
"""

import argparse
from typing import Any

import jax
import numpy as np

from dense_jax.objectives import rcnn
from tests.parity import detection, drawn, theirs, training, zoo


def make(name: str) -> None:
    """Writes the arrays of one network of torchvision; prints differences stage by stage."""
    network = theirs.build(name)
    shapes = theirs.shapes_of(network)
    tensors = drawn.parameters(shapes)
    stages = theirs.stages(name, network, tensors)
    zoo.keep(name, shapes, stages)
    ours = zoo.ours(name, tensors)
    for stage in zoo.NETWORKS[name].stages:
        apart = zoo.apart(ours[stage], stages[stage])
        print(f"| {name} | {stage} | {abs(stages[stage]).max():.3g} | {apart:.1e} |", flush=True)


def make_detections() -> None:
    """Writes what torchvision's detectors find and lose; prints how far from it we are."""
    rcnn.uniforms, rcnn.sample_rois = detection.given_uniforms, detection.sample_by_place
    outputs = {}
    for name in detection.NAMES:
        tensors = detection.parameters(name)
        outputs[name] = detection.theirs(name, tensors)
        apart = detection.differences(detection.ours(name, tensors), outputs[name])
        cells = " | ".join(f"{key} {value:.1e}" for key, value in apart.items())
        print(f"| {name} | {cells} |", flush=True)
    detection.keep(outputs)


def make_losses() -> None:
    """Writes torch's losses; prints how far from them ours are, and torch's own in float32."""
    jax.config.update("jax_disable_most_optimizations", True)
    losses: Any = {}
    for name, run in training.RUNS.items():
        reference, _ = training.theirs(run)
        losses[run.twin] = np.array(reference)
        others = (
            training.ours(run)[0],
            training.ours(run, np.float32)[0],
            training.theirs(run, np.float32)[0],
        )
        cells = [f"{max(training.apart(other, reference)):.1e}" for other in others]
        falls = f"{reference[0]:.4f} to {reference[-1]:.4f}"
        print(f"| {name} | {falls} | {' | '.join(cells)} |", flush=True)
    np.savez_compressed(training.REFERENCE, **losses)


if __name__ == "__main__":
    everything = [*zoo.NETWORKS, "training", "detections"]
    parser = argparse.ArgumentParser(
        prog="python -m tests.parity.make", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(everything)}")
    names = parser.parse_args().names
    if unknown := [name for name in names if name not in everything]:
        parser.error(f"no such network: {', '.join(unknown)}; known are {', '.join(everything)}")
    jax.config.update("jax_num_cpu_devices", 2)
    for name in names or everything:
        if name == "training":
            make_losses()
        elif name == "detections":
            make_detections()
        else:
            make(name)
