"""Published weights of Faster and Mask R-CNN in Detectron (Caffe2), and its files of ImageNet.

A normalisation is a scale and a shift there, with mean 0 and variance 1. detectron2's own files of
ImageNet have these names too, and all four vectors. Images are BGR.

References: facebookresearch/Detectron: MODEL_ZOO.md; detectron/modeling/{ResNet,FPN,rpn_heads,
fast_rcnn_heads,mask_rcnn_heads}.py; detectron/utils/net.py; tools/pickle_caffe_blobs.py, which adds
biases of zero; facebookresearch/detectron2: detectron2/checkpoint/c2_model_loading.py; names of
detectron2's R-50.pkl in a log: facebookresearch/detectron2#1698.
"""

import functools
from collections.abc import Callable

from dense_jax.releases import detectron2, resnet
from dense_jax.releases.catalogue import Network
from dense_jax.weights.rules import Release, Rule

_Norm = Callable[[str, str], tuple[Rule, ...]]
_AFFINE_ABSENT = ("batch_stats/*/mean", "batch_stats/*/var")


def _affine(source: str, target: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{source}_s", f"params/{target}/scale"),
        Rule(f"{source}_b", f"params/{target}/bias"),
    )


def _four_vectors(source: str, target: str) -> tuple[Rule, ...]:
    """Returns rules for detectron2's normalisations; the second names are Caffe2's."""
    params = (f"params/{target}/{name}" for name in ("scale", "bias"))
    paths = (*params, *(f"batch_stats/{target}/{name}" for name in ("mean", "var")))
    names = ("gamma", "beta", "running_mean", "running_var")
    return (
        *(Rule(f"{source}_{name}", path) for name, path in zip(names, paths, strict=True)),
        *(
            Rule(f"{source}_{name}", path, role="alias")
            for name, path in zip(("s", "b", "rm", "riv"), paths, strict=True)
        ),
    )


def _layer(source: str, target: str, layout: str = "conv") -> tuple[Rule, Rule]:
    return (
        Rule(f"{source}_w", f"params/{target}/kernel", layout),
        Rule(f"{source}_b", f"params/{target}/bias"),
    )


def _unbiased(source: str, target: str, layout: str = "conv") -> tuple[Rule, Rule]:
    kernel, _ = _layer(source, target, layout)
    return kernel, Rule(f"{source}_b", None, reason="Detectron has no bias there")


def _trunk(norm: _Norm) -> tuple[Rule, ...]:
    """Returns rules for a residual network; `norm` returns those for a normalisation."""
    table = [*_unbiased("conv1", "conv1", "conv+bgr"), *norm("res_conv1_bn", "bn1")]
    for number in range(2, 6):
        for branch, (conv, bn) in resnet.BRANCHES.items():
            theirs, ours = f"res{number}_{{b}}_{branch}", f"layer{number - 1}_{{b}}"
            table += [*_unbiased(theirs, f"{ours}/{conv}"), *norm(f"{theirs}_bn", f"{ours}/{bn}")]
    return tuple(table)


def _classifier(norm: _Norm) -> tuple[Rule, ...]:
    """Returns rules for a file of ImageNet; ResNeXts have the second name of the last layer."""
    last = (rule._replace(role="alias") for rule in _layer("pred", "fc", "dense"))
    return (*_trunk(norm), *_layer("fc1000", "fc", "dense"), *last)


def _detector(neck: str) -> tuple[Rule, ...]:
    """Returns rules for Faster and Mask R-CNN; see `FasterRCNN.neck`."""
    level, trunk = "", Release("", _trunk(_affine), (), "")
    table = list(resnet.of_detectors(trunk, "")[neck == "c4"].rules)
    if neck == "fpn":
        level = "_fpn2"  # all levels share the first one's
        for number in range(2, 6):
            # By the last block of the stage, whose number depends on the network.
            name = f"res{number}_{{b}}_sum"
            lateral = f"{name}_lateral" if number < 5 else name
            for kind, theirs in (("inner", f"fpn_inner_{lateral}"), ("layer", f"fpn_{name}")):
                convs = _layer(theirs, f"fpn/{kind}_blocks_{number - 2}")
                table += [rule._replace(role="alias") for rule in convs]
    table += _layer(f"conv_rpn{level}", "rpn/conv1")
    table += _layer(f"rpn_cls_logits{level}", "rpn/cls_logits")
    table += _layer(f"rpn_bbox_pred{level}", "rpn/bbox_pred")
    if neck != "c4":
        table += _layer("fc6", "box_head/fc6", "dense_chw") + _layer("fc7", "box_head/fc7", "dense")
    for name in ("cls_score", "bbox_pred"):
        table += _layer(name, f"box_predictor/{name}", "dense")
    for i in range(1, 5):
        table += _layer(f"_[mask]_fcn{i}", f"mask_head/mask_fcn{i}")
    table += _layer("conv5_mask", "mask_predictor/conv5_mask", "up_conv")
    table += _layer("mask_fcn_logits", "mask_predictor/mask_fcn_logits")
    unused = [(f"{rule.source}_momentum", "state of the optimiser") for rule in table]
    unused += [(name, "state of the optimiser") for name in ("lr", "model_iter")]
    unused += [
        (f"{name}_{kind}", "scores of ImageNet's classes")
        for name in ("fc1000", "pred")
        for kind in "wb"
    ]
    return (*table, *(Rule(name, None, reason=reason) for name, reason in unused))


_is_resnext = detectron2.is_grouped("res2_0_branch2b_w")


def _detectors(neck: str) -> tuple[Release, Release]:
    """Returns the releases on ResNets and on ResNeXts."""
    release = functools.partial(
        Release,
        rules=_detector(neck),
        trunk=detectron2.TRUNK,
        normalisation="fast_rcnn",
        absent=_AFFINE_ABSENT,
    )
    needs = "--recipe=paper of experiments.mask_rcnn, --bn-epsilon=0 --stride-in="
    return (
        release(f"Detectron's R-CNN on ResNet-{neck.upper()}", needs=f"{needs}1x1"),
        release(
            f"Detectron's R-CNN on ResNeXt-{neck.upper()}", needs=f"{needs}3x3", sign=_is_resnext
        ),
    )


DETECTORS = tuple(release for neck in ("fpn", "c4", "dc5") for release in _detectors(neck))
CLASSIFIERS = tuple(
    Release(
        f"{code}'s {kind} for ImageNet",
        _classifier(norm),
        resnet.TRUNK,
        normalisation,
        absent,
        f"--stride-in={stride}{epsilon}",
        _is_resnext if kind == "ResNeXt" else None,
    )
    for code, norm, normalisations, absent, epsilon in (
        ("Detectron", _affine, ("fast_rcnn", "fast_rcnn"), _AFFINE_ABSENT, " --bn-epsilon=0"),
        ("detectron2", _four_vectors, ("detectron2", "torchvision"), (), ""),
    )
    for kind, normalisation, stride in zip(
        ("ResNet", "ResNeXt"), normalisations, ("1x1", "3x3"), strict=True
    )
)

RELEASES = (
    *DETECTORS,
    *CLASSIFIERS,
    *(moved for one in CLASSIFIERS for moved in resnet.of_detectors(one, one.needs)),
)
# Those of detectron2.
NETWORKS: dict[str, Network] = {}
