"""The flags that all training scripts share. Each script adds the ablations of its paper."""

import contextlib
import dataclasses
import inspect
import json
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Self, TypeVar

from dense_jax.data import dataset
from dense_jax.data.datasets.shapes import ShapesSpec
from dense_jax.data.normalise import NORMALISATIONS
from dense_jax.data.padded import Shapes
from dense_jax.errors import UserError
from dense_jax.train import processes

# The choices are those that the data rooms have; for a type checker, any string.
if TYPE_CHECKING:
    DatasetName = Normalisation = str
else:
    DatasetName = Literal[tuple(dataset.names())]
    Normalisation = Literal[tuple(NORMALISATIONS)]

# Fields that a resumed run may change: they alter neither the parameters nor the data order.
# num_steps is one of them, so that a finished run can be trained further. The remaining steps
# then follow the longer schedule.
FREE_ON_RESUME = {
    "data_dir",
    "eval_batch_size",
    "eval_shapes",
    "eval_every",
    "coordinator",
    "distributed",
    "log_every",
    "num_processes",
    "num_steps",
    "num_threads",
    "num_workers",
    "process_id",
    "save_every",
    "train_json",
    "val_json",
    "workdir",
}


class Limit(NamedTuple):
    """The values that a flag may have besides None; part of the annotation of its field.

    Attributes:
      holds: whether a value is allowed.
      words: the allowed values in words, for the message "give ...".
    """

    holds: Callable[[Any], bool]
    words: str


