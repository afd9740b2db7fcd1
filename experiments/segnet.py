"""SegNet and SegNet-Basic (Badrinarayanan, Kendall, Cipolla, PAMI 2017, arXiv:1511.00561).

    python -m experiments.segnet demo
    python -m experiments.segnet camvid --data-dir=/data/camvid --decoder=bilinear
    python -m experiments.segnet paper --data-dir=/data/camvid --class-balance=none
    python -m experiments.segnet bayesian --data-dir=/data/camvid --workdir=/runs/bayesian

Table 1 is one sweep over --decoder and --class-balance. Results: docs/results.md has every run
with its command, device and the paper's figure.

Differences: (1) Images are RGB, the release's BGR. (2) The learning rate multiplies the momentum
and not, as in Caffe, the gradient; equal at the constant rates used here. (3) Encoders start from
He's initialisation, the paper's full net from VGG-16's ImageNet weights; --init takes those.
(4) Table 2 trains on 3,433 road images of several collections, which are not distributed
together: give your own with --dataset=folder. (5) The best checkpoint is that of the highest mean
IoU, the paper's that of the highest pixel accuracy. (6) The FCN decoders start as interpolation;
fcn_nodimred may still need --learning-rate=0.01.
"""

import dataclasses
import pathlib
from typing import Literal

import jax
import numpy as np
from flax import linen as nn

from dense_jax import losses
from dense_jax.data.dataset import Dataset, Source
from dense_jax.data.transforms import Transform, whole_images
from dense_jax.errors import UserError
from dense_jax.infer.monte_carlo import MonteCarlo
from dense_jax.models.segnet import CAMVID_WEIGHTS, Decoder, SegNet, SegNetBasic
from dense_jax.tasks import prediction, semantic, uncertainty
from dense_jax.train.config import FROM_SCRATCH, SMOKE, RunConfig
from dense_jax.train.schedules import ParamGroup
from dense_jax.train.state import TrainState
from dense_jax.train.step import AXIS

