"""What a semantic segmentation run is: its loss, its scores, its pictures and its report."""

import contextlib
import dataclasses
import functools
import heapq
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from flax import linen as nn
from PIL import Image

from dense_jax import losses, report, runs, viz
from dense_jax.data import dataset as datasets
from dense_jax.data import pipeline, prepared
from dense_jax.data.classes import ClassTable
from dense_jax.data.dataset import Dataset, Example, Source
from dense_jax.data.transforms import Normalise, Transform
from dense_jax.errors import UserError
from dense_jax.infer import ensemble
from dense_jax.metrics import boundary
from dense_jax.metrics import semantic as metrics
from dense_jax.ops.resize import resize_bilinear
from dense_jax.train.checkpoint import read_variables
from dense_jax.train.config import RunConfig
from dense_jax.train.loop import fit
from dense_jax.train.schedules import ParamGroup, build_optimizer
from dense_jax.train.state import TrainState, load_matching, num_parameters
from dense_jax.train.step import Batch, LossFn, eval_step, replicate, shard, train_step

Variables = dict[str, Any]
# (variables, images [B, H, W, C], sizes [B, 2]) -> logits [B, H, W, classes], compiled. Images
# are normalised; sizes are their heights and widths in front of padding. Variables are those of the
# network, or a tuple of those of several.
PredictFn = Callable[[Any, jax.Array, jax.Array], jax.Array]
# (variables, split) -> further scores by name.
ExtraScores = Callable[[Variables, Source], dict[str, float]]
BoundaryMatch = Literal["none", "distance", "assignment"]
Combine = Literal["mean_prob", "product_score"]

_NUM_WARNINGS = 5  # lines of the label doctor shown before training
ONE_PASS = "none: one pass, no flips, no scales, no CRF"

_NUM_PICTURES = 4  # best and worst images shown in a report, each


def load_dataset(config: RunConfig) -> Dataset:
    """Opens the dataset of a configuration, looking for broken files and labels first.

    Raises:
      UserError: files or labels are wrong; names the first of them and what to do.
    """
    options = dataclasses.asdict(config.shapes) if config.dataset == "shapes" else {}
    dataset = datasets.load(config.dataset, config.data_dir, **options)
    for line in dataset.warnings[:_NUM_WARNINGS]:
        print(f"check-data: {line}")
    if (more := len(dataset.warnings) - _NUM_WARNINGS) > 0:
        print(f"check-data: and {more} more; python -m dense_jax check-data lists them")
    return dataset


def class_weights(dataset: Dataset, definition: losses.ClassFrequency = "eigen") -> np.ndarray:
    """Median-frequency weights [C] of the training split; counted once and kept on disk."""
    source = dataset.split("train")
    kept = prepared.cache_dir() / "class_weights" / f"{dataset.fingerprint}-{definition}.json"
    with contextlib.suppress(OSError, ValueError):  # not there, or damaged: counted again
        weights = np.array(json.loads(kept.read_text()), np.float32)
        if weights.shape == (dataset.classes.num_classes,):
            return weights
    labels = (source[i]["label"] for i in range(len(source)))
    num_classes = dataset.classes.num_classes
    weights = losses.median_frequency_weights(labels, num_classes, definition=definition)
    kept.parent.mkdir(parents=True, exist_ok=True)
    runs.write_json(kept, weights.tolist())
    return weights


def cross_entropy_loss(
    model: nn.Module, config: RunConfig, class_weights: np.ndarray | None = None
) -> tuple[LossFn, Callable[[Batch], jax.Array]]:
    """The per-pixel softmax loss of a network's "logits", and what it is divided by."""
    weights = None if class_weights is None else np.asarray(class_weights, np.float32)

    def loss_fn(
        params: Any,
        model_state: dict[str, Any],
        batch: Batch,
        denominator: jax.Array,
        rng: jax.Array,
    ) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]:
        outputs: Any
        outputs, new_state = model.apply(
            {"params": params, **model_state},
            batch["images"],
            train=True,
            rngs={"dropout": rng},
            mutable=list(model_state),
        )
        logits, labels = outputs["logits"], batch["labels"]
        pixel_loss = losses.softmax_cross_entropy(
            logits,
            labels,
            class_weights=None if weights is None else jnp.asarray(weights),
            pixel_weights=batch.get("weights"),
        )
        loss = jnp.sum(pixel_loss) / losses.resolve_denominator(denominator, config.loss_norm)
        return loss, (new_state, {})

    def denominator_fn(batch: Batch) -> jax.Array:
        return losses.loss_denominator(
            batch["labels"],
            batch["valid"],
            config.loss_norm,
            class_weights=None if weights is None else jnp.asarray(weights),
            pixel_weights=batch.get("weights"),
        )

    return loss_fn, denominator_fn


