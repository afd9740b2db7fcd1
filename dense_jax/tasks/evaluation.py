"""Scores and pictures of a network on a split, and the folder they are written to."""

import dataclasses
import functools
import heapq
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from PIL import Image

from dense_jax import losses, runs, viz
from dense_jax.data.classes import ClassTable
from dense_jax.data.dataset import Dataset, Example, Source
from dense_jax.errors import UserError
from dense_jax.infer.crf import WithCrf
from dense_jax.metrics import boundary
from dense_jax.metrics import semantic as metrics
from dense_jax.tasks.prediction import PredictFn, Variables, eval_batches
from dense_jax.train.step import Batch, eval_step, replicate, shard

# (variables, split) -> further scores by name.
ExtraScores = Callable[[Variables, Source], dict[str, float]]
BoundaryMatch = Literal["none", "distance", "assignment"]

_NUM_PICTURES = 4  # best and worst images shown in a report, each


def extra_scores_of(run: runs.Run, predict: PredictFn, source: Source) -> dict[str, float]:
    """The scores that only the run's script knows: its ``extra_scores``, where it has one."""
    if not hasattr(run.script, "extra_scores"):
        return {}
    return run.script.extra_scores(run.config, predict, run.variables, source)


@dataclasses.dataclass
class Evaluation:
    """Counts and pictures of one pass over a split.

    Attributes:
      confusion: [C, C], row = label.
      loss: the mean over scored pixels.
      num_images: how many were scored.
      shapes: the padded sizes that were computed.
      best: (mean IoU, index, prediction) of the best images, and `worst` of the worst.
      boundary_f1: None if it was not asked for.
      before_crf: the confusion without the CRF, where the prediction ends in one.
      sharpened: (gain in mean IoU, index, predictions before and after it [2, H, W]) of the images
        that it helped most.
    """

    confusion: np.ndarray
    loss: float
    num_images: int
    shapes: set[tuple[int, int]]
    best: list[tuple[float, int, np.ndarray]]
    worst: list[tuple[float, int, np.ndarray]]
    boundary_f1: float | None = None
    before_crf: np.ndarray | None = None
    sharpened: list[tuple[float, int, np.ndarray]] = dataclasses.field(default_factory=list)


class Evaluator:
    """Scores a network on a split: every image once, at its own size, in few compiled shapes."""

    def __init__(
        self,
        predict: PredictFn,
        source: Source,
        classes: ClassTable,
        *,
        batch_size: int,
        normalisation: str,
    ) -> None:
        self._classes = classes
        self._batches = eval_batches(source, batch_size, normalisation)

        count = jax.vmap(
            functools.partial(metrics.confusion_counts, num_classes=classes.num_classes)
        )

        def counts(variables: Variables, batch: Batch) -> tuple[Any, Any]:
            inputs = variables, batch["images"], batch["size"]
            sums, per_image = {}, {}
            if isinstance(predict, WithCrf):
                before, logits = predict.before_and_after(*inputs)
                unrefined = jnp.argmax(before, axis=-1).astype(jnp.uint8)
                confusion = count(batch["labels"], unrefined)
                sums["before_crf"] = jnp.sum(confusion, axis=0)
                per_image = {"confusion_before_crf": confusion, "before_crf": unrefined}
            else:
                logits = predict(*inputs)
            predictions = jnp.argmax(logits, axis=-1).astype(jnp.uint8)
            confusion = count(batch["labels"], predictions)
            loss = jnp.sum(losses.softmax_cross_entropy(logits, batch["labels"]))
            sums |= {
                "confusion": jnp.sum(confusion, axis=0),
                "loss": loss,
                "num_images": jnp.sum(batch["valid"], dtype=jnp.int32),
            }
            return sums, per_image | {"confusion": confusion, "predictions": predictions}

        self._step = eval_step(counts)

    def __call__(self, variables: Any, boundary_match: BoundaryMatch = "none") -> Evaluation:
        """Evaluates ``variables``; boundary F1 is computed on the host and takes longer."""
        confusion, before_crf, loss, num_images = None, None, 0.0, 0
        shapes: set[tuple[int, int]] = set()
        best, worst, sharpened, boundaries = Top(), Top(), Top(), []
        variables = replicate(variables)  # once, and not with every batch
        for batch in self._batches:
            arrays = {k: batch[k] for k in ("images", "labels", "valid", "size")}
            sums, per_image = jax.device_get(self._step(variables, shard(arrays)))
            confusion = metrics.add(confusion, sums["confusion"])
            if "before_crf" in sums:
                before_crf = metrics.add(before_crf, sums["before_crf"])
            loss += float(sums["loss"])
            num_images += int(sums["num_images"])
            shapes.add(batch["images"].shape[1:3])
            flat = {k: v.reshape(-1, *v.shape[2:]) for k, v in per_image.items()}
            for i, index in enumerate(batch["index"]):
                if index < 0:
                    continue
                height, width = batch["size"][i]
                prediction = flat["predictions"][i, :height, :width]
                score = metrics.summarise(flat["confusion"][i])["mean_iou"]
                if not np.isnan(score):
                    best.offer(score, int(index), prediction)
                    worst.offer(-score, int(index), prediction)
                    if "before_crf" in flat:
                        without = metrics.summarise(flat["confusion_before_crf"][i])["mean_iou"]
                        pair = np.stack([flat["before_crf"][i, :height, :width], prediction])
                        sharpened.offer(score - without, int(index), pair)
                if boundary_match != "none":
                    labels = batch["labels"][i, :height, :width]
                    boundaries.append(
                        boundary.image_boundary_f1(
                            labels, prediction, self._classes.num_classes, match=boundary_match
                        )
                    )
        if confusion is None:
            raise UserError("the split to evaluate has no images")
        finite = [b for b in boundaries if not np.isnan(b)]
        return Evaluation(
            confusion=confusion,
            loss=loss / max(int(confusion.sum()), 1),
            num_images=num_images,
            shapes=shapes,
            best=best.items(),
            worst=[(-score, index, image) for score, index, image in worst.items()],
            boundary_f1=float(np.mean(finite)) if finite else None,
            before_crf=before_crf,
            sharpened=sharpened.items(),
        )


