"""The score of a labelling from boxes that are known for the images of a dataset only."""

from collections.abc import Callable
from typing import Any

import numpy as np

from dense_jax.data import crops
from dense_jax.data.dataset import Dataset, Source
from dense_jax.evaluation.record import Findings, Score
from dense_jax.infer.proposals import BoxScores, label_images
from dense_jax.metrics import semantic as metrics


def measure(
    task: Any,
    variables: Any,
    dataset: Dataset,
    split: str,
    *,
    network: BoxScores,
    boxes: Callable[[Source], list[list[crops.Box]]],
) -> Findings:
    """Labels a split from boxes of its own and returns "boxes_mean_iou".

    Args:
      task: refines the scores with its CRF, if it has one.
      variables: of the network.
      dataset: the images and their labels.
      split: which of them.
      network: scores boxes.
      boxes: those of each image of a split, best first.

    Raises:
      UserError: there are no boxes of an image.
    """
    source, num_classes = dataset.split(split), dataset.classes.num_classes
    predictions = label_images(
        network.score,
        variables,
        source,
        boxes(source),
        normalisation=task.config.normalisation,
        num=network.num,
        min_side=network.min_side,
        crf=task.crf,
    )
    confusion = np.zeros((num_classes, num_classes), np.int64)
    for index, labels in enumerate(predictions):
        counts = metrics.confusion_counts(source[index]["label"], labels, num_classes)
        confusion = metrics.add(confusion, np.asarray(counts))
    score = metrics.summarise(confusion)["mean_iou"]
    return Findings([Score("boxes_mean_iou", score, "Mean IoU from known boxes")])
