"""Limits of flags, flags that need one another, and stages of training."""

import dataclasses
from typing import Literal

import pytest

from dense_jax.errors import UserError
from dense_jax.train.config import (
    NO_STAGE,
    Count,
    Counts,
    Rate,
    RunConfig,
    Shares,
    Sides,
    Stage,
    changed,
    from_json,
    stage_by_stage,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """A script's flags."""

    net: Literal["small", "large", "huge"] = "small"
    pool: Literal["off", "on"] = "off"
    rates: Counts | None = None
    drop: Rate | None = None
    crop: Sides | None = None
    train_mode: Literal["front", "context", "joint"] = "joint"
    first: Stage = NO_STAGE
    second: Stage = NO_STAGE

    def __post_init__(self) -> None:
        super().__post_init__()
        self.needs("pool", "on", net=("large", "huge"), rates=None)
        self.needs("crop", scale=1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"rates": ()}, "^--rates: give one or more"),
        ({"rates": (2, 0)}, "^--rates 2 0: give one or more"),
        ({"drop": 1.0}, r"^--drop=1\.0: give a value in \[0, 1\)"),
        ({"crop": (0, 8)}, "^--crop 0 8: give at least 1 1"),
        ({"pool": "on"}, "^--pool=on does not go with --net=small: give --net=large or huge$"),
        ({"pool": "on", "net": "huge", "rates": (2, 4)}, "with --rates 2 4: leave --rates out$"),
        ({"crop": (8, 8), "scale": 0.5}, r"^--crop 8 8 does not go with --scale=0\.5: give"),
    ],
)
def test_refusals_name_flags_values_and_remedy(flags, message):
    with pytest.raises(UserError, match=message):
        Config(**flags)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"rates": (2,), "drop": 0.0, "crop": (1, 1)},
        {"pool": "on", "net": "large"},
        {"scale": 0.5, "net": "large", "rates": (2, 4)},
    ],
)
def test_other_values_are_taken(flags):
    Config(**flags)


def test_each_stage_starts_from_the_one_before():
    config = Config(
        first=Stage("front", num_steps=3, crop=(8, 9)), second=Stage("context"), workdir="run"
    )
    assert from_json(Config, config.to_json()) == config
    stages = list(stage_by_stage(config, ("first", "second"), batch_size=2))
    assert [(s.train_mode, s.workdir, s.init, s.num_steps, s.crop) for s in stages] == [
        ("front", "run/front", None, 3, (8, 9)),
        ("context", "run/context", "run:run/front", 1000, None),
        ("joint", "run/joint", "run:run/context", 1000, None),
    ]
    assert [s.batch_size for s in stages] == [2, 2, 8]
    assert all((s.first, s.second) == (NO_STAGE, NO_STAGE) for s in stages)


def test_a_trained_run_takes_other_settings_of_evaluation():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Tested(RunConfig):
        test_side: Count | None = None
        test_scales: Shares = (1.0,)
        test_flip: Literal["on", "off"] = "off"

    own = Tested()
    assert changed(own, ()) == own
    found = changed(own, ["test-side=7", "test-scales=1,0.75", "test-flip=on"])
    assert found == Tested(test_side=7, test_scales=(1.0, 0.75), test_flip="on")
    assert changed(own, ["test-scales=0.5"]).test_scales == (0.5,)
    for change, words in {
        "batch-size=7": r"give NAME=VALUE for a test setting \(test-side, test-scales, test-flip\)",
        "test-flip": "give NAME=VALUE",
        "test-flip=maybe": r"--change test-flip=maybe: 'maybe' is no Literal\['on', 'off'\]",
        "test-side=1.5": "'1.5' is no int$",
        "test-scales=2": "--test-scales 2: .* each in",
        "test-scales=": "--test-scales.*one or more",
    }.items():
        with pytest.raises(UserError, match=words):
            changed(own, [change])
    with pytest.raises(UserError, match=r"for a test setting \(it has none\)"):
        changed(RunConfig(), ["test-flip=on"])
