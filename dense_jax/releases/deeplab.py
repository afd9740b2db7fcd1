"""Published weights of DeepLab v1 and v2, in Caffe.

Most layers keep the names of the released networks; fc8_voc12 is fc8 here, and fc1_voc12 is fc1.
"""

from dense_jax.models import deeplab
from dense_jax.releases import resnet, vgg
from dense_jax.releases.catalogue import Network
from dense_jax.weights import rules
from dense_jax.weights.rules import Release, Rule


def _vgg_rules() -> tuple[Rule, ...]:
    """Returns rules for heads with one branch and with several."""
    names = {name: name for name in ("fc6", "fc7")} | {"fc8_voc12": "fc8"}
    names |= {f"{theirs}_{{n}}": f"{ours}_{{n}}" for theirs, ours in names.items()}
    heads = (rule for theirs in names for rule in rules.caffe_conv(theirs, names[theirs]))
    return (*rules.caffe_convs(*vgg.CONVS), *heads)


_RESNET_RULES = (
    *resnet.msra_rules(resnet.MSRA_101),
    *rules.caffe_conv("fc1_voc12", "fc1"),
    *rules.caffe_conv("fc1_voc12_c{n}", "fc1_c{n}"),
)
# A network that trains at several scales has a copy of each layer for each scale, with a suffix.
_COPY_RULES = tuple(Rule(rule.source.replace(".", "_res0{scale}."), None) for rule in _RESNET_RULES)
CAFFE = (
    Release(
        "Caffe's DeepLab on VGG-16",
        _vgg_rules(),
        trunk=vgg.TRUNK,
        normalisation="caffe",
        needs="--pool5a=on for version 1",
    ),
    Release(
        "Caffe's DeepLab on ResNet-101",
        (*_RESNET_RULES, *_COPY_RULES),
        trunk=resnet.TRUNK,
        normalisation="caffe",
        needs="--stride-in=1x1",
    ),
)

RELEASES = CAFFE
NETWORKS = {  # VOC's classes
    "deeplab_largefov": Network(deeplab.deeplab_largefov, num_classes=21),
    "deeplab_vgg16": Network(deeplab.deeplab_vgg_aspp_l, num_classes=21),
    "deeplab_resnet101": Network(deeplab.deeplab_resnet101, num_classes=21),
}