_DEFINITIONS: dict[str, losses.ClassFrequency] = {
    "median_pixels": "pixels",
    "median_eigen": "eigen",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Flags of the paper's ablations, then the shared ones."""

    # The network.
    net: Literal["segnet", "basic"] = "basic"
    """SegNet on VGG-16's 13 layers (Figure 2) or the small SegNet-Basic (Section 3.1)."""
    decoder: Decoder = "indices"
    """Decoders of Table 1, in its order; all but indices are SegNet-Basic's."""
    decoder_relu: Literal["released", "off", "on"] = "released"
    """ReLUs in the decoder; released: on in SegNet, off in SegNet-Basic."""
    conv_bias: Literal["on", "off"] = "on"
    """Biases in front of batch normalisation: released with, described without (Section 3.2)."""
    bn_epsilon: float = 1e-9
    """Added to variances: 1e-9 as released; 1e-5 for an encoder of torchvision's vgg16_bn."""
    dropout: Literal["none", "enc_dec", "bayes"] = "none"
    """Dropout 0.5 after the coarse stages; bayes also samples it when predicting."""
    mc_samples: int = 40
    """Passes of --dropout=bayes; Bayesian SegNet (arXiv:1511.02680) found no gain beyond 40."""
    input_norm: Literal["none", "lrn", "meanstd"] = "meanstd"
    """none: pixels of 0-255 (released SegNet); lrn: these, normalised over channels (released
    SegNet-Basic); meanstd: what --normalisation says, which the others set to none."""
    width: float = 1.0
    """Channel multiplier; below 1 for trials."""

    # Training.
    class_balance: Literal["none", "median_pixels", "median_eigen", "published"] = "none"
    """Weights of the classes: median frequency of pixels (Section 3.1), of Eigen and Fergus, or
    the released numbers for CamVid; none is Table 1's natural frequency."""
    bn_stats: Literal["posthoc", "running"] = "posthoc"
    """Statistics for evaluation: of one pass over the training split (released), or running."""
    augment: Literal["none", "mirror_scale"] = "none"
    """The paper augments nothing; mirror_scale is for small networks and few steps."""
    crop: tuple[int, int] | None = None
    """Height and width of training images; None takes whole images (all of one size)."""

    def __post_init__(self) -> None:
        """Raises UserError for values that no network or batch can have."""
        super().__post_init__()
        if self.width <= 0:
            raise UserError(f"--width={self.width}: give a factor above 0")
        if self.mc_samples < 1:
            raise UserError(f"--mc-samples={self.mc_samples}: give at least 1")
        if self.crop and min(self.crop) < 1:
            raise UserError(f"--crop {self.crop[0]} {self.crop[1]}: give at least 1 1")
        if self.net == "segnet" and self.decoder != "indices":
            raise UserError(f"--decoder={self.decoder} is SegNet-Basic's: give --net=basic with it")
        normalisation = self.normalisation
        if self.input_norm == "meanstd":
            normalisation = "torchvision" if normalisation == "none" else normalisation
        elif normalisation not in ("none", RunConfig.normalisation):
            raise UserError(
                f"--input-norm={self.input_norm} takes pixels of 0-255: "
                f"give --input-norm=meanstd with --normalisation={normalisation}"
            )
        else:
            normalisation = "none"
        object.__setattr__(self, "normalisation", normalisation)


# Section 3.2 (Table 1): batches of 12, rate 0.1, tested every 1,000 steps, about 33 epochs.
_BASIC = Config(
    dataset="camvid",
    input_norm="lrn",
    class_balance="published",
    batch_size=12,
    learning_rate=0.1,
    bias_lr=2.0,
    num_steps=10_000,
    eval_every=1000,
    save_every=1000,
    log_every=20,
)
# Section 4 (Table 3): batches of 5, rate 0.001, dropout after the deeper stages.
_FULL = dataclasses.replace(
    _BASIC,
    net="segnet",
    input_norm="none",
    dropout="enc_dec",
    batch_size=5,
    learning_rate=1e-3,
    num_steps=40_000,
    eval_every=2000,
    save_every=2000,
)
# For few steps from scratch: inputs of unit scale and a fast start.
_SCRATCH = Config(
    **FROM_SCRATCH,
    learning_rate=1e-2,
)

PRESETS = {
    "paper": _BASIC,
    "paper_segnet": _FULL,
    "bayesian": dataclasses.replace(  # bayesian_segnet_solver.prototxt
        _FULL, dropout="bayes", batch_size=4, num_steps=60_000, eval_every=10_000,
        save_every=2000,
    ),
    "camvid": dataclasses.replace(
        _SCRATCH, dataset="camvid", scale=0.5, augment="mirror_scale", crop=(180, 240), width=0.5,
        class_balance="published", num_steps=1000, eval_every=500, save_every=500,
    ),
    "demo": dataclasses.replace(
        _SCRATCH, width=0.25, bn_stats="running", num_steps=800, eval_every=400, save_every=400,
        eval_batch_size=16,
    ),
    "smoke": dataclasses.replace(
        _SCRATCH, **SMOKE, width=1 / 32, dropout="bayes", mc_samples=2,
    ),
}  # fmt: skip


def build_model(config: Config, num_classes: int) -> nn.Module:
    """The network of a configuration."""
    is_full = config.net == "segnet"
    relu = is_full if config.decoder_relu == "released" else config.decoder_relu == "on"
    shared = dict(
        width=config.width,
        decoder_relu=relu,
        dropout_rate=0.0 if config.dropout == "none" else 0.5,
        conv_bias=config.conv_bias == "on",
        bn_epsilon=config.bn_epsilon,
        input_lrn=config.input_norm == "lrn",
        axis_name=AXIS,
        dtype=config.dtype,
    )
    if is_full:
        return SegNet(num_classes, **shared)
    return SegNetBasic(num_classes, decoder=config.decoder, **shared)


def build_predict(config: Config, model: nn.Module) -> prediction.PredictFn:
    """One pass, or with ``--dropout=bayes`` the mean of many that drop."""
    if config.dropout != "bayes":
        return prediction.whole_image(model, config.scale)
    drawing = model.clone(sample_dropout=True, axis_name=None)

    def one_pass(
        variables: prediction.Variables, images: jax.Array, sizes: jax.Array, key: jax.Array
    ) -> jax.Array:
        predict = prediction.whole_image(drawing, config.scale, {"dropout": key})
        return predict(variables, images, sizes)

    return MonteCarlo(one_pass, config.mc_samples, config.seed)


def test_time(config: Config) -> str:
    """What `build_predict` does, for the protocol card."""
    if config.dropout != "bayes":
        return prediction.ONE_PASS
    return f"mean probabilities of {config.mc_samples} passes with dropout; no flips, no scales"


def extra_scores(
    config: Config,
    predict: prediction.PredictFn,
    variables: prediction.Variables,
    source: Source,
) -> dict[str, float]:
    """How far the variance of ``--dropout=bayes`` tells right pixels from wrong ones."""
    if not isinstance(predict, MonteCarlo):
        return {}
    return uncertainty.measure(predict, variables, source, config).scores


def build_groups(config: Config) -> tuple[ParamGroup, ...]:
    """The release's: normalisation decays too, save SegNet's shifts, and learns at the one rate."""
    if config.optimizer != "sgd":
        return ()
    shift_decay = 0.0 if config.net == "segnet" else 1.0
    return ParamGroup(r"_bn/bias$", decay=shift_decay), ParamGroup(r"_bn/scale$")


def build_transforms(config: Config) -> list[Transform]:
    """Training transforms."""
    return whole_images(config.normalisation, config.scale, config.augment, config.crop)


def class_weights(config: Config, dataset: Dataset) -> np.ndarray | None:
    """The weights of ``--class-balance``, [C], or None."""
    if config.class_balance == "none":
        return None
    if config.class_balance != "published":
        return semantic.class_weights(dataset, _DEFINITIONS[config.class_balance])
    if set(dataset.classes.names) != set(CAMVID_WEIGHTS):
        raise UserError(
            f"--class-balance=published is for CamVid's 11 classes, not for {dataset.name}: "
            "give --class-balance=median_eigen"
        )
    return np.array([CAMVID_WEIGHTS[name] for name in dataset.classes.names], np.float32)


def main(config: Config) -> TrainState:
    """Trains, evaluates and reports."""
    dataset = semantic.load_dataset(config)
    model = build_model(config, dataset.classes.num_classes)
    predict = build_predict(config, model)

    def measure(variables: prediction.Variables, source: Source) -> dict[str, float]:
        if not isinstance(predict, MonteCarlo):
            return {}
        found = uncertainty.measure(predict, variables, source, config)
        found.write(pathlib.Path(config.workdir or ""), source, dataset.classes)
        return found.scores

    return semantic.train_and_evaluate(
        config,
        model,
        dataset,
        build_transforms(config),
        groups=build_groups(config),
        class_weights=class_weights(config, dataset),
        predict=predict,
        test_time=test_time(config),
        posthoc_batch_stats=config.bn_stats == "posthoc",
        extra_scores=measure,
    )


if __name__ == "__main__":
    semantic.run(main, PRESETS, __doc__)
