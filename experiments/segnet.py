"""SegNet and SegNet-Basic (Badrinarayanan, Kendall, Cipolla, PAMI 2017, arXiv:1511.00561).

    python -m experiments.segnet demo
    python -m experiments.segnet camvid --data-dir=/data/camvid --decoder=bilinear
    python -m experiments.segnet paper --data-dir=/data/camvid --class-balance=none
    python -m experiments.segnet bayesian --data-dir=/data/camvid --workdir=/runs/bayesian

Table 1 is one sweep over --decoder and --class-balance. Results: docs/results.md. Conventions that
all scripts share (RGB, momentum, initialisation): docs/conventions.md.

Differences from the paper: (1) Table 2 trains on 3,433 road images of several collections that are
not distributed together: give your own with --dataset=folder. (2) The best checkpoint has the
highest mean IoU; in the paper, the highest pixel accuracy. (3) The FCN decoders start as bilinear
interpolation; fcn_nodimred may still need --learning-rate=0.01.
"""

import dataclasses
import functools
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from dense_jax.data.dataset import Dataset
from dense_jax.errors import UserError
from dense_jax.evaluation import uncertainty
from dense_jax.infer.monte_carlo import monte_carlo
from dense_jax.infer.whole_image import ONE_PASS
from dense_jax.models.segnet import CAMVID_WEIGHTS, Decoder, SegNet, SegNetBasic
from dense_jax.tasks import training
from dense_jax.tasks.semantic import Semantic, SemanticConfig, median_frequency
from dense_jax.train.config import Count, from_plain, from_scratch, smoke
from dense_jax.train.schedules import ParamGroup
from dense_jax.train.step import AXIS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(SemanticConfig):
    """The paper's ablations; then the flags of every semantic run."""

    net: Literal["segnet", "basic"] = "basic"
    """SegNet on VGG-16's 13 layers (Figure 2) or the small SegNet-Basic (Section 3.1)."""
    decoder: Decoder = "indices"
    """Decoders of Table 1, in its order. SegNet has only indices; SegNet-Basic has all."""
    decoder_relu: Literal["released", "off", "on"] = "released"
    """ReLUs in the decoder; released: on in SegNet, off in SegNet-Basic."""
    conv_bias: Literal["on", "off"] = "on"
    """Biases before batch normalisation: on in the release, off in the paper (Section 3.2)."""
    bn_epsilon: float = 1e-9  # Added to variances: 1e-9 as released; torchvision's vgg16_bn: 1e-5.
    dropout: Literal["none", "enc_dec", "bayes"] = "none"
    """enc_dec: dropout 0.5 after the coarse stages. bayes: also samples it in predictions."""
    mc_samples: Count = 40
    """Passes of --dropout=bayes; Bayesian SegNet (arXiv:1511.02680) found no gain beyond 40."""
    input_lrn: Literal["on", "off"] = "off"
    """on: local response normalisation of pixels of 0-255 first (released SegNet-Basic)."""
    class_balance: Literal["none", "median_pixels", "median_eigen", "published"] = "none"
    """Class weights: none (natural, Table 1); median_pixels (Section 3.1), median_eigen (Eigen and
    Fergus): median frequency; published: the released weights for CamVid."""
    bn_stats: Literal["posthoc", "running"] = "posthoc"
    """Statistics for evaluation. posthoc: from one pass over the training split (released)."""

    def __post_init__(self) -> None:
        """Raises UserError for flags that do not go together."""
        super().__post_init__()
        if self.net == "segnet" and self.decoder != "indices":
            raise UserError(f"--decoder={self.decoder} is SegNet-Basic's: give --net=basic with it")
        if self.input_lrn == "on" and self.normalisation != "none":
            raise UserError("--input-lrn=on takes pixels of 0-255: give --normalisation=none")

    @classmethod
    def upgrade(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Converts --input-norm of earlier versions, which also set the normalisation."""
        if "input_norm" in values:
            forms, norm = Literal["none", "lrn", "meanstd"], values.pop("input_norm")
            lrn = from_plain(norm, forms, "input_norm") == "lrn"
            values["input_lrn"] = "on" if lrn else "off"
        return values


# Section 3.2 (Table 1): batches of 12, rate 0.1, tested every 1,000 steps, about 33 epochs.
_BASIC = Config(
    dataset="camvid", normalisation="none", input_lrn="on", class_balance="published",
    batch_size=12, learning_rate=0.1, bias_lr=2.0, num_steps=10_000, eval_every=1000, log_every=20,
)  # fmt: skip
# Section 4 (Table 3): batches of 5, rate 0.001, dropout after the deeper stages.
_FULL = replace(
    _BASIC, net="segnet", input_lrn="off", dropout="enc_dec", batch_size=5, learning_rate=1e-3,
    num_steps=40_000, eval_every=2000,
)  # fmt: skip
_SCRATCH = from_scratch(Config(learning_rate=1e-2))

PRESETS = {
    "paper": _BASIC,
    "paper_segnet": _FULL,
    "bayesian": replace(  # bayesian_segnet_solver.prototxt
        _FULL, dropout="bayes", batch_size=4, num_steps=60_000, eval_every=10_000, save_every=2000,
    ),
    "camvid": replace(
        _SCRATCH, dataset="camvid", scale=0.5, augment="mirror_scale", crop=(180, 240), width=0.5,
        class_balance="published", num_steps=1000, eval_every=500,
    ),
    "demo": replace(
        _SCRATCH, width=0.25, bn_stats="running", num_steps=800, eval_every=400, eval_batch_size=16,
    ),
    "smoke": smoke(replace(_SCRATCH, width=1 / 32, dropout="bayes", mc_samples=2)),
}  # fmt: skip


def build(config: Config, num_classes: int) -> Semantic:
    """Returns the task: the network, its training and its use."""
    is_full = config.net == "segnet"
    options = dict(
        decoder_relu={"released": is_full, "on": True, "off": False}[config.decoder_relu],
        dropout_rate=0.0 if config.dropout == "none" else 0.5,
        conv_bias=config.conv_bias == "on", input_lrn=config.input_lrn == "on",
        bn_epsilon=config.bn_epsilon, width=config.width, axis_name=AXIS, dtype=config.dtype,
    )  # fmt: skip
    if is_full:
        model = SegNet(num_classes, **options)
    else:
        model = SegNetBasic(num_classes, decoder=config.decoder, **options)
    sampled = None
    if config.dropout == "bayes":
        sampled = monte_carlo(model, config.scale, config.mc_samples, config.seed)
    # The release also decays normalisation, except SegNet's shifts, and uses one rate for all.
    groups = (ParamGroup(r"_bn/bias$", decay=0.0 if is_full else 1.0), ParamGroup(r"_bn/scale$"))
    return Semantic(
        config, model, config.whole_images(), groups=groups if config.optimizer == "sgd" else (),
        class_weights=functools.partial(class_weights, config.class_balance),
        forward=sampled, test_time=sampled.words if sampled else ONE_PASS,
        measures=(uncertainty.measure,) if sampled else (),
        posthoc_batch_stats=config.bn_stats == "posthoc",
    )  # fmt: skip


def class_weights(balance: str, dataset: Dataset) -> np.ndarray | None:
    """Returns the weights [C] of ``--class-balance``, or None for equal weights."""
    if balance == "none":
        return None
    if balance != "published":
        return median_frequency(dataset, "pixels" if balance == "median_pixels" else "eigen")
    if set(dataset.classes.names) != set(CAMVID_WEIGHTS):
        raise UserError(
            f"--class-balance=published is for CamVid's 11 classes, not for {dataset.name}: "
            "give --class-balance=median_eigen"
        )
    return np.array([CAMVID_WEIGHTS[name] for name in dataset.classes.names], np.float32)


if __name__ == "__main__":
    training.main(build, PRESETS, __doc__)
