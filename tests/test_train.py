"""The step is the same function on any number of devices; the loop can be killed and resumed."""

import dataclasses
import json
import pathlib
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from dense_jax.data.datasets.shapes import ShapesSpec
from dense_jax.data.normalise import Normalise
from dense_jax.errors import UserError
from dense_jax.infer.whole_image import whole_image
from dense_jax.layers.conv import Conv
from dense_jax.objectives import pixels
from dense_jax.tasks import training
from dense_jax.tasks.semantic import Semantic, SemanticConfig, pixel_loss
from dense_jax.train import config as config_lib
from dense_jax.train import loop, schedules, step
from dense_jax.train.checkpoint import Checkpoints, read_variables
from dense_jax.train.config import RunConfig
from dense_jax.train.log import CompileCounter, MetricsWriter, read_metrics
from dense_jax.train.state import TrainState, load_matching, num_parameters

NUM_CLASSES = 3


class Tiny(nn.Module):
    """Two convolutions: enough to see gradients, small enough to compile in no time."""

    @nn.compact
    def __call__(self, images, *, train):
        x = nn.relu(Conv(4, 3, name="conv1")(images))
        return {"logits": Conv(NUM_CLASSES, 1, name="score")(x)}


def make_batch(number, batch_size=8, size=6):
    """Random images; later images of the batch are ignored more and more, the first wholly."""
    rng = np.random.default_rng(number)
    labels = rng.integers(0, NUM_CLASSES, (batch_size, size, size), dtype=np.int32)
    for i in range(batch_size):
        labels[i][rng.random((size, size)) < i / batch_size] = 255
    labels[:2] = 255
    return {
        "images": rng.standard_normal((batch_size, size, size, 3)).astype(np.float32),
        "labels": labels,
        "valid": np.ones(batch_size, bool),
        "index": np.arange(batch_size, dtype=np.int32),
    }


@dataclasses.dataclass
class FakeBatches:
    """Batches that are a function of their number, like those of the pipeline."""

    number: int = 0
    poison: int | None = None

    def __next__(self):
        batch = make_batch(self.number)
        if self.number == self.poison:
            batch["images"][3] = np.nan
        self.number += 1
        return batch

    def get_state(self):
        return {"number": self.number}

    def set_state(self, state):
        self.number = state["number"]

    def close(self):
        pass

    def names(self, index):
        return [f"image_{i}" for i in index]


def make_state(config, groups=()):
    tx = schedules.build_optimizer(config, groups)
    return TrainState.init(Tiny(), tx, (6, 6, 3), seed=config.seed, ema=config.ema_decay > 0)


def predict(params, images) -> jax.Array:
    outputs: Any = Tiny().apply({"params": params}, images, train=True)
    return outputs["logits"]


def make_step(config):
    return step.train_step(pixel_loss(config.loss_norm), ema_decay=config.ema_decay)


def run_steps(config, num_devices, num_steps=5):
    """Final state and losses on the first ``num_devices`` virtual devices."""
    devices = jax.devices()[:num_devices]
    loss = pixel_loss(config.loss_norm)
    train_step = step.train_step(loss, ema_decay=config.ema_decay, devices=devices)
    state, values = step.replicate(make_state(config), devices), []
    for number in range(num_steps):
        batch = step.shard(make_batch(number), config.accumulate, devices)
        state, scalars = train_step(state, batch)
        values.append(float(scalars["loss"]))
    return state, values


@pytest.mark.parametrize(
    ("norm", "spreads"),
    [("valid", [(2, 1), (4, 1), (1, 4), (2, 2)]), ("batch", [(4, 1)]), ("sum", [(2, 2)])],
)
def test_devices_and_micro_batches_do_not_change_the_result(norm, spreads):
    rate = 0.1 if norm == "valid" else 1e-3
    config = RunConfig(learning_rate=rate, loss_norm=norm, ema_decay=0.9)
    reference, losses_1 = run_steps(config, 1)
    for num_devices, accumulate in spreads:
        other = dataclasses.replace(config, accumulate=accumulate)
        state, losses_n = run_steps(other, num_devices)
        np.testing.assert_allclose(losses_n, losses_1, rtol=1e-5)
        chex.assert_trees_all_close(state.params, reference.params, atol=1e-5)
        chex.assert_trees_all_close(state.ema_params, reference.ema_params, atol=1e-5)
        for leaf in jax.tree.leaves(state):
            shards = [np.asarray(s.data) for s in leaf.addressable_shards]
            assert len(shards) == num_devices
            for shard in shards[1:]:
                np.testing.assert_array_equal(shard, shards[0])


