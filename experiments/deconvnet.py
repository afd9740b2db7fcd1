"""DeconvNet (Noh, Hong, Han, ICCV 2015, arXiv:1505.04366).

    python -m experiments.deconvnet demo
    python -m experiments.deconvnet camvid --data-dir=/data/camvid --unpool=bilinear
    python -m experiments.deconvnet paper --data-dir=/data/VOCdevkit --proposals=edge_boxes.json

Stage 1 trains on windows around single objects, whose neighbours count as background; stage 2 goes
on with proposals that overlap an object. --proposals takes the boxes of any method (the paper's
are Edge Boxes) as JSON {"image name": [[x0, y0, x1, y1], ...]}, best first, in pixels. Without it
stage 2 trains on randomly moved object boxes and sliding windows, and images are labelled from
sliding windows. For scenes without single objects --stages=whole trains on (crops of) whole images,
and --proposal-source=none labels them in one pass.

The ensemble with an FCN-8s run, scored by one command (--combine=product_score is the release's):
    python -m dense_jax evaluate --run RUN --ensemble runs/fcn-camvid --combine mean_prob
The fully connected CRF, which the paper's last step is, refines the aggregated scores: --post=crf
here, or --crf in `evaluate` and `predict`, where it refines what an ensemble decides together.

Results: docs/results.md has every run with its command, device and the paper's figure.

Differences: (1) Windows that leave the image are filled with the mean colour; the release fills
them with black. (2) Rare classes are repeated up to the median class; the paper does not say how
often. (3) The learning rate multiplies the momentum and not, as in Caffe, the gradient. (4) Scores
lie exactly in their boxes; the released script cuts them out one pixel early. (5) The paper presets
need ImageNet weights to reach the paper's scores; --init takes those.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np
from flax import linen as nn

from dense_jax.data import crops
from dense_jax.data.dataset import Dataset, Source
from dense_jax.data.normalise import num_channels, to_uint8
from dense_jax.data.transforms import Resize, Transform, whole_images
from dense_jax.errors import UserError
from dense_jax.infer import proposals
from dense_jax.infer.crf import WithCrf, with_crf
from dense_jax.metrics import semantic as metrics
from dense_jax.models.deconvnet import DeconvNet
from dense_jax.ops.boxes import min_side
from dense_jax.ops.crf import CrfParams
from dense_jax.tasks import prediction, semantic
from dense_jax.train.config import FROM_SCRATCH, SMOKE, RunConfig
from dense_jax.train.schedules import ParamGroup
from dense_jax.train.state import TrainState
from dense_jax.train.step import AXIS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Flags of the paper's ablations, then the shared ones."""

    # The network.
    bn: Literal["on", "off"] = "on"
    """Batch normalisation (Section 4.1: without it training ends in a poor optimum)."""
    bn_stats: Literal["posthoc", "running"] = "posthoc"
    """Statistics for evaluation: averaged over batches after training (release), or running."""
    bn_epsilon: float = 1e-9
    """Added to variances: 1e-9 as released; 1e-5 for an encoder of torchvision's vgg16_bn."""
    unpool: Literal["switch", "fixed_corner", "bilinear"] = "switch"
    """Where unpooling puts values (Section 3.2): the maximum's place, a corner, everywhere."""
    decoder_init: Literal["gaussian", "he"] = "gaussian"
    """Start of the layers that VGG-16 lacks: deviation 0.01 (release), or He's, for thin nets."""
    input_size: int = 224
    """Side of the square that fc6 takes in at once (Table 2), a multiple of 32."""
    fc_width: int = 4096
    """Channels of fc6 and fc7 (Table 2); 1024 in the SegNet paper's comparison."""
    width: float = 1.0
    """Channel multiplier of all layers; below 1 for trials."""

    # Training.
    stages: Literal["two", "stage1_only", "stage2_only", "whole"] = "two"
    """Single objects and then proposals (Section 4.2), one of them, or crops of whole images."""
    stage1_steps: int = 20_000
    """Steps of stage 1 of two; num_steps is for the last stage."""
    background: int | None = 0
    """Class that is no object; None: every class has objects, and there is no stage 1."""
    proposals: str | None = None
    """JSON file of boxes for stage 2 and for --proposal-source=file."""
    min_iou: float = 0.5
    """Least overlap of a training proposal with an object (Section 4.2)."""
    enlarge: float = 1.2
    """Windows are this much wider and higher than boxes of objects and proposals (Section 4.2)."""
    balance: Literal["on", "off"] = "on"
    """Repeat the windows of rare classes (Section 6.1)."""
    resize: int = 250
    """Side that windows are resized to, in front of random crops of input_size (Section 6.1)."""
    augment: Literal["mirror", "mirror_scale"] = "mirror"
    """Mirror; mirror_scale also resizes by 0.75 to 1.5 with --stages=whole."""
    crop: tuple[int, int] | None = None
    """Height and width of training crops with --stages=whole; None takes whole images."""

    # Inference.
    proposal_source: Literal["sliding", "file", "gt", "whole", "none"] = "sliding"
    """Boxes to label (Section 5.1). whole: the image as one box; none: the whole image in one fully
    convolutional pass. file and gt, the boxes of objects, are known for a dataset only: evaluation
    adds their score as boxes_mean_iou to that of sliding windows."""
    num_proposals: int = 50
    """Boxes for each image, the first of the file or the largest (Section 6.1)."""
    min_box: int = 112
    """Boxes with a shorter side, in pixels, are left out (release)."""
    aggregate: Literal["max", "sum", "mean"] = "max"
    """How scores of overlapping boxes are joined (Section 5.1)."""
    max_init: Literal["zero", "neg_inf"] = "zero"
    """What --aggregate=max starts from; no score falls below zero in the release."""
    post: Literal["none", "crf"] = "none"
    """Refine the scores by a fully connected CRF (Section 5.2; Table 1: 69.6 and 70.5)."""
    crf: CrfParams = dataclasses.field(default_factory=CrfParams)
    """Of --post=crf; the paper presets have the release's."""

    def __post_init__(self) -> None:
        """Raises UserError for values that no network or batch can have."""
        super().__post_init__()
        if self.width <= 0:
            raise UserError(f"--width={self.width}: give a factor above 0")
        for name in ("fc_width", "num_proposals", "stage1_steps"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"--{name.replace('_', '-')}={getattr(self, name)}: give at least 1"
                )
        if self.input_size < 32 or self.input_size % 32:
            raise UserError(f"--input-size={self.input_size}: give a multiple of 32")
        if self.resize < self.input_size:
            raise UserError(f"--resize={self.resize}: give at least --input-size={self.input_size}")
        if not 0 < self.min_iou <= 1:
            raise UserError(f"--min-iou={self.min_iou}: give a share in (0, 1]")
        if self.enlarge < 1:
            raise UserError(f"--enlarge={self.enlarge}: give a factor of 1 or more")
        if self.background is None and self.stages in ("two", "stage1_only"):
            raise UserError(
                "--background=None leaves stage 1 no label for the neighbours of an object: "
                "give --stages=stage2_only or --stages=whole"
            )
        if self.proposal_source == "file" and not self.proposals:
            raise UserError("--proposal-source=file needs boxes: give --proposals=FILE")
        if self.bn == "on" and self.batch_size // self.accumulate < 2:
            raise UserError(
                f"--batch-size={self.batch_size} in {self.accumulate} micro-batches leaves one "
                "image to normalise the 1x1 map of fc6 over: give at least 2 each, or --bn=off"
            )


