"""SegNet and its decoders against torch, in float64: float32 rounding flips switches."""

from typing import get_args

import jax
import numpy as np
import pytest

from dense_jax.models import segnet
from tests import contract

torch = pytest.importorskip("torch")
F = torch.nn.functional
DEPTHS = {1: 2, 2: 2, 3: 3, 4: 3, 5: 3}


class Twin:
    """The networks in torch, written from the layer tables; images are [B, C, H, W]."""

    def __init__(self, variables, *, train, decoder_relu):
        self.params = jax.tree.map(
            lambda x: torch.tensor(x, requires_grad=True), variables["params"]
        )
        self.stats = jax.tree.map(torch.tensor, variables["batch_stats"])
        self.train, self.decoder_relu = train, decoder_relu

    def conv(self, x, name, groups=1):
        layer = self.params[name]
        kernel = layer["kernel"].permute(3, 2, 0, 1)
        return F.conv2d(x, kernel, layer.get("bias"), padding=kernel.shape[2] // 2, groups=groups)

    def block(self, x, name, relu=True, groups=1):
        norm, stats = self.params[f"{name}_bn"], self.stats[f"{name}_bn"]
        x = self.conv(x, name, groups)
        x = F.batch_norm(
            x,
            stats["mean"],
            stats["var"],
            norm["scale"],
            norm["bias"],
            training=self.train,
            eps=1e-9,
        )
        return x.relu() if relu else x

    def segnet(self, x):
        memory = {}
        for stage, depth in DEPTHS.items():
            for i in range(1, depth + 1):
                x = self.block(x, f"conv{stage}_{i}")
            size = x.shape[2:]
            x, places = F.max_pool2d(x, 2, ceil_mode=True, return_indices=True)
            memory[stage] = places, size
        for stage in (5, 4, 3, 2, 1):
            places, size = memory[stage]
            x = F.max_unpool2d(x, places, [2, 2], output_size=size)
            for i in range(DEPTHS[stage], 1 if stage == 1 else 0, -1):
                x = self.block(x, f"conv{stage}_{i}_D", self.decoder_relu)
        return self.conv(x, "conv1_1_D")

    def basic(self, x, decoder):
        memory = {}
        for stage in (1, 2, 3, 4):
            encoded = self.block(x, f"conv{stage}")
            x, places = F.max_pool2d(encoded, 2, ceil_mode=True, return_indices=True)
            memory[stage] = places, encoded
        scores_of_maps = decoder in ("fcn", "fcn_noadd")
        if scores_of_maps:
            x = self.conv(x, "conv_classifier")
        for stage in (4, 3, 2, 1):
            places, encoded = memory[stage]
            height, width = encoded.shape[2:]
            if decoder == "bilinear":  # of features, where ours enlarges their scores
                x = F.interpolate(x, scale_factor=2, mode="bilinear")[:, :, :height, :width]
            elif decoder.startswith("fcn"):
                kernel = self.params[f"upsample{stage}"]["kernel"].permute(2, 3, 0, 1)
                x = F.conv_transpose2d(x, kernel, stride=2, padding=3)[:, :, :height, :width]
                if decoder == "fcn":
                    x = x + self.conv(encoded, f"score{stage}")
                elif decoder == "fcn_nodimred":
                    x = x + encoded
            else:
                x = F.max_unpool2d(x, places, [2, 2], output_size=(height, width))
                groups = x.shape[1] if decoder == "single_channel" else 1
                x = self.block(x, f"conv_decode{stage}", self.decoder_relu, groups)
                x = x + encoded if decoder == "indices_add" else x
        return x if scores_of_maps else self.conv(x, "conv_classifier")


@pytest.mark.parametrize(
    ("name", "train"),
    [("segnet", True), *((d, d != "indices") for d in get_args(segnet.Decoder))],
)
def test_equals_torch(name, train):
    """Logits, with the batch's statistics or running ones; of SegNet also every gradient."""
    shape, is_full = (2, 27, 38, 3), name == "segnet"
    model = (
        segnet.SegNet(3, width=1 / 32)
        if is_full
        else segnet.SegNetBasic(3, width=1 / 16, decoder=name)
    )
    rng = np.random.default_rng(0)
    images, cotangent = rng.uniform(-1, 1, shape), rng.standard_normal((*shape[:3], 3))
    variables = jax.tree.map(np.float64, contract.random_variables(model, shape))

    @jax.jit
    def ours(variables):
        def logits_of(params):
            mutable = ["batch_stats"] if train else False
            outputs = contract.apply(
                model, {**variables, "params": params}, images, train, mutable=mutable
            )
            return (outputs[0] if train else outputs)["logits"]

        if not is_full:
            return logits_of(variables["params"]), None
        logits, back = jax.vjp(logits_of, variables["params"])
        return logits, back(cotangent.astype(logits.dtype))[0]

    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):  # flax mixes widths
        logits, grads = ours(variables)
    twin = Twin(variables, train=train, decoder_relu=is_full)
    x = torch.tensor(images).permute(0, 3, 1, 2)
    theirs = (twin.segnet(x) if is_full else twin.basic(x, name)).permute(0, 2, 3, 1)
    assert theirs.std() > 0.01
    np.testing.assert_allclose(logits, theirs.detach(), rtol=1e-4, atol=1e-4)
    if is_full:
        (theirs * torch.tensor(cotangent)).sum().backward()
        for layer, values in grads.items():
            for kind, grad in values.items():
                expected = twin.params[layer][kind].grad
                np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-5, err_msg=layer)
                is_shifted_away = kind == "bias" and f"{layer}_bn" in grads
                assert is_shifted_away or np.any(np.abs(grad) > 1e-3), layer
