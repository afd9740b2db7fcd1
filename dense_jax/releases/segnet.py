"""Published weights of SegNet and SegNet-Basic in Caffe, and of SegNet's encoder in torchvision.

References: alexgkendall/SegNet-Tutorial: the networks in segnet_model_zoo.md that have an inference
prototxt, and files that compute_bn_statistics.py has finished; pytorch/vision:
torchvision/models/vgg.py, vgg16_bn.
"""

import functools

from dense_jax.models import segnet
from dense_jax.releases import vgg
from dense_jax.releases.catalogue import Network
from dense_jax.weights import rules
from dense_jax.weights.rules import Release, Rule

# The encoder of `SegNet`.
TORCHVISION = Release(
    "torchvision's vgg16_bn",
    vgg.torchvision_rules("conv{}_bn"),
    trunk=("*/conv?_?/*", "*/conv?_?_bn/*"),
    normalisation="torchvision",
    needs="--bn-epsilon=1e-5",
)


def _caffe_rules(last: str, *names: str) -> tuple[Rule, ...]:
    """Returns rules for blocks of these names, and for the scores in the layer `last`."""
    return (
        *rules.caffe_convs(*names, last),
        *(rule for name in names for rule in rules.caffe_scale(f"{name}_bn", f"{name}_bn")),
    )


_DECODER = [f"{name}_D" for name in vgg.CONVS[1:]]
_BASIC = [f"conv{prefix}{i}" for prefix in ("", "_decode") for i in range(1, 5)]
_FOLDED = (
    "do not train weights that are finished for inference, because their scale and bias contain "
    "the statistics"
)
_release = functools.partial(Release, normalisation="none", absent=("batch_stats/*",))
CAFFE = (
    _release(
        "Caffe's SegNet",
        _caffe_rules("conv1_1_D", *vgg.CONVS, *_DECODER),
        tuple(f"params/{name}{end}/*" for name in (*vgg.CONVS, *_DECODER) for end in ("", "_bn")),
        needs=f"--normalisation=none; {_FOLDED}",
    ),
    _release(
        "Caffe's SegNet-Basic",
        (
            *_caffe_rules("conv_classifier", *_BASIC),
            *(
                rule._replace(role="alias")
                for rule in rules.caffe_conv("dense_softmax_inner_prod", "conv_classifier")
            ),
        ),
        tuple(f"params/{name}{end}/*" for name in _BASIC for end in ("", "_bn")),
        needs=f"--input-lrn=on; {_FOLDED}",
    ),
)

RELEASES = (TORCHVISION, *CAFFE)
NETWORKS = {  # CamVid's classes
    "segnet": Network(segnet.SegNet, num_classes=11),
    "segnet_basic": Network(segnet.SegNetBasic, num_classes=11),
}
