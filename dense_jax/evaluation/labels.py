"""Metrics and pictures of a network that labels pixels, on a split."""

import dataclasses
import functools
import heapq
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dense_jax import viz
from dense_jax.data.classes import IGNORE_LABEL, ClassTable
from dense_jax.data.dataset import Dataset, Example, Part, Source
from dense_jax.data.padded import in_words, tell_if_many
from dense_jax.errors import UserError
from dense_jax.evaluation.batches import Predicts, eval_batches, predict_each, predict_split
from dense_jax.evaluation.record import Cell, Column, Findings, Picture, Record, Score, Table
from dense_jax.metrics import boundary
from dense_jax.metrics import semantic as metrics
from dense_jax.objectives import pixels
from dense_jax.train import processes
from dense_jax.train.step import Batch, eval_step, replicate, shard

BoundaryMatch = Literal["none", "distance", "assignment"]
Absent = Literal["skip", "zero"]

_NUM_SIZES = 8  # of images, on which the effect of padding is measured
_NUM_PICTURES = 4  # of the best images in a report, and of the worst
_PARTS = ("image", "label", "prediction", "errors red, void white")
_ABSENT = {
    "skip": "left out of the mean where neither labelled nor predicted",
    "zero": "count as zero in the mean",
}


@dataclasses.dataclass
class Counts:
    """Counts and pictures of one pass over a split.

    Attributes:
      confusion: [C, C], row = label.
      loss: the mean over scored pixels.
      num_images: number of scored images.
      shapes: the padded heights and widths of the batches.
      best: (mean IoU, index, prediction) of the best images.
      worst: the same of the worst images.
      boundary_f1: mean over the images; NaN if it was not requested.
      before_crf: the confusion without the CRF; None without a CRF.
      padding: what the padding of images to a few shapes changed, in words.
      sharpened: (gain in mean IoU, index, predictions before and after the CRF [2, H, W]) of the
        images that the CRF improved most.
    """

    confusion: np.ndarray
    loss: float
    num_images: int
    shapes: set[tuple[int, int]]
    best: list[tuple[float, int, np.ndarray]]
    worst: list[tuple[float, int, np.ndarray]]
    boundary_f1: float = math.nan
    before_crf: np.ndarray | None = None
    sharpened: list[tuple[float, int, np.ndarray]] = dataclasses.field(default_factory=list)
    padding: str = ""


