"""Multi-scale context by dilated convolutions (Yu, Koltun, ICLR 2016, arXiv:1511.07122).

    python -m experiments.dilated demo
    python -m experiments.dilated camvid --data-dir=/data/camvid --context=large
    python -m experiments.dilated paper --data-dir=/data/VOCdevkit --workdir=/runs/dilated-large

Results: docs/results.md has every run with its command, device and the paper's figure.
Differences: (1) The paper's scores need ImageNet weights (--init). Its images from COCO are not
among our datasets. (2) The release runs the context module and softmax in each tile and joins the
probabilities; here the tiles' scores are joined first, so the result does not depend on the tile.
(3) The context module is trained on the frozen front end, without dropout; in the release, on maps
stored on disk. (4) Steps of the context stage on VOC and of joint training on CamVid are not
published; the presets have our choice.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from dense_jax.data.normalise import PixelValues
from dense_jax.data.transforms import crop_with_context, whole_images
from dense_jax.errors import refuse
from dense_jax.infer.tiles import check_tile, in_two_parts
from dense_jax.infer.whole_image import ONE_PASS, whole_image
from dense_jax.layers.crf_rnn import WithCrfRnn
from dense_jax.models.dilated import Context, ContextPad, Dilated, FrontEnd, Pad, Pools
from dense_jax.objectives.pixels import LossTerm
from dense_jax.tasks import training
from dense_jax.tasks.semantic import Semantic, SemanticConfig, check_sides, whole_images_fit
from dense_jax.train.config import NO_STAGE, Rate, Stage, from_scratch, smoke, stage_by_stage
from dense_jax.train.schedules import ParamGroup
from dense_jax.train.step import AXIS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(SemanticConfig):
    """The paper's ablations; then the flags of every semantic run."""

    context: Context = "large"  # Context module (Tables 1 and 3); none is the front end alone.
    context_layers: Literal[7, 8, 10] = 8  # 8: Table 1; 7: KITTI; 10: Cityscapes (Section 5).
    context_pad: ContextPad = "once_zero"  # Pad once by the field (VOC), or each layer (urban).
    context_init: Literal["paper", "identity", "identity_noise", "random"] = "paper"
    """Equations 4, 5. paper: noise for large, none for basic. random does not help (Section 3)."""
    front_pools: Pools = "removed"  # pool4 and pool5 (Section 4: removed is best); strided: VGG's.
    front_pad: Pad = "valid_reflect"  # Reflected margin (186 pixels; Section 4), or zeros.
    dropout_rate: Rate = 0.5  # Dropout after fc6 and fc7.
    train_mode: Literal["front", "context", "joint"] = "joint"
    """Train the front end, the context on a frozen front end (--init), or both (Sections 4, 5)."""
    first: Stage = NO_STAGE  # An earlier stage; each stage starts from the one before it.
    second: Stage = NO_STAGE  # A second earlier stage.
    upsample_loss: Literal["off", "on"] = "off"
    """off: labels of every eighth pixel. on: a bilinear up-convolution first (Cityscapes)."""
    augment: Literal["none", "mirror", "mirror_scale"] = "mirror"
    """mirror flips left and right (release); mirror_scale is for training from scratch."""
    tile: int = 900  # Side of the front end's tiles, with --front-pad=valid_reflect.
    post: Literal["none", "crf", "crf_rnn"] = "none"  # pyrefly: ignore[bad-override]
    """crf refines the scores. crf_rnn: the last stage trains the CRF with the network (Table 3)."""

    def __post_init__(self) -> None:
        """Raises UserError for flags that do not go together."""
        super().__post_init__()
        front = FrontEnd(1, pools=self.front_pools, pad=self.front_pad)
        stages = (self, self.first, self.second)
        idle = self.context == "none" and "context" in {stage.train_mode for stage in stages}
        refuse(idle, "--train-mode=context trains nothing: give --context=basic or large")
        if self.front_pad == "valid_reflect":
            lacks = self.crop is None or self.scale != 1
            refuse(lacks, "--front-pad=valid_reflect needs --crop and --scale=1; same needs none")
            check_tile(self.tile, front.context, front.stride)
        for crop in [stage.crop for stage in stages if stage.crop]:
            check_sides(front.check_side, crop, f"--crop {crop[0]} {crop[1]}")

    def each_stage(self) -> Iterator["Config"]:
        """Yields the earlier stages, then the last stage without them."""
        for stage in stage_by_stage(self, ("first", "second"), post="none"):
            lacks = stage.train_mode == "context" and stage.init is None
            refuse(lacks, "--train-mode=context: give --init=run:PATH, or --first.train-mode=front")
            yield stage


