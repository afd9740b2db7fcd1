"""The task that labels pixels: softmax losses, mean IoU, and a CRF after any network."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dense_jax import runs
from dense_jax.data import prepared
from dense_jax.data.classes import ClassTable
from dense_jax.data.dataset import Dataset, Source
from dense_jax.data.transforms import RandomTranslate, Transform, whole_images
from dense_jax.errors import UserError, refuse
from dense_jax.evaluation import labels
from dense_jax.evaluation.record import Findings, Record
from dense_jax.infer import ensemble
from dense_jax.infer.crf import check_crf, with_crf
from dense_jax.infer.predictor import Labels
from dense_jax.infer.whole_image import ONE_PASS, PredictFn, padded_side, whole_image
from dense_jax.objectives import pixels
from dense_jax.objectives.pixels import LossTerm
from dense_jax.ops.crf import CrfParams
from dense_jax.tasks.task import Evaluate, Task
from dense_jax.train.config import Factor, RunConfig, Sides
from dense_jax.train.step import Batch, Losses, LossFn

Combine = Literal["mean_prob", "product_score"]
# (task, variables, dataset, split) -> further metrics and pictures.
Measure = Callable[[Any, Any, Dataset, str], Findings]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelConfig(RunConfig):
    """The flags of all scripts that label pixels, besides those of `RunConfig`."""

    width: Factor = 1.0
    """Factor for the number of channels; use less than 1 for trials."""
    post: Literal["none", "crf"] = "none"
    """Post-processing of the scores: none, or a fully connected CRF."""
    crf: CrfParams = dataclasses.field(default_factory=CrfParams)
    """Parameters of --post=crf."""

    def __post_init__(self) -> None:
        """Raises UserError for a CRF that cannot work."""
        super().__post_init__()
        if self.post != "none":
            check_crf(self.crf, self.normalisation)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SemanticConfig(LabelConfig):
    """The flags of scripts that train on whole images or on crops."""

    augment: Literal["none", "mirror", "mirror_jitter32", "mirror_scale"] = "none"
    """mirror flips left and right at random. mirror_jitter32 also shifts by up to 32 pixels (FCN,
    Section 4.3: no gain). mirror_scale also resizes, for training from scratch."""
    crop: Sides | None = None
    """Height and width of training images; None takes whole images (all of one size)."""

    def whole_images(self, zoom: tuple[float, float] = (0.75, 1.5)) -> list[Transform]:
        """Returns transforms: resize (by a factor in ``zoom``), normalise, crop, flip, shift."""
        shift = [RandomTranslate(32)] if self.augment == "mirror_jitter32" else []
        usual = whole_images(self.normalisation, self.scale, self.augment, self.crop, zoom)
        return [*usual, *shift]


@dataclasses.dataclass(frozen=True)
class Semantic(Task):
    """A run whose network labels pixels: its outputs hold "logits" [B, H, W, classes].

    Attributes:
      loss_terms: the outputs to compare with the labels; the loss is their weighted sum.
      class_weights: (dataset) -> weights [C] of its classes, or None for equal weights.
      forward: how to apply the network to images; None makes one pass over each.
      test_time: `forward` in words, for the protocol card.
      crf: refines the scores; None does not. Default: the CRF of ``--post=crf``, if it is set.
      measures: functions that add metrics and pictures to the last evaluation.
      absent: whether classes without pixels count in the mean.
      boundary_match: how the last evaluation matches boundary pixels.
      notes: further lines of the protocol card.
    """

    config: LabelConfig
    _: dataclasses.KW_ONLY
    loss_terms: Sequence[LossTerm] = (LossTerm(),)
    class_weights: Callable[[Dataset], np.ndarray | None] = lambda dataset: None
    forward: PredictFn | None = None
    test_time: str = ONE_PASS
    crf: CrfParams | Literal["config"] | None = "config"
    measures: Sequence[Measure] = ()
    absent: labels.Absent = "skip"
    boundary_match: labels.BoundaryMatch = "distance"
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    headline: ClassVar[str] = "mean_iou"
    reads: ClassVar[Sequence[str]] = ("labels", "probabilities")
    meanings: ClassVar[Mapping[str, str]] = {"labels": "indices into the list of classes"}

    def __post_init__(self) -> None:
        """Raises UserError for impossible CRF parameters."""
        if self.crf == "config":
            crf = self.config.crf if self.config.post == "crf" else None
            object.__setattr__(self, "crf", crf)
        if isinstance(self.crf, CrfParams):
            check_crf(self.crf, self.config.normalisation)

    def loss(self, dataset: Dataset) -> LossFn:
        """Returns the weighted cross-entropy of each of the loss terms."""
        weights = self.class_weights(dataset)
        num_classes = dataset.classes.num_classes
        refuse(
            num_classes == 1,
            f"dataset {dataset.name!r} has one class, {dataset.classes.names[0]}, and a softmax "
            "over one class learns nothing: add a class for the rest, such as background",
        )
        loss_norm, terms = self.config.loss_norm, self.loss_terms
        return pixel_loss(loss_norm, terms, weights, num_classes=num_classes)

    def predict(
        self, variables: Any, images: jax.Array, sizes: jax.Array, *inputs: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns "logits" [B, H, W, classes] and, with a CRF, the logits "before_crf"."""
        forward = self.forward or whole_image(self.model, self.config.scale)
        if isinstance(self.crf, CrfParams):
            forward = with_crf(forward, self.crf, self.config.normalisation)
        return forward(variables, images, sizes)

    def padded_side(self, side: int) -> int:
        """Returns the side to which the network pads whole images; other predictions tell none."""
        is_plain = self.forward is None and self.config.scale == 1
        return padded_side(self.model, side) if is_plain else side

    def answers(self, outputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns "labels", uint8 [B, H, W], "probabilities" and "logits" [B, H, W, classes]."""
        logits = outputs["logits"].astype(jnp.float32)
        labels = jnp.argmax(logits, axis=-1).astype(jnp.uint8)
        return {"labels": labels, "probabilities": jax.nn.softmax(logits), "logits": logits}

    def read(
        self, answers: Mapping[str, np.ndarray], image: np.ndarray, classes: ClassTable
    ) -> Labels:
        """Returns the labels of an image and their probabilities."""
        height, width = image.shape[:2]
        labels, soft = (answers[name][:height, :width] for name in self.reads)
        return Labels(image, labels, soft, classes)

    @property
    def card(self) -> dict[str, Any]:
        """How the network is used, for the protocol card."""
        crf = dataclasses.asdict(self.crf) if isinstance(self.crf, CrfParams) else "none"
        usage = {"seen_at_scale": self.config.scale, "test_time_options": self.test_time}
        return {**usage, "crf": crf, **self.notes}

    def evaluator(self, dataset: Dataset, split: str) -> Evaluate:
        """Returns a function that scores a split; its last call adds boundaries and measures."""
        counter = labels.LabelCounter(self, dataset.split(split), dataset.classes)

        def evaluate(variables: Any, is_last: bool) -> Record:
            counts = counter(variables, self.boundary_match if is_last else "none")
            findings = [labels.findings(counts, dataset, split, self.absent)]
            for measure in self.measures if is_last else ():
                findings.append(measure(self, variables, dataset, split))
            return labels.record(
                counts, findings, dataset, split, self.headline, self.card, self.absent
            )

        return evaluate


def pixel_loss(
    norm: pixels.LossNorm,
    terms: Sequence[LossTerm] = (LossTerm(),),
    class_weights: np.ndarray | None = None,
    num_classes: int | None = None,
) -> LossFn:
    """Returns the softmax losses of a network that takes images; see `pixels.cross_entropy`.

    With ``num_classes``, the loss raises UserError for a network with other channels.
    """

    def loss_fn(apply: Callable[..., Any], batch: Batch, rng: jax.Array) -> Losses:
        del rng
        outputs = apply(batch["images"])
        for term in terms:
            labels.check_channels(outputs[term.output], num_classes, f'output "{term.output}"')
        return pixels.cross_entropy(
            outputs, batch, norm=norm, terms=terms, class_weights=class_weights
        )

    return loss_fn


def check_sides(check: Callable[[int], None], sides: Sequence[int], flag: str) -> None:
    """Checks that training images fit the network.

    Args:
      check: raises ValueError for a height or width, in pixels, that does not fit.
      sides: heights and widths.
      flag: the flag that sets them, for the message.

    Raises:
      UserError: a side does not fit; the message names the flag and sides that fit.
    """
    for side in sides:
        try:
            check(side)
        except ValueError as error:
            raise UserError(f"{flag}: {error}") from error


def whole_images_fit(check: Callable[[int], None], scale: float) -> Callable[[Source], Source]:
    """Returns a ``training_split`` that raises UserError if whole images do not fit the network."""

    def checked(source: Source) -> Source:
        height, width = source.size(0)
        sides = [max(1, round(side * scale)) for side in (height, width)]
        check_sides(check, sides, f"images of {height}x{width} are seen whole")
        return source

    return checked


def labelling(task: Task, flag: str) -> Semantic:
    """Returns the task if it labels pixels.

    Raises:
      UserError: it is another task, for which the flag has no meaning.
    """
    if not isinstance(task, Semantic):
        raise UserError(
            f"{flag} is for runs that label pixels, and this one does not: leave it out"
        )
    return task


def with_rules(task: Task, absent: labels.Absent, boundary_match: labels.BoundaryMatch) -> Task:
    """Returns the task with these rules of scoring.

    Raises:
      UserError: the rules are not the default, and the task does not label pixels.
    """
    if (absent, boundary_match) == ("skip", "distance"):
        return task
    return dataclasses.replace(
        labelling(task, "--absent and --bf-match"), absent=absent, boundary_match=boundary_match
    )


def together(tasks: Sequence[Semantic], names: Sequence[str], combine: Combine) -> Semantic:
    """Returns an ensemble as one task; its variables are a tuple with those of each member.

    Each member predicts as its script says, with its own CRF if it has one. A CRF of the ensemble
    refines the combined scores (DeconvNet, arXiv:1505.04366, Section 5.2).

    Raises:
      UserError: the members have different normalisations, or product_score has not two members.
    """
    first = tasks[0]
    for task, name in zip(tasks[1:], names[1:], strict=True):
        if task.config.normalisation != first.config.normalisation:
            raise UserError(
                f"--ensemble: {name} has --normalisation={task.config.normalisation}, {names[0]} "
                f"has --normalisation={first.config.normalisation}: give runs with the same one"
            )
    if combine == "product_score" and len(tasks) != 2:
        raise UserError("--combine=product_score joins two runs: give one --ensemble folder")

    def forward(
        variables: tuple[Any, ...], images: jax.Array, sizes: jax.Array
    ) -> dict[str, jax.Array]:
        pairs = zip(tasks, variables, strict=True)
        logits = [task.predict(own, images, sizes)["logits"] for task, own in pairs]
        if combine == "product_score":
            return {"logits": ensemble.product_scores(*logits)}
        return {"logits": ensemble.mean_probabilities(logits)}

    notes: dict[str, Any] = {"ensemble": f"{combine} of {' and '.join(names)}"}
    if any(task.crf for task in tasks):
        notes["crf_of_each_member"] = "; ".join(str(task.card["crf"]) for task in tasks)
    return dataclasses.replace(
        first,
        forward=forward,
        test_time=f"of each member: {'; '.join(task.test_time for task in tasks)}",
        crf=None,
        measures=(),
        notes=notes,
    )


def median_frequency(dataset: Dataset, definition: pixels.ClassFrequency = "eigen") -> np.ndarray:
    """Median-frequency weights [C] of the training split; cached on disk after the first count."""
    source = dataset.split("train")
    path = prepared.cache_dir() / "class_weights" / f"{dataset.fingerprint}-{definition}.json"
    # If the file is missing or damaged, count again.
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        weights = np.array(runs.parse_json(path.read_text())["weights"], np.float32)
        if weights.shape == (dataset.classes.num_classes,):
            return weights
    maps = (source[i]["label"] for i in range(len(source)))
    num_classes = dataset.classes.num_classes
    weights = pixels.median_frequency_weights(maps, num_classes, definition=definition)
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.write_json(path, {"weights": weights.tolist()})
    return weights
