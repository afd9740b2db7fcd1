"""The task that finds objects: their boxes, classes and scores, scored by average precision."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import numpy as np

from dense_jax.data import objects as object_lib
from dense_jax.data import proposals as proposal_file
from dense_jax.data import rle
from dense_jax.data.classes import ClassTable
from dense_jax.data.dataset import Dataset, Example, Part, Source
from dense_jax.data.detection import (
    GiveProposals,
    LargeScaleJitter,
    PadObjects,
    PadProposals,
    ReadObjects,
    ResizeShortSide,
    Rounding,
    short_side_size,
)
from dense_jax.data.normalise import Normalise
from dense_jax.data.padded import BUCKET, Size, in_words, multiple_of, prepare, tell_if_many
from dense_jax.data.transforms import RandomCrop, RandomFlip, Transform, chosen
from dense_jax.errors import UserError, refuse
from dense_jax.evaluation import instances, padding, proposals
from dense_jax.evaluation.batches import eval_batches, predict_each
from dense_jax.evaluation.record import Record
from dense_jax.infer import rcnn_pictures
from dense_jax.infer.detections import FirstStage
from dense_jax.infer.instances import Instances
from dense_jax.metrics.coco import Kind
from dense_jax.metrics.detections import Detections, Truth
from dense_jax.objectives.rcnn import AnchorRule, match_anchors
from dense_jax.objectives.targets import FOREGROUND
from dense_jax.ops import boxes as box_ops
from dense_jax.tasks.task import DebugPictures, Evaluate, Input, ProposeFn, Task
from dense_jax.train import processes
from dense_jax.train.config import Count, Counts, RunConfig
from dense_jax.train.step import Batch, LossFn, eval_step, replicate, shard

OBJECTS = ClassTable(("background", "object"))
"""The classes of proposals."""

SHOWN_SCORE = 0.5
"""Pictures of predictions show objects of at least this score."""

PROPOSALS_FILE = "proposals.json"
"""The file in a folder of images that holds their proposals, if these are given."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectionConfig(RunConfig):
    """The flags of all scripts that find objects, besides those of `RunConfig`."""

    short_side: Counts = (800,)
    """Pixels of the shorter side of training images; of several, one is drawn for each image.
    Evaluation and prediction take the last one, or --test-side."""
    max_side: Count = 1333
    """Limit of the longer side, in pixels."""
    test_side: Count | None = None
    """Pixels of the shorter side in evaluation and prediction. Default: the last --short-side."""
    flip: Literal["on", "off"] = "on"
    """Flip training images left and right at random."""
    jitter: Literal["none", "large_scale"] = "none"
    """large_scale resizes training images by 0.1 to 2, relative to --max-side, and crops squares of
    this side (arXiv:2012.07177, Section 3), in place of --short-side."""
    max_objects: Count = 100
    """Largest number of objects of a training image; of more, the largest are kept."""
    empty_images: Literal["skip", "keep"] = "skip"
    """Whether images without objects are left out of training."""

    def __post_init__(self) -> None:
        """Raises UserError for flags that do not go together."""
        super().__post_init__()
        refuse(self.scale != 1, f"--scale={self.scale}: detectors resize by --short-side")
        refuse(
            self.loss_norm != "valid",
            f"--loss-norm={self.loss_norm}: the losses of detectors have divisors of their own",
        )

    @property
    def rounding(self) -> Rounding:
        """How the sides of resized images are rounded; see `short_side_size`."""
        return "nearest"

    @property
    def antialias(self) -> bool:
        """Whether images that shrink are smoothed; see `dense_jax.data.transforms.resize_image`."""
        return True

    @property
    def mask_cells(self) -> int | None:
        """Cells along each side of the masks that train; None: they are whole; see `PadObjects`."""
        return None

    @property
    def polygons(self) -> Literal["off", "suitable", "on"]:
        """Whether masks train as polygons. "suitable": if the dataset has any."""
        return "off"

    def resized(self, size: Size, short: int) -> Size:
        """Returns the size of an image whose shorter side becomes ``short``, but for --max-side."""
        return short_side_size(size, short, self.max_side, self.rounding)

    def transforms(
        self,
        *,
        masks: bool = False,
        keypoints: bool = False,
        proposals: str | None = None,
        num_proposals: int = 0,
    ) -> list[Transform]:
        """Returns the training transforms.

        Args:
          masks: whether objects have masks.
          keypoints: whether they have keypoints.
          proposals: a file of proposals, if these are given.
          num_proposals: their largest number for an image.
        """
        has_jitter, square = self.jitter == "large_scale", (self.max_side, self.max_side)
        return chosen(
            ReadObjects(
                masks=masks, keypoints=keypoints, polygons=masks and self.polygons != "off"
            ),
            proposals is not None and GiveProposals(proposals, num_proposals),
            has_jitter and LargeScaleJitter(square, antialias=self.antialias),
            not has_jitter
            and ResizeShortSide(self.short_side, self.max_side, self.rounding, self.antialias),
            Normalise(self.normalisation),
            has_jitter and RandomCrop(square),
            self.flip == "on" and RandomFlip(),
            proposals is not None and PadProposals(num_proposals),
            PadObjects(self.max_objects, self.mask_cells),
        )


