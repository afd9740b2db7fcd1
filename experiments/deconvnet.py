"""DeconvNet (Noh, Hong, Han, ICCV 2015, arXiv:1505.04366).

    python -m experiments.deconvnet demo
    python -m experiments.deconvnet camvid --data-dir=/data/camvid --unpool=bilinear
    python -m experiments.deconvnet paper --data-dir=/data/VOCdevkit --proposals=edge_boxes.json
    python -m dense_jax evaluate --run RUN --ensemble runs/fcn-camvid --combine mean_prob

Stage 1 trains on windows around single objects, stage 2 on proposals that overlap an object.
--proposals takes boxes (the paper's are Edge Boxes), best first, in pixels, as JSON
{"image name": [[x0, y0, x1, y1], ...]}. The last command scores the ensemble with FCN-8s; the
release uses --combine=product_score; --crf refines the combined scores. Results: docs/results.md.

Differences: (1) Outside the image, windows have the mean colour; in the release they are black. (2)
Rare classes are repeated up to the median class; the paper does not give the number. (3) The
learning rate multiplies the momentum; in Caffe it multiplies the gradient. (4) Scores lie exactly
in their boxes; in the release, one pixel early. (5) Paper presets need ImageNet weights (--init).
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Annotated, Literal

from dense_jax.data import crops
from dense_jax.data.transforms import Resize, whole_images
from dense_jax.errors import refuse
from dense_jax.evaluation import known_boxes
from dense_jax.infer.proposals import BoxScores
from dense_jax.models.deconvnet import DeconvNet
from dense_jax.ops.crf import CrfParams
from dense_jax.tasks import training
from dense_jax.tasks.semantic import Semantic, SemanticConfig
from dense_jax.train.config import AtLeastOne, Count, Limit, Share, from_scratch, smoke
from dense_jax.train.step import AXIS

Square = Annotated[int, Limit(lambda x: x >= 32 and x % 32 == 0, "a multiple of 32")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(SemanticConfig):
    """The paper's ablations; then the flags of every semantic run."""

    bn: Literal["on", "off"] = "on"  # Batch normalisation (Section 4.1: a poor optimum without it).
    bn_stats: Literal["posthoc", "running"] = "posthoc"  # posthoc: after training (release).
    bn_epsilon: float = 1e-9  # 1e-9 as released; 1e-5 for torchvision's vgg16_bn.
    unpool: Literal["switch", "fixed_corner", "bilinear"] = "switch"
    """Position of unpooled values (Section 3.2): at the maximum, in a corner, or interpolated."""
    decoder_init: Literal["gaussian", "he"] = "gaussian"
    """Initial kernels after VGG-16: standard deviation 0.01 (release), or He's, for thin nets."""
    input_size: Square = 224  # Side of the square under one unit of fc6 (Table 2).
    fc_width: Count = 4096  # Channels of fc6 and fc7 (Table 2); SegNet's paper compares 1024.
    stages: Literal["two", "stage1_only", "stage2_only", "whole"] = "two"
    """two: single objects, then proposals (Section 4.2). whole: crops of whole images instead."""
    stage1_steps: Count = 20_000  # Steps of stage 1 with --stages=two; num_steps: the last stage's.
    background: int | None = 0  # Class without objects. None: no such class, and no stage 1.
    proposals: str | None = None
    """JSON of boxes for stage 2 and --proposal-source=file. None: shifted and sliding boxes."""
    min_iou: Share = 0.5  # Least overlap of a training proposal with an object (Section 4.2).
    enlarge: AtLeastOne = 1.2  # Factor from width and height of boxes to windows (Section 4.2).
    balance: Literal["on", "off"] = "on"  # Repeat the windows of rare classes (Section 6.1).
    resize: int = 250  # Side of windows before random crops of input_size (Section 6.1).
    augment: Literal["mirror", "mirror_scale"] = "mirror"
    """mirror flips left and right; with --stages=whole mirror_scale also resizes by 0.75 to 1.5."""
    proposal_source: Literal["sliding", "file", "gt", "whole", "none"] = "sliding"
    """Boxes to label (Section 5.1). whole: the image as one box. none: one convolutional pass. file
    and gt (boxes of objects) exist for datasets only: evaluation adds their boxes_mean_iou."""
    num_proposals: Count = 50  # Boxes for each image, the first or the largest (Section 6.1).
    min_box: int = 112  # Boxes with a side shorter than this (pixels) are not used (release).
    aggregate: Literal["max", "sum", "mean"] = "max"  # How to combine boxes' scores (Section 5.1).
    max_init: Literal["zero", "neg_inf"] = "zero"  # Initial value of max; release: zero.

    def __post_init__(self) -> None:
        """Raises UserError for flags that do not go together."""
        super().__post_init__()
        lacks_file = self.proposal_source == "file" and not self.proposals
        refuse(lacks_file, "--proposal-source=file needs boxes: give --proposals=FILE")
        refuse(self.resize < self.input_size, f"--resize={self.resize}: give --input-size or more")
        self.needs("background", None, stages=("stage2_only", "whole"))
        is_boxes = self.stages != "whole" and self.proposal_source != "none"
        refuse(is_boxes and self.scale != 1, "--scale changes no box: give --resize, --input-size")
        is_single = self.bn == "on" and self.batch_size // self.accumulate < 2
        refuse(is_single, f"--batch-size={self.batch_size} in {self.accumulate} micro-batches: fc6 "
               "is normalised over 2 or more images each: give more, or --bn=off")  # fmt: skip

    def each_stage(self) -> Iterator["Config"]:
        """Yields stage 1 and then stage 2, whose folder is the run's own."""
        if self.stages == "two":
            first = replace(self, stages="stage1_only", workdir=f"{self.workdir}/stage1")
            yield replace(first, num_steps=self.stage1_steps, step_at=(0.45, 0.9))  # as released
            self = replace(self, stages="stage2_only", init=f"run:{first.workdir}")
        yield self


