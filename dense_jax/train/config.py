"""The flags that every training script shares; a script adds its paper's ablations to them."""

import dataclasses
import typing
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from dense_jax.data import dataset
from dense_jax.data.datasets.shapes import ShapesSpec
from dense_jax.errors import UserError

# The choices are the modules of `dense_jax.data.datasets`; for a type checker, any string.
if TYPE_CHECKING:
    DatasetName = str
else:
    DatasetName = Literal[tuple(dataset.names())]

# Fields that a resumed run may change: they alter neither the parameters nor the data order.
# num_steps is among them so that a finished run can be trained further; the remaining steps then
# follow the longer schedule.
_FREE_ON_RESUME = {
    "data_dir",
    "eval_batch_size",
    "eval_every",
    "log_every",
    "num_steps",
    "num_threads",
    "num_workers",
    "save_every",
    "workdir",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Data, optimisation and bookkeeping of one run; written to ``config.json`` as it is."""

    # Data.
    dataset: DatasetName = "shapes"
    """What to train on. shapes is generated and needs no files."""
    data_dir: str | None = None
    """Folder of a local copy (see docs/data.md for the layouts)."""
    shapes: ShapesSpec = dataclasses.field(default_factory=ShapesSpec)
    """Difficulty of the generated images; only read when --dataset=shapes."""
    scale: float = 1.0
    """The network sees images at this multiple of their size; scores are taken at full size."""
    normalisation: Literal[
        "torchvision",
        "torchvision_vgg16_features",
        "caffe",
        "none",
        "grey",
        "grey_image",
        "dilation_voc",
        "dilation_camvid",
        "dilation_kitti",
        "dilation_cityscapes",
    ] = "torchvision"
    """What images are brought to: mean 0 and deviation 1, 0-255 minus the mean of ImageNet (caffe,
    torchvision_vgg16_features) or of a dataset (dilation_*), or one grey channel of fixed scale
    (grey) or of mean 0 and deviation 1 in each image (grey_image). Unless it is given, that of the
    weights of --init."""
    num_workers: int = 0
    """Worker processes of the input pipeline; 0 uses threads of this process."""
    num_threads: int = 2
    """Reading threads of the input pipeline (per worker)."""

    # Optimisation.
    num_steps: int = 1000
    """Optimiser steps. A finished run goes on when this is raised."""
    batch_size: int = 8
    """Images per optimiser step, over all devices and micro-batches."""
    accumulate: int = 1
    """Micro-batches per step: the same gradient, dropout aside, in less memory."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd decays weights inside the momentum (Caffe); adamw decouples it."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    momentum: float = 0.9
    """Momentum of sgd."""
    weight_decay: float = 5e-4
    """L2 decay of the kernels; biases and normalisation parameters are not decayed."""
    bias_lr: float = 1.0
    """Learning-rate multiplier of the biases (Caffe nets use 2)."""
    schedule: Literal["constant", "poly", "step", "cosine"] = "constant"
    """How the learning rate falls after the warm-up."""
    poly_power: float = 0.9
    """Exponent of --schedule=poly: lr (1 - step / num_steps) ** power."""
    step_at: tuple[float, ...] = (0.6, 0.85)
    """--schedule=step divides by 10 at these fractions of num_steps."""
    warmup_steps: int = 0
    """Linear rise of the learning rate from zero."""
    loss_norm: Literal["valid", "batch", "sum", "weights"] = "valid"
    """What the summed loss is divided by: scored pixels, images, nothing, or their weights."""
    ema_decay: float = 0.0
    """Averaging of the parameters; the average is what is evaluated. 0 turns it off."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the network; parameters and loss stay float32."""
    init: str | None = None
    """Start from other weights: run:PATH, a run or what import-weights wrote; file:PATH, published
    weights; hub:OWNER/REPOSITORY, such weights of the Hugging Face Hub. Every parameter of equal
    name and shape is copied, and the rest is named. Images come as the weights expect them."""
    seed: int = 0
    """Seed of the parameters, the data order and dropout."""

    # Bookkeeping.
    workdir: str | None = None
    """Run folder; the same command run again resumes it. Default: runs/SCRIPT-PRESET."""
    eval_batch_size: int = 8
    """Images per evaluation step, over all devices."""
    log_every: int = 10
    """Steps between rows of metrics.jsonl."""
    eval_every: int = 1000
    """Steps between evaluations on the validation split; the last step is always evaluated."""
    save_every: int = 1000
    """Steps between checkpoints; the last and the best are kept."""

    def __post_init__(self) -> None:
        """Raises UserError for values that no run can use."""
        counts = ("num_steps", "batch_size", "accumulate", "eval_batch_size")
        for name in (*counts, "log_every", "eval_every", "save_every", "num_threads"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"--{name.replace('_', '-')}={getattr(self, name)}: give at least 1"
                )
        for name in ("num_workers", "warmup_steps", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name.replace('_', '-')}={getattr(self, name)}: give 0 or more")
        if self.scale <= 0:
            raise UserError(f"--scale={self.scale}: give a factor above 0")
        if self.batch_size % self.accumulate:
            raise UserError(
                f"--batch-size={self.batch_size} is not a multiple of "
                f"--accumulate={self.accumulate}: make it one"
            )
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"--ema-decay={self.ema_decay}: give a value in [0, 1)")

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return dataclasses.asdict(self)


