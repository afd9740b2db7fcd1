"""What a semantic segmentation run is: its data, its loss, its training and its report."""

import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dense_jax import losses, report, runs, start
from dense_jax.data import dataset as datasets
from dense_jax.data import pipeline, prepared
from dense_jax.data.dataset import Dataset, Source
from dense_jax.data.transforms import Transform
from dense_jax.errors import UserError
from dense_jax.losses import LossTerm
from dense_jax.tasks.evaluation import Evaluator, ExtraScores, write_evaluation
from dense_jax.tasks.prediction import ONE_PASS, PredictFn, Variables, crf_card, whole_image
from dense_jax.train import cli
from dense_jax.train.checkpoint import has_checkpoint
from dense_jax.train.config import RunConfig
from dense_jax.train.loop import fit
from dense_jax.train.schedules import ParamGroup, build_optimizer
from dense_jax.train.state import TrainState, load_matching, num_parameters
from dense_jax.train.step import Batch, LossFn, eval_step, replicate, shard, train_step

ConfigT = TypeVar("ConfigT", bound=RunConfig)

_STATISTICS_BATCHES = 500  # as DeconvNet's release takes
_NUM_WARNINGS = 5  # lines of the label doctor shown before training


def run(
    main: Callable[[ConfigT], object],
    presets: Mapping[str, ConfigT],
    doc: str | None,
    stages: Callable[[ConfigT], Iterator[ConfigT]] | None = None,
) -> None:
    """Runs a script from the command line: `cli.run`, with images as weights of --init expect them.

    Args:
      main: see `cli.run`, as the next two.
      presets: configurations by name.
      doc: the script's docstring.
      stages: what a configuration trains one after another, where that may be several runs.
    """

    def follow_weights(config: ConfigT) -> ConfigT:
        if not config.init or cli.is_given("--normalisation"):
            return config
        first = next(stages(config)) if stages else config
        return _follow_weights(config, pathlib.Path(first.workdir or ""))

    cli.run(main, presets, doc, adapt=follow_weights)


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


def dataset_of(run: runs.Run, data_dir: str | None = None) -> Dataset:
    """Opens the dataset of a run; ``data_dir`` is where it lies now, if it has moved.

    Raises:
      UserError: it cannot be opened, or has other classes than the run labels.
    """
    config = run.config if data_dir is None else dataclasses.replace(run.config, data_dir=data_dir)
    dataset = load_dataset(config)
    if dataset.classes.names != run.classes.names:
        raise UserError(
            f"{run.workdir} labels {', '.join(run.classes.names)} but the dataset has "
            f"{', '.join(dataset.classes.names)}: give the --data-dir of the same classes"
        )
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
    model: nn.Module,
    config: RunConfig,
    class_weights: np.ndarray | None = None,
    terms: Sequence[LossTerm] = (LossTerm(),),
) -> tuple[LossFn, Callable[[Batch], jax.Array]]:
    """The per-pixel softmax losses of a network's outputs, and what each is divided by [terms]."""
    weights = None if class_weights is None else np.asarray(class_weights, np.float32)

    def pixels_of(batch: Batch, term: LossTerm, size: tuple[int, int]) -> dict[str, jax.Array]:
        """Labels, and weights where there are any, of the pixels that are scored."""
        maps = {name: batch[name] for name in ("labels", "weights") if name in batch}
        return {
            name: losses.labels_at(values, size, align_corners=term.align_corners)
            for name, values in maps.items()
        }

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
        total = jnp.float32(0.0)
        for term, divisor in zip(terms, denominator, strict=True):
            logits = outputs[term.output]
            pixels = pixels_of(batch, term, logits.shape[1:3])
            pixel_loss = losses.softmax_cross_entropy(
                logits,
                pixels["labels"],
                class_weights=None if weights is None else jnp.asarray(weights),
                pixel_weights=pixels.get("weights"),
            )
            divisor = losses.resolve_denominator(divisor, config.loss_norm)
            total += term.weight * jnp.sum(pixel_loss) / divisor
        return total, (new_state, {})

    def denominator_fn(batch: Batch) -> jax.Array:
        sizes = {"logits": batch["labels"].shape[-2:]}
        if any(term.output not in sizes for term in terms):
            sizes |= _output_sizes(model, batch["images"])
        divisors = []
        for term in terms:
            pixels = pixels_of(batch, term, sizes[term.output])
            divisors.append(
                losses.loss_denominator(
                    pixels["labels"],
                    batch["valid"],
                    config.loss_norm,
                    class_weights=None if weights is None else jnp.asarray(weights),
                    pixel_weights=pixels.get("weights"),
                )
            )
        return jnp.stack(divisors)

    return loss_fn, denominator_fn


