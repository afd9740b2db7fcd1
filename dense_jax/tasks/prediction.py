"""How a network is used on images: one pass, what a run's script says, or several runs as one."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dense_jax import runs
from dense_jax.data import pipeline
from dense_jax.data.dataset import Source
from dense_jax.data.normalise import Normalise
from dense_jax.errors import UserError
from dense_jax.infer import ensemble
from dense_jax.infer.crf import WithCrf, with_crf, without_crf
from dense_jax.ops.crf import CrfParams
from dense_jax.ops.resize import rescaled, resize_bilinear
from dense_jax.train.config import RunConfig
from dense_jax.train.step import Batch, eval_step, replicate, shard

Variables = dict[str, Any]
# (variables, images [B, H, W, C], sizes [B, 2]) -> logits [B, H, W, classes], compiled. Images
# are normalised; sizes are their heights and widths in front of padding. Variables are those of the
# network, or a tuple of those of several.
PredictFn = Callable[[Any, jax.Array, jax.Array], jax.Array]
Combine = Literal["mean_prob", "product_score"]
# As the run's script does, none, or this one instead of the script's.
CrfChoice = Literal["run", "none"] | CrfParams

ONE_PASS = "none: one pass, no flips, no scales"


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
            small = [max(1, rescaled(side, scale)) for side in size]
            images = jax.image.resize(images, (images.shape[0], *small, images.shape[3]), "linear")
        outputs: Any = model.apply(variables, images, train=False, rngs=rngs, **extra)
        logits = outputs["logits"]
        return logits if scale == 1.0 else resize_bilinear(logits, size, align_corners=False)

    return predict


def predict_of(run: runs.Run, crf: CrfChoice = "run") -> tuple[PredictFn, dict[str, Any]]:
    """How a run predicts, and its lines on the protocol card.

    A script that does more than one pass over whole images defines ``build_predict(config, model)``
    and ``test_time(config)``, which says in words what that is but for a CRF.
    """
    predict, words = whole_image(run.model, run.config.scale), ONE_PASS
    if hasattr(run.script, "build_predict"):
        predict = run.script.build_predict(run.config, run.model)
        words = run.script.test_time(run.config)
    predict = _choose(predict, crf, run.config.normalisation)
    return predict, {
        "seen_at_scale": run.config.scale,
        "test_time_options": words,
        "crf": crf_card(predict),
    }


def crf_card(predict: PredictFn) -> dict[str, Any] | str:
    """The parameters of the CRF that a prediction ends in, for the protocol card."""
    return dataclasses.asdict(predict.params) if isinstance(predict, WithCrf) else "none"


def _choose(predict: PredictFn, crf: CrfChoice, normalisation: str) -> PredictFn:
    if isinstance(crf, CrfParams):
        return with_crf(predict, crf, normalisation)
    return without_crf(predict) if crf == "none" else predict


def ensemble_of(
    members: Sequence[runs.Run], combine: Combine, crf: CrfChoice = "run"
) -> tuple[PredictFn, dict[str, Any]]:
    """How several runs predict together, given the variables of each, and the protocol card.

    With "run" each member predicts as its script does; a CRF that is given instead refines what
    they decide together (DeconvNet, arXiv:1505.04366, Section 5.2).

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
    ways = [predict_of(member, "run" if crf == "run" else "none") for member in members]

    def together(
        variables: tuple[Variables, ...], images: jax.Array, sizes: jax.Array
    ) -> jax.Array:
        logits = [way(v, images, sizes) for (way, _), v in zip(ways, variables, strict=True)]
        if combine == "product_score":
            return ensemble.product_scores(*logits)
        return ensemble.mean_probabilities(logits)

    predict = _choose(together, crf, first.config.normalisation)
    names = " and ".join(str(member.workdir) for member in members)
    each = "; ".join(str(card["test_time_options"]) for _, card in ways)
    card = {
        "ensemble": f"{combine} of {names}",
        "test_time_options": f"of each member: {each}",
        "crf": crf_card(predict),
    }
    if any(isinstance(way, WithCrf) for way, _ in ways):
        card["crf_of_each_member"] = "; ".join(str(card["crf"]) for _, card in ways)
    return predict, card


def predict_split(
    predict: PredictFn, variables: Variables, source: Source, config: RunConfig
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the index and the logits [H, W, C] of every image of a split, in no given order."""
    batches = eval_batches(source, config.eval_batch_size, config.normalisation)

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


def eval_batches(source: Source, batch_size: int, normalisation: str) -> pipeline.EvalBatches:
    """Normalised batches that hold every image of a split once, for all devices."""
    devices = jax.local_device_count()
    # Whole rows of devices; the rest of the last batch is padding.
    size = -(-batch_size // devices) * devices
    return pipeline.eval_batches(source, [Normalise(normalisation)], size)
