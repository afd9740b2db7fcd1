"""Published weights of DeconvNet in Caffe, and of its encoder in torchvision.

References: HyeonwooNoh/DeconvNet: DeconvNet_trainval_inference.caffemodel; pytorch/vision:
torchvision/models/vgg.py, vgg16_bn.
"""

from dense_jax.models import deconvnet
from dense_jax.releases import vgg
from dense_jax.releases.catalogue import Network
from dense_jax.weights import rules
from dense_jax.weights.rules import Release, Rule

# The encoder.
TORCHVISION = Release(
    "torchvision's vgg16_bn",
    vgg.torchvision_rules("bn{}"),
    trunk=("*/conv?_?/*", "*/bn?_?/*"),
    normalisation="torchvision",
    needs="--bn-epsilon=1e-5",
)


def _caffe_rules() -> tuple[Rule, ...]:
    """Returns rules for the whole network; in Caffe deconv* are up-convolutions of stride 1."""
    table = list(vgg.CAFFE_RULES)
    norms = {"fc6": "bnfc6", "fc7": "bnfc7", "fc6-deconv": "fc6-deconv-bn"}
    for conv in vgg.CONVS:
        number = conv.removeprefix("conv")
        norms |= {conv: f"bn{number}", f"deconv{number}": f"debn{number}"}
        table += rules.caffe_conv(f"deconv{number}", f"deconv{number}", "up_conv+flip")
    table += rules.caffe_conv("fc6-deconv", "fc6-deconv", "up_conv")
    table += rules.caffe_conv("seg-score-voc", "seg-score")
    return (*table, *(rule for norm in norms.values() for rule in rules.caffe_scale(norm, norm)))


CAFFE = Release(
    "Caffe's DeconvNet",
    _caffe_rules(),
    trunk=("params/[!s]*",),  # all but seg-score
    normalisation="caffe",
    absent=("batch_stats/*",),
    needs="its default options; do not train weights that are finished for inference, because "
    "their scale and bias contain the statistics",
)

RELEASES = (TORCHVISION, CAFFE)
NETWORKS = {"deconvnet": Network(deconvnet.DeconvNet, num_classes=21)}  # VOC's classes