# The release: 64 windows a step, of which batch normalisation sees 8 at a time.
_RELEASE = Config(
    dataset="voc2012_sbd",
    normalisation="caffe",
    batch_size=64,
    accumulate=8,
    learning_rate=0.01,
    schedule="step",
    step_at=(0.25, 0.5, 0.75),
    bias_lr=2.0,
    crf=CrfParams(w1=5.0, sxy=20.0),
    num_steps=40_000,
    eval_batch_size=4,
    eval_every=10_000,
    save_every=4000,
    log_every=20,
)
_STAGE1_STEP_AT = (0.45, 0.9)  # every 9,000 of 20,000 steps
# Without pretrained weights: a fast start, and whole images, each place with its own units of fc6.
_SCRATCH = Config(
    stages="whole",
    proposal_source="none",
    decoder_init="he",
    bn_stats="running",
    **FROM_SCRATCH,
    learning_rate=4e-3,
    width=0.125,
    input_size=32,
    resize=36,
    min_box=16,
)

PRESETS = {
    "paper": _RELEASE,
    "paper_fc1024": dataclasses.replace(_RELEASE, fc_width=1024),
    "camvid": dataclasses.replace(
        _SCRATCH, dataset="camvid", background=None, scale=0.5, augment="mirror_scale",
        crop=(192, 256), input_size=96, resize=108, width=0.25, learning_rate=2e-3,
        num_steps=1000, eval_every=500, save_every=500,
    ),
    "demo": dataclasses.replace(
        _SCRATCH, width=0.1875, num_steps=2000, eval_every=1000, save_every=1000,
        eval_batch_size=16,
    ),
    "demo_stages": dataclasses.replace(
        _SCRATCH, stages="two", proposal_source="sliding", input_size=64, resize=72,
        stage1_steps=400, num_steps=800, eval_every=400, save_every=400, eval_batch_size=16,
    ),
    "smoke": dataclasses.replace(
        _SCRATCH, **SMOKE, stages="stage2_only", proposal_source="sliding", num_proposals=5,
        width=1 / 32,
    ),
}  # fmt: skip