class LabelCounter:
    """Counts a network's labels on a split, every image once."""

    def __init__(self, task: Predicts, source: Source, classes: ClassTable) -> None:
        self._task, self._source, self._classes = task, source, classes
        self._batches = eval_batches(source, task)
        tell_if_many(self._batches.shapes, task.config.eval_shapes)

        count = jax.vmap(
            functools.partial(metrics.confusion_counts, num_classes=classes.num_classes)
        )

        def counts(variables: Any, batch: Batch) -> tuple[Any, Any]:
            outputs = predict_each(task, variables, batch["images"], batch["size"])
            check_channels(outputs["logits"], classes.num_classes, "logits")
            sums, per_image = {}, {}
            if "before_crf" in outputs:
                unrefined = jnp.argmax(outputs["before_crf"], axis=-1).astype(jnp.uint8)
                confusion = count(batch["labels"], unrefined)
                sums["before_crf"] = jnp.sum(confusion, axis=0)
                per_image = {"confusion_before_crf": confusion, "before_crf": unrefined}
            predictions = jnp.argmax(outputs["logits"], axis=-1).astype(jnp.uint8)
            confusion = count(batch["labels"], predictions)
            loss = jnp.sum(pixels.softmax_cross_entropy(outputs["logits"], batch["labels"]))
            sums |= {
                "confusion": jnp.sum(confusion, axis=0),
                "loss": loss,
                "num_images": jnp.sum(batch["valid"], dtype=jnp.int32),
            }
            return sums, per_image | {"confusion": confusion, "predictions": predictions}

        self._step = eval_step(counts)

    def __call__(self, variables: Any, boundary_match: BoundaryMatch = "none") -> Counts:
        """Counts with ``variables``. Boundary F1 is computed on the host and takes longer."""
        confusion, before_crf, loss, num_images = None, None, 0.0, 0
        shapes: set[tuple[int, int]] = set()
        best, worst, sharpened, boundaries = Top(), Top(), Top(), []
        is_last = boundary_match != "none"
        examples = self._examples() if is_last else []
        padded: dict[int, np.ndarray] = {}
        variables = replicate(variables)  # once, not for every batch
        for batch in self._batches:
            self._check(batch)
            arrays = {k: batch[k] for k in ("images", "labels", "valid", "size")}
            sums, per_image = jax.device_get(self._step(variables, shard(arrays)))
            own = {k: v.reshape(-1, *v.shape[2:]) for k, v in per_image.items()}
            own["boundary_f1"] = self._boundaries(batch, own, boundary_match)
            own |= {k: batch[k] for k in ("index", "size")}
            flat = processes.gather(own)
            confusion = metrics.add(confusion, sums["confusion"])
            if "before_crf" in sums:
                before_crf = metrics.add(before_crf, sums["before_crf"])
            loss += float(sums["loss"])
            num_images += int(sums["num_images"])
            shapes.add(batch["images"].shape[1:3])
            for i, index in enumerate(flat["index"]):
                if index < 0:
                    continue
                height, width = flat["size"][i]
                prediction = flat["predictions"][i, :height, :width]
                if int(index) in examples:
                    padded[int(index)] = prediction
                score = metrics.summarise(flat["confusion"][i])["mean_iou"]
                if not np.isnan(score):
                    best.offer(score, int(index), prediction)
                    worst.offer(-score, int(index), prediction)
                    if "before_crf" in flat:
                        without = metrics.summarise(flat["confusion_before_crf"][i])["mean_iou"]
                        pair = np.stack([flat["before_crf"][i, :height, :width], prediction])
                        sharpened.offer(score - without, int(index), pair)
                boundaries.append(flat["boundary_f1"][i])
        if confusion is None:
            raise UserError("the split to evaluate has no images")
        finite = [b for b in boundaries if not np.isnan(b)]
        return Counts(
            confusion=confusion,
            loss=loss / max(int(confusion.sum()), 1),
            num_images=num_images,
            shapes=shapes,
            best=best.items(),
            worst=[(-score, index, image) for score, index, image in worst.items()],
            boundary_f1=float(np.mean(finite)) if finite else math.nan,
            before_crf=before_crf,
            sharpened=sharpened.items(),
            padding=self._padding(variables, padded),
        )

    def _boundaries(
        self, batch: Batch, outputs: Mapping[str, np.ndarray], match: BoundaryMatch
    ) -> np.ndarray:
        """The boundary F1 of each row, float64; NaN for one without a label or a request."""
        scores = np.full(len(batch["index"]), math.nan)
        for i in np.nonzero(batch["index"] >= 0)[0]:
            if match != "none" and outputs["confusion"][i].any():
                height, width = batch["size"][i]
                labels, prediction = batch["labels"][i], outputs["predictions"][i]
                scores[i] = boundary.image_boundary_f1(
                    labels[:height, :width],
                    prediction[:height, :width],
                    self._classes.num_classes,
                    match=match,
                )
        return scores

    def _check(self, batch: Batch) -> None:
        """Refuses labels that are no class and not void, as of a source that nobody checked."""
        labels, num_classes = batch["labels"], self._classes.num_classes
        is_wrong = (labels < 0) | (labels >= num_classes) & (labels != IGNORE_LABEL)
        if is_wrong.any():
            name = self._source[int(batch["index"][np.nonzero(is_wrong)[0][0]])]["name"]
            raise UserError(
                f"{name}: its label holds {labels[is_wrong][0]}, and class ids are 0 to "
                f"{num_classes - 1} and {IGNORE_LABEL} for void: mend the label"
            )

    def _examples(self) -> list[int]:
        """Returns the first image of each of the most frequent sizes, if images share shapes."""
        if self._task.config.eval_shapes == "exact":
            return []
        sizes = [self._source.size(i) for i in range(len(self._source))]
        return [sizes.index(size) for size, _ in Counter(sizes).most_common(_NUM_SIZES)]

    def _padding(self, variables: Any, padded: Mapping[int, np.ndarray]) -> str:
        """Says how images are padded, and what that changes in the labels of some of them."""
        if self._task.config.eval_shapes == "exact":
            return ""
        rule = "zeros pad images below and on the right (eval_shapes=buckets)"
        if not padded:
            return f"{rule}; what this changes is measured with the boundaries only"
        indices, changed, total = list(padded), 0, 0
        exact = predict_split(self._task, variables, Part(self._source, indices), "exact")
        for place, outputs in exact:
            labels = outputs["logits"].argmax(-1)
            changed += int(np.sum(labels != padded[indices[place]]))
            total += labels.size
        return (
            f"{rule}; this changes {100 * changed / total:.2f} % of the labels of {len(indices)} "
            "images, one of each of the most frequent sizes"
        )


