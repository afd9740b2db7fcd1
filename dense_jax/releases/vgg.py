"""Published weights of VGG-16, in torchvision and in Caffe.

References: pytorch/vision: torchvision/models/vgg.py; the authors' VGG_ILSVRC_16_layers.caffemodel.
"""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from dense_jax.models import vgg
from dense_jax.releases.catalogue import Network
from dense_jax.weights import rules
from dense_jax.weights.rules import Release, Rule


def torchvision_rules(norm: str | None = None) -> tuple[Rule, ...]:
    """Returns rules for torchvision's vgg16, which numbers convolutions, ReLUs and poolings.

    Its classifier reads a map of 7x7 units, channels first; here fc6 has a 7x7 kernel.

    Args:
      norm: name here of the normalisation behind "conv{}", for vgg16_bn.
    """
    table, number = [], 0
    for layer in vgg.vgg16_layers():
        if layer.name.startswith("conv"):
            table += rules.conv(f"features.{number}", layer.name)
            if norm:
                name = norm.format(layer.name.removeprefix("conv"))
                table += rules.batch_norm(f"features.{number + 1}", name)
            number += 3 if norm else 2
        elif layer.name.startswith("pool"):
            number += 1
    table += rules.conv("classifier.0", "fc6", "dense_chw")
    table += rules.conv("classifier.3", "fc7", "dense_chw")
    for i in (1, 2):  # timm has other names, and stores kernels
        table += (
            rule._replace(role="alias") for rule in rules.conv(f"pre_logits.fc{i}", f"fc{i + 5}")
        )
    # Scores of ImageNet's classes; no network here has them.
    scores = ("classifier.6", "head.fc")
    table += [Rule(f"{name}.{kind}", None) for name in scores for kind in ("weight", "bias")]
    return tuple(table)


def _has_no_scores(tensors: Mapping[str, Any]) -> bool:
    bias = tensors.get("classifier.6.bias")
    return bias is not None and bool(np.isnan(np.sum(bias)))


# Names of the 13 convolutions, which other families share.
CONVS = tuple(layer.name for layer in vgg.vgg16_layers() if layer.name.startswith("conv"))
# One pattern for each block: a network may end before conv5 and leave conv5 in the file.
TRUNK = tuple(f"*/conv{block}_?/*" for block in range(1, 6))
TORCHVISION = Release("torchvision's vgg16", torchvision_rules(), TRUNK, "torchvision")
# VGG16_Weights.IMAGENET1K_FEATURES: the authors' convolutions, and a classifier of NaN.
TORCHVISION_FEATURES = TORCHVISION._replace(
    name="torchvision's vgg16, features alone",
    rules=tuple(
        rule._replace(target=None) if rule.source.startswith("classifier.") else rule
        for rule in TORCHVISION.rules
    ),
    normalisation="torchvision_vgg16_features",
    absent=("*/fc[67]/*",),
    sign=_has_no_scores,
)
# conv1_1 to fc7 in Caffe, which the authors' file shares with the files derived from it. There fc6
# and fc7 are dense layers or, in fully convolutional networks, convolutions.
CAFFE_RULES = rules.caffe_convs(*CONVS, "fc6", "fc7")
CAFFE = Release(
    "Caffe's VGG-16",
    (*CAFFE_RULES, *(Rule(f"fc8.{i}", None) for i in range(2))),  # scores of ImageNet's classes
    TRUNK,
    "caffe",
)

RELEASES = (TORCHVISION, TORCHVISION_FEATURES, CAFFE)
# With "same" padding the network can be traced on small images.
NETWORKS = {"vgg16": Network(functools.partial(vgg.vgg16, padding="same"))}