def build_model(config: Config, num_classes: int) -> nn.Module:
    """The network of a configuration."""
    return DeconvNet(
        num_classes,
        input_size=config.input_size,
        bn=config.bn == "on",
        bn_epsilon=config.bn_epsilon,
        unpool=config.unpool,
        decoder_init=config.decoder_init,
        fc_width=config.fc_width,
        width=config.width,
        axis_name=AXIS,
        dtype=config.dtype,
    )


def build_groups(config: Config) -> tuple[ParamGroup, ...]:
    """No part of the network learns at a rate of its own."""
    del config
    return ()


def build_transforms(config: Config) -> list[Transform]:
    """Training transforms: of windows, or of whole images as in `experiments.fcn`."""
    if config.stages == "whole":
        return whole_images(config.normalisation, config.scale, config.augment, config.crop)
    size = (config.resize, config.resize)
    return [Resize(size), *whole_images(config.normalisation, 1.0, "mirror", config.input_size)]


def build_dataset(config: Config, dataset: Dataset, objects: Sequence[crops.Window]) -> Dataset:
    """The dataset whose training split is the windows of the stage, around `objects`.

    Raises:
      UserError: no proposal overlaps an object, or the file of proposals lacks an image.
    """
    if config.stages == "whole":
        return dataset
    source, windows = dataset.split("train"), objects
    is_first = config.stages == "stage1_only"
    if not is_first:
        boxes = crops.read_proposals(config.proposals) if config.proposals else None
        windows = crops.propose(
            source, windows, min_iou=config.min_iou, seed=config.seed, boxes=boxes
        )
    windows = crops.enlarged(windows, config.enlarge)
    if config.balance == "on":
        windows = crops.balance(windows)
    mean = to_uint8(np.zeros(num_channels(config.normalisation)), config.normalisation)
    fill = (int(mean[0]), int(mean[1]), int(mean[2]))
    train = crops.Crops(source, windows, fill, config.background if is_first else None)
    return dataclasses.replace(dataset, splits={**dataset.splits, "train": train})


def _score_boxes(config: Config, model: nn.Module) -> Any:
    """(variables, images, boxes [B, N, 4], valid [B, N]) -> aggregated scores [B, H, W, C]."""

    def score(variables: Any, images: jax.Array, boxes: jax.Array, valid: jax.Array) -> jax.Array:
        def network(inputs: jax.Array) -> jax.Array:
            outputs: Any = model.apply(variables, inputs, train=False)
            return outputs["logits"]

        return proposals.aggregate(
            network,
            images,
            boxes,
            valid,
            size=config.input_size,
            how=config.aggregate,
            max_init=config.max_init,
        )

    return score


def build_predict(config: Config, model: nn.Module) -> prediction.PredictFn:
    """How the network labels images of which nothing else is known."""
    predict = _without_crf(config, model)
    return with_crf(predict, config.crf, config.normalisation) if config.post == "crf" else predict


