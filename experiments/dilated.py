"""Multi-scale context by dilated convolutions (Yu, Koltun, ICLR 2016, arXiv:1511.07122).

    python -m experiments.dilated demo
    python -m experiments.dilated camvid --data-dir=/data/camvid --context=large
    python -m experiments.dilated paper --data-dir=/data/VOCdevkit --workdir=/runs/dilated-large

Results: docs/results.md has every run with its command, device and the paper's figure.

Differences: (1) The paper presets need ImageNet weights to reach the paper's scores; --init takes
those. Its images from COCO are not among our datasets. (2) The release runs the context
module and softmax in each tile and joins probabilities; here the tiles' scores are joined first, so
that the result does not depend on the tile. (3) The context module is trained on the frozen front
end, without dropout, and not on maps kept on disk. (4) Steps of the context stage on VOC and of
joint training on CamVid are not published; the presets say what we take.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from dense_jax.data.normalise import PixelValues
from dense_jax.data.transforms import crop_with_context, whole_images
from dense_jax.errors import refuse
from dense_jax.infer.tiles import in_two_parts
from dense_jax.infer.whole_image import ONE_PASS, whole_image
from dense_jax.layers.crf_rnn import WithCrfRnn
from dense_jax.models.dilated import Context, ContextPad, Dilated, Pad, Pools
from dense_jax.objectives.pixels import LossTerm
from dense_jax.tasks import training
from dense_jax.tasks.semantic import Semantic, SemanticConfig, check_sides, whole_images_fit
from dense_jax.train.config import Rate, Stage, from_scratch, smoke, stage_by_stage
from dense_jax.train.schedules import ParamGroup
from dense_jax.train.step import AXIS

_MODES = ("none", "front", "context")  # of stages before the last


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(SemanticConfig):
    """The paper's ablations; then the flags of every semantic run."""

    context: Context = "large"  # Context module (Tables 1 and 3); none is the front end alone.
    context_layers: Literal[7, 8, 10] = 8
    """Its layers: 8 as in Table 1, 7 for KITTI, 10 for Cityscapes (Section 5)."""
    context_pad: ContextPad = "once_zero"
    """Extend the scores once by the field (VOC model), or pad every layer (urban models)."""
    context_init: Literal["paper", "identity", "identity_noise", "random"] = "paper"
    """Equations 4, 5. paper: noise for large, none for basic. random does not help (Section 3)."""
    front_pools: Pools = "removed"
    """What becomes of pool4 and pool5 (Section 4: removed is best); strided is VGG's own."""
    front_pad: Pad = "valid_reflect"
    """No padding but reflected surroundings of the image (186 pixels; Section 4), or zeros."""
    dropout_rate: Rate = 0.5  # Dropout after fc6 and fc7.
    train_mode: Literal["front", "context", "joint"] = "joint"
    """What learns: the front end, which has no context module then; the context module on the
    frozen front end of --init; or both (Section 4, Section 5)."""
    first: Stage = Stage()  # noqa: RUF009  A stage to train before; train_mode is front or context.
    second: Stage = Stage()  # noqa: RUF009  A second one.
    upsample_loss: Literal["off", "on"] = "off"
    """Loss on the label of every eighth pixel, or behind a bilinear up-convolution (Cityscapes)."""
    augment: Literal["none", "mirror", "mirror_scale"] = "mirror"
    """mirror is the release's; mirror_scale is for training from scratch."""
    tile: int = 900  # Side of the front end's tiles, with --front-pad=valid_reflect.
    post: Literal["none", "crf", "crf_rnn"] = "none"  # pyrefly: ignore[bad-override]
    """Refine with a CRF, or with one that the last stage trains with the network (Table 3)."""

    def __post_init__(self) -> None:
        """Raises UserError for flags that do not go together."""
        super().__post_init__()
        modes = [self.first.train_mode, self.second.train_mode]
        wrong, is_valid = set(modes).difference(_MODES), self.front_pad == "valid_reflect"
        no_context = "context" in (*modes, self.train_mode) and self.context == "none"
        refuse(bool(wrong), f"a stage trains {sorted(wrong)}: give one of {', '.join(_MODES)}")
        refuse(no_context, "--train-mode=context trains nothing: give --context=basic or large")
        refuse(is_valid and (self.crop is None or self.scale != 1), "--front-pad=valid_reflect "
               "needs --crop and --scale=1: give these, or --front-pad=same")  # fmt: skip
        front, tile = _network(self, 1).front_end(), f"--tile={self.tile}"
        least = 2 * front.context + front.stride
        refuse(is_valid and self.tile < least, f"{tile} is all context: give at least {least}")
        for crop in filter(None, (self.crop, self.first.crop, self.second.crop)):
            check_sides(front.check_side, crop, f"--crop {crop[0]} {crop[1]}")

    def each_stage(self) -> Iterator["Config"]:
        """Yields the stages before the last, and then that one without them."""
        before = {"first": self.first, "second": self.second}
        for stage in stage_by_stage(self, before, post="none"):
            refuse(stage.train_mode == "context" and stage.init is None, "--train-mode=context "
                   "needs a trained front end: give --init=run:PATH, or --first.train-mode=front "
                   "to train one")  # fmt: skip
            yield stage


