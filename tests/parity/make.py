"""Makes the reference arrays by torch and torchvision, and prints how far we are from them.

    python -m tests.parity.make
    python -m tests.parity.make resnet50 vgg16

The wheel of torchvision may be built for another torch: pip install --no-deps torchvision.
"""

import sys

from tests.parity import drawn, theirs, zoo


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


if __name__ == "__main__":
    for name in sys.argv[1:] or zoo.NETWORKS:
        make(name)
