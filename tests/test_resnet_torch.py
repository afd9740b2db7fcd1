"""ResNets and torchvision's heads against torch, in float64, from the layer tables.

The twin is addressed by torchvision's names, so it also checks the rule that gives them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.models import deeplabv3, resnet
from tests import contract
from tests.torchvision_names import torch_axes, torch_leaves

torch = pytest.importorskip("torch")
F = torch.nn.functional

DEPTHS = (1, 2, 2, 2)
MOMENTUM = 0.75  # torch's is one less this
# Of each stage: stride, dilation of the first 3x3 convolution, of the others.
TORCHVISION = {
    32: [(1, 1, 1), (2, 1, 1), (2, 1, 1), (2, 1, 1)],
    16: [(1, 1, 1), (2, 1, 1), (2, 1, 1), (1, 1, 2)],
    8: [(1, 1, 1), (2, 1, 1), (1, 1, 2), (1, 2, 4)],
}
DEEPLAB_V2 = [(1, 1, 1), (2, 1, 1), (1, 2, 2), (1, 4, 4)]


class Twin:
    """The networks in torch on our variables; images are [B, C, H, W]."""

    def __init__(
        self, variables, prefix="", *, train=False, stages=(), stride_in="3x3", ceil=False
    ):
        self.state = {
            name: torch.tensor(np.transpose(leaf, torch_axes(leaf)))
            for name, leaf in torch_leaves(variables).items()
        }
        for name, leaf in self.state.items():
            leaf.requires_grad = "running" not in name
        self.prefix, self.train = prefix, train
        self.stages, self.stride_in, self.ceil = stages, stride_in, ceil

    def conv(self, x, name, stride=1, dilation=1):
        kernel = self.state[f"{name}.weight"]
        padding = dilation * (kernel.shape[2] // 2)
        groups = x.shape[1] // kernel.shape[1]
        bias = self.state.get(f"{name}.bias")
        return F.conv2d(x, kernel, bias, stride, padding, dilation, groups)

    def norm(self, x, name):
        mean, var, scale, bias = (
            self.state[f"{name}.{kind}"]
            for kind in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, scale, bias, self.train, 1 - MOMENTUM, 1e-5)

    def block(self, x, name, stride, dilation):
        first, middle = (stride, 1) if self.stride_in == "1x1" else (1, stride)
        y = self.norm(self.conv(x, f"{name}.conv1", first), f"{name}.bn1").relu()
        y = self.norm(self.conv(y, f"{name}.conv2", middle, dilation), f"{name}.bn2").relu()
        y = self.norm(self.conv(y, f"{name}.conv3"), f"{name}.bn3")
        if f"{name}.downsample.0.weight" in self.state:
            x = self.norm(self.conv(x, f"{name}.downsample.0", stride), f"{name}.downsample.1")
        return (x + y).relu()

    def trunk(self, x):
        x = self.norm(self.conv(x, f"{self.prefix}conv1", 2), f"{self.prefix}bn1").relu()
        outputs = {"conv1": x}
        x = outputs["pool1"] = F.max_pool2d(x, 3, 2, 1, ceil_mode=self.ceil)
        for number, (stride, first, dilation) in enumerate(self.stages, 1):
            for i in range(DEPTHS[number - 1]):
                at = (1, dilation) if i else (stride, first)
                x = self.block(x, f"{self.prefix}layer{number}.{i}", *at)
            outputs[f"layer{number}"] = x
        if "fc.weight" in self.state:
            outputs["fc"] = F.linear(x.mean((2, 3)), self.state["fc.weight"], self.state["fc.bias"])
        return outputs

    def hidden(self, x, name, number, dilation=1):
        x = self.conv(x, f"{name}.{number}", dilation=dilation)
        return self.norm(x, f"{name}.{number + 1}").relu()

    def scores(self, x, name, is_deeplab):
        if is_deeplab:
            aspp = f"{name}.0.convs"
            branches = [self.hidden(x, f"{aspp}.0", 0)]
            for i, rate in enumerate((12, 24, 36), 1):
                branches.append(self.hidden(x, f"{aspp}.{i}", 0, rate))
            pooled = self.hidden(F.adaptive_avg_pool2d(x, 1), f"{aspp}.4", 1)
            branches.append(F.interpolate(pooled, x.shape[2:], mode="bilinear"))
            x = self.hidden(torch.cat(branches, 1), f"{name}.0.project", 0)
        x = self.hidden(x, name, 1 if is_deeplab else 0)
        return self.conv(x, f"{name}.4")

    def segment(self, x, is_deeplab):
        outputs = self.trunk(x)
        for layer, name, prefix in (
            ("layer4", "classifier", ""),
            ("layer3", "aux_classifier", "aux_"),
        ):
            scores = self.scores(outputs[layer], name, is_deeplab and layer == "layer4")
            outputs[f"{prefix}scores"] = scores
            outputs[f"{prefix}logits"] = F.interpolate(scores, x.shape[2:], mode="bilinear")
        return outputs


def channels_last(x):
    return np.transpose(x.detach().numpy(), {4: (0, 2, 3, 1), 2: (0, 1)}[x.ndim])


def close(ours, theirs, tolerance, name):
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance, err_msg=name)


def compare(model, shape, run_twin, *, train, last, tolerance=1e-9, **options):
    """All outputs; in training also new running means and the gradients of the outputs `last`."""
    rng = np.random.default_rng(0)
    images, shapes = rng.uniform(-1, 1, shape), contract.shapes_of(model, shape)[0]
    cotangents = {name: rng.standard_normal(shapes[name].shape) for name in last}
    variables = jax.tree.map(np.float64, contract.random_variables(model, shape))

    @jax.jit
    def ours(params):
        def loss(params):
            everything = {**variables, "params": params}
            results = contract.apply(model, everything, images, train, mutable=["batch_stats"])
            return sum(jnp.sum(results[0][name] * v) for name, v in cotangents.items()), results

        return jax.grad(loss, has_aux=True)(params) if train else ({}, loss(params)[1])

    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):  # flax mixes widths
        grads, (outputs, state) = ours(variables["params"])
    twin = Twin(variables, train=train, **options)
    theirs = run_twin(twin, torch.tensor(images).permute(0, 3, 1, 2))
    assert set(theirs) == set(outputs)
    for name, output in theirs.items():
        assert output.std() > 1e-3, name
        rounding = 1e-5 if name == "fc" else tolerance  # it is computed in float32
        close(outputs[name], channels_last(output), rounding, name)
    if not train:
        return
    for name, cotangent in cotangents.items():
        theirs[name].backward(torch.tensor(np.moveaxis(cotangent, -1, 1)), retain_graph=True)
    for name, leaf in torch_leaves({"params": grads, **state}).items():
        values = twin.state[name]
        if "running_mean" in name:  # torch's variance is the unbiased one
            close(leaf, values, tolerance, name)
        elif values.grad is not None:
            close(np.transpose(leaf, torch_axes(leaf)), values.grad, tolerance, name)
        else:
            assert "running_var" in name or not np.any(leaf), name


RESNETS = {
    "stride 32": ({"num_classes": 5}, (1, 41, 50, 3), TORCHVISION[32], False),
    "stride 16": ({"output_stride": 16}, (1, 41, 50, 3), TORCHVISION[16], False),
    "stride 8": ({"output_stride": 8}, (1, 41, 50, 3), TORCHVISION[8], False),
    "resnext": (
        {"groups": 8, "group_width": 32, "output_stride": 8},
        (2, 33, 46, 3),
        TORCHVISION[8],
        True,
    ),
    "deeplab v2": (
        {
            "stride_in": "1x1",
            "first_block_dilation": "new",
            "output_stride": 8,
            "pool_ceil": True,
        },
        (1, 48, 57, 3),
        DEEPLAB_V2,
        False,
    ),
}


@pytest.mark.parametrize(("settings", "shape", "stages", "train"), RESNETS.values(), ids=RESNETS)
def test_resnet_equals_torch(settings, shape, stages, train):
    compare(
        resnet.ResNet(DEPTHS, width=1 / 16, bn_momentum=MOMENTUM, **settings),
        shape,
        Twin.trunk,
        train=train,
        last=["layer4"],
        stages=stages,
        stride_in=settings.get("stride_in", "3x3"),
        ceil="pool_ceil" in settings,
    )


@pytest.mark.parametrize(("head", "train"), [("deeplabv3", True), ("fcn", False)])
def test_segmenter_equals_torch(head, train):
    compare(
        deeplabv3.ResNetSegmenter(
            5,
            head,
            trunk=functools.partial(resnet.ResNet, DEPTHS),
            aux=True,
            width=1 / 16,
            bn_momentum=MOMENTUM,
            dropout_rate=0.0,
        ),
        (2, 43, 58, 3),
        functools.partial(Twin.segment, is_deeplab=head == "deeplabv3"),
        train=train,
        last=["logits", "aux_logits"],
        tolerance=1e-4,
        prefix="backbone.",
        stages=TORCHVISION[8],
    )