# VOC (Section 4, release): the front end, then the context module on its maps, for 20,000 steps
# (our choice). A window of 900 holds a whole image with its margin.
_VOC = Config(
    dataset="voc2012_sbd", normalisation="dilation_voc", train_mode="context", crop=(900, 900),
    first=Stage("front", 60_000, 14, 1, (500, 500)), batch_size=60, accumulate=60, bias_lr=2.0,
    num_steps=20_000, eval_batch_size=1, eval_every=4000, save_every=2000, log_every=20,
)  # fmt: skip
# Street scenes (Section 5): padding in each layer, Basic context, joint training at the end.
_URBAN = replace(_VOC, train_mode="joint", context="basic", context_pad="per_layer", batch_size=1,
                 accumulate=1, learning_rate=1e-5)  # fmt: skip
_URBAN_FRONT = Stage("front", 20_000, 8, 1, (628, 628), learning_rate=1e-4, momentum=0.99)
# Without pretrained weights: padded layers, inputs of unit scale, and fast optimisation.
_SCRATCH = from_scratch(Config(context="basic", context_pad="per_layer", front_pad="same",
                               context_init="identity_noise", upsample_loss="on",
                               dropout_rate=0.1, width=0.25))  # fmt: skip

PRESETS = {
    "paper": _VOC,
    "paper_camvid": replace(_URBAN, dataset="camvid", normalisation="dilation_camvid",
                            first=_URBAN_FRONT, crop=(852, 852), tile=1100),  # Our 20,000 steps.
    "paper_kitti": replace(_URBAN, dataset="folder", normalisation="dilation_kitti", tile=852,
                           first=replace(_URBAN_FRONT, num_steps=10_000), context_layers=7,
                           momentum=0.99),
    "paper_cityscapes": replace(_URBAN, dataset="cityscapes", context_layers=10, crop=(1396, 1396),
                                normalisation="dilation_cityscapes", upsample_loss="on",
                                first=replace(_URBAN_FRONT, num_steps=40_000),
                                second=Stage("context", 24_000, 100, 100, (1396, 1396), 1e-4, 0.99),
                                momentum=0.99, num_steps=60_000, tile=1396),
    "camvid": replace(_SCRATCH, dataset="camvid", scale=0.5, augment="mirror_scale",
                      crop=(176, 240), eval_every=500),
    # Small batches: fifteen layers without normalisation or skips need many steps.
    "demo": replace(_SCRATCH, width=0.125, dropout_rate=0.0, batch_size=4, num_steps=6000,
                    eval_every=2000, eval_batch_size=16),
    "smoke": smoke(replace(_SCRATCH, width=1 / 32, upsample_loss="off")),
}  # fmt: skip


def build(config: Config, num_classes: int) -> Semantic:
    """Returns the task: the network, its training and its use."""
    network = Dilated(
        num_classes, context="none" if config.train_mode == "front" else config.context,
        context_layers=config.context_layers, context_pad=config.context_pad,
        context_init=None if config.context_init == "paper" else config.context_init,
        pools=config.front_pools, pad=config.front_pad, frozen_front=config.train_mode == "context",
        upsample="scores" if config.upsample_loss == "on" else "probabilities", axis_name=AXIS,
        width=config.width, dropout_rate=config.dropout_rate, dtype=config.dtype,
    )  # fmt: skip
    front, is_tiled = network.front_end(), config.front_pad == "valid_reflect"
    model, has_crf = network, config.post == "crf_rnn"
    if has_crf:
        model = WithCrfRnn(network, PixelValues(config.normalisation), params=config.crf)
    whole = whole_image(model, config.scale, sized=has_crf), ONE_PASS
    forward, words = in_two_parts(model, config.tile) if is_tiled else whole
    words += f", then CRF-RNN, {config.crf.iterations} iterations" if has_crf else ""
    transforms = whole_images(config.normalisation, config.scale, config.augment, None)
    if config.crop:
        transforms.append(crop_with_context(config.crop, front.context if is_tiled else 0))
    at_units = config.upsample_loss == "off" and not has_crf  # A CRF's output is one per pixel.
    groups = [ParamGroup(r"^(?!ctx_|crf_rnn/)", lr=0.0)] if config.train_mode == "context" else []
    groups += [ParamGroup(r"^crf_rnn/", decay=0.0)] if has_crf else []
    fits = whole_images_fit(front.check_side, config.scale)
    return Semantic(config, model, transforms, groups=groups, forward=forward, test_time=words,
                    loss_terms=[LossTerm("scores" if at_units else "logits")],
                    training_split=fits if at_units and not config.crop else None)  # fmt: skip


if __name__ == "__main__":
    training.main(build, PRESETS, __doc__)
