"""The flags that every training script shares; a script adds its paper's ablations to them."""

import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Self, TypeVar

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


class Limit(NamedTuple):
    """Which values a flag takes beside None; stands in the annotation of its field.

    Attributes:
      holds: whether a value is one of them.
      words: what to give instead of another.
    """

    holds: Callable[[Any], bool]
    words: str


Count = Annotated[int, Limit(lambda x: x >= 1, "at least 1")]
Counts = Annotated[tuple[int, ...], Limit(lambda x: x and min(x) >= 1, "one or more, each >= 1")]
CountOrZero = Annotated[int, Limit(lambda x: x >= 0, "0 or more")]
Factor = Annotated[float, Limit(lambda x: x > 0, "a factor above 0")]
AtLeastOne = Annotated[float, Limit(lambda x: x >= 1, "a factor of 1 or more")]
AtLeastZero = Annotated[float, Limit(lambda x: x >= 0, "0 or more")]
Rate = Annotated[float, Limit(lambda x: 0 <= x < 1, "a value in [0, 1)")]
Share = Annotated[float, Limit(lambda x: 0 < x <= 1, "a share in (0, 1]")]
Sides = Annotated[tuple[int, int], Limit(lambda x: min(x) >= 1, "at least 1 1")]


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
    scale: Factor = 1.0
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
    num_workers: CountOrZero = 0
    """Worker processes of the input pipeline; 0 uses threads of this process."""
    num_threads: Count = 2
    """Reading threads of the input pipeline (per worker)."""

    # Optimisation.
    num_steps: Count = 1000
    """Optimiser steps. A finished run goes on when this is raised."""
    batch_size: Count = 8
    """Images per optimiser step, over all devices and micro-batches."""
    accumulate: Count = 1
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
    warmup_steps: CountOrZero = 0
    """Linear rise of the learning rate from zero."""
    loss_norm: Literal["valid", "batch", "sum", "weights"] = "valid"
    """What the summed loss is divided by: scored pixels, images, nothing, or their weights."""
    ema_decay: Rate = 0.0
    """Averaging of the parameters; the average is what is evaluated. 0 turns it off."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the network; parameters and loss stay float32."""
    init: str | None = None
    """Start from other weights: run:PATH, a run or what import-weights wrote; file:PATH, published
    weights; hub:OWNER/REPOSITORY, such weights of the Hugging Face Hub. Every parameter of equal
    name and shape is copied, and the rest is named. Images come as the weights expect them."""
    seed: CountOrZero = 0
    """Seed of the parameters, the data order and dropout."""

    # Bookkeeping.
    workdir: str | None = None
    """Run folder; the same command run again resumes it. Default: runs/SCRIPT-PRESET."""
    eval_batch_size: Count = 8
    """Images per evaluation step, over all devices."""
    log_every: Count = 10
    """Steps between rows of metrics.jsonl."""
    eval_every: Count = 1000
    """Steps between evaluations on the validation split; the last step is always evaluated."""
    save_every: Count = 1000
    """Steps between checkpoints; the last and the best are kept."""

    def __post_init__(self) -> None:
        """Raises UserError for values that no run can use."""
        for name, hint in typing.get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            for limit in _limits(hint) if value is not None else ():
                if not limit.holds(value):
                    raise UserError(f"{_as_flag(name, value)}: give {limit.words}")
        if self.batch_size % self.accumulate:
            raise UserError(
                f"--batch-size={self.batch_size} is not a multiple of "
                f"--accumulate={self.accumulate}: make it one"
            )

    def needs(self, name: str, *values: Any, **others: Any) -> None:
        """Refuses a flag beside values of other flags.

        ``self.needs("pool5a", "on", backbone="vgg16")`` says that --pool5a=on is for VGG-16 only.

        Args:
          name: of a field.
          *values: the values of it that need something; if none are given, all but None.
          **others: what other fields must be then: a value, or a tuple of those that will do.

        Raises:
          UserError: names both flags and what to give.
        """
        own = getattr(self, name)
        if own not in values if values else own is None:
            return
        for other, wanted in others.items():
            value, wanted = getattr(self, other), wanted if isinstance(wanted, tuple) else (wanted,)
            if value not in wanted:
                remedy = f"give {_as_flag(other, ' or '.join(map(str, wanted)))}"
                if wanted == (None,):
                    remedy = f"leave {_as_flag(other)} out"
                raise UserError(
                    f"{_as_flag(name, own)} does not go with {_as_flag(other, value)}: {remedy}"
                )

    def each_stage(self) -> Iterator[Self]:
        """Yields what is trained one after another, each in its own folder; the last is the run."""
        yield self

    @classmethod
    def upgrade(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Returns the fields of a ``config.json`` of an earlier version by their names of today."""
        return values

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return dataclasses.asdict(self)


def _limits(hint: Any) -> Iterator[Limit]:
    """The limits in an annotation, of ``Annotated[...]`` or ``Annotated[...] | None``."""
    for part in (hint, *typing.get_args(hint)):
        yield from (x for x in getattr(part, "__metadata__", ()) if isinstance(x, Limit))


def _as_flag(name: str, *value: Any) -> str:
    """A field as it is given on the command line, with its value if there is one."""
    flag = f"--{name.replace('_', '-')}"
    if value and isinstance(value[0], tuple):
        return " ".join([flag, *map(str, value[0])])
    return f"{flag}={value[0]}" if value else flag


ConfigT = TypeVar("ConfigT", bound=RunConfig)


def from_json(cls: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    """Rebuilds a configuration from :meth:`RunConfig.to_json`.

    Raises:
      UserError: a field is not known to this version of the script.
    """
    return _rebuild(cls, cls.upgrade(dict(values)))


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


def check_resumable(old: RunConfig, new: RunConfig, workdir: str) -> None:
    """Refuses to go on with a run whose settings were different.

    Raises:
      UserError: names the first settings that differ and both values.
    """
    before, after = old.to_json(), new.to_json()
    changed = [
        f"--{key.replace('_', '-')} was {before[key]!r} and is now {after[key]!r}"
        for key in sorted(after)
        if key not in _FREE_ON_RESUME and before[key] != after[key]
    ]
    if changed:
        raise UserError(
            f"{workdir} holds a run with other settings ({'; '.join(changed[:3])}): "
            "give the old settings to resume it, or another --workdir"
        )


@dataclasses.dataclass(frozen=True)
class Stage:
    """A training stage before the last one; None takes what that one has."""

    train_mode: Literal["none", "front", "context"] = "none"
    """What it trains, as in --train-mode; none skips the stage."""
    num_steps: int | None = None
    """Optimiser steps."""
    batch_size: int | None = None
    """Images per step."""
    accumulate: int | None = None
    """Micro-batches per step."""
    crop: tuple[int, int] | None = None
    """Height and width of training images."""
    learning_rate: float | None = None
    """Peak learning rate."""
    momentum: float | None = None
    """Momentum of sgd."""


NO_STAGE = Stage()


def stage_by_stage(config: ConfigT, before: Sequence[str], **changes: Any) -> Iterator[ConfigT]:
    """Yields a configuration for each earlier stage, and then the last without them.

    Each stage starts from the one before and has a folder of its own, named by what it trains.

    Args:
      config: the last stage; has ``train_mode``.
      before: names of the fields that hold the earlier stages.
      **changes: further fields of the earlier stages.
    """
    alone: dict[str, Any] = dict.fromkeys(before, NO_STAGE)
    init, workdir = config.init, config.workdir
    for stage in (vars(config)[name] for name in before):
        if stage.train_mode != "none":
            workdir = f"{config.workdir}/{stage.train_mode}"
            own = {name: value for name, value in vars(stage).items() if value is not None}
            folder = {"workdir": workdir, "init": init}
            yield dataclasses.replace(config, **{**alone, **changes, **own, **folder})
            init, workdir = f"run:{workdir}", f"{config.workdir}/{vars(config)['train_mode']}"
    yield dataclasses.replace(config, **alone, workdir=workdir, init=init)


def own_flags_first(cls: type[RunConfig]) -> None:
    """Lists a script's own fields in front of the shared ones, as ``--help`` shows them.

    All fields are given by keyword, so that their order matters to nobody else.
    """
    fields: dict[str, Any] = cls.__dict__["__dataclass_fields__"]
    own = {name: fields.pop(name) for name in inspect.get_annotations(cls) if name in fields}
    shared = dict(fields)
    fields.clear()
    fields.update(own | shared)


def from_scratch(config: ConfigT) -> ConfigT:
    """For networks that learn from nothing, in minutes; each has a learning rate of its own."""
    return dataclasses.replace(
        config,
        optimizer="adamw",
        weight_decay=1e-2,
        schedule="cosine",
        warmup_steps=50,
        ema_decay=0.99,
    )


def smoke(config: ConfigT) -> ConfigT:
    """Two steps on tiny images, which show that everything runs."""
    return dataclasses.replace(
        config,
        shapes=ShapesSpec(size=(32, 32), num_train=16, num_val=6, num_test=2),
        warmup_steps=0,
        num_steps=2,
        log_every=1,
        eval_every=2,
        save_every=1,
    )
