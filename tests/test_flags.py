"""Every flag does something: another value changes the batches, the parameters or a program."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import re
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from dense_jax.data import pipeline
from dense_jax.data.datasets.shapes import ShapesSpec
from dense_jax.errors import UserError
from dense_jax.ops.crf import CrfParams
from dense_jax.tasks import training
from dense_jax.tasks.detection import DetectionConfig
from dense_jax.train import config as configs
from dense_jax.train.schedules import build_optimizer
from dense_jax.train.state import TrainState
from dense_jax.train.step import shard, train_step
from tests import ROOT, SCRIPTS, members, script

# Flags that each script's `build` reads; the other shared ones are tried with one script.
READ_BY_BUILD = {"width", "augment", "crop", "dtype", "normalisation", "scale"}
READ_BY_BUILD |= set(DetectionConfig.__annotations__)
ONE_SCRIPT = "segnet"

_SHAPES = ShapesSpec(size=(32, 32), num_train=16, num_val=6, num_test=2)

# Another value than the smoke preset's, where twice or half of it will not do.
OTHER = {
    "crf": CrfParams(w1=5.0),
    "crop": (16, 16),
    "ema_decay": 0.9,
    "first": configs.Stage("front", 1),
    "min_iou": 0.9,
    "rates": (2, 4),
    "scale": 0.5,
    "second": configs.Stage("front", 1),
    "shapes": dataclasses.replace(_SHAPES, seed=5),
    "step_at": (0.5,),
    "tap_kernel": (3, 1, 1),
    "tile": 136,
    ("dilated", "tile"): 500,
}

_VALID_UNET = {"padding": "valid", "tile": 204, "depth": 4}

# What a flag, or one value of it, makes sense with.
NEEDED = {
    "bias_lr": {"optimizer": "sgd"},
    "crf": {"post": "crf"},
    "momentum": {"optimizer": "sgd"},
    "poly_power": {"schedule": "poly"},
    "step_at": {"schedule": "step"},
    ("deconvnet", "augment"): {"stages": "whole", "crop": (32, 32)},
    ("deconvnet", "balance"): {"shapes": dataclasses.replace(_SHAPES, num_train=2)},
    ("deconvnet", "crop"): {"stages": "whole"},
    ("deconvnet", "input_size"): {"resize": 72},
    ("deconvnet", "scale"): {"stages": "whole", "proposal_source": "none"},
    ("deconvnet", "stage1_steps"): {"stages": "two"},
    ("deeplab", "aux"): {"head": "fcn", "backbone": "resnet50"},
    ("deeplab", "bn"): {"backbone": "resnet50"},
    ("deeplab", "crop"): {"loss_at": "pixels"},
    ("deeplab", "head", "deeplabv3"): {"backbone": "resnet50"},
    ("deeplab", "head", "fcn"): {"backbone": "resnet50"},
    ("deeplab", "stride_in", "1x1"): {"head": "fcn", "backbone": "resnet50"},
    ("deeplab", "stride_in", "3x3"): {"backbone": "resnet50"},
    ("deeplab", "tile_context"): {"tile": 136},
    ("dilated", "augment"): {"crop": (24, 24)},
    ("dilated", "tile"): {"front_pad": "valid_reflect", "crop": (404, 404)},
    ("dilated", "train_mode", "context"): {"first": configs.Stage("front", 1)},
    ("faster_rcnn", "head_loss", "box"): {"init": "run:trained"},
    ("faster_rcnn", "head_loss", "svm"): {"init": "run:trained"},
    ("fcn", "backbone"): {"stride": 32, "pad_mode": "100"},
    ("fcn", "single_skip"): {"stride": 16},
    ("fcn", "stage_lr"): {"train": "staged", "stride": 16},
    ("hypercolumns", "box_iou"): {"mode": "box"},
    ("hypercolumns", "box_weight"): {"mode": "box"},
    ("hypercolumns", "boxes_per_image"): {"mode": "box"},
    ("hypercolumns", "dropout_rate"): {"taps": "all"},
    ("hypercolumns", "fc7_lr"): {"taps": "all"},
    ("hypercolumns", "heatmap"): {"mode": "box"},
    ("hypercolumns", "mask_threshold"): {"mode": "box"},
    ("segnet", "decoder_relu", "off"): {"net": "segnet"},
    ("segnet", "input_lrn"): {"normalisation": "none"},
    ("unet", "mirror"): _VALID_UNET,
}

# What one value of a flag needs, and no other value goes with.
ALSO = {
    ("faster_rcnn", "neck", "c4"): {"anchor_sizes": (16, 32)},
    ("faster_rcnn", "neck", "c5"): {"anchor_sizes": (16, 32)},
    ("faster_rcnn", "neck", "dc5"): {"anchor_sizes": (16, 32)},
    ("faster_rcnn", "recipe", "paper"): {"neck": "dc5", "anchor_sizes": (16, 32)},
    ("dilated", "front_pad", "valid_reflect"): {"crop": (404, 404)},
    ("mask_rcnn", "keypoint_branch", "on"): {"num_keypoints": 5},  # of shapes
    ("unet", "padding", "valid"): _VALID_UNET,
}

# Side of the images of predictions, where it is not 32.
SIDES = {
    ("deeplab", "tile"): 160,
    ("deeplab", "tile_context"): 160,
    ("dilated", "front_pad"): 404,
    ("dilated", "tile"): 404,
    ("unet", "mirror"): 208,
    ("unet", "padding"): 208,
}

# These change nothing here, or need files: other tests try them.
ELSEWHERE = configs.FREE_ON_RESUME - {"num_steps"} | {"dataset", "init", "proposals"}
ELSEWHERE |= {("deconvnet", "proposal_source", "file")}
ELSEWHERE |= {("segnet", "class_balance", "published")}  # of CamVid
ELSEWHERE |= {("faster_rcnn", "proposal_source", "file")}  # test_given_proposals
for _name in ("faster_rcnn", "mask_rcnn"):
    ELSEWHERE |= {(_name, "empty_images", "keep")}  # shapes counts no objects
    ELSEWHERE |= {(_name, "test_side", 24)}  # images are resized before the program


def changed(name, flags):
    return dataclasses.replace(script(name).PRESETS["smoke"], workdir="run", **flags)


def needed(name, field, value):
    keys = field, (name, field), (name, field, value)
    flags = {flag: needs for key in keys for flag, needs in NEEDED.get(key, {}).items()}
    return flags | of_its_own_test(name, "NEEDED").get(field, {})


def other(name, field):
    """Another value than the smoke preset's, of a flag that is not a choice."""
    now = getattr(changed(name, {}), field)
    values = [of_its_own_test(name, "OTHER").get(field), OTHER.get((name, field)), OTHER.get(field)]
    if type(now) in (int, float):
        values += [2 * now, now / 2 if isinstance(now, float) else now // 2, type(now)(1)]
    for value in values:
        if value is not None and value != now:
            with contextlib.suppress(UserError):
                changed(name, {**needed(name, field, value), field: value})
                return value
    raise ValueError(f"--{field}: give another value, OTHER = {{...}} in tests/test_{name}.py")


@functools.cache
def of_its_own_test(name, table):
    """The NEEDED or OTHER of the test file of a script, by flag; {} without them."""
    file = ROOT / "tests" / f"test_{name}.py"
    module = importlib.import_module(f"tests.test_{name}") if file.exists() else None
    return getattr(module, table, {})


def flags_of(name):
    """Each (script, field, value) to try: all choices of its own, and one value of other flags."""
    config = changed(name, {})
    hints = typing.get_type_hints(type(config))
    fields = {field.name for field in dataclasses.fields(config)} - ELSEWHERE
    own = set(type(config).__annotations__)
    if name != ONE_SCRIPT:
        fields &= own | READ_BY_BUILD
    fields -= of_its_own_test(name, "REFUSED").keys()
    for field in sorted(fields):
        if typing.get_origin(hints[field]) is typing.Literal:
            values = typing.get_args(hints[field])
            now = getattr(config, field)
            values = values if field in own else [x for x in values if x != now][:1]
        else:
            values = [other(name, field)]
        for value in values:
            before = getattr(changed(name, needed(name, field, value)), field)
            if value != before and (name, field, value) not in ELSEWHERE:
                yield name, field, value


def marked(flags):
    """The flags as parameters; slow are all but one script, and all but one value of a choice."""
    seen = set()
    for name, field, value in flags:
        is_slow = (name, field) in seen or name != ONE_SCRIPT
        marks = [pytest.mark.slow] if is_slow else []
        seen.add((name, field))
        yield pytest.param(name, field, value, marks=marks)


FLAGS = list(marked(flag for name in SCRIPTS for flag in flags_of(name)))


class StageOfRun:
    """What one stage of a run makes. Programs are traced only; they are compared as text."""

    def __init__(self, name, config, side):
        self.config = config
        self.dataset = training.load_dataset(config)
        self.task = script(name).build(config, self.dataset.classes.num_classes)
        self.side = side

    @functools.cached_property
    def batch(self):
        task, config = self.task, self.config
        source = task.training_data(self.dataset).split("train")
        batches = pipeline.train_batches(
            source, task.transforms, config.batch_size, config.seed, shape_of=task.train_size
        )
        with contextlib.closing(batches):
            return next(batches)

    @functools.cached_property
    def prediction(self):
        images = jnp.zeros((1, self.side, self.side, self.batch["images"].shape[-1]))
        sizes = jnp.full((1, 2), self.side)
        inputs = [
            jnp.zeros((1, *(2 if isinstance(n, str) else n for n in given.shape)), given.dtype)
            for given in self.task.inputs.values()
        ]

        def predict(variables):
            return self.task.answers(self.task.predict(variables, images, sizes, *inputs))

        return program(predict, self.network[1])[0]

    @functools.cached_property
    def batches(self):
        return jax.tree.map(lambda x: (x.shape, sha256(x)), self.batch)

    @functools.cached_property
    def network(self):
        shape = (1, *self.batch["images"].shape[1:])
        made, (outputs, variables) = initial(self.task.model, self.config.seed, shape)
        if "logits" in outputs:
            assert outputs["logits"].shape[1:3] == self.batch["labels"].shape[1:]
        return made, variables

    @property
    def parameters(self):
        return self.network[0]

    @functools.cached_property
    def evaluation(self):
        return self.task.posthoc_batch_stats, len(getattr(self.task, "measures", ()))

    @functools.cached_property
    def updates(self):
        tx, params = build_optimizer(self.config, self.task.groups), self.network[1]["params"]
        return program(tx.update, params, jax.eval_shape(tx.init, params), params)[0]

    @functools.cached_property
    def training(self):
        task, config, shape = self.task, self.config, self.batch["images"].shape[1:]
        tx, seed = build_optimizer(config, task.groups), jnp.uint32(config.seed)
        draw = functools.partial(TrainState.draw, task.model, tx, shape, ema=config.ema_decay > 0)
        step = train_step(task.loss(self.dataset), ema_decay=config.ema_decay)
        return program(step, jax.eval_shape(draw, seed), shard(self.batch, config.accumulate))[0]


# In order of their cost.
MADE = ("batches", "evaluation", "parameters", "updates", "prediction", "training")


def stages(name, flags, side):
    """The stages of a run of the smoke preset with other flags."""
    return [StageOfRun(name, config, side) for config in changed(name, flags).each_stage()]


@functools.cache
def stages_before(name, flags, side):
    """The same for flags as pairs, kept for all tests that change one more."""
    return stages(name, dict(flags), side)


@functools.cache
def initial(model, seed, shape):
    """The program that makes a network's parameters; the shapes of its outputs and of these."""
    init = functools.partial(model.init_with_output, train=False)
    return program(init, jax.random.key(seed), np.zeros(shape, np.float32))


def program(function, *arguments):
    """A traced program as text, with the values of its constants; and the shapes of its outputs."""
    jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    values = [sha256(x) for x in constants_in(jaxpr)]
    return (re.sub(r"0x[0-9a-f]+", "", str(jaxpr)), values), shapes


def constants_in(jaxpr):
    """The constants of a closed jaxpr and of those inside it."""
    yield from jaxpr.consts
    for equation in jaxpr.jaxpr.eqns:
        for inner in jax.tree.leaves(list(equation.params.values())):
            if isinstance(inner, core.ClosedJaxpr):
                yield from constants_in(inner)


def sha256(x):
    return hashlib.sha256(np.asarray(x).tobytes()).hexdigest()


def different(some, others):
    """Names of what differs between two runs, lazily, as training is slow to trace."""
    if len(some) != len(others):
        yield "stages"
    for one, other in zip(some, others, strict=False):
        yield from (made for made in MADE if getattr(one, made) != getattr(other, made))


@pytest.mark.parametrize(("name", "field", "value"), FLAGS)
def test_another_value_does_something(name, field, value):
    flags, side = needed(name, field, value), SIDES.get((name, field), 32)
    before = stages_before(name, tuple(flags.items()), side)
    flags |= ALSO.get((name, field, value), {}) | {field: value}
    after = stages(name, flags, side)
    with jax.numpy_dtype_promotion("standard"):  # AdamW raises a float to an integer power
        assert next(different(before, after), None), f"--{field}={value} does nothing"


@pytest.mark.parametrize("name", members(SCRIPTS, (ONE_SCRIPT,)))
def test_equal_values_make_equal_runs(name):
    """Without this, a name or an address in a program's text would pass for an effect."""
    with jax.numpy_dtype_promotion("standard"):
        assert list(different(stages_before(name, (), 32), stages(name, {}, 32))) == []
