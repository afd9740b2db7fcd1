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
from typing import Any, Literal

import jax

from dense_jax.data.dataset import Source
from dense_jax.data.normalise import PixelValues
from dense_jax.data.transforms import RandomCrop, Transform, whole_images
from dense_jax.errors import UserError
from dense_jax.infer.crf import with_crf
from dense_jax.infer.tiles import overlap_tile
from dense_jax.layers.crf_rnn import WithCrfRnn
from dense_jax.losses import LossTerm
from dense_jax.models.dilated import Context, ContextPad, Dilated, Pad, Pools, enlarge
from dense_jax.ops.crf import CrfParams
from dense_jax.tasks import prediction, semantic
from dense_jax.train.config import FROM_SCRATCH, SMOKE, RunConfig
from dense_jax.train.schedules import ParamGroup
from dense_jax.train.state import TrainState
from dense_jax.train.step import AXIS


@dataclasses.dataclass(frozen=True)
class Stage:
    """A training stage in front of the last one; None takes what that one has."""

    train_mode: Literal["none", "front", "context"] = "none"
    """What it trains; none skips the stage."""
    num_steps: int | None = None
    """Optimiser steps."""
    batch_size: int | None = None
    """Images per step."""
    accumulate: int | None = None
    """Micro-batches per step."""
    crop: tuple[int, int] | None = None
    """Height and width of training images."""
    learning_rate: float | None = None
    """Peak learning rate."""
    momentum: float | None = None
    """Momentum of sgd."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Flags of the paper's ablations, then the shared ones."""

    # The network.
    context: Context = "large"
    """Context module (Tables 1 and 3); none is the front end alone."""
    context_layers: Literal[7, 8, 10] = 8
    """Its layers: 8 as in Table 1, 7 for KITTI, 10 for Cityscapes (Section 5)."""
    context_pad: ContextPad = "once_zero"
    """Extend the scores once by the field (VOC model; zeros or reflection score the same), or pad
    every layer (urban models)."""
    context_init: Literal["paper", "identity", "identity_noise", "random"] = "paper"
    """Equations 4 and 5. paper: noise for large, none for basic. random does not help (Section
    3)."""
    front_pools: Pools = "removed"
    """What becomes of pool4 and pool5: removed, kept with stride 1, or VGG's own at output stride
    32 (Section 4: removed is best)."""
    front_pad: Pad = "valid_reflect"
    """No padding but reflected surroundings of the image (186 pixels; Section 4), or pad by
    zeros."""
    width: float = 1.0
    """Channel multiplier of the front end; below 1 for trials."""
    dropout_rate: float = 0.5
    """Dropout after fc6 and fc7."""

    # Training.
    train_mode: Literal["front", "context", "joint"] = "joint"
    """What learns: the front end, which has no context module then; the context module on the
    frozen front end of --init; or both (Section 4, Section 5)."""
    first: Stage = Stage()
    """A stage to train before; each stage starts from the last and has its own folder."""
    second: Stage = Stage()
    """A second one."""
    upsample_loss: Literal["off", "on"] = "off"
    """off: loss at the output stride, on the label of every eighth pixel. on: at full resolution,
    behind a bilinear up-convolution (Cityscapes model)."""
    augment: Literal["none", "mirror", "mirror_scale"] = "mirror"
    """mirror is the release's; mirror_scale is for training from scratch."""
    crop: tuple[int, int] | None = None
    """Height and width of the network's training input, reflected surroundings included; None takes
    whole images (all of one size)."""

    # Prediction.
    tile: int = 900
    """Side of the tiles that the front end predicts in, with --front-pad=valid_reflect."""
    post: Literal["none", "crf", "crf_rnn"] = "none"
    """Refine with a dense CRF, or with one that the last stage trains with the network (Table 3,
    second and third rows)."""
    crf: CrfParams = dataclasses.field(default_factory=CrfParams)
    """The CRF, or where training it starts; the paper does not give its parameters."""

    def __post_init__(self) -> None:
        """Raises UserError for values that no network or batch can have."""
        super().__post_init__()
        if self.width <= 0:
            raise UserError(f"--width={self.width}: give a factor above 0")
        if not 0 <= self.dropout_rate < 1:
            raise UserError(f"--dropout-rate={self.dropout_rate}: give a value in [0, 1)")
        modes = [stage.train_mode for stage in (self.first, self.second)] + [self.train_mode]
        if "context" in modes and self.context == "none":
            raise UserError("--train-mode=context trains nothing: give --context=basic or large")
        front = build_network(self, 1).front_end()
        if self.front_pad == "valid_reflect":
            if self.crop is None or self.scale != 1:
                raise UserError(
                    "--front-pad=valid_reflect needs --crop and --scale=1: give these, or "
                    "--front-pad=same"
                )
            if self.tile < (least := 2 * front.context + front.stride):
                raise UserError(f"--tile={self.tile} is all context: give at least {least}")
        for crop in (self.crop, self.first.crop, self.second.crop):
            if crop:
                _check_sides(self, crop, f"--crop {crop[0]} {crop[1]}")