# The release: 64 windows a step; batch normalisation works on 8 at a time.
_RELEASE = Config(
    dataset="voc2012_sbd", normalisation="caffe", batch_size=64, accumulate=8, learning_rate=0.01,
    schedule="step", step_at=(0.25, 0.5, 0.75), bias_lr=2.0, crf=CrfParams(w1=5.0, sxy=20.0),
    num_steps=40_000, eval_batch_size=4, eval_every=10_000, save_every=4000, log_every=20,
)  # fmt: skip
# Without pretrained weights: fast optimisation, and whole images, a unit of fc6 per 32 x 32 pixels.
_SCRATCH = from_scratch(Config(stages="whole", proposal_source="none", decoder_init="he",
                               bn_stats="running", width=0.125, learning_rate=4e-3,
                               input_size=32, resize=36, min_box=16))  # fmt: skip
_SLIDING = replace(_SCRATCH, proposal_source="sliding")

PRESETS = {
    "paper": _RELEASE,
    "paper_fc1024": replace(_RELEASE, fc_width=1024),
    "camvid": replace(_SCRATCH, dataset="camvid", background=None, scale=0.5, crop=(192, 256),
                      augment="mirror_scale", input_size=96, resize=108, width=0.25,
                      learning_rate=2e-3, eval_every=500),
    "demo": replace(_SCRATCH, width=0.1875, num_steps=2000, eval_batch_size=16),
    "demo_stages": replace(_SLIDING, stages="two", input_size=64, resize=72, stage1_steps=400,
                           num_steps=800, eval_every=400, eval_batch_size=16),
    "smoke": smoke(replace(_SLIDING, stages="stage2_only", num_proposals=5, width=1 / 32)),
}  # fmt: skip


def build(config: Config, num_classes: int) -> Semantic:
    """Returns the task: the network, its training and its use."""
    is_whole, source = config.stages == "whole", config.proposal_source
    objects = dict(background=config.background, factor=config.enlarge)
    model = DeconvNet(
        num_classes, config.input_size, bn=config.bn == "on", bn_epsilon=config.bn_epsilon,
        unpool=config.unpool, decoder_init=config.decoder_init, fc_width=config.fc_width,
        width=config.width, axis_name=AXIS, dtype=config.dtype,
    )  # fmt: skip
    how = config.aggregate, config.max_init, config.num_proposals, config.min_box
    boxes = BoxScores(model, config.input_size, *how)
    forward, words = boxes.forward(source)
    known = partial(known_boxes.measure, network=boxes, **objects,
                    proposals=config.proposals if source == "file" else None)  # fmt: skip
    windows = partial(crops.training_windows, single_objects=config.stages == "stage1_only",
                      proposals=config.proposals, min_iou=config.min_iou, seed=config.seed,
                      is_balanced=config.balance == "on", normalisation=config.normalisation,
                      **objects)  # fmt: skip
    resize = Resize((config.resize, config.resize))
    crop = [resize, *whole_images(config.normalisation, 1.0, "mirror", config.input_size)]
    return Semantic(
        config, model, config.whole_images() if is_whole else crop, forward=forward,
        training_split=None if is_whole else windows, test_time=words,
        posthoc_batch_stats=config.bn == "on" and config.bn_stats == "posthoc",
        measures=(known,) if source in ("file", "gt") else (),
    )  # fmt: skip


if __name__ == "__main__":
    training.main(build, PRESETS, __doc__)