def check_channels(logits: jax.Array, num_classes: int | None, words: str) -> None:
    """Refuses logits [..., C] whose channels are not the classes.

    Raises:
      UserError: names both numbers.
    """
    if num_classes not in (None, logits.shape[-1]):
        raise UserError(
            f"{words} of the network: {logits.shape[-1]} channels, and the dataset has "
            f"{num_classes} classes: build the network for num_classes"
        )


class Top:
    """Stores only the few predictions of highest score: memory does not grow with the split."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Any]] = []

    def offer(self, score: float, index: int, prediction: Any) -> None:
        """Stores a prediction if its score is among the highest."""
        heapq.heappush(self._heap, (score, -index, prediction))
        if len(self._heap) > _NUM_PICTURES:
            heapq.heappop(self._heap)

    def items(self) -> list[tuple[float, int, Any]]:
        """Returns (score, index, prediction), the highest score first."""
        return [(s, -i, p) for s, i, p in sorted(self._heap, key=lambda x: x[:2], reverse=True)]


def findings(
    counts: Counts,
    dataset: Dataset,
    split: str,
    absent: Absent = "skip",
    draw: Callable[[int, Example], np.ndarray] | None = None,
) -> Findings:
    """Returns the metrics, tables and pictures of predicted labels.

    Args:
      counts: the counts of the split.
      dataset: the scored dataset.
      split: name of the scored split.
      absent: whether classes without pixels count in the mean.
      draw: (index, example) -> the image to show, uint8 [H, W, 3]; by default the image itself.
    """
    source, classes = dataset.split(split), dataset.classes
    summary = metrics.summarise(counts.confusion, classes.names, absent=absent)
    scores = [
        Score("mean_iou", summary["mean_iou"], "Mean IoU"),
        Score("pixel_accuracy", summary["pixel_accuracy"], "Pixel accuracy"),
        Score("mean_accuracy", summary["mean_accuracy"], "Mean accuracy"),
        Score("boundary_f1", counts.boundary_f1, "Boundary F1"),
        Score(
            "frequency_weighted_iou",
            summary["frequency_weighted_iou"],
            "Frequency-weighted IoU",
            main=False,
        ),
        Score("loss", counts.loss, "Loss", unit="", main=False),
    ]
    if counts.before_crf is not None:
        without = metrics.summarise(counts.before_crf, absent=absent)["mean_iou"]
        scores.append(Score("mean_iou_before_crf", without, "Mean IoU without CRF"))
    pictures = [
        Picture(
            f"{split}_{group.lower()}_{rank}.png",
            functools.partial(_compare, source, index, prediction, classes, draw),
            group,
            f"{source[index]['name']}, {100 * score:.1f} %",
            _PARTS,
        )
        for group, items in (("Worst", counts.worst), ("Best", counts.best))
        for rank, (score, index, prediction) in enumerate(items, 1)
    ]
    pictures += [
        Picture(
            f"crf_{split}_{rank}.png",
            functools.partial(_sharpening, source, index, pair, classes),
            "Where the CRF helped most",
            source[index]["name"],
            ("image", "label", "before the CRF", "after it"),
        )
        for rank, (_, index, pair) in enumerate(counts.sharpened, 1)
    ]
    pictures.append(
        Picture(
            f"confusion_{split}.png",
            functools.partial(_confusion, counts.confusion, classes),
            "Confusion",
            "Rows are true classes, columns are predicted classes; percent of the true class.",
        )
    )
    return Findings(scores, [class_table(summary, counts.confusion)], pictures)


def class_table(summary: Mapping[str, Any], confusion: np.ndarray) -> Table:
    """Returns IoU, accuracy, share of the pixels and most frequent mistake of each class."""
    names = [row["name"] for row in summary["per_class"]]
    pixels = max(1, sum(row["pixels"] for row in summary["per_class"]))
    rows: list[list[Cell]] = []
    for i, row in enumerate(summary["per_class"]):
        wrong = np.where(np.arange(len(names)) == i, 0, confusion[i])
        mistake = None
        if wrong.any():
            mistake = f"{names[wrong.argmax()]} {100 * wrong.max() / row['pixels']:.1f} %"
        rows.append([row["name"], row["iou"], row["accuracy"], row["pixels"] / pixels, mistake])
    heads = [Column("Class"), Column("IoU", "%"), Column("Accuracy", "%")]
    heads += [Column("Share of pixels", "%"), Column("Most often mistaken for")]
    return Table("Classes", heads, rows, log="iou")


def record(
    counts: Counts,
    found: list[Findings],
    dataset: Dataset,
    split: str,
    headline: str,
    card: Mapping[str, Any],
    absent: Absent = "skip",
) -> Record:
    """Returns the record of predicted labels.

    Args:
      counts: the counts of the split.
      found: findings of each measure, the main metrics first.
      dataset: the scored dataset.
      split: name of the scored split.
      headline: name of the metric that decides which checkpoint is the best.
      card: further lines of the protocol: how the network was used.
      absent: whether classes without pixels count in the mean.
    """
    classes = dataset.classes
    protocol = {
        "dataset": dataset.name,
        "description": dataset.description,
        "fingerprint": dataset.fingerprint,
        "split": split,
        "images_scored": counts.num_images,
        "images_in_split": len(dataset.split(split)),
        "resolution": f"native size, {in_words(counts.shapes)}",
        **({"padding": counts.padding} if counts.padding else {}),
        "ignored": f"label {classes.ignore_label} in no count",
        "absent_classes": _ABSENT[absent],
        **card,
    }
    summary = metrics.summarise(counts.confusion, classes.names, absent=absent)
    data = {"per_class": summary["per_class"], "confusion": counts.confusion.tolist()}
    return Record(headline, found, protocol, data)


def _compare(
    source: Source,
    index: int,
    prediction: np.ndarray,
    classes: ClassTable,
    draw: Callable[[int, Example], np.ndarray] | None,
) -> np.ndarray:
    example = source[index]
    image = draw(index, example) if draw else example["image"]
    return viz.comparison(image, example["label"], prediction, classes.palette())


def _sharpening(source: Source, index: int, pair: np.ndarray, classes: ClassTable) -> np.ndarray:
    example, palette = source[index], classes.palette()
    maps = [viz.colourise(labels, palette) for labels in (example["label"], *pair)]
    return viz.contact_sheet([example["image"], *maps], columns=4)


def _confusion(confusion: np.ndarray, classes: ClassTable) -> np.ndarray:
    cell = 68 if len(confusion) <= 30 else max(8, 2000 // len(confusion))
    return viz.confusion_picture(confusion, classes.names, cell=cell)
