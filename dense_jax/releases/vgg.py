"""Published weights of VGG-16: torchvision's vgg16, which timm renames in part, and the authors'.

References: pytorch/vision: torchvision/models/vgg.py; the authors' VGG_ILSVRC_16_layers.caffemodel.
"""

import functools

from dense_jax.models import vgg
from dense_jax.releases.catalogue import Network
from dense_jax.weights import rules
from dense_jax.weights.rules import Release, Rule


def torchvision_rules(norm: str | None = None) -> tuple[Rule, ...]:
    """Returns rules for torchvision's vgg16, which numbers layers, ReLUs and poolings through.

    Its classifier reads a map of 7x7 units, channels first, as fc6 does by a 7x7 kernel.

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
    for i in (1, 2):  # timm's names, of kernels
        table += (
            rule._replace(role="alias") for rule in rules.conv(f"pre_logits.fc{i}", f"fc{i + 5}")
        )
    # Scores of ImageNet's classes, which no network here has.
    scores = ("classifier.6", "head.fc")
    table += [Rule(f"{name}.{kind}", None) for name in scores for kind in ("weight", "bias")]
    return tuple(table)


# Names of the 13 convolutions. Networks that are VGG-16 and more take them from here.
CONVS = tuple(layer.name for layer in vgg.vgg16_layers() if layer.name.startswith("conv"))
# Block by block: networks may end before conv5, and leave it in the file.
TRUNK = tuple(f"*/conv{block}_?/*" for block in range(1, 6))
TORCHVISION = Release("torchvision's vgg16", torchvision_rules(), TRUNK, "torchvision")
# VGG16_Weights.IMAGENET1K_FEATURES: the authors' own layers, with a classifier of nothing but NaN.
TORCHVISION_FEATURES = TORCHVISION._replace(
    name="torchvision's vgg16, features alone",
    rules=tuple(
        rule._replace(target=None) if rule.source.startswith("classifier.") else rule
        for rule in TORCHVISION.rules
    ),
    normalisation="torchvision_vgg16_features",
    absent=("*/fc[67]/*",),
    hollow=("classifier.6.bias",),
)
# conv1_1 to fc7 in Caffe, with fc6 and fc7 dense or, as "fully convolutional" networks have them,
# on a map. What the authors' file and others derived from it have in common.
CAFFE_RULES = rules.caffe_convs(*CONVS, "fc6", "fc7")
CAFFE = Release(
    "Caffe's VGG-16",
    (*CAFFE_RULES, *(Rule(f"fc8.{i}", None) for i in range(2))),  # ImageNet's classes
    TRUNK,
    "caffe",
)

RELEASES = (TORCHVISION, TORCHVISION_FEATURES, CAFFE)
# "same": so that the network can be traced on small images.
NETWORKS = {"vgg16": Network(functools.partial(vgg.vgg16, padding="same"))}