Count = Annotated[int, Limit(lambda x: x >= 1, "at least 1")]
Counts = Annotated[tuple[int, ...], Limit(lambda x: x and min(x) >= 1, "one or more, each >= 1")]
CountOrZero = Annotated[int, Limit(lambda x: x >= 0, "0 or more")]
Factor = Annotated[float, Limit(lambda x: 0 < x < 1000, "a factor above 0 and below 1000")]
AtLeastOne = Annotated[float, Limit(lambda x: x >= 1, "a factor of 1 or more")]
AtLeastZero = Annotated[float, Limit(lambda x: x >= 0, "0 or more")]
Rate = Annotated[float, Limit(lambda x: 0 <= x < 1, "a value in [0, 1)")]
Share = Annotated[float, Limit(lambda x: 0 < x <= 1, "a share in (0, 1]")]
Shares = Annotated[
    tuple[float, ...],
    Limit(lambda x: x and all(0 < each <= 1 for each in x), "one or more, each in (0, 1]"),
]
Sides = Annotated[tuple[int, int], Limit(lambda x: min(x) >= 1, "at least 1 1")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Data, optimisation and bookkeeping of one run. ``config.json`` holds these fields."""

    # Data.
    dataset: DatasetName = "shapes"
    """Dataset to train on. shapes is generated and needs no files."""
    data_dir: str | None = None
    """Folder of a local copy (see docs/data.md for the layouts)."""
    train_json: str | None = None
    """Annotations of the training images, in --data-dir or anywhere; only with --dataset=coco.
    Default: a file of a usual name, such as annotations/instances_train2017.json."""
    val_json: str | None = None
    """Annotations of the validation images, likewise."""
    shapes: ShapesSpec = dataclasses.field(default_factory=ShapesSpec)
    """Difficulty of the generated images; used only with --dataset=shapes."""
    scale: Factor = 1.0
    """The network gets images resized by this factor; metrics are computed at full size."""
    normalisation: Normalisation = "torchvision"
    """Normalisation of the images. torchvision: mean 0 and standard deviation 1. caffe, fast_rcnn
    and torchvision_vgg16_features: 0-255 minus the mean of ImageNet; dilation_*: minus that of a
    dataset. efficientnet_lite: -1 to 1. grey: one grey channel of fixed scale. grey_image: one grey
    channel with mean 0 and standard deviation 1 in each image. Default: what the weights given with
    --init expect."""
    num_workers: CountOrZero = 0
    """Worker processes of the input pipeline; 0 uses threads of this process."""
    num_threads: Count = 2
    """Reading threads of the input pipeline (per worker)."""

    # Optimisation.
    num_steps: Count = 1000
    """Optimiser steps. Raise it to train a finished run further."""
    batch_size: Count = 8
    """Images per optimiser step, over all devices and micro-batches."""
    accumulate: Count = 1
    """Micro-batches per step. The gradient is the same except for dropout, with less memory."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd decays weights inside the momentum (Caffe); adamw decouples it."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    momentum: float = 0.9
    """Momentum of sgd."""
    weight_decay: float = 5e-4
    """L2 decay of the kernels; biases and normalisation parameters are not decayed."""
    clip_norm: AtLeastZero = 0.0
    """Largest norm of the gradient of all trained parameters together; a longer one is shortened to
    it. 0 turns it off."""
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
    """Divisor of the summed loss. valid: scored pixels; batch: images; sum: none; weights: the
    weights of the scored pixels."""
    ema_decay: Rate = 0.0
    """Decay of the parameters' running average, which is evaluated instead. 0 turns it off."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the network; parameters and loss stay float32."""
    init: str | None = None
    """Weights to start from. run:PATH: a run folder or the output of import-weights; file:PATH:
    published weights; hub:OWNER/REPOSITORY: published weights on the Hugging Face Hub. Parameters
    of equal name and shape are copied; the others are listed."""
    seed: CountOrZero = 0
    """Seed for the initial parameters, the data order and dropout."""

    # Bookkeeping.
    workdir: str | None = None
    """Run folder. The same command resumes the run in it. Default: runs/SCRIPT-PRESET."""
    eval_batch_size: Count = 8
    """Images per evaluation step, over all devices."""
    eval_shapes: Shapes = "exact"
    """exact: evaluation and prediction run at the size of each image; each size is compiled.
    buckets: zeros pad images to at most four sizes, which changes results near the lower and right
    edges; for sets of very many sizes."""
    log_every: Count = 10
    """Steps between rows of metrics.jsonl."""
    eval_every: Count = 1000
    """Steps between evaluations on the validation split; the last step is always evaluated."""
    save_every: Count = 1000
    """Steps between checkpoints; the last two and the best checkpoint stay on disk."""
    distributed: bool = False
    """Train with many processes: start the same command in each (docs/scale.md). SLURM, Open MPI
    and TPU pods say the next three values themselves."""
    coordinator: str | None = None
    """HOST:PORT of the first process."""
    process_id: CountOrZero | None = None
    """Number of this process, from 0."""
    num_processes: Count | None = None
    """Number of processes."""

    def __post_init__(self) -> None:
        """Expands "~" and checks the values. Raises UserError for one that no run can use."""
        for name in ("data_dir", "init", "train_json", "val_json", "workdir"):
            path = getattr(self, name)
            if isinstance(path, str):  # a shell expands it at the start of a word alone
                kind, colon, rest = path.rpartition(":")
                object.__setattr__(self, name, kind + colon + os.path.expanduser(rest))
        for name, hint in typing.get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            for limit in _limits(hint) if value is not None else ():
                if not limit.holds(value):
                    raise UserError(f"{_as_flag(name, value)}: give {limit.words}")
        for name in ("train_json", "val_json"):
            self.needs(name, dataset="coco")
        processes.check(self.distributed, self.coordinator, self.process_id, self.num_processes)
        if self.batch_size % self.accumulate:
            raise UserError(
                f"--batch-size={self.batch_size} is not a multiple of "
                f"--accumulate={self.accumulate}: give a multiple"
            )

    def needs(self, name: str, *values: Any, **others: Any) -> None:
        """Checks that a flag goes with the values of other flags.

        ``self.needs("pool5a", "on", backbone="vgg16")``: --pool5a=on works only with VGG-16.

        Args:
          name: name of a field.
          *values: the values of the field that need something; without any, all values but None.
          **others: what another field must be in this case: one value, or a tuple of alternatives.

        Raises:
          UserError: the flags do not go together; the message names both and the remedy.
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

    @property
    def data_options(self) -> dict[str, Any]:
        """The arguments of `dense_jax.data.dataset.load` besides the name and the folder."""
        if self.dataset == "shapes":
            return dataclasses.asdict(self.shapes)
        if self.dataset == "coco":
            return {"train_json": self.train_json, "val_json": self.val_json}
        return {}

    def each_stage(self) -> Iterator[Self]:
        """Yields the configurations to train in turn, each in its own folder; the last is self."""
        yield self

    @classmethod
    def upgrade(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Returns the fields of a ``config.json`` from an earlier version under current names."""
        return values

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return dataclasses.asdict(self)


def _limits(hint: Any) -> Iterator[Limit]:
    """The limits in an annotation ``Annotated[...]`` or ``Annotated[...] | None``."""
    for part in (hint, *typing.get_args(hint)):
        yield from (x for x in getattr(part, "__metadata__", ()) if isinstance(x, Limit))


def _as_flag(name: str, *value: Any) -> str:
    """A field as the user writes it on the command line, with its value if there is one."""
    flag = f"--{name.replace('_', '-')}"
    if value and isinstance(value[0], tuple):
        return " ".join([flag, *map(str, value[0])])
    return f"{flag}={value[0]}" if value else flag


ConfigT = TypeVar("ConfigT", bound=RunConfig)


def from_json(cls: type[ConfigT], values: dict[str, Any], where: object = "config.json") -> ConfigT:
    """Rebuilds a configuration from :meth:`RunConfig.to_json`.

    Fields that an earlier version did not have get their defaults, which a line tells.

    Args:
      cls: the class of the configuration.
      values: its fields as JSON values.
      where: the file that they come from, for messages.

    Raises:
      UserError: this version of the script does not know a field, or a value is of another kind
        than the field, or none that a run can use.
    """
    try:
        values = cls.upgrade(dict(values))
        config = _rebuild(cls, values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except ValueError as error:
        raise UserError(f"{where} is damaged ({error}): restore it") from error
    if absent := list(_absent(config.to_json(), values)):
        print(f"{where} lacks {', '.join(absent)}: the defaults are taken", file=sys.stderr)
    return config


def changed(config: ConfigT, changes: Sequence[str]) -> ConfigT:
    """Returns a configuration with other settings of evaluation: those named test_...

    Args:
      config: the configuration.
      changes: texts such as "test-flip=on"; commas are between several values.

    Raises:
      UserError: there is no such setting, or it has no such value.
    """
    hints = typing.get_type_hints(type(config))
    names = {name.replace("_", "-"): name for name in hints if name.startswith("test_")}
    values = {}
    for change in changes:
        flag, sign, text = change.partition("=")
        known = ", ".join(names) or "it has none"
        if not sign or flag not in names:
            raise UserError(f"--change {change}: give NAME=VALUE for a test setting ({known})")
        values[names[flag]] = _read(text, hints[names[flag]], f"--change {change}")
    return dataclasses.replace(config, **values)


def _read(text: str, hint: Any, name: str) -> Any:
    """Returns the value that a text stands for: a word, a number, or several numbers."""
    values: list[Any] = [text]
    with contextlib.suppress(ValueError):
        numbers = json.loads(f"[{text}]")
        values += [numbers, *numbers[: len(numbers) == 1]]
    for value in values:
        with contextlib.suppress(ValueError):
            return from_plain(value, hint, name)
    words = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    words = re.sub(r"^Optional\[(.*)\]$", r"\1", words)
    raise UserError(f"{name}: {text!r} is no {words}")


def _absent(whole: Mapping[str, Any], values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yields the names of the fields that a record lacks and that results depend on."""
    for name, value in whole.items():
        if name in FREE_ON_RESUME:
            continue
        if name not in values:
            yield prefix + name
        elif isinstance(value, dict):
            yield from _absent(value, values[name], f"{prefix}{name}.")


def from_plain(value: Any, hint: Any, name: str) -> Any:
    """Returns a JSON value as an annotation has it: lists as tuples, objects as dataclasses.

    Args:
      value: the JSON value.
      hint: the annotation, as `typing.get_type_hints` returns it; one of an unknown kind takes any
        value.
      name: name of the field, for the message.

    Raises:
      ValueError: the value is of another kind.
    """
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in options:
            with contextlib.suppress(ValueError):
                return from_plain(value, option, name)
    elif origin is Literal:
        if any(value == option and type(value) is type(option) for option in options):
            return value
    elif origin in (tuple, list, Sequence) and isinstance(value, list | tuple):
        each = options[:1] * len(value) if origin is not tuple or options[-1] is ... else options
        if len(each) == len(value):
            items = enumerate(zip(value, each, strict=True))
            return tuple(from_plain(item, kind, f"{name}[{i}]") for i, (item, kind) in items)
    elif origin in (dict, Mapping) and isinstance(value, dict):
        return {key: from_plain(x, options[1], f"{name}.{key}") for key, x in value.items()}
    elif dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _rebuild(hint, value, f"{name}.")
    elif hint in (int, float):  # true is 1 in Python
        kinds = (int, float) if hint is float else (int,)
        if type(value) in kinds and abs(value) < (_FAR if hint is float else 2**63):
            return value
    elif hint in (str, bool, NoneType):
        if isinstance(value, hint):
            return value
    elif not (origin or dataclasses.is_dataclass(hint)):
        return tuple(value) if isinstance(value, list) else value
    raise ValueError(f"{name} is {json.dumps(value)[:60]}, not {_kind_in_words(hint)}")


_FAR = sys.float_info.max
_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "a truth value"}


def _kind_in_words(hint: Any) -> str:
    options = typing.get_args(hint)
    match typing.get_origin(hint):
        case typing.Union | types.UnionType:
            return " or ".join(map(_kind_in_words, options))
        case typing.Literal:
            return f"one of {', '.join(map(str, options))}"
        case origin if origin is tuple and options[-1] is not ...:
            return f"a list of {len(options)}, each {_kind_in_words(options[0])}"
        case origin if origin in (tuple, list, Sequence):
            return f"a list, each {_kind_in_words(options[0])}"
    return "null" if hint is NoneType else _WORDS.get(hint, "an object")


def _rebuild(cls: type[Any], values: dict[str, Any], prefix: str = "") -> Any:
    """Builds a dataclass from its fields as JSON values; fields may be dataclasses themselves."""
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)
    if unknown := sorted(set(values) - {f.name for f in fields}):
        raise UserError(
            f"it has fields that this version of the script does not know "
            f"({', '.join(prefix + name for name in unknown)}): use the version that wrote it"
        )
    needed = (f for f in fields if f.default is f.default_factory is dataclasses.MISSING)
    if missing := [f.name for f in needed if f.name not in values]:
        raise ValueError(f"it has no {prefix}{missing[0]}")
    return cls(**{k: from_plain(value, hints[k], prefix + k) for k, value in values.items()})


def check_resumable(old: RunConfig, new: RunConfig, workdir: str) -> None:
    """Checks that a run may be resumed with new settings.

    Raises:
      UserError: settings differ; the message names the first of them with both values.
    """
    before, after = old.to_json(), new.to_json()
    changed = [
        f"--{key.replace('_', '-')} was {before[key]!r} and is now {after[key]!r}"
        for key in sorted(after)
        if key not in FREE_ON_RESUME and before[key] != after[key]
    ]
    if changed:
        raise UserError(
            f"{workdir} holds a run with other settings ({'; '.join(changed[:3])}): "
            "give the old settings to resume it, or another --workdir"
        )


@dataclasses.dataclass(frozen=True)
class Stage:
    """A training stage before the last one. None means: the value of the last stage."""

    train_mode: Literal["none", "front", "context"] = "none"
    """Part to train, as in --train-mode; none skips the stage."""
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
    """Yields a configuration for each earlier stage, then the last stage without the earlier ones.

    Each stage starts from the one before. Its folder has the name of the part that it trains.

    Args:
      config: the last stage; has a field ``train_mode``.
      before: names of the fields that hold the earlier stages.
      **changes: other fields to change in the earlier stages.
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
    """Moves a script's own fields before the shared ones, for the order in ``--help``.

    All fields are keyword-only, so nothing else depends on their order.
    """
    fields: dict[str, Any] = cls.__dict__["__dataclass_fields__"]
    own = {name: fields.pop(name) for name in inspect.get_annotations(cls) if name in fields}
    shared = dict(fields)
    fields.clear()
    fields.update(own | shared)


def from_scratch(config: ConfigT) -> ConfigT:
    """Settings for small networks trained from scratch in minutes; each adds a learning rate."""
    return dataclasses.replace(
        config,
        optimizer="adamw",
        weight_decay=1e-2,
        schedule="cosine",
        warmup_steps=50,
        ema_decay=0.99,
    )


def smoke(config: ConfigT) -> ConfigT:
    """Settings for two steps on tiny images: a check that everything runs."""
    return dataclasses.replace(
        config,
        shapes=ShapesSpec(size=(32, 32), num_train=16, num_val=6, num_test=2),
        warmup_steps=0,
        num_steps=2,
        log_every=1,
        eval_every=2,
        save_every=1,
    )