def whole_image(
    model: nn.Module,
    scale: float = 1.0,
    rngs: dict[str, jax.Array] | None = None,
    *,
    sized: bool = False,
) -> PredictFn:
    """One pass over the images, which the network sees at ``scale``.

    A network trained on images of half size predicts on images of half size; its logits are then
    enlarged bilinearly, so that labels are never resized. ``rngs`` are for networks that draw,
    and ``sized`` ones are told which part of an image is not padding.
    """

    def predict(variables: Variables, images: jax.Array, sizes: jax.Array) -> jax.Array:
        # Padding is labelled too, and cut off afterwards.
        extra: Any = {"sizes": sizes.astype(jnp.float32) * scale} if sized else {}
        size = (images.shape[1], images.shape[2])
        if scale != 1.0:
            small = [max(1, round(side * scale)) for side in size]
            images = jax.image.resize(images, (len(images), *small, images.shape[3]), "linear")
        outputs: Any = model.apply(variables, images, train=False, rngs=rngs, **extra)
        logits = outputs["logits"]
        return logits if scale == 1.0 else resize_bilinear(logits, size, align_corners=False)

    return predict


def predict_of(run: runs.Run) -> tuple[PredictFn, dict[str, Any]]:
    """How a run predicts, and its lines on the protocol card.

    A script that does more than one pass over whole images defines ``build_predict(config, model)``
    and ``test_time(config)``, which says in words what that is.
    """
    card = {"seen_at_scale": run.config.scale, "test_time_options": ONE_PASS}
    if not hasattr(run.script, "build_predict"):
        return whole_image(run.model, run.config.scale), card
    card["test_time_options"] = run.script.test_time(run.config)
    return run.script.build_predict(run.config, run.model), card


def ensemble_of(members: Sequence[runs.Run], combine: Combine) -> tuple[PredictFn, dict[str, Any]]:
    """How several runs predict together, given the variables of each, and the protocol card.

    Raises:
      UserError: they do not see images in one normalisation, or do not label the same classes.
    """
    first = members[0]
    for other in members[1:]:
        if other.classes.names != first.classes.names:
            raise UserError(f"--ensemble: {other.workdir} and {first.workdir} label other classes")
        if other.config.normalisation != first.config.normalisation:
            raise UserError(
                f"--ensemble: {other.workdir} takes images as {other.config.normalisation}, "
                f"{first.workdir} as {first.config.normalisation}: train them with one "
                "--normalisation"
            )
    if combine == "product_score" and len(members) != 2:
        raise UserError("--combine=product_score joins two runs: give one --ensemble folder")
    ways = [predict_of(member) for member in members]

    def predict(variables: tuple[Variables, ...], images: jax.Array, sizes: jax.Array) -> jax.Array:
        logits = [way(v, images, sizes) for (way, _), v in zip(ways, variables, strict=True)]
        if combine == "product_score":
            return ensemble.product_scores(*logits)
        return ensemble.mean_probabilities(logits)

    names = " and ".join(str(member.workdir) for member in members)
    each = "; ".join(str(card["test_time_options"]) for _, card in ways)
    card = {"ensemble": f"{combine} of {names}", "test_time_options": f"of each member: {each}"}
    return predict, card


def extra_scores_of(run: runs.Run, predict: PredictFn, source: Source) -> dict[str, float]:
    """The scores that only the run's script knows: its ``extra_scores``, where it has one."""
    if not hasattr(run.script, "extra_scores"):
        return {}
    return run.script.extra_scores(run.config, predict, run.variables, source)


