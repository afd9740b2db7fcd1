"""Published weights of FCN-32s, 16s, 8s and FCN-AlexNet, in Caffe.

Reference: shelhamer/fcn.berkeleyvision.org: fcn32s-, fcn16s-, fcn8s-heavy-pascal.caffemodel,
pascalcontext-* (nyud-* have another mean); fcn8s-atonce-pascal; fcn-alexnet-pascal, and
bvlc_reference_caffenet, which it starts from (bvlc_alexnet has the same names but normalises in
front of poolings).
"""

import functools

import jax
import numpy as np

from dense_jax.layers import init
from dense_jax.models import fcn
from dense_jax.releases import vgg
from dense_jax.releases.catalogue import Network
from dense_jax.weights import rules
from dense_jax.weights.rules import Release, Rule


def _bilinear(shape: tuple[int, ...]) -> jax.Array:
    return init.bilinear()(None, shape)


def _upscore_rules(*names: str) -> tuple[Rule, ...]:
    """Returns rules for fixed or learned up-convolutions, which Caffe stores as [C, C, k, k]."""
    return tuple(
        Rule(f"{name}.0", f"params/{name}/kernel", "diagonal+conv", constant=_bilinear)
        for name in names
    )


_RULES = (
    *vgg.CAFFE_RULES,
    *rules.caffe_conv("score_fr", "score_fr"),
    *rules.caffe_conv("score_pool4", "score_pool4"),
    *rules.caffe_conv("score_pool3", "score_pool3"),
    *_upscore_rules("upscore2", "upscore_pool4", "upscore", "upscore16", "upscore8"),
)
_SCALE_RULES = tuple(
    Rule(f"{name}.0", f"params/{name}", constant=functools.partial(np.full, fill_value=scale))
    for name, scale in zip(("scale_pool4", "scale_pool3"), fcn.AT_ONCE, strict=True)
)
_ALEXNET_RULES = (
    *rules.caffe_convs(*(layer.name for layer in fcn.ALEXNET_LAYERS if layer.features), "score_fr"),
    *_upscore_rules("upscore"),
    *(Rule(f"fc8.{i}", None) for i in range(2)),  # scores of ImageNet's classes
)
CAFFE = (
    Release(
        "Caffe's FCN",
        _RULES,
        vgg.TRUNK,
        "caffe",
        needs="--pad-mode=100 --skip-scale=1; files for NYUDv2 expect another mean colour",
    ),
    Release(
        "Caffe's FCN-8s trained at once",
        (*_RULES, *_SCALE_RULES),
        vgg.TRUNK,
        "caffe",
        needs="--pad-mode=100 --skip-scale=paper",
    ),
    Release("Caffe's CaffeNet", _ALEXNET_RULES, ("*/conv?/*",), "caffe"),
)

RELEASES = CAFFE
NETWORKS = {  # VOC's classes
    "fcn32s": Network(fcn.fcn32s, num_classes=21),
    "fcn16s": Network(fcn.fcn16s, num_classes=21),
    "fcn8s": Network(fcn.fcn8s, num_classes=21),
    "fcn8s_at_once": Network(fcn.fcn8s_at_once, num_classes=21),
    "fcn_alexnet": Network(fcn.fcn_alexnet, num_classes=21),
}