def confident(apply, batch, rng):
    """Two losses; what the second is divided by is decided by the network, and not by labels."""
    del rng
    logits = apply(batch["images"])["logits"]
    labels = pixels.cross_entropy({"logits": logits}, batch)["logits"]
    surest = jnp.max(logits, axis=-1)
    chosen = surest > 0.3
    sharp = jnp.sum(jnp.where(chosen, surest**2, 0.0)), jnp.sum(chosen, dtype=jnp.int32)
    return {"labels": labels, "sharp": sharp}


@pytest.mark.slow
def test_counts_of_the_network_do_not_tell_devices_and_micro_batches_either():
    config = RunConfig(learning_rate=0.1, batch_size=8)
    batch, start = make_batch(0), jax.device_get(make_state(config))
    results = []
    for num_devices, accumulate in ((1, 1), (4, 1), (1, 4), (2, 2)):
        devices = jax.devices()[:num_devices]
        train_step = step.train_step(confident, devices=devices)
        state, scalars = train_step(
            step.replicate(start, devices), step.shard(batch, accumulate, devices)
        )
        results.append(jax.device_get((scalars, state.params)))
    logits = predict(start.params, batch["images"])
    surest = np.max(logits, axis=-1)
    assert 0 < np.sum(surest > 0.3) < surest.size
    (scalars, params), *others = results
    np.testing.assert_allclose(scalars["sharp"], np.mean(surest[surest > 0.3] ** 2), rtol=1e-5)
    np.testing.assert_allclose(scalars["loss"], scalars["sharp"] + scalars["labels"], rtol=1e-6)
    for other in others:
        chex.assert_trees_all_close(other, (scalars, params), atol=1e-5)


@pytest.mark.slow
def test_counts_of_labels_cost_no_second_pass_of_the_network():
    """With micro-batches the counts come first; the compiler drops the network from that pass."""

    def flops(loss, accumulate):
        device = jax.devices()[:1]
        train_step: Any = step.train_step(loss, devices=device)
        batch = step.shard(make_batch(0, size=16), accumulate, device)
        state = step.replicate(make_state(RunConfig()), device)
        return train_step.lower(state, batch).compile().cost_analysis()["flops"]

    of_labels, of_network = flops(pixel_loss("valid"), 4), flops(confident, 4)
    assert of_network > 1.1 * of_labels


def test_a_loss_and_an_optimiser_of_ones_own(tmp_path):
    """A user's own loss and optax transformation, without a copied line of the library."""
    config = SemanticConfig(
        shapes=ShapesSpec(size=(8, 8), num_train=8, num_val=4, num_test=4),
        num_steps=2, log_every=1, batch_size=4, workdir=str(tmp_path), weight_decay=1.0,
    )  # fmt: skip
    task = Semantic(config, Seven(), config.whole_images())

    def squares(apply, batch, rng):
        logits = apply(batch["images"])["logits"]
        return {"squares": (jnp.sum(logits**2), logits.size)}

    state = training.train(task, loss=squares, optimizer=optax.sgd(0.5))
    rows = list(read_metrics(tmp_path / "metrics.jsonl"))
    # The mean of w^2, over 6 equal logits: w falls by 0.5 * 2 w / 6 in each step.
    np.testing.assert_allclose(  # sums of 1,536 squares, in float32 one after another
        [rows[0]["loss"], rows[1]["loss"]], [49, 49 * (5 / 6) ** 2], rtol=1e-5
    )
    params: Any = state.params
    np.testing.assert_allclose(params["w"], np.full(6, 7 * (5 / 6) ** 2), rtol=1e-5)
    assert "learning_rate" not in rows[0]  # that of the flags would be another optimiser's
    record = json.loads((tmp_path / "config.json").read_text())
    assert "squares" in record["own_loss"]
    assert record["own_optimizer"] == "GradientTransformationExtraArgs"
    # The run goes on with the same loss only.
    longer = dataclasses.replace(task, config=dataclasses.replace(config, num_steps=3))
    with pytest.raises(UserError, match=r"own loss .*squares, and now it is none: give the same"):
        training.train(longer, optimizer=optax.sgd(0.5))
    training.train(longer, loss=squares, optimizer=optax.sgd(0.5))