def predict_split(
    predict: PredictFn, variables: Variables, source: Source, config: RunConfig
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the index and the logits [H, W, C] of every image of a split, in no given order."""
    batches = _eval_batches(source, config.eval_batch_size, config.normalisation)

    def logits(variables: Variables, batch: Batch) -> tuple[Any, Any]:
        return {}, predict(variables, batch["images"], batch["size"])

    step, variables = eval_step(logits), replicate(variables)
    for batch in batches:
        arrays = {k: batch[k] for k in ("images", "size")}
        values = np.asarray(step(variables, shard(arrays))[1])
        values = values.reshape(-1, *values.shape[2:])
        for i, index in enumerate(batch["index"]):
            if index >= 0:
                height, width = batch["size"][i]
                yield int(index), values[i, :height, :width]


def _eval_batches(source: Source, batch_size: int, normalisation: str) -> pipeline.EvalBatches:
    devices = jax.local_device_count()
    # Whole rows of devices; the rest of the last batch is padding.
    size = -(-batch_size // devices) * devices
    return pipeline.eval_batches(source, [Normalise(normalisation)], size)


@dataclasses.dataclass
class Evaluation:
    """Counts and pictures of one pass over a split."""

    confusion: np.ndarray
    loss: float
    num_images: int
    shapes: set[tuple[int, int]]
    best: list[tuple[float, int, np.ndarray]]
    worst: list[tuple[float, int, np.ndarray]]
    boundary_f1: float | None = None


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
        self._batches = _eval_batches(source, batch_size, normalisation)

        def counts(variables: Variables, batch: Batch) -> tuple[Any, Any]:
            logits = predict(variables, batch["images"], batch["size"])
            predictions = jnp.argmax(logits, axis=-1).astype(jnp.uint8)
            confusion = jax.vmap(
                functools.partial(metrics.confusion_counts, num_classes=classes.num_classes)
            )(batch["labels"], predictions)
            loss = jnp.sum(losses.softmax_cross_entropy(logits, batch["labels"]))
            sums = {
                "confusion": jnp.sum(confusion, axis=0),
                "loss": loss,
                "num_images": jnp.sum(batch["valid"], dtype=jnp.int32),
            }
            return sums, {"confusion": confusion, "predictions": predictions}

        self._step = eval_step(counts)

    def __call__(self, variables: Any, boundary_match: BoundaryMatch = "none") -> Evaluation:
        """Evaluates ``variables``; boundary F1 is computed on the host and takes longer."""
        confusion, loss, num_images = None, 0.0, 0
        shapes: set[tuple[int, int]] = set()
        best, worst, boundaries = Top(), Top(), []
        variables = replicate(variables)  # once, and not with every batch
        for batch in self._batches:
            arrays = {k: batch[k] for k in ("images", "labels", "valid", "size")}
            sums, per_image = jax.device_get(self._step(variables, shard(arrays)))
            confusion = metrics.add(confusion, sums["confusion"])
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


def train_and_evaluate(
    config: RunConfig,
    model: nn.Module,
    dataset: Dataset,
    transforms: Sequence[Transform],
    *,
    groups: Sequence[ParamGroup] = (),
    class_weights: np.ndarray | None = None,
    predict: PredictFn | None = None,
    test_time: str = ONE_PASS,
    posthoc_batch_stats: bool = False,
    extra_scores: ExtraScores | None = None,
) -> TrainState:
    """Trains ``model`` and leaves a run folder with scores, pictures and a report.

    Args:
      config: the run; see ``RunConfig``.
      model: network whose outputs hold "logits".
      dataset: its "train" split is trained on, its "val" split evaluated.
      transforms: training transforms; they end in normalised images of one size.
      groups: learning rates of parts of the network; see ``build_optimizer``.
      class_weights: [C] weights of the loss, or None.
      predict: how the network is used for evaluation; by default `whole_image`.
      test_time: what that is, for the protocol card.
      posthoc_batch_stats: evaluate with batch statistics averaged over the training split.
      extra_scores: computes further scores of the last evaluation.

    Returns:
      The final state.
    """
    if config.batch_size % (jax.device_count() * config.accumulate):
        raise UserError(
            f"--batch-size={config.batch_size} cannot be shared by {jax.device_count()} devices "
            f"in {config.accumulate} micro-batches: make it a multiple of their product"
        )
    train, val = dataset.split("train"), dataset.split("val")
    workdir = runs.prepare(config, dataset)
    batches = pipeline.train_batches(
        train,
        transforms,
        config.batch_size // jax.process_count(),
        config.seed,
        num_threads=config.num_threads,
        num_workers=config.num_workers,
    )
    image_shape = batches.example["images"].shape[1:]
    tx = build_optimizer(config, groups)
    state = TrainState.init(model, tx, image_shape, seed=config.seed, ema=config.ema_decay > 0)
    if config.init:
        state = initialise_from(config.init, state, tx)
    print(f"{type(model).__name__}: {num_parameters(state.params):,} parameters; run in {workdir}")
    loss_fn, denominator_fn = cross_entropy_loss(model, config, class_weights)
    step = train_step(loss_fn, denominator_fn, ema_decay=config.ema_decay)
    evaluator = Evaluator(
        predict or whole_image(model, config.scale),
        val,
        dataset.classes,
        batch_size=config.eval_batch_size,
        normalisation=config.normalisation,
    )
    card: dict[str, Any] = {
        "input_shape": list(image_shape),  # of training
        "seen_at_scale": config.scale,
        "test_time_options": test_time,
    }

    def evaluate(state: TrainState, step: int) -> dict[str, float]:
        last, variables = step == config.num_steps, state.eval_variables()
        evaluation = evaluator(variables, "distance" if last else "none")
        extra = extra_scores(variables, val) if extra_scores and last else {}
        return write_evaluation(workdir, evaluation, dataset, "val", step, card, extra)

    refresh = None
    if posthoc_batch_stats:
        card["batch_statistics"] = "averaged over the training split after training"
        refresh = posthoc_statistics(model, train, transforms, config)
    state = fit(state, step, batches, config, evaluate, refresh)
    print(f"report: {report.write_report(workdir)}")
    return state


def posthoc_statistics(
    model: nn.Module, source: Source, transforms: Sequence[Transform], config: RunConfig
) -> Callable[[TrainState], TrainState]:
    """Returns what replaces the batch statistics of a state by their average over ``source``.

    One pass in training mode, each batch's own mean and variance, all batches weighing the same
    (SegNet, Badrinarayanan et al., PAMI 2017, arXiv:1511.00561: the authors' release keeps no
    running averages). Training itself does not look at the result. The network has an attribute
    ``bn_momentum``.
    """
    own = model.clone(bn_momentum=0.0)  # the new statistics are then those of the batch

    def statistics(variables: Variables, batch: Batch) -> tuple[Any, Any]:
        _, new = own.apply(
            variables,
            batch["images"],
            train=True,
            rngs={"dropout": jax.random.key(0)},
            mutable=["batch_stats"],
        )
        return jax.tree.map(lambda x: x / jax.device_count(), new["batch_stats"]), {}

    step = eval_step(statistics)

    def refresh(state: TrainState) -> TrainState:
        size = config.batch_size // config.accumulate
        num_batches = max(1, len(source) // size)
        batches = pipeline.train_batches(
            source,
            transforms,
            size // jax.process_count(),
            config.seed,
            num_threads=config.num_threads,
            num_workers=config.num_workers,
        )
        total = None
        with contextlib.closing(batches):
            for batch, _ in zip(batches, range(num_batches), strict=False):
                arrays = {"images": batch["images"]}
                sums, _ = jax.device_get(step(state.eval_variables(), shard(arrays)))
                sums = jax.tree.map(lambda x: x.astype(np.float64), sums)
                total = sums if total is None else jax.tree.map(np.add, total, sums)
        mean = jax.tree.map(lambda x: (x / num_batches).astype(np.float32), total)
        return replicate(state.replace(model_state={**state.model_state, "batch_stats": mean}))

    return refresh


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


def initialise_from(source: str, state: TrainState, tx: Any) -> TrainState:
    """Copies the parameters of equal name and shape from ``run:PATH``."""
    kind, _, path = source.partition(":")
    if kind != "run" or not path:
        raise UserError(f"--init={source}: give run:PATH with the folder of another run")
    variables, step = read_variables(path)
    print(f"init: {path} at step {step}")
    params = load_matching(dict(state.params), variables["params"])
    ema = None if state.ema_params is None else jax.tree.map(jnp.copy, params)
    return state.replace(params=params, ema_params=ema, opt_state=tx.init(params))
