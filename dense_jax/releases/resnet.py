"""Published weights of ResNets and ResNeXts: torchvision's, and those of He et al. in Caffe.

References: pytorch/vision: torchvision/models/resnet.py; KaimingHe/deep-residual-networks:
ResNet-50- and ResNet-101-model.caffemodel.
"""

from collections.abc import Sequence

from dense_jax.models import resnet
from dense_jax.releases.catalogue import Network
from dense_jax.weights import rules
from dense_jax.weights.rules import Release, Rule

TRUNK = tuple(  # not "*/conv1/*", which is also the name of layers of heads
    f"{place}/{layer}"
    for place in ("params", "params/backbone", "batch_stats", "batch_stats/backbone")
    for layer in ("conv1/*", "bn1/*", "layer?_*")
)


def torchvision_rules(source: str = "", target: str = "") -> tuple[Rule, ...]:
    """Returns rules for all but "fc"; `source` may be "backbone.", and `target` "backbone/"."""
    block, ours = f"{source}layer{{s}}.{{b}}", f"{target}layer{{s}}_{{b}}"
    return (
        *rules.conv(f"{source}conv1", f"{target}conv1"),
        *rules.batch_norm(f"{source}bn1", f"{target}bn1"),
        *rules.conv(f"{block}.conv{{i}}", f"{ours}/conv{{i}}"),
        *rules.batch_norm(f"{block}.bn{{i}}", f"{ours}/bn{{i}}"),
        *rules.conv(f"{block}.downsample.0", f"{ours}/downsample_0"),
        *rules.batch_norm(f"{block}.downsample.1", f"{ours}/downsample_1"),
    )


TORCHVISION = Release(
    "torchvision's ResNet",
    (*torchvision_rules(), *rules.dense("fc", "fc")),
    TRUNK,
    normalisation="torchvision",
    needs="--stride-in=3x3, the default but in DeepLab v2 and the paper presets of Mask R-CNN",
)

# Names of the blocks of stages 2 to 5 in the release of He et al.
MSRA_50 = ("abc", "abcd", "abcdef", "abc")
MSRA_101 = (
    "abc",
    ("a", *(f"b{i}" for i in range(1, 4))),
    ("a", *(f"b{i}" for i in range(1, 23))),
    "abc",
)
BRANCHES = {
    "branch1": ("downsample_0", "downsample_1"),
    **{f"branch2{letter}": (f"conv{i}", f"bn{i}") for i, letter in enumerate("abc", 1)},
}


def msra_rules(blocks: Sequence[Sequence[str]]) -> tuple[Rule, ...]:
    """Returns rules for all but "fc" of a residual network in the release of He et al. in Caffe.

    Args:
      blocks: names of the blocks of each stage, see `MSRA_50`.
    """
    table = [*rules.caffe_conv("conv1", "conv1", "conv+bgr")[:1]]
    table += rules.caffe_batch_norm("bn_conv1", "scale_conv1", "bn1")
    for stage, names in enumerate(blocks, start=2):
        for i, name in enumerate(names):
            for branch, (conv, norm) in BRANCHES.items():
                if branch == "branch1" and i > 0:
                    continue  # only the first block has a convolution on the shortcut
                block, layer = f"layer{stage - 1}_{i}", f"{stage}{name}_{branch}"
                table += rules.caffe_conv(f"res{layer}", f"{block}/{conv}", "conv")[:1]
                table += rules.caffe_batch_norm(f"bn{layer}", f"scale{layer}", f"{block}/{norm}")
    return tuple(table)


# ResNet-50 has a bias in front of its first normalisation; the mean here absorbs it.
_CONV1_BIAS = Rule("conv1.1", "batch_stats/bn1/mean", "ones+minus", role="part")
# These networks subtract a mean image; its colour is within one grey value of Caffe's mean colour.
MSRA = tuple(
    Release(
        f"MSRA's ResNet-{depth}",
        (*table, *rules.caffe_dense("fc1000", "fc")),
        TRUNK,
        normalisation="caffe",
        needs='ResNet(stride_in="1x1", pool_ceil=True, pool_padding=0)',
    )
    for depth, table in (
        (50, (*msra_rules(MSRA_50), _CONV1_BIAS)),
        (101, msra_rules(MSRA_101)),
    )
)


def of_detectors(release: Release, needs: str) -> tuple[Release, Release]:
    """Returns a release of classifiers under the names of networks that use them as a trunk.

    Args:
      release: the release; its rules name each stage.
      needs: see `Release`.

    Returns:
      The release with all stages in "backbone", and with the last one in "box_head", as in C4.
    """

    def moved(rule: Rule, last: str) -> Rule:
        kind, _, name = (rule.target or "").partition("/")
        if not name.startswith(("conv1/", "bn1/", "layer")):
            return rule
        place = last if name.startswith("layer4") else "backbone"
        return rule._replace(target=f"{kind}/{place}/{name}")

    def release_of(last: str, *more: str) -> Release:
        table = tuple(moved(rule, last) for rule in release.rules)
        return release._replace(rules=table, trunk=("*/backbone/*", *more), needs=needs)

    return release_of("backbone"), release_of("box_head", "*/box_head/layer4_*")


RELEASES = (
    TORCHVISION,
    *MSRA,
    *(moved for release in MSRA for moved in of_detectors(release, "--stride-in=1x1")),
)
NETWORKS = {  # ImageNet's classes
    "resnet50": Network(resnet.resnet50, num_classes=1000),
    "resnet101": Network(resnet.resnet101, num_classes=1000),
    "resnext101_32x8d": Network(resnet.resnext101_32x8d, num_classes=1000),
    "resnext101_64x4d": Network(resnet.resnext101_64x4d, num_classes=1000),
}