@pytest.mark.parametrize("returned", [jnp.zeros(()), {"x": jnp.zeros(())}])
def test_a_loss_of_another_form_is_one_line(returned, tmp_path):
    config = SemanticConfig(
        shapes=ShapesSpec(size=(8, 8), num_train=8, num_val=4, num_test=4),
        num_steps=2, batch_size=4, workdir=str(tmp_path),
    )  # fmt: skip
    task = Semantic(config, Seven(), config.whole_images())
    with pytest.raises(UserError, match=r"return \{name: \(sum, count\)\}"):
        training.train(task, loss=lambda apply, batch, rng: returned)


class Seven(nn.Module):
    """Logits that are parameters and start at 7."""

    @nn.compact
    def __call__(self, images, *, train):
        w = self.param("w", lambda _: jnp.full(6, 7, jnp.float32))
        return {"logits": jnp.broadcast_to(w.reshape(1, 1, 1, 6), (*images.shape[:3], 6))}


@pytest.mark.slow
def test_mean_of_device_means_would_be_another_loss():
    """The batch of the test above can tell the two apart."""
    batch, config = make_batch(0), RunConfig()
    state = make_state(config)
    logits = predict(state.params, batch["images"])
    pixel_loss = pixels.softmax_cross_entropy(logits, jnp.asarray(batch["labels"]))
    count = np.sum(batch["labels"] != 255, axis=(1, 2))
    whole = float(jnp.sum(pixel_loss)) / count.sum()
    halves = [float(jnp.sum(pixel_loss[i : i + 4])) / count[i : i + 4].sum() for i in (0, 4)]
    assert abs(np.mean(halves) - whole) > 1e-3


def test_step_equals_a_hand_written_sgd():
    config = RunConfig(
        learning_rate=0.1, momentum=0.9, weight_decay=0.01, bias_lr=2.0, ema_decay=0.2
    )
    state = make_state(config)
    train_step = make_step(config)

    def loss(params, batch):
        logits = predict(params, batch["images"])
        log_p = jax.nn.log_softmax(logits)
        labels = batch["labels"]
        mask = labels != 255
        picked = jnp.take_along_axis(log_p, jnp.where(mask, labels, 0)[..., None], -1)[..., 0]
        return -jnp.sum(jnp.where(mask, picked, 0.0)) / jnp.sum(mask).astype(jnp.float32)

    params = jax.device_get(state.params)
    average, velocity = (jax.tree.map(f, params) for f in (np.copy, np.zeros_like))
    running = step.replicate(state)
    for number in range(3):
        batch = make_batch(number)
        grads = jax.device_get(jax.grad(loss)(params, batch))
        for layer in params:
            for kind, rate, decay in (("kernel", 0.1, 0.01), ("bias", 0.2, 0.0)):
                g = grads[layer][kind] + decay * params[layer][kind]
                velocity[layer][kind] = 0.9 * velocity[layer][kind] + g
                params[layer][kind] = params[layer][kind] - rate * velocity[layer][kind]
        decay = min(0.2, (2 + number) / (11 + number))  # 2 / 11, then 0.2
        average = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * p, average, params)
        running, scalars = train_step(running, step.shard(batch, 1))
        assert np.isfinite(float(scalars["loss"]))
    chex.assert_trees_all_close(jax.device_get(running.params), params, atol=1e-6)
    chex.assert_trees_all_close(jax.device_get(running.ema_params), average, atol=1e-6)


def test_a_batch_without_labels_has_loss_zero_and_changes_nothing():
    config = RunConfig(weight_decay=0.0)
    state = make_state(config)
    before: Any = jax.device_get(state.params)
    batch = make_batch(0) | {"labels": np.full((8, 6, 6), 255, np.int32)}
    state, scalars = make_step(config)(step.replicate(state), step.shard(batch, 1))
    assert float(scalars["loss"]) == 0
    chex.assert_trees_all_equal(jax.device_get(state.params), before)


def test_frozen_parameters_stay_and_hold_no_momentum():
    config = RunConfig(learning_rate=0.1)
    state = make_state(config, [schedules.ParamGroup(r"^(?!score)", lr=0.0)])
    before: Any = jax.device_get(state.params)
    assert num_parameters(state.opt_state) < num_parameters(before)
    state, _ = make_step(config)(step.replicate(state), step.shard(make_batch(0), 1))
    after: Any = jax.device_get(state.params)
    chex.assert_trees_all_equal(after["conv1"], before["conv1"])
    assert np.abs(after["score"]["kernel"] - before["score"]["kernel"]).max() > 0