def build_model(config: Config, num_classes: int) -> Dilated | WithCrfRnn:
    """The network of a configuration, with a CRF behind it that is trained too if so wanted."""
    network = build_network(config, num_classes)
    if config.post != "crf_rnn":
        return network
    return WithCrfRnn(network, PixelValues(config.normalisation), params=config.crf)


def build_network(config: Config, num_classes: int) -> Dilated:
    """Front end and context module."""
    return Dilated(
        num_classes,
        context="none" if config.train_mode == "front" else config.context,
        context_layers=config.context_layers,
        context_pad=config.context_pad,
        context_init=None if config.context_init == "paper" else config.context_init,
        pools=config.front_pools,
        pad=config.front_pad,
        upsample="scores" if config.upsample_loss == "on" else "probabilities",
        frozen_front=config.train_mode == "context",
        width=config.width,
        dropout_rate=config.dropout_rate,
        axis_name=AXIS,
        dtype=config.dtype,
    )


def context_of(config: Config) -> int:
    """Pixels of reflected surroundings on each side of training images."""
    valid = config.front_pad == "valid_reflect"
    return build_network(config, 1).front_end().context if valid else 0


def _check_sides(config: Config, sides: tuple[int, int], what: str) -> None:
    """Refuses training images whose units do not stand for every eighth pixel.

    Raises:
      UserError: a side is no whole number of strides and, where it is reflected, context.
    """
    edge, stride = 2 * context_of(config), build_network(config, 1).front_end().stride
    if any(side <= edge or (side - edge) % stride for side in sides):
        raise UserError(
            f"{what}: scores at stride {stride} need sides of {edge} + {stride} m: give such a "
            "--crop"
        )


# VOC (Section 4, release): the front end, then the context module on its maps. A window of 900
# holds a whole image with its surroundings.
_VOC = Config(
    dataset="voc2012_sbd",
    normalisation="dilation_voc",
    train_mode="context",
    first=Stage("front", num_steps=60_000, batch_size=14, accumulate=1, crop=(500, 500)),
    crop=(900, 900),
    batch_size=60,
    accumulate=60,
    learning_rate=1e-3,
    bias_lr=2.0,
    num_steps=20_000,  # ours
    eval_batch_size=1,
    eval_every=4000,
    save_every=2000,
    log_every=20,
)
# Street scenes (Section 5): layers padded one by one, Basic context, trained jointly at the end.
_URBAN = dataclasses.replace(
    _VOC,
    train_mode="joint",
    context="basic",
    context_pad="per_layer",
    batch_size=1,
    accumulate=1,
    learning_rate=1e-5,
)
# Without pretrained weights: padded layers, inputs of unit scale, and a fast start.
_SCRATCH = Config(
    context="basic",
    context_pad="per_layer",
    context_init="identity_noise",
    front_pad="same",
    upsample_loss="on",
    **FROM_SCRATCH,
    learning_rate=1e-3,
    dropout_rate=0.1,
    width=0.25,
)


def _urban_front(num_steps: int) -> Stage:
    return Stage("front", num_steps, 8, 1, (628, 628), learning_rate=1e-4, momentum=0.99)


PRESETS = {
    "paper": _VOC,
    "paper_camvid": dataclasses.replace(
        _URBAN, dataset="camvid", normalisation="dilation_camvid", first=_urban_front(20_000),
        crop=(852, 852), num_steps=20_000,  # ours
        tile=1100,
    ),
    "paper_kitti": dataclasses.replace(
        _URBAN, dataset="folder", normalisation="dilation_kitti", context_layers=7,
        first=_urban_front(10_000), crop=(900, 900), momentum=0.99, num_steps=20_000, tile=852,
    ),
    "paper_cityscapes": dataclasses.replace(
        _URBAN, dataset="cityscapes", normalisation="dilation_cityscapes", context_layers=10,
        upsample_loss="on", first=_urban_front(40_000),
        second=Stage("context", 24_000, 100, 100, (1396, 1396), 1e-4, 0.99),
        crop=(1396, 1396), momentum=0.99, num_steps=60_000, tile=1396,
    ),
    "camvid": dataclasses.replace(
        _SCRATCH, dataset="camvid", scale=0.5, augment="mirror_scale", crop=(176, 240),
        num_steps=1000, eval_every=500, save_every=500,
    ),
    # Small batches: fifteen layers without normalisation or skips learn by the number of steps.
    "demo": dataclasses.replace(
        _SCRATCH, width=0.125, dropout_rate=0.0, batch_size=4, num_steps=6000, eval_every=2000,
        save_every=2000, eval_batch_size=16,
    ),
    "smoke": dataclasses.replace(
        _SCRATCH, **SMOKE, width=1 / 32, upsample_loss="off",
    ),
}  # fmt: skip