def _without_crf(config: Config, model: nn.Module) -> prediction.PredictFn:
    if config.proposal_source == "none":
        return prediction.whole_image(model, config.scale)
    score, whole = _score_boxes(config, model), config.proposal_source == "whole"

    def predict(variables: Any, images: jax.Array, sizes: jax.Array) -> jax.Array:
        boxes = proposals.sliding_boxes(sizes)[:, : 1 if whole else config.num_proposals]
        valid = min_side(boxes) >= (1 if whole else config.min_box)
        return score(variables, images, boxes, valid)

    return predict


def test_time(config: Config) -> str:
    """What `build_predict` does but for the CRF, for the protocol of a run."""
    if config.proposal_source == "none":
        return prediction.ONE_PASS
    if config.proposal_source == "whole":
        return f"the image as one box of {config.input_size}x{config.input_size}"
    return (
        f"sliding windows, the largest {config.num_proposals}, shorter side at least "
        f"{config.min_box} pixels, joined by {config.aggregate} from {config.max_init}"
    )


def extra_scores(
    config: Config, predict: prediction.PredictFn, variables: Any, source: Source
) -> dict[str, float]:
    """The score with boxes that are known for the images of a dataset only.

    Raises:
      UserError: the file of proposals lacks an image.
    """
    if config.proposal_source not in ("file", "gt"):
        return {}
    num_classes = len(variables["params"]["seg-score"]["bias"])
    predictions = proposals.label_images(
        _score_boxes(config, build_model(config, num_classes)),
        variables,
        source,
        _known_boxes(config, source),
        normalisation=config.normalisation,
        num=config.num_proposals,
        min_side=config.min_box,
        crf=predict.params if isinstance(predict, WithCrf) else None,
    )
    confusion = np.zeros((num_classes, num_classes), np.int64)
    for index, labels in enumerate(predictions):
        counts = metrics.confusion_counts(source[index]["label"], labels, num_classes)
        confusion = metrics.add(confusion, np.asarray(counts))
    return {"boxes_mean_iou": metrics.summarise(confusion)["mean_iou"]}


def _known_boxes(config: Config, source: Source) -> list[list[crops.Box]]:
    """The enlarged boxes of each image of a split."""
    if config.proposal_source == "file":
        table = crops.read_proposals(config.proposals or "")
        found = [crops.boxes_of(table, source[i]["name"]) for i in range(len(source))]
    else:
        found = [[] for _ in range(len(source))]
        for window in crops.find_objects(source, config.background):
            found[window.index].append(window.box)
    return [[crops.enlarge(box, config.enlarge) for box in boxes] for boxes in found]


def stages(config: Config) -> Iterator[Config]:
    """The runs to make one after another; the last one's folder is the run's own."""
    if config.stages != "two":
        yield config
        return
    folder = f"{config.workdir}/stage1"
    yield dataclasses.replace(
        config,
        stages="stage1_only",
        workdir=folder,
        num_steps=config.stage1_steps,
        step_at=_STAGE1_STEP_AT,
    )
    yield dataclasses.replace(config, stages="stage2_only", init=f"run:{folder}")


def main(config: Config) -> TrainState:
    """Trains, evaluates and reports each stage; returns the last state."""
    dataset, objects = semantic.load_dataset(config), []
    if config.stages != "whole":
        objects = crops.find_objects(dataset.split("train"), config.background)
    for stage in stages(config):
        model = build_model(stage, dataset.classes.num_classes)
        predict = build_predict(stage, model)
        state = semantic.train_and_evaluate(
            stage,
            model,
            build_dataset(stage, dataset, objects),
            build_transforms(stage),
            predict=predict,
            test_time=test_time(stage),
            posthoc_batch_stats=stage.bn == "on" and stage.bn_stats == "posthoc",
            extra_scores=functools.partial(extra_scores, stage, predict),
        )
        if int(state.step) < stage.num_steps:  # stopped by a signal: go on from here next time
            break
    return state


if __name__ == "__main__":
    semantic.run(main, PRESETS, __doc__, stages)