def test_a_group_that_matches_nothing_is_an_error():
    with pytest.raises(UserError, match="'fc8'"):
        make_state(RunConfig(), [schedules.ParamGroup("fc8", lr=0.0)])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"schedule": "constant"}, {0: 1.0, 99: 1.0}),
        ({"schedule": "poly", "poly_power": 0.9}, {0: 1.0, 50: 0.5**0.9, 100: 0.0}),
        ({"schedule": "cosine"}, {0: 1.0, 50: 0.5, 100: 0.0}),
        ({"schedule": "step", "step_at": (0.6, 0.85)}, {59: 1.0, 61: 0.1, 90: 0.01}),
        ({"schedule": "constant", "warmup_steps": 10}, {0: 0.1, 4: 0.5, 9: 1.0, 50: 1.0}),
        ({"schedule": "poly", "warmup_steps": 20, "poly_power": 1.0}, {20: 1.0, 60: 0.5, 100: 0}),
        ({"schedule": "step", "warmup_steps": 10}, {59: 1.0, 61: 0.1, 90: 0.01}),
    ],
)
def test_schedules_by_their_formulas(flags, expected):
    schedule = schedules.build_schedule(RunConfig(num_steps=100, learning_rate=1.0, **flags))
    for at, rate in expected.items():
        assert np.asarray(schedule(at)) == pytest.approx(rate, abs=1e-6), at


@pytest.fixture
def config(tmp_path):
    return RunConfig(
        workdir=str(tmp_path / "run"),
        num_steps=7,
        save_every=2,
        eval_every=3,
        log_every=1,
        learning_rate=0.05,
        warmup_steps=6,  # a run that is resumed at step 4 is still warming up
        ema_decay=0.9,
    )


def evaluate(state, step):
    """A score that is best at step 3."""
    return {"mean_iou": 1.0 - abs(step - 3) / 10}


def fit(config, **kwargs):
    pathlib.Path(config.workdir).mkdir(exist_ok=True)
    batches, rate = FakeBatches(**kwargs), schedules.build_schedule(config)
    return loop.fit(
        make_state(config), make_step(config), batches, config, evaluate, "mean_iou", rate
    )


