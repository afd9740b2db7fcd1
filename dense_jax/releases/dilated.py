"""Published weights of the dilated front end and context module, in Caffe.

Reference: fyu/dilation: models/dilation*_deploy.prototxt, datasets/*.json; what its VOC model calls
fc-final and ct_* is final and ctx_* here, as in the others.
"""

import functools
from typing import Literal

from dense_jax.layers import init
from dense_jax.models import dilated
from dense_jax.releases import vgg
from dense_jax.releases.catalogue import Network
from dense_jax.weights import rules
from dense_jax.weights.rules import Release, Rule


def _release(
    dataset: str,
    num_layers: Literal[7, 8, 10],
    needs: str,
    final: str = "final",
    context: str = "ctx",
) -> Release:
    """The release of one dataset; VOC's calls some layers by other names."""
    names = (*dilated.ContextModule(num_layers).names, "ctx_final")
    theirs = {name: name.replace("ctx", context, 1) for name in names} | {"final": final}
    table = [rule for name in theirs for rule in rules.caffe_conv(theirs[name], name)]
    if num_layers == 10:  # the only one that enlarges its scores
        upsample = functools.partial(init.bilinear(), None)
        target = "params/ctx_upsample/kernel"
        table.append(Rule("ctx_upsample.0", target, "conv", constant=upsample))
    return Release(
        f"fyu/dilation's dilation{num_layers} for {dataset}",
        (*vgg.CAFFE_RULES, *table),
        trunk=vgg.TRUNK,
        normalisation=f"dilation_{dataset.lower()}",
        needs=f"--front-pad=valid_reflect {needs}",
    )


_BASIC = "--context=basic --context-pad=per_layer"
# As in fyu/dilation: datasets/camvid.json; ours have another order.
_CLASSES = (
    "its classes are building, tree, sky, car, sign, road, pedestrian, fence, pole, pavement, "
    "bicyclist in this order"
)
# They differ in their names. A front end alone does not say whose it is, and is taken for KITTI's.
CAFFE = (
    _release("VOC", 8, "--context=large --context-pad=once_zero", "fc-final", "ct"),
    _release(
        "KITTI",
        7,
        f"{_BASIC} --context-layers=7; {_CLASSES}; if it is a front end alone, the mean colour of "
        "its own dataset",
    ),
    _release("CamVid", 8, f"{_BASIC}; {_CLASSES}"),
    _release("Cityscapes", 10, f"{_BASIC} --context-layers=10 --upsample-loss=on"),
)

RELEASES = CAFFE


def _network(build, num_classes: int) -> Network:
    """A network that pads, so that it can be traced on small images."""
    return Network(functools.partial(build, pad="same"), num_classes)


NETWORKS = {
    "dilated_front_end": _network(dilated.front_end, 21),  # VOC
    "dilation7": _network(dilated.dilation7, 11),  # KITTI, with CamVid's classes
    "dilation8": _network(dilated.dilation8, 11),  # CamVid
    "dilation8_voc": _network(dilated.dilated_large, 21),
    "dilation10": _network(dilated.dilation10, 19),  # Cityscapes
}
