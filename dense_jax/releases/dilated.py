"""Published weights of the dilated front end and context module, in Caffe.

Reference: fyu/dilation: models/dilation*_deploy.prototxt, datasets/*.json. Its VOC model has the
names fc-final and ct_*; here they are final and ctx_*, as in its other models.
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
    """Returns the release for one dataset; the one for VOC has other names for some layers."""
    names = (*dilated.ContextModule(num_layers).names, "ctx_final")
    theirs = {name: name.replace("ctx", context, 1) for name in names} | {"final": final}
    table = [rule for name in theirs for rule in rules.caffe_conv(theirs[name], name)]
    if num_layers == 10:  # only this network upsamples its scores by a layer
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
# From fyu/dilation: datasets/camvid.json; the dataset here has another order.
_CLASSES = (
    "the order of its classes is building, tree, sky, car, sign, road, pedestrian, fence, pole, "
    "pavement, bicyclist"
)
# The names of the context layers tell the releases apart. A front end alone lacks them, and counts
# as KITTI's.
CAFFE = (
    _release("VOC", 8, "--context=large --context-pad=once_zero", "fc-final", "ct"),
    _release(
        "KITTI",
        7,
        f"{_BASIC} --context-layers=7; {_CLASSES}; a front end alone expects the mean colour of "
        "its own dataset",
    ),
    _release("CamVid", 8, f"{_BASIC}; {_CLASSES}"),
    _release("Cityscapes", 10, f"{_BASIC} --context-layers=10 --upsample-loss=on"),
)

RELEASES = CAFFE


def _network(build, num_classes: int) -> Network:
    """Returns a network that pads, so that it can be traced on small images."""
    return Network(functools.partial(build, pad="same"), num_classes)


NETWORKS = {
    "dilated_front_end": _network(dilated.front_end, 21),  # VOC
    "dilation7": _network(dilated.dilation7, 11),  # KITTI, with CamVid's classes
    "dilation8": _network(dilated.dilation8, 11),  # CamVid
    "dilation8_voc": _network(dilated.dilated_large, 21),
    "dilation10": _network(dilated.dilation10, 19),  # Cityscapes
}