def _output_sizes(model: nn.Module, images: jax.Array) -> dict[str, tuple[int, int]]:
    """Height and width of each output for images [..., B, H, W, C]; nothing is computed."""
    one_batch = jax.ShapeDtypeStruct(images.shape[-4:], images.dtype)
    init = functools.partial(model.init_with_output, train=False)
    outputs: Any
    outputs, _ = jax.eval_shape(init, jax.random.key(0), one_batch)
    return {name: output.shape[1:3] for name, output in outputs.items() if output.ndim == 4}


def begin(
    config: RunConfig,
    model: nn.Module,
    dataset: Dataset,
    transforms: Sequence[Transform],
    groups: Sequence[ParamGroup],
) -> tuple[pathlib.Path, pipeline.TrainBatches, TrainState]:
    """Makes the run folder, the training batches and the state to start from.

    Raises:
      UserError: the batch cannot be shared by the devices, or the folder is another run's.
    """
    if config.batch_size % (jax.device_count() * config.accumulate):
        raise UserError(
            f"--batch-size={config.batch_size} cannot be shared by {jax.device_count()} devices "
            f"in {config.accumulate} micro-batches: make it a multiple of their product"
        )
    source = dataset.split("train")
    dataset.split("val")  # asked for now, and not after hours of training
    batches = pipeline.train_batches(
        source,
        transforms,
        config.batch_size // jax.process_count(),
        config.seed,
        num_threads=config.num_threads,
        num_workers=config.num_workers,
    )
    tx, shape = build_optimizer(config, groups), batches.example["images"].shape[1:]
    state = TrainState.init(model, tx, shape, seed=config.seed, ema=config.ema_decay > 0)
    if config.init and not has_checkpoint(pathlib.Path(config.workdir or "")):
        state = _initialise_from(config.init, state, tx, config.normalisation)
    workdir = runs.prepare(config, dataset)  # now that nothing else can be wrong
    print(f"{type(model).__name__}: {num_parameters(state.params):,} parameters; run in {workdir}")
    return workdir, batches, state


def train_and_evaluate(
    config: RunConfig,
    model: nn.Module,
    dataset: Dataset,
    transforms: Sequence[Transform],
    *,
    groups: Sequence[ParamGroup] = (),
    class_weights: np.ndarray | None = None,
    loss_terms: Sequence[LossTerm] = (LossTerm(),),
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
      loss_terms: which outputs are compared with the labels; their weighted losses are added up.
      predict: how the network is used for evaluation; by default `whole_image`.
      test_time: what that is but for a CRF, for the protocol card.
      posthoc_batch_stats: evaluate with batch statistics averaged over the training split.
      extra_scores: computes further scores of the last evaluation.

    Returns:
      The final state.
    """
    train, val = dataset.split("train"), dataset.split("val")
    workdir, batches, state = begin(config, model, dataset, transforms, groups)
    image_shape = batches.example["images"].shape[1:]
    loss_fn, denominator_fn = cross_entropy_loss(model, config, class_weights, loss_terms)
    step = train_step(loss_fn, denominator_fn, ema_decay=config.ema_decay)
    predict = predict or whole_image(model, config.scale)
    evaluator = Evaluator(
        predict,
        val,
        dataset.classes,
        batch_size=config.eval_batch_size,
        normalisation=config.normalisation,
    )
    card: dict[str, Any] = {
        "input_shape": list(image_shape),  # of training
        "seen_at_scale": config.scale,
        "test_time_options": test_time,
        "crf": crf_card(predict),
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

    One pass (of at most 500 batches) in training mode, each batch's own mean and variance, all
    batches weighing the same
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
        num_batches = min(max(1, len(source) // size), _STATISTICS_BATCHES)
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


def _follow_weights(config: ConfigT, workdir: pathlib.Path) -> ConfigT:
    """Lets images come as the weights of ``--init`` expect them, or as a run in `workdir` began."""
    if has_checkpoint(workdir):
        expected = runs.read_config(workdir)["config"].get("normalisation")
    else:
        expected = start.normalisation_of(config.init or "")
    if expected in (None, config.normalisation):
        return config
    with contextlib.suppress(UserError):  # flags of the script's own want it otherwise
        config = dataclasses.replace(config, normalisation=expected)
    if config.normalisation == expected:
        print(f"init: --normalisation={expected}, as these weights expect images")
    return config


def _initialise_from(source: str, state: TrainState, tx: Any, normalisation: str) -> TrainState:
    """Copies parameters and batch statistics of equal name and shape from ``--init``."""
    ours = {"params": dict(state.params), **state.model_state}
    theirs, expected = start.initial(source, ours)
    if expected not in (None, normalisation):
        print(
            f"init: warning: these weights expect --normalisation={expected}, and this run has "
            f"--normalisation={normalisation}"
        )
    variables = load_matching(ours, theirs)
    params = variables.pop("params")
    ema = None if state.ema_params is None else jax.tree.map(jnp.copy, params)
    return state.replace(
        params=params, model_state=variables, ema_params=ema, opt_state=tx.init(params)
    )