class Top:
    """Keeps the few predictions of highest score, so that memory does not grow with the split."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, np.ndarray]] = []

    def offer(self, score: float, index: int, prediction: np.ndarray) -> None:
        """Considers a prediction."""
        heapq.heappush(self._heap, (score, -index, prediction))
        if len(self._heap) > _NUM_PICTURES:
            heapq.heappop(self._heap)

    def items(self) -> list[tuple[float, int, np.ndarray]]:
        """Returns (score, index, prediction), the highest score first."""
        return [(s, -i, p) for s, i, p in sorted(self._heap, key=lambda x: x[:2], reverse=True)]


def write_evaluation(
    workdir: pathlib.Path,
    evaluation: Evaluation,
    dataset: Dataset,
    split: str,
    step: int,
    card: dict[str, Any],
    extra: dict[str, float],
    absent: Literal["skip", "zero"] = "skip",
    draw: Callable[[int, Example], np.ndarray] | None = None,
) -> dict[str, float]:
    """Writes ``evaluation.json`` with its pictures and protocol.

    Args:
      workdir: folder to write.
      evaluation: counts and pictures.
      dataset: what was scored.
      split: which part of it.
      step: age of the parameters.
      card: how the network was used, added to the protocol.
      extra: further scores, shown with the others.
      absent: whether classes without pixels count in the mean.
      draw: (index, example) -> the image to show, uint8 [H, W, 3]; by default as it is.

    Returns:
      The scores that any evaluation has; a row of the log.
    """
    source, classes = dataset.split(split), dataset.classes
    summary = metrics.summarise(evaluation.confusion, classes.names, absent=absent)
    scores = {k: v for k, v in summary.items() if isinstance(v, float)} | {"loss": evaluation.loss}
    if evaluation.boundary_f1 is not None:
        scores["boundary_f1"] = evaluation.boundary_f1
    if evaluation.before_crf is not None:
        without = metrics.summarise(evaluation.before_crf, absent=absent)
        extra = {"mean_iou_before_crf": without["mean_iou"], **extra}
    protocol = {
        "dataset": dataset.name,
        "description": dataset.description,
        "fingerprint": dataset.fingerprint,
        "split": split,
        "images_scored": evaluation.num_images,
        "images_in_split": len(source),
        "resolution": "native size; padded for computing to "
        + ", ".join(f"{h}x{w}" for h, w in sorted(evaluation.shapes)),
        "ignored": f"label {classes.ignore_label} in no count",
        "absent_classes": {
            "skip": "left out of the mean where neither labelled nor predicted",
            "zero": "count as zero in the mean",
        }[absent],
        **card,
        "step": step,
        **runs.provenance(),
    }
    pictures = workdir / "pictures"
    pictures.mkdir(exist_ok=True)
    images = []
    for kind, items in (("best", evaluation.best), ("worst", evaluation.worst)):
        for rank, (score, index, prediction) in enumerate(items, 1):
            example = source[index]
            path = pictures / f"{split}_{kind}_{rank}.png"
            image = draw(index, example) if draw else example["image"]
            triplet = viz.comparison(image, example["label"], prediction, classes.palette())
            Image.fromarray(triplet).save(path)
            images.append(
                {
                    "name": example["name"],
                    "kind": kind,
                    "score": score,
                    "triplet": str(path.relative_to(workdir)),
                }
            )
    for rank, (_, index, pair) in enumerate(evaluation.sharpened, 1):
        example, palette = source[index], classes.palette()
        maps = [viz.colourise(labels, palette) for labels in (example["label"], *pair)]
        sheet = viz.contact_sheet([example["image"], *maps], columns=4)
        Image.fromarray(sheet).save(pictures / f"crf_{split}_{rank}.png")
    record = {
        "protocol": protocol,
        "scores": scores | extra,
        "per_class": summary["per_class"],
        "confusion": evaluation.confusion.tolist(),
        "images": images,
    }
    runs.write_json(workdir / "evaluation.json", record)
    per_class = {
        f"iou/{c['name']}": np.nan if c["iou"] is None else c["iou"] for c in summary["per_class"]
    }
    tqdm.tqdm.write(  # above a progress bar, where there is one
        f"step {step}: mean IoU {scores['mean_iou']:.4f}, pixel accuracy "
        f"{scores['pixel_accuracy']:.4f} on {evaluation.num_images} {split} images"
    )
    # Every row of the log has the same columns, computed or not.
    return {"boundary_f1": float("nan")} | scores | per_class