def build_groups(config: Config) -> tuple[ParamGroup, ...]:
    """Frozen parts: the front end with ``--train-mode=context``; a CRF's weights do not decay."""
    frozen = (ParamGroup(r"^(?!ctx_|crf_rnn/)", lr=0.0),) if config.train_mode == "context" else ()
    crf = (ParamGroup(r"^crf_rnn/", decay=0.0),) if config.post == "crf_rnn" else ()
    return (*frozen, *crf)


def build_transforms(config: Config) -> list[Transform]:
    """Training transforms: scale, colour and mirror, then the window with its surroundings."""
    transforms = whole_images(config.normalisation, config.scale, config.augment, None)
    if config.crop:
        context = context_of(config)
        size = (config.crop[0] - 2 * context, config.crop[1] - 2 * context)
        transforms.append(RandomCrop(size, context))
    return transforms


def build_predict(config: Config, model: Dilated | WithCrfRnn) -> prediction.PredictFn:
    """One pass, or the front end in tiles and the context module on all of them together."""
    learned = model if isinstance(model, WithCrfRnn) else None
    network: Any = learned.network if learned else model
    if config.front_pad == "valid_reflect":
        predict = _tiled(config, network, learned)
    else:  # a learned CRF sees images at the scale that it was trained at
        predict = prediction.whole_image(model, config.scale, sized=learned is not None)
    if config.post == "crf":
        predict = with_crf(predict, config.crf, config.normalisation)
    return predict


def _tiled(config: Config, model: Dilated, learned: WithCrfRnn | None) -> prediction.PredictFn:
    front = model.front_end()
    front_scores = overlap_tile(
        front,
        tile=config.tile,
        context=front.context,
        grid=front.stride,
        output="final",
        stride=front.stride,
    )

    def predict(variables: Any, images: jax.Array, sizes: jax.Array) -> jax.Array:
        scores = front_scores(variables, images, sizes)
        if model.context != "none":
            outputs: Any = model.context_module().apply(variables, scores)
            scores = outputs["ctx_final"]
        size = (images.shape[1], images.shape[2])
        logits = enlarge(scores, size, front.stride, model.upsample, sizes)
        return learned.refine(variables, logits, images, sizes) if learned else logits

    return predict


def test_time(config: Config) -> str:
    """What `build_predict` does, for the protocol card."""
    words = prediction.ONE_PASS
    if config.front_pad == "valid_reflect":
        words = f"tiles of {config.tile} pixels with reflected surroundings, no flips, no scales"
    learned = f", then CRF-RNN, {config.crf.iterations} iterations"
    return words + learned if config.post == "crf_rnn" else words


def loss_output(config: Config) -> str:
    """The output that is compared with the labels; a CRF has one value for each pixel."""
    return "logits" if config.upsample_loss == "on" or config.post == "crf_rnn" else "scores"


def stages(config: Config) -> Iterator[Config]:
    """The runs to make one after another, each from the one before.

    Raises:
      UserError: a context module would be trained on an untrained front end.
    """
    last: dict[str, Any] = {"first": Stage(), "second": Stage()}
    before = [s for s in (config.first, config.second) if s.train_mode != "none"]
    init, workdir = config.init, config.workdir
    for stage in before:
        workdir = f"{config.workdir}/{stage.train_mode}"
        given: dict[str, Any] = dataclasses.asdict(stage)
        changes = last | {"post": "none"} | {k: v for k, v in given.items() if v is not None}
        yield dataclasses.replace(config, **changes, workdir=workdir, init=init)
        init, workdir = f"run:{workdir}", f"{config.workdir}/{config.train_mode}"
    if config.train_mode == "context" and init is None:
        raise UserError(
            "--train-mode=context needs a trained front end: give --init=run:PATH, or "
            "--first.train-mode=front to train one"
        )
    yield dataclasses.replace(config, **last, workdir=workdir, init=init)


def check_images(config: Config, source: Source) -> None:
    """Refuses whole images that do not fit the loss, before anything is built."""
    if config.crop is None and loss_output(config) == "scores":
        height, width = (max(1, round(side * config.scale)) for side in source.size(0))
        _check_sides(config, (height, width), f"images of {height}x{width} are seen whole")


def main(config: Config) -> TrainState:
    """Trains, evaluates and reports each stage; returns the last state."""
    dataset = semantic.load_dataset(config)
    for stage in stages(config):
        check_images(stage, dataset.split("train"))
        model = build_model(stage, dataset.classes.num_classes)
        state = semantic.train_and_evaluate(
            stage,
            model,
            dataset,
            build_transforms(stage),
            groups=build_groups(stage),
            predict=build_predict(stage, model),
            test_time=test_time(stage),
            loss_terms=[LossTerm(loss_output(stage))],
        )
        if int(state.step) < stage.num_steps:  # stopped by a signal: go on from here next time
            break
    return state


if __name__ == "__main__":
    semantic.run(main, PRESETS, __doc__, stages)
