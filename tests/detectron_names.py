"""Names and shapes of the tensors in files of detectron2 and Detectron, from their descriptions.

Written from facebookresearch/detectron2: detectron2/modeling, and facebookresearch/Detectron:
detectron/modeling, and not from the tables of rules. Also: a pickle as Python 2 wrote it.
"""

import numpy as np

DEPTHS = {"R_50": (3, 4, 6, 3), "R_101": (3, 4, 23, 3), "X_101_32x8d": (3, 4, 23, 3),
          "X_101_64x4d": (3, 4, 23, 3)}  # fmt: skip
GROUPS = {"X_101_32x8d": 32, "X_101_64x4d": 64}
_BRANCHES = {"conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c", "shortcut": "branch1"}
NORM = (".norm.weight", ".norm.bias", ".norm.running_mean", ".norm.running_var")


def blocks(trunk):
    """Yields (number of the stage, block, convolution, shape) of a residual network."""
    inputs, groups = 64, GROUPS.get(trunk, 1)
    for stage, depth in enumerate(DEPTHS[trunk]):
        inner, outputs = (64 if groups == 1 else 256) * 2**stage, 256 * 2**stage
        for block in range(depth):
            yield stage + 2, block, "conv1", (inner, inputs, 1, 1)
            yield stage + 2, block, "conv2", (inner, inner // groups, 3, 3)
            yield stage + 2, block, "conv3", (outputs, inner, 1, 1)
            if block == 0:
                yield stage + 2, block, "shortcut", (outputs, inputs, 1, 1)
            inputs = outputs


def _with_biases(shapes):
    """{layer: shape of its kernel} with the biases; up-convolutions are [i, o, h, w]."""
    return {
        f"{layer}.{kind}": shape if kind == "weight" else (shape[layer.endswith("deconv")],)
        for layer, shape in shapes.items()
        for kind in ("weight", "bias")
    }


def detectron2(kind, trunk, neck):
    """{name: shape} of faster_rcnn_* or mask_rcnn_* (`kind`) in detectron2's model zoo."""
    shapes, body = {}, "backbone.bottom_up." if neck == "FPN" else "backbone."
    convs = {f"{body}stem.conv1": (64, 3, 7, 7)}
    for stage, block, conv, shape in blocks(trunk):
        source = "roi_heads." if neck == "C4" and stage == 5 else body
        convs[f"{source}res{stage}.{block}.{conv}"] = shape
    for name, shape in convs.items():
        shapes |= {f"{name}.weight": shape} | {name + norm: shape[:1] for norm in NORM}
    layers, rpn, head = {}, "proposal_generator.rpn_head", "roi_heads.box_head"
    if neck == "FPN":
        for stage in range(2, 6):
            layers[f"backbone.fpn_lateral{stage}"] = (256, 64 * 2**stage, 1, 1)
            layers[f"backbone.fpn_output{stage}"] = (256, 256, 3, 3)
    maps, anchors = {"FPN": (256, 3), "C4": (1024, 15), "DC5": (2048, 15)}[neck]
    layers[f"{rpn}.conv"] = (maps, maps, 3, 3)
    layers[f"{rpn}.objectness_logits"] = (anchors, maps, 1, 1)
    layers[f"{rpn}.anchor_deltas"] = (4 * anchors, maps, 1, 1)
    features, channels = 2048, 2048
    if neck != "C4":
        features, channels = 1024, 256
        layers |= {f"{head}.fc1": (1024, 49 * maps), f"{head}.fc2": (1024, 1024)}
    layers |= {
        "roi_heads.box_predictor.cls_score": (81, features),
        "roi_heads.box_predictor.bbox_pred": (320, features),
    }
    if kind == "mask":
        head = "roi_heads.mask_head"
        if neck != "C4":
            layers[f"{head}.mask_fcn1"] = (256, maps, 3, 3)
            layers |= {f"{head}.mask_fcn{i}": (256, 256, 3, 3) for i in range(2, 5)}
        layers |= {f"{head}.deconv": (channels, 256, 2, 2), f"{head}.predictor": (80, 256, 1, 1)}
    return shapes | _with_biases(layers)


def imagenet(trunk, norm, biases=False):
    """{name: shape} of a classifier under Caffe2's names.

    Args:
      trunk: one of `DEPTHS`.
      norm: names of the vectors of a normalisation.
      biases: whether convolutions have biases, as in what pickle_caffe_blobs.py writes.
    """
    shapes: dict[str, tuple[int, ...]] = {"conv1_w": (64, 3, 7, 7)}
    shapes |= {f"res_conv1_bn_{name}": (64,) for name in norm}
    for stage, block, conv, shape in blocks(trunk):
        layer = f"res{stage}_{block}_{_BRANCHES[conv]}"
        shapes[f"{layer}_w"] = shape
        shapes |= {f"{layer}_bn_{name}": shape[:1] for name in norm}
    if biases:
        convs = [(name, shape) for name, shape in shapes.items() if len(shape) == 4]
        shapes |= {name[:-1] + "b": shape[:1] for name, shape in convs}
    last = "pred" if trunk in GROUPS else "fc1000"
    return shapes | {f"{last}_w": (1000, 2048), f"{last}_b": (1000,)}


def detectron(kind, trunk, neck):
    """{name: shape} of e2e_faster_rcnn_* or e2e_mask_rcnn_* in Detectron's model zoo."""
    shapes = imagenet(trunk, ("s", "b"), biases=trunk not in GROUPS)
    theirs = detectron2(kind, trunk, neck)
    level = "_fpn2" if neck == "FPN" else ""
    names = {
        "proposal_generator.rpn_head.conv": f"conv_rpn{level}",
        "proposal_generator.rpn_head.objectness_logits": f"rpn_cls_logits{level}",
        "proposal_generator.rpn_head.anchor_deltas": f"rpn_bbox_pred{level}",
        "roi_heads.box_head.fc1": "fc6",
        "roi_heads.box_head.fc2": "fc7",
        "roi_heads.box_predictor.cls_score": "cls_score",
        "roi_heads.box_predictor.bbox_pred": "bbox_pred",
        "roi_heads.mask_head.deconv": "conv5_mask",
        "roi_heads.mask_head.predictor": "mask_fcn_logits",
        **{f"roi_heads.mask_head.mask_fcn{i}": f"_[mask]_fcn{i}" for i in range(1, 5)},
    }
    for stage, depth in enumerate(DEPTHS[trunk], 2):
        block = f"res{stage}_{depth - 1}_sum"
        lateral = "" if stage == 5 else "_lateral"
        names[f"backbone.fpn_lateral{stage}"] = f"fpn_inner_{block}{lateral}"
        names[f"backbone.fpn_output{stage}"] = f"fpn_{block}"
    for name, shape in theirs.items():
        layer, _, part = name.rpartition(".")
        if layer in names:
            # Background has boxes and a mask.
            rows = {"bbox_pred": 4, "mask_fcn_logits": 1}.get(names[layer], 0)
            shapes[f"{names[layer]}_{part[0]}"] = (shape[0] + rows, *shape[1:])
    frozen = ("conv1_", "res2_", "fc1000", "pred")
    trained = {k: x for k, x in shapes.items() if "_bn_" not in k and not k.startswith(frozen)}
    return shapes | {f"{name}_momentum": shape for name, shape in trained.items()}


def blank(shapes):
    """{name: array of zeros that takes no memory}."""
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


def _text(value):
    return b"T" + len(value).to_bytes(4, "little") + value


def _array(values):
    """An array as Python 2 pickles it: its bytes are text."""
    shape = b"(" + b"".join(b"J" + n.to_bytes(4, "little") for n in values.shape) + b"t"
    state = b"(K\x03U\x01<NNN" + 2 * (b"J" + 4 * b"\xff") + b"K\x00tb"
    dtype = b"cnumpy\ndtype\n(U\x02f4K\x00K\x01tR" + state
    made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    return made + b"(K\x01" + shape + dtype + b"\x89" + _text(values.tobytes()) + b"tb"


def python2(containers, **texts):
    """A pickle of protocol 2 from Python 2: {container: {name: float32 array}, key: text}."""
    content = b"\x80\x02}("
    for container, tensors in containers.items():
        content += _text(container.encode()) + b"}("
        content += b"".join(_text(key.encode()) + _array(x) for key, x in tensors.items()) + b"u"
    content += b"".join(_text(k.encode()) + _text(v.encode()) for k, v in texts.items())
    return content + b"u."