ConfigT = TypeVar("ConfigT", bound=RunConfig)


def from_json(cls: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    """Rebuilds a configuration from :meth:`RunConfig.to_json`.

    Raises:
      UserError: a field is not known to this version of the script.
    """
    return _rebuild(cls, values)


def _rebuild(cls: type[Any], values: dict[str, Any]) -> Any:
    """A dataclass from its fields as JSON values, those that are dataclasses themselves as well."""
    hints = typing.get_type_hints(cls)
    if unknown := sorted(set(values) - {f.name for f in dataclasses.fields(cls)}):
        raise UserError(
            f"config.json has fields that this version of the script does not know: "
            f"{', '.join(unknown)}; use the version that wrote it"
        )
    fields = {}
    for name, value in values.items():
        if isinstance(value, list):
            value = tuple(value)
        elif isinstance(value, dict) and dataclasses.is_dataclass(hints[name]):
            value = _rebuild(hints[name], value)
        fields[name] = value
    return cls(**fields)


def check_resumable(old: dict[str, Any], new: dict[str, Any], workdir: str) -> None:
    """Refuses to go on with a run whose settings were different.

    Raises:
      UserError: names the first settings that differ and both values.
    """
    changed = [
        f"--{key.replace('_', '-')} was {old.get(key)!r} and is now {new.get(key)!r}"
        for key in sorted(set(old) | set(new))
        if key not in _FREE_ON_RESUME and _plain(old.get(key)) != _plain(new.get(key))
    ]
    if changed:
        raise UserError(
            f"{workdir} holds a run with other settings ({'; '.join(changed[:3])}): "
            "give the old settings to resume it, or another --workdir"
        )


def _plain(value: Any) -> Any:
    """JSON turns tuples into lists; compare them as equal."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


# What presets have in common. Networks that learn from nothing, in minutes; the learning rate is
# each network's own:
FROM_SCRATCH: dict[str, Any] = dict(
    optimizer="adamw",
    weight_decay=1e-2,
    schedule="cosine",
    warmup_steps=50,
    ema_decay=0.99,
)
# Two steps on tiny images, which show that everything runs:
SMOKE: dict[str, Any] = dict(
    shapes=ShapesSpec(size=(32, 32), num_train=16, num_val=6, num_test=2),
    warmup_steps=0,
    num_steps=2,
    log_every=1,
    eval_every=2,
    save_every=1,
)
