"""The score of a labelling from boxes that are known for the images of a dataset only."""

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
    """Labels a split from boxes of its own and returns "boxes_mean_iou".

    Args:
      task: refines the scores with its CRF, if it has one.
      variables: of the network.
      dataset: the images and their labels.
      split: which of them.
      network: scores boxes.
      proposals: JSON file of the boxes; None takes those of objects.
      background: class that is no object; None: every class has objects.
      factor: boxes become this much wider and higher.

    Raises:
      UserError: there are no boxes of an image.
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
    )
    confusion = np.zeros((num_classes, num_classes), np.int64)
    for index, labels in enumerate(predictions):
        counts = metrics.confusion_counts(source[index]["label"], labels, num_classes)
        confusion = metrics.add(confusion, np.asarray(counts))
    score = metrics.summarise(confusion)["mean_iou"]
    return Findings([Score("boxes_mean_iou", score, "Mean IoU from known boxes")])
