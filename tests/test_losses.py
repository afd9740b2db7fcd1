import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.objectives import pixels as losses


def slow_cross_entropy(logits, labels, class_weights=None, pixel_weights=None):
    """One pixel at a time in float64."""
    loss = np.zeros(labels.shape)
    for index in np.ndindex(labels.shape):
        label, scores = labels[index], logits[index].astype(np.float64)
        if not 0 <= label < len(scores):
            continue
        probabilities = np.exp(scores - scores.max())
        loss[index] = -np.log(probabilities[label] / probabilities.sum())
        if class_weights is not None:
            loss[index] *= class_weights[label]
        if pixel_weights is not None:
            loss[index] *= pixel_weights[index]
    return loss


def example(seed=0, num_classes=5):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (2, 4, 6, num_classes)).astype(np.float32)
    labels = rng.integers(0, num_classes, (2, 4, 6)).astype(np.int32)
    labels[rng.random(labels.shape) < 0.3] = 255
    return jnp.asarray(logits), jnp.asarray(labels)


@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_equals_slow_twin(weighted):
    logits, labels = example()
    rng = np.random.default_rng(1)
    classes = jnp.asarray(rng.uniform(0, 2, 5), jnp.float32) if weighted else None
    pixels = jnp.asarray(rng.uniform(0, 2, labels.shape), jnp.float32) if weighted else None

    def cross_entropy(logits, labels):
        return losses.softmax_cross_entropy(
            logits, labels, class_weights=classes, pixel_weights=pixels
        )

    loss = cross_entropy(logits, labels)
    assert loss.dtype == jnp.float32
    slow = slow_cross_entropy(np.asarray(logits), np.asarray(labels), classes, pixels)
    np.testing.assert_allclose(loss, slow, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.jit(cross_entropy)(logits, labels), loss, rtol=1e-6)


def test_zero_logits_cost_log_num_classes():
    loss = losses.softmax_cross_entropy(jnp.zeros((1, 2, 2, 21)), jnp.zeros((1, 2, 2), jnp.int32))
    np.testing.assert_allclose(loss, np.log(21), rtol=1e-6)


@pytest.mark.parametrize("label", [255, -1, 5, 254])
def test_unscored_labels_give_no_loss_and_no_gradient(label):
    logits, _ = example()
    labels = jnp.full(logits.shape[:-1], label, jnp.int32)

    def total(logits):
        weights = jnp.full((5,), 2.0)
        return losses.softmax_cross_entropy(logits, labels, class_weights=weights).sum()

    value, gradient = jax.value_and_grad(total)(logits)
    assert value == 0
    assert not gradient.any()


def test_ignore_label_inside_the_range_is_ignored():
    loss = losses.softmax_cross_entropy(
        jnp.zeros((1, 1, 2, 3)), jnp.array([[[0, 1]]]), ignore_label=0
    )
    assert loss[0, 0, 0] == 0
    assert loss[0, 0, 1] > 0


def test_logits_of_ignored_pixels_do_not_matter():
    logits, labels = example()
    other = jnp.where((labels == 255)[..., None], 1e4, logits)
    chex.assert_trees_all_equal(
        losses.softmax_cross_entropy(logits, labels), losses.softmax_cross_entropy(other, labels)
    )


def test_large_and_bfloat16_logits_stay_finite():
    labels = jnp.zeros((1, 1, 1), jnp.int32)
    loss = losses.softmax_cross_entropy(jnp.array([[[[-1e30, 1e30]]]]), labels)
    assert np.isfinite(loss).all()
    half = losses.softmax_cross_entropy(jnp.ones((1, 1, 1, 2), jnp.bfloat16), labels)
    assert half.dtype == jnp.float32


def test_wrong_shapes_are_named():
    logits, labels = example()
    with pytest.raises(ValueError, match=r"\(2, 4, 6, 5\)"):
        losses.softmax_cross_entropy(logits, labels[:1])
    with pytest.raises(ValueError, match="class_weights"):
        losses.softmax_cross_entropy(logits, labels, class_weights=jnp.ones(1))
    with pytest.raises(ValueError, match="pixel_weights"):
        losses.softmax_cross_entropy(logits, labels, pixel_weights=jnp.ones((1, 4, 6)))