def _network(config: Config, num_classes: int) -> Dilated:
    """Front end and context module."""
    return Dilated(
        num_classes, context="none" if config.train_mode == "front" else config.context,
        context_layers=config.context_layers, context_pad=config.context_pad,
        context_init=None if config.context_init == "paper" else config.context_init,
        pools=config.front_pools, pad=config.front_pad, frozen_front=config.train_mode == "context",
        upsample="scores" if config.upsample_loss == "on" else "probabilities", axis_name=AXIS,
        width=config.width, dropout_rate=config.dropout_rate, dtype=config.dtype,
    )  # fmt: skip


# VOC (Section 4, release): the front end, then the context module on its maps. A window of 900
# holds a whole image with its surroundings.
_VOC = Config(
    dataset="voc2012_sbd",
    normalisation="dilation_voc",
    train_mode="context",
    first=Stage("front", 60_000, 14, 1, (500, 500)),
    crop=(900, 900),
    batch_size=60,
    accumulate=60,
    bias_lr=2.0,
    num_steps=20_000,
    eval_batch_size=1,
    eval_every=4000,
    save_every=2000,
    log_every=20,
)  # fmt: skip  (20,000 steps are ours)
# Street scenes (Section 5): layers padded one by one, Basic context, trained jointly at the end.
_URBAN = replace(
    _VOC, train_mode="joint", context="basic", context_pad="per_layer", batch_size=1, accumulate=1,
    learning_rate=1e-5,
)  # fmt: skip
_URBAN_FRONT = Stage("front", 20_000, 8, 1, (628, 628), learning_rate=1e-4, momentum=0.99)
# Without pretrained weights: padded layers, inputs of unit scale, and a fast start.
_SCRATCH = from_scratch(Config(
    context="basic", context_pad="per_layer", context_init="identity_noise", front_pad="same",
    upsample_loss="on", learning_rate=1e-3, dropout_rate=0.1, width=0.25,
))  # fmt: skip

PRESETS = {
    "paper": _VOC,
    "paper_camvid": replace(
        _URBAN, dataset="camvid", normalisation="dilation_camvid", first=_URBAN_FRONT,
        crop=(852, 852), tile=1100,  # 20,000 steps are ours
    ),
    "paper_kitti": replace(
        _URBAN, dataset="folder", normalisation="dilation_kitti", context_layers=7,
        first=replace(_URBAN_FRONT, num_steps=10_000), momentum=0.99, tile=852,
    ),
    "paper_cityscapes": replace(
        _URBAN, dataset="cityscapes", normalisation="dilation_cityscapes", context_layers=10,
        upsample_loss="on", first=replace(_URBAN_FRONT, num_steps=40_000),
        second=Stage("context", 24_000, 100, 100, (1396, 1396), 1e-4, 0.99),
        crop=(1396, 1396), momentum=0.99, num_steps=60_000, tile=1396,
    ),
    "camvid": replace(
        _SCRATCH, dataset="camvid", scale=0.5, augment="mirror_scale", crop=(176, 240),
        eval_every=500,
    ),
    # Small batches: fifteen layers without normalisation or skips learn by the number of steps.
    "demo": replace(
        _SCRATCH, width=0.125, dropout_rate=0.0, batch_size=4, num_steps=6000, eval_every=2000,
        eval_batch_size=16,
    ),
    "smoke": smoke(replace(_SCRATCH, width=1 / 32, upsample_loss="off")),
}  # fmt: skip


def build(config: Config, num_classes: int) -> Semantic:
    """The network, and how it is trained and used."""
    network, is_tiled = _network(config, num_classes), config.front_pad == "valid_reflect"
    front, learned = network.front_end(), None
    if config.post == "crf_rnn":
        learned = WithCrfRnn(network, PixelValues(config.normalisation), params=config.crf)
    # A learned CRF sees images at the scale that it was trained at.
    forward = whole_image(learned or network, config.scale, sized=learned is not None)
    words = ONE_PASS
    if is_tiled:
        tile = dict(tile=config.tile, context=front.context, stride=front.stride)
        forward = in_two_parts(front, network.finish, learned.refine if learned else None, **tile)
        words = f"tiles of {config.tile} pixels with reflected surroundings, no flips, no scales"
    words += f", then CRF-RNN, {config.crf.iterations} iterations" if learned else ""
    transforms = whole_images(config.normalisation, config.scale, config.augment, None)
    if config.crop:
        transforms.append(crop_with_context(config.crop, front.context if is_tiled else 0))
    # The output that is compared with the labels; a CRF has one value for each pixel.
    at_units = config.upsample_loss == "off" and not learned
    groups = [ParamGroup(r"^(?!ctx_|crf_rnn/)", lr=0.0)] if config.train_mode == "context" else []
    groups += [ParamGroup(r"^crf_rnn/", decay=0.0)] if learned else []
    fits = whole_images_fit(front.check_side, config.scale)
    return Semantic(
        config, learned or network, transforms, groups=groups, forward=forward, test_time=words,
        loss_terms=[LossTerm("scores" if at_units else "logits")],
        training_split=fits if at_units and config.crop is None else lambda split: split,
    )  # fmt: skip


if __name__ == "__main__":
    training.main(build, PRESETS, __doc__)
