"""The mean IoU of labels from known boxes: proposals of a file, or boxes of true objects."""

from typing import Any

import numpy as np

from dense_jax.data import crops
from dense_jax.data.dataset import Dataset
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
    proposals: str | None,
    background: int | None,
    factor: float,
) -> Findings:
    """Labels a split from the boxes of its images and returns "boxes_mean_iou".

    Args:
      task: its CRF, if it has one, refines the scores.
      variables: the network's variables.
      dataset: the images and their labels.
      split: name of the split.
      network: scores boxes.
      proposals: JSON file with boxes; None takes the boxes of the true objects.
      background: class without objects; None if every class has objects.
      factor: factor for the width and height of the boxes.

    Raises:
      UserError: an image has no boxes.
    """
    source, num_classes = dataset.split(split), dataset.classes.num_classes
    predictions = label_images(
        network.score,
        variables,
        source,
        crops.known_boxes(source, proposals=proposals, background=background, factor=factor),
        normalisation=task.config.normalisation,
        num=network.num,
        min_side=network.min_side,
        crf=task.crf,
        shapes=task.config.eval_shapes,
    )
    confusion = np.zeros((num_classes, num_classes), np.int64)
    for index, labels in enumerate(predictions):
        counts = metrics.confusion_counts(source[index]["label"], labels, num_classes)
        confusion = metrics.add(confusion, np.asarray(counts))
    score = metrics.summarise(confusion)["mean_iou"]
    return Findings([Score("boxes_mean_iou", score, "Mean IoU from known boxes")])