def test_denominators():
    labels = jnp.array([[[0, 255, 1]], [[2, 2, 2]]])
    valid = jnp.array([True, False])
    keep = jnp.array([[[0.5, 1, 0]], [[1, 1, 1]]])
    assert losses.count_pixels(labels, valid, "valid") == 2
    assert losses.count_pixels(labels, valid, "valid", pixel_weights=keep) == 2
    assert losses.count_pixels(labels, valid, "weights") == 2
    assert losses.count_pixels(labels, valid, "weights", pixel_weights=keep) == 0.5
    classes = jnp.array([3.0, 5.0, 7.0])
    weights = {"class_weights": classes, "pixel_weights": keep + 1}
    assert losses.count_pixels(labels, valid, "weights", **weights) == 3 * 1.5 + 5 * 1
    assert losses.count_pixels(labels, valid, "batch") == 1
    assert losses.count_pixels(labels, valid, "sum") == 0
    with pytest.raises(ValueError, match="mean"):
        losses.count_pixels(labels, valid, "mean")  # pyrefly: ignore


def test_labels_are_picked_where_the_units_of_smaller_scores_sit():
    pixels = np.arange(32)
    labels = jnp.asarray(100 * pixels[:, None] + pixels)[None, None]  # leading axes are kept
    eighth = losses.labels_at(labels, (4, 4), align_corners=False)
    np.testing.assert_array_equal(eighth, labels[..., ::8, ::8])
    # DeepLab: 8 m + 1 pixels, m + 1 units; at other sizes the nearest pixel, halves up.
    aligned = losses.labels_at(labels[..., :25, :25], (4, 4), align_corners=True)
    np.testing.assert_array_equal(aligned, labels[..., :25:8, :25:8])
    row = losses.labels_at(labels[..., :1, :10], (1, 3), align_corners=True)
    np.testing.assert_array_equal(row[0, 0, 0], [0, 5, 9])  # 0, 4.5, 9
    one = losses.labels_at(labels, (1, 32), align_corners=True)
    np.testing.assert_array_equal(one, labels[..., :1, :])
    with pytest.raises(ValueError, match=r"\(33, 32\) are larger"):
        losses.labels_at(labels, (33, 32), align_corners=False)


def test_padding_with_ignore_leaves_the_valid_mean():
    logits, labels = example()
    pad = ((0, 0), (0, 3), (0, 2))

    def mean(logits, labels):
        total = losses.count_pixels(labels, jnp.ones(2, bool), "valid")
        return losses.softmax_cross_entropy(logits, labels).sum() / total

    padded = mean(jnp.pad(logits, (*pad, (0, 0))), jnp.pad(labels, pad, constant_values=255))
    np.testing.assert_allclose(padded, mean(logits, labels), rtol=1e-6)


@pytest.mark.parametrize(
    ("definition", "shares"),
    [("eigen", [3 / 8, 1 / 4, 4 / 8]), ("pixels", [3 / 8, 1 / 8, 4 / 8])],
)
def test_median_frequency_weights_by_hand(definition, shares):
    # class 0: 3 of 8 labelled pixels, in both images; 1: one, in an image of 4; 2: 4 of 8; no 3
    first, second = np.array([[0, 0, 1, 2], [255] * 4]), np.array([[0, 2, 2, 2]])
    weights = losses.median_frequency_weights([first, second], 4, definition=definition)
    np.testing.assert_allclose(weights, [*(3 / 8 / np.array(shares)), 1], rtol=1e-6)
    np.testing.assert_array_equal(losses.median_frequency_weights([], 2), [1, 1])


def test_unknown_class_frequency_is_refused():
    with pytest.raises(ValueError, match="median"):
        losses.median_frequency_weights([], 2, definition="median")  # pyrefly: ignore