def test_a_resumed_run_ends_with_the_same_bits(config, tmp_path):
    whole = fit(dataclasses.replace(config, workdir=str(tmp_path / "whole")))
    fit(dataclasses.replace(config, num_steps=4))
    resumed = fit(config)
    leaves = zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True)
    for ours, theirs in leaves:
        np.testing.assert_array_equal(ours, theirs)
    rows = [(r["kind"], r["step"]) for r in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert rows.count(("train", 5)) == 1
    assert [s for k, s in rows if k == "train"] == list(range(1, 8))


def test_a_run_is_not_shortened(config):
    fit(config)
    with pytest.raises(UserError, match="at step 7, beyond --num-steps=3"):
        fit(dataclasses.replace(config, num_steps=3))


def test_last_and_best_are_kept(config):
    fit(config)
    with Checkpoints(config.workdir, "mean_iou") as checkpoints:
        assert (checkpoints.latest_step, checkpoints.best_step) == (7, 3)
    averaged: Any
    averaged, at = read_variables(config.workdir, "best", "mean_iou")
    assert at == 3
    assert set(averaged["params"]) == {"conv1", "score"}


def test_a_run_that_starts_from_another_averages_from_there(config):
    trained: Any = fit(config)
    fresh = make_state(dataclasses.replace(config, seed=1))
    state = training._initialise_from(f"run:{config.workdir}", fresh, fresh.tx, "caffe")
    chex.assert_trees_all_equal(state.params, trained.ema_params)
    chex.assert_trees_all_equal(state.ema_params, state.params)
    make_step(config)(step.replicate(state), step.shard(make_batch(0), 1))  # owns its arrays


def test_a_network_sees_images_at_its_scale():
    class Height(nn.Module):
        def __call__(self, images, *, train):
            return {"logits": jnp.full_like(images, images.shape[1])}

    images = jnp.zeros((1, 8, 6, 3))
    for scale, height in ((1.0, 8), (0.5, 4), (0.01, 1)):
        outputs = whole_image(Height(), scale)({}, images, jnp.array([[8, 6]]))
        chex.assert_trees_all_close(outputs["logits"], jnp.full(images.shape, height, jnp.float32))


class Normalised(nn.Module):
    """Channel means and deviations of the images, as any batch norm tracks them."""

    bn_momentum: float = 0.9

    @nn.compact
    def __call__(self, images, *, train):
        norm = nn.BatchNorm(not train, momentum=self.bn_momentum, axis_name=step.AXIS, name="bn")
        return {"logits": norm(images)}


def test_posthoc_statistics_are_those_of_the_training_split(config, tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(256, size=(12, 4, 4, 3), dtype=np.uint8)
    label = np.zeros((4, 4), np.uint8)
    source: Any = [{"image": p, "label": label, "name": str(i)} for i, p in enumerate(pixels)]
    config = dataclasses.replace(config, batch_size=4)
    state = TrainState.init(Normalised(), optax.sgd(0.1), (4, 4, 3))
    refresh = training.posthoc_statistics(Normalised(), source, [Normalise("caffe")], config)
    first, second = (refresh(s) for s in (state, refresh(state)))
    chex.assert_trees_all_equal(first.model_state, second.model_state)  # of the parameters alone
    found = first.model_state["batch_stats"]["bn"]
    images = pixels - np.array([122.679, 116.669, 104.007])
    np.testing.assert_allclose(found["mean"], images.mean((0, 1, 2)), rtol=1e-3)
    # Batches of 64 pixels vary less than all pixels do.
    np.testing.assert_allclose(found["var"], images.var((0, 1, 2)), rtol=0.05)
    chex.assert_trees_all_equal(first.params, state.params)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, value):
    """The loss of a step can be finite, and its update not."""
    good = {"params": {"w": np.ones(3, np.float32)}, "step": np.int32(1)}
    bad = {"params": {"w": np.array([1, value, 1], np.float32)}, "step": np.int32(2)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, good, {"next_batch": 1})
        checkpoints.wait()
        with pytest.raises(UserError, match=r"step 2 made params/w .*step 1 is kept"):
            checkpoints.save(2, bad, {"next_batch": 2})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step == 1
        np.testing.assert_array_equal(checkpoints.read()[0]["params"]["w"], 1)


def test_a_loss_that_is_not_finite_stops_with_step_and_images(config):
    with pytest.raises(UserError, match=r"nan at step 6, .*image_3"):
        fit(config, poison=5)
    with Checkpoints(config.workdir) as checkpoints:
        assert checkpoints.latest_step in (4, None)


def test_a_new_shape_after_warm_up_is_counted(config, capfd):
    batches = FakeBatches()
    normal = make_batch
    try:
        globals()["make_batch"] = lambda n: normal(n, size=6 if n != 4 else 8)
        loop.fit(make_state(config), make_step(config), batches, config)
    finally:
        globals()["make_batch"] = normal
    assert "compiled again" in "".join(capfd.readouterr())


def test_a_checkpoint_of_another_network_is_refused(config):
    fit(config)

    class Wider(nn.Module):
        @nn.compact
        def __call__(self, images, *, train):
            x = nn.relu(Conv(5, 3, name="conv1")(images))
            return {"logits": Conv(NUM_CLASSES, 1, name="score")(x)}

    state = TrainState.init(Wider(), schedules.build_optimizer(config), (6, 6, 3), ema=True)
    with Checkpoints(config.workdir) as checkpoints, pytest.raises(UserError, match="conv1"):
        checkpoints.restore(state)


def test_settings_that_changed_are_named():
    old = RunConfig(seed=0)
    config_lib.check_resumable(old, RunConfig(seed=0, num_steps=9, log_every=3), "w")
    from_file = config_lib.from_json(RunConfig, json.loads(json.dumps(old.to_json())))
    config_lib.check_resumable(from_file, old, "w")
    with pytest.raises(UserError, match="--seed was 0 and is now 1"):
        config_lib.check_resumable(old, RunConfig(seed=1), "w")


def test_config_survives_json():
    config = RunConfig(step_at=(0.5, 0.75), seed=3)
    assert config_lib.from_json(RunConfig, json.loads(json.dumps(config.to_json()))) == config
    with pytest.raises(UserError, match="colour"):
        config_lib.from_json(RunConfig, {"colour": 1})


@dataclasses.dataclass(frozen=True)
class Inner:
    names: tuple[str, ...] = ("a",)
    depth: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class NestedConfig(RunConfig):
    inner: Inner = Inner()


def test_config_with_dataclasses_inside_survives_json():
    config = NestedConfig(inner=Inner(("b", "c"), 2), shapes=ShapesSpec(size=(8, 9)))
    assert config_lib.from_json(NestedConfig, json.loads(json.dumps(config.to_json()))) == config
    # A run from before a field was there takes its default.
    assert config_lib.from_json(NestedConfig, {"inner": {"depth": 3}}).inner == Inner(depth=3)
    with pytest.raises(UserError, match="hue"):
        config_lib.from_json(NestedConfig, {"inner": {"hue": 1}})


@pytest.mark.parametrize(
    "flags", [{"num_steps": 0}, {"ema_decay": 1.0}, {"batch_size": 8, "accumulate": 3}]
)
def test_impossible_settings_are_refused(flags):
    with pytest.raises(UserError, match="--"):
        RunConfig(**flags)


def test_matching_parameters_are_copied_and_the_rest_named():
    kernel = {"kernel": jnp.zeros((3, 1))}
    new: Any = {"a": kernel, "b": {"kernel": jnp.zeros((2, 1))}, "c": jnp.zeros(1)}
    old: Any = {"a": {"kernel": np.ones((3, 1))}, "b": {"kernel": np.ones((4, 1))}, "d": np.ones(1)}
    said = []
    loaded = load_matching(new, old, said.append)
    np.testing.assert_array_equal(loaded["a"]["kernel"], np.ones((3, 1)))
    np.testing.assert_array_equal(loaded["b"]["kernel"], np.zeros((2, 1)))
    text = "\n".join(said)
    assert "1 of 3" in text
    assert all(name in text for name in ("b/kernel", "new here: c", "other run: d"))
    with pytest.raises(UserError, match="no kernel"):
        load_matching({"a": jnp.zeros((3, 1))}, {"z": np.ones((3, 1))})


def test_metrics_file_survives_a_cut_line(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, "train", {"loss": 1.0})
        writer.write(2, "train", {"loss": float("nan")})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "ki')
    with MetricsWriter(tmp_path, step=2) as writer:
        writer.write(3, "train", {"loss": 3.0})
    rows = list(read_metrics(tmp_path / "metrics.jsonl"))
    assert [(r["step"], r["loss"]) for r in rows] == [(1, 1.0), (2, None), (3, 3.0)]
    assert (tmp_path / "train.csv").read_text().splitlines()[0] == "step,loss"


def test_scores_of_the_last_evaluation_alone_reach_the_table(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, "eval", {"mean_iou": 0.25})
        writer.write(2, "eval", {"mean_iou": 0.5, "boundary_f1": 0.75})
        writer.write(3, "eval", {"mean_iou": 1.0})
    lines = (tmp_path / "eval.csv").read_text().splitlines()
    assert lines == ["step,mean_iou,boundary_f1", "1,0.25,", "2,0.5,0.75", "3,1.0,"]


def test_compile_counter_counts_programs():
    CompileCounter.start()
    before = CompileCounter.programs
    jax.jit(lambda x: x + lax.iota(jnp.int32, 3))(jnp.arange(3)).block_until_ready()
    assert CompileCounter.programs > before


def test_optimizer_adamw_matches_optax():
    config = RunConfig(optimizer="adamw", learning_rate=0.1, weight_decay=0.02)
    params = {"conv": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    grads = jax.tree.map(lambda p: 0.3 * p, params)
    ours = schedules.build_optimizer(config)
    mask = {"conv": {"kernel": True, "bias": False}}
    theirs = optax.adamw(0.1, weight_decay=0.02, mask=mask)
    with jax.numpy_dtype_promotion("standard"):  # optax counts steps in integers
        updates = [tx.update(grads, tx.init(params), params)[0] for tx in (ours, theirs)]
    chex.assert_trees_all_close(*updates, rtol=1e-6)


def test_long_gradients_are_shortened_to_their_limit():
    """The norm is that of all trained parameters; frozen ones do not count."""
    params = {"conv": {"kernel": jnp.zeros((2, 2))}, "fixed": {"kernel": jnp.zeros(3)}}
    grads = {"conv": {"kernel": jnp.full((2, 2), 3.0)}, "fixed": {"kernel": jnp.full(3, 100.0)}}
    groups = [schedules.ParamGroup("^fixed/", lr=0.0)]
    for limit, expected in ((0.0, 3.0), (7.0, 3.0), (2.0, 1.0)):  # a norm of 6
        config = RunConfig(learning_rate=1.0, weight_decay=0.0, clip_norm=limit)
        tx = schedules.build_optimizer(config, groups)
        updates: Any = tx.update(grads, tx.init(params), params)[0]
        np.testing.assert_allclose(updates["conv"]["kernel"], -expected, rtol=1e-6)
        assert not updates["fixed"]["kernel"].any()