@dataclasses.dataclass(frozen=True)
class Detection(Task):
    """A run whose network finds objects.

    Attributes:
      objective: the loss: (apply, batch, rng) -> {name: (sum, count)}.
      forward: (variables, images [B, H, W, C], sizes [B, 2]) -> detections, in pixels of these
        images: "boxes" [B, D, 4], "classes" [B, D], "scores" [B, D], "valid" [B, D]; and
        "overflow" [B], see `dense_jax.infer.detections.detect`. With proposals that are given, it
        takes them too, [B, R, 4]; see `dense_jax.infer.detections.from_input`.
      stride: heights and widths of padded images are multiples of this, in pixels.
      given: the file of proposals (see `dense_jax.data.proposals`), if these are given.
      num_given: R, their largest number for an image; of more, the first ones are kept.
      first_stage: (variables, images, sizes) -> maps, anchors and proposals, for debug pictures;
        None draws none.
      many_proposals: the same with as many proposals as in training, for `proposer`.
      finds_any_class: whether the network finds objects and not their classes: a proposal network.
        Its results have one class, "object", and its run leaves the proposals of all images.
      anchor_rule: which anchors train; None draws no anchors.
      notes: further lines of the protocol card.
    """

    config: DetectionConfig
    _: dataclasses.KW_ONLY
    objective: LossFn
    forward: Callable[..., dict[str, jax.Array]]
    stride: int = BUCKET
    given: str | None = None
    num_given: int = 0
    first_stage: Callable[[Any, jax.Array, jax.Array], FirstStage] | None = None
    many_proposals: Callable[[Any, jax.Array, jax.Array], FirstStage] | None = None
    finds_any_class: bool = False
    anchor_rule: AnchorRule | None = None
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    kinds: ClassVar[Sequence[Kind]] = ("box",)
    finds_objects: ClassVar[bool] = True
    headline: ClassVar[str] = "box_ap"
    reads: ClassVar[Sequence[str]] = ("boxes", "classes", "scores", "valid")
    meanings: ClassVar[Mapping[str, str]] = {
        "boxes": "x0 y0 x1 y1 in pixels of the images, from edge to edge; the best score first",
        "classes": "indices into the list of classes",
        "scores": "probabilities",
        "valid": "whether there is a detection; the last places are mostly empty",
        "overflow": "whether candidates were left out that could have been detections",
    }

    @property
    def card(self) -> dict[str, Any]:
        """How images are resized and what was chosen."""
        side = self.config.test_side or self.config.short_side[-1]
        words = f"shorter side {side}, longer at most {self.config.max_side} pixels"
        return {"test_time_options": words, **self.notes}

    def input_size(self, size: Size) -> Size:
        """Returns the size to which an image is resized."""
        side = self.config.test_side or self.config.short_side[-1]
        return self.config.resized(size, side)

    @property
    def antialias(self) -> bool:
        """As the configuration says."""
        return self.config.antialias

    @property
    def export_size(self) -> Size:
        """A size that is not resized, as wide as any: anchors need a size."""
        side = self.config.test_side or self.config.short_side[-1]
        return self.input_size((side, max(side, self.config.max_side)))

    def padded_side(self, side: int) -> int:
        """Returns the next multiple of the stride.

        Padding is not without an effect: biases make it non-zero behind the first layers, so that
        detections near the lower and right edges depend on it. Each image is padded by its own
        size alone, so its detections do not depend on other images, unless images share shapes;
        the protocol card says what that changes (see `dense_jax.evaluation.padding`).
        """
        return multiple_of(side, self.stride)

    @property
    def train_size(self) -> Callable[[Size], Size] | None:
        """The largest size of a training image, by its size in the dataset; None for squares."""
        config = self.config
        if config.jitter == "large_scale":
            return None
        return lambda size: config.resized(size, max(config.short_side))

    def training_data(self, dataset: Dataset) -> Dataset:
        """Returns the dataset without training images that show no object, and tells of them."""
        counts = dataset.num_objects.get("train")
        if counts:
            many = [count for count in counts if count > self.config.max_objects]
            if many:
                print(
                    f"{len(many)} training images have more than --max-objects="
                    f"{self.config.max_objects} objects, up to {max(many)}: the largest are kept"
                )
        if counts and self.config.empty_images == "skip" and not all(counts):
            own = [i for i, count in enumerate(counts) if count]
            refuse(not own, f"no training image of {dataset.name} shows an object: give other data")
            print(f"{len(counts) - len(own)} training images without objects are left out")
            train = Part(dataset.split("train"), own)
            dataset = dataclasses.replace(dataset, splits={**dataset.splits, "train": train})
        return super().training_data(dataset)

    def loss(self, dataset: Dataset) -> LossFn:
        """Returns the objective.

        Raises:
          UserError: there is no class, or the file of proposals lacks the first image of a split.
        """
        if self.given is not None:  # names of another kind are told before any work
            table = proposal_file.read_once(self.given)
            for split in ("train", "val"):
                proposal_file.of_image(table, dataset.split(split)[0]["name"])
        refuse(
            dataset.classes.num_classes < 2,
            f"dataset {dataset.name!r} has no class besides the background: add one",
        )
        return self.objective

    def predict(
        self, variables: Any, images: jax.Array, sizes: jax.Array, *inputs: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns the detections of a batch; see `Detection.forward`."""
        return self.forward(variables, images, sizes, *inputs)

    @property
    def inputs(self) -> Mapping[str, Input]:
        """The proposals, if they are given."""
        if self.given is None:
            return {}
        words = "x0 y0 x1 y1 as shares of the image's width and height, the best first"
        return {"proposals": Input((self.num_given, 4), "float32", words)}

    def as_inputs(self, given: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Returns "proposals" as float32 [R, 4]; slots of zeros stand for none.

        Raises:
          UserError: they are no boxes.
        """
        if not given:
            return {}
        try:
            boxes = np.asarray(given["proposals"], np.float32)
        except (TypeError, ValueError) as error:  # ragged, or no numbers
            raise UserError(f"proposals are no array ({error}): give [R, 4] from 0 to 1") from error
        boxes = boxes.reshape(-1, 4) if boxes.size == 0 else boxes
        refuse(
            boxes.ndim != 2 or boxes.shape[1] != 4,
            f"proposals are {list(boxes.shape)}: give [R, 4], x0 y0 x1 y1",
        )
        refuse(
            not ((boxes >= 0) & (boxes <= 1)).all(),
            "proposals are shares of the image's width and height, from 0 to 1: divide pixels by "
            "these",
        )
        refuse(
            bool((boxes[:, 2:] < boxes[:, :2]).any()),
            "a proposal has x1 below x0 or y1 below y0: give x0 y0 x1 y1",
        )
        boxes = boxes[: self.num_given]
        return {"proposals": np.pad(boxes, [(0, self.num_given - len(boxes)), (0, 0)])}

    def inputs_in(
        self, folder: pathlib.Path
    ) -> Callable[[pathlib.Path, Size], dict[str, np.ndarray]] | None:
        """Reads ``proposals.json`` in the folder of the images; see `dense_jax.data.proposals`."""
        if self.given is None:
            return None
        path = (folder if folder.is_dir() else folder.parent) / PROPOSALS_FILE
        table = proposal_file.read(path)

        def inputs_of(image: pathlib.Path, size: Size) -> dict[str, np.ndarray]:
            refuse(
                image.stem not in table,
                f"{image}: {path} has no boxes for {image.stem!r}; add its list",
            )
            proposals = self.as_inputs({"proposals": as_shares(table[image.stem], size)})
            return {name: array[None] for name, array in proposals.items()}

        return inputs_of

    def answers(self, outputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns the detections."""
        return dict(outputs)

    def read(
        self, answers: Mapping[str, np.ndarray], image: np.ndarray, classes: ClassTable
    ) -> Instances:
        """Returns the objects of an image, in its own pixels, the highest score first."""
        found = self.in_image(answers, image.shape[:2])
        if self.finds_any_class:
            classes = OBJECTS
        own = found["boxes"], found["class_ids"], found["scores"]
        return Instances(image, *own, classes, shown_score=SHOWN_SCORE)

    def in_image(self, answers: Mapping[str, np.ndarray], size: Size) -> dict[str, np.ndarray]:
        """Returns "boxes", "class_ids" and "scores" of an image of a size before resizing."""
        valid = answers["valid"]
        return {
            "boxes": self.in_pixels(answers, size)["boxes"][valid],
            "class_ids": answers["classes"][valid],
            "scores": answers["scores"][valid],
        }

    def in_pixels(self, answers: Mapping[str, Any], size: Size) -> dict[str, Any]:
        """Returns the answers with the boxes in pixels of an image before resizing."""
        boxes = box_ops.scale(answers["boxes"], self._enlarged(size))
        return {**answers, "boxes": box_ops.clip(boxes, size)}

    def _enlarged(self, size: Size) -> tuple[float, float]:
        """Returns the factors from an image's size after resizing to its own."""
        inputs = self.input_size(size)
        return size[0] / inputs[0], size[1] / inputs[1]

    def debug_pictures(self) -> DebugPictures | None:
        """Returns pictures of proposals, and of the anchors that stand for known objects."""
        if self.first_stage is None:
            return None
        words = {"proposals": "boxes that the first stage keeps, coloured by score"}
        if self.anchor_rule is not None:
            words["anchors"] = (
                "known objects and the anchors that stand for them in training, if images have "
                "their size in evaluation"
            )
        first_stage = jax.jit(self.first_stage)

        def draw(variables: Any, example: Example) -> dict[str, np.ndarray]:
            image = example["image"]
            boxes, logits, anchors = self._propose(first_stage, variables, image)
            scores = 1 / (1 + np.exp(-logits))
            pictures = {"proposals": rcnn_pictures.proposals(image, boxes, scores)}
            if self.anchor_rule is not None and "label" in example:
                pictures["anchors"] = self._draw_anchors(example, anchors, self.anchor_rule)
            return pictures

        return DebugPictures(words, draw)

    def proposer(self) -> ProposeFn | None:
        """Returns the proposals of the network, as many as train a head."""
        if self.many_proposals is None:
            return None
        first_stage = jax.jit(self.many_proposals)
        return lambda variables, image: self._propose(first_stage, variables, image)[0]

    def _propose(
        self, first_stage: Callable[..., FirstStage], variables: Any, image: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, jax.Array]:
        """Returns boxes [N, 4] in pixels of the image, their logits [N], and the anchors."""
        size = image.shape[:2]
        inputs = self.input_size(size)
        shape = self.padded_side(inputs[0]), self.padded_side(inputs[1])
        normalisation = self.config.normalisation
        arrays = prepare(image, normalisation, shape, inputs, antialias=self.antialias)
        _, anchors, found = first_stage(variables, *arrays)
        boxes, logits, valid = (x[0] for x in jax.device_get(found))
        return self.in_pixels({"boxes": boxes[valid]}, size)["boxes"], logits[valid], anchors

    def after_training(self, variables: Any, dataset: Dataset) -> None:
        """Writes the proposals of all images, if these are what the run is for."""
        path = proposals_of_run(self.config)
        propose = self.proposer() if self.finds_any_class else None
        if propose is None or processes.from_first(path.exists()):
            return
        sources = list(dataset.splits.values())
        boxes = proposals.of_sources(functools.partial(propose, variables), sources)
        processes.by_first(lambda: proposals.write(path, boxes))
        print(f"proposals of {len(boxes)} images: {path}")

    def _draw_anchors(self, example: Example, anchors: jax.Array, rule: AnchorRule) -> np.ndarray:
        size = example["image"].shape[:2]
        enlarged = self._enlarged(size)
        objects = object_lib.find(example, 0, masks=False)
        boxes = objects.boxes[~objects.crowd]  # crowds do not train
        resized = box_ops.scale(boxes, (1 / enlarged[0], 1 / enlarged[1]))
        matches = jax.device_get(
            jax.jit(match_anchors, static_argnames="rule")(
                anchors,
                np.pad(resized, [(0, 1), (0, 0)]),  # for images without objects
                np.arange(len(boxes) + 1) < len(boxes),
                np.array(self.input_size(size)),
                rule=rule,
            )
        )
        chosen = matches.label == FOREGROUND
        return rcnn_pictures.anchors(
            example["image"],
            boxes,
            box_ops.scale(np.asarray(anchors)[chosen], enlarged),
            matches.index[chosen],
            matches.iou[chosen] < rule.foreground,
            rule.foreground,
        )

    def evaluator(self, dataset: Dataset, split: str) -> Evaluate:
        """Returns a function that scores the detections of a split."""
        source = dataset.split(split)
        if self.finds_any_class:
            dataset = dataclasses.replace(dataset, classes=OBJECTS, category_ids=())
        batches = eval_batches(source, self)
        tell_if_many(batches.shapes, self.config.eval_shapes)

        def outputs(variables: Any, batch: Batch) -> tuple[Any, Any]:
            inputs = (batch[name] for name in self.inputs)
            return {}, predict_each(self, variables, batch["images"], batch["size"], *inputs)

        step = eval_step(outputs)

        def evaluate(variables: Any, is_last: bool) -> Record:
            variables = replicate(variables)
            collected, image_ids, num_cut = instances.DetectionEvaluator(), {}, 0
            for index, found in self._each(step, variables, source, batches):
                example = source[index]
                image_ids[index] = example.get("image_id", index)
                num_cut += int(found["overflow"])
                size = example["image"].shape[:2]
                truth = truth_of(
                    example,
                    any_class=self.finds_any_class,
                    masks="mask" in self.kinds,
                    keypoints="keypoint" in self.kinds,
                )
                collected.add(index, truth, self._detections(found, size))
            collected.gather()
            ids = dict(pair for some in processes.from_all([*image_ids.items()]) for pair in some)
            shown = instances.findings(
                collected,
                dataset,
                split,
                kinds=self.kinds,
                voc_boxes="devkit" if dataset.name.startswith("voc") else None,
                image_ids=[ids[index] for index in sorted(ids)],
                category_ids=dataset.category_ids or None,
            )
            card = {
                "resolution": in_words(set(batches.shapes.values())),
                "padding": self._padding(step, variables, source, collected, is_last),
                **self.card,
            }
            if num_cut := sum(processes.from_all(num_cut)):
                card["candidates"] = f"{num_cut} images had more than took part"
                print(f"{num_cut} images had more candidates than take part in suppression")
            return instances.record(collected, [shown], dataset, split, self.headline, card)

        return evaluate

    def _each(
        self, step: Any, variables: Any, source: Source, batches: Iterable[Batch]
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Yields the index and the outputs of each image of this process."""
        for batch in batches:
            arrays = {name: batch[name] for name in ("images", "size")}
            arrays |= self._given_for(source, batch["index"])
            found = jax.device_get(step(variables, shard(arrays))[1])
            found = {name: x.reshape(-1, *x.shape[2:]) for name, x in found.items()}
            for row, index in enumerate(batch["index"].tolist()):
                if index >= 0:
                    yield index, {name: x[row] for name, x in found.items()}

    def _padding(
        self,
        step: Any,
        variables: Any,
        source: Source,
        collected: instances.DetectionEvaluator,
        is_last: bool,
    ) -> str:
        """Says how images are padded, and what shapes that they share change in detections."""
        if self.config.eval_shapes == "exact":
            return f"zeros pad images below and on the right to multiples of {self.stride} pixels"
        if not is_last:
            return f"{padding.RULE}; what this changes is measured in the last evaluation only"
        inputs = [self.input_size(source.size(i)) for i in range(len(source))]
        indices = padding.sample([(self.padded_side(h), self.padded_side(w)) for h, w in inputs])
        some, padded = Part(source, indices), collected.images()
        counts = np.zeros((2, 2), int)
        for place, found in self._each(step, variables, some, eval_batches(some, self, "exact")):
            index = indices[place]
            size = source.size(index)
            exact = self._detections(found, size)
            counts += padding.changes(exact, padded[index][1], size, inputs[index])
        counts = np.sum(processes.from_all(counts.tolist()), axis=0)
        words = padding.in_words(counts, len(indices))
        return f"{padding.RULE}; {words} of the most frequent shapes"

    def _given_for(self, source: Source, index: np.ndarray) -> dict[str, np.ndarray]:
        """Returns "proposals" of the images of a batch, [B, R, 4], if they are given."""
        if self.given is None:
            return {}
        rows = np.zeros((len(index), self.num_given, 4), np.float32)
        table = proposal_file.read_once(self.given)
        for row, i in enumerate(index.tolist()):
            if i >= 0:
                boxes = proposal_file.of_image(table, source[i]["name"])
                rows[row] = self.as_inputs({"proposals": as_shares(boxes, source.size(i))})[
                    "proposals"
                ]
        return {"proposals": rows}

    def _detections(self, answers: Mapping[str, np.ndarray], size: Size) -> Detections:
        found = self.in_image(answers, size)
        return Detections.build(found["boxes"], found["class_ids"], found["scores"])


def as_shares(boxes: np.ndarray, size: Size) -> np.ndarray:
    """Returns boxes [N, 4] in pixels as shares of an image's width and height, cut at its edges."""
    return box_ops.scale(box_ops.clip(boxes.astype(np.float32), size), (1 / size[0], 1 / size[1]))


def truth_of(
    example: Example, *, any_class: bool = False, masks: bool = False, keypoints: bool = False
) -> Truth:
    """Returns the true objects of an example, as metrics take them; class 0 is the background.

    Args:
      example: has objects.
      any_class: whether all objects have class 1.
      masks: whether they have masks.
      keypoints: whether they have keypoints.
    """
    objects = object_lib.find(example, 0, masks=masks, keypoints=keypoints)
    classes = np.ones_like(objects.classes) if any_class else objects.classes
    codes = None
    if objects.masks is not None:
        codes = [rle.encode(m) if isinstance(m, np.ndarray) else m for m in objects.masks]
    return Truth.build(
        objects.boxes,
        classes,
        crowd=objects.crowd,
        area=objects.areas,
        masks=codes,
        keypoints=None if objects.keypoints is None else objects.keypoints.points,
    )


def proposals_of_run(config: RunConfig) -> pathlib.Path:
    """Returns the file of proposals that the run of a proposal network leaves, by its steps."""
    return pathlib.Path(config.workdir or "") / f"proposals-{config.num_steps}.json"
