"""Importance from fine-tuning's updates, and the searches over scales and clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax import quantize

D = jnp.array([[0.0, 1, 2, 3], [0, 0, 4, 5]])


def layer(seed=0, rows=6, columns=16, samples=80):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(rows, columns)).astype(np.float32)
    x = rng.normal(size=(samples, columns)) * np.exp(rng.normal(size=columns))
    return jnp.asarray(w), jnp.asarray(x, jnp.float32)


def output_error(w, other, x):
    gap = (np.asarray(other, np.float64) - np.asarray(w, np.float64)) @ np.asarray(x, np.float64).T
    return np.mean(gap**2)


def test_by_hand():
    stats = quantize.update_stats([D])
    assert [float(v) for v in stats] == [1.0, 3.0, 5.0]
    want = [[1, 10, 3.25, 1], [1, 1, 3.25, 10]]
    np.testing.assert_allclose(quantize.protect_ends(D, stats), want)
    np.testing.assert_allclose(quantize.channel_importance(D, stats), [3, 11, 3.25, 5.5])
    np.testing.assert_allclose(quantize.channel_importance(D, stats, ratio=1.0), [3, 2, 1, 1])


def test_statistics_are_over_all_matrices():
    rng = np.random.default_rng(1)
    leaves = {"a": rng.exponential(size=(4, 5)), "b": [rng.exponential(size=33) * 1e-3]}
    leaves["a"][0, :3] = 0.0
    every = np.concatenate([leaves["a"].ravel(), leaves["b"][0]]).astype(np.float32)
    every = every[every > 0]
    stats = quantize.update_stats(leaves)
    want = [every.min(), np.median(every), every.max()]
    np.testing.assert_allclose(stats, want, rtol=1e-6)
    near = quantize.update_stats(leaves, streaming=True, bins=4096)
    np.testing.assert_allclose([near.low, near.high], [want[0], want[2]], rtol=1e-6)
    lower, upper = np.sort(every)[(len(every) - 1) // 2], np.sort(every)[len(every) // 2]
    bin_ratio = (want[2] / want[0]) ** (1 / 4096)
    assert lower / bin_ratio <= float(near.middle) <= upper * bin_ratio
    one = quantize.update_stats([jnp.array([0.0, 2.0])], streaming=True)
    np.testing.assert_allclose(one, [2.0, 2.0, 2.0], rtol=1e-6)
    jitted = jax.jit(quantize.update_stats)([jnp.zeros((2, 2))])
    assert [float(v) for v in jitted] == [0.0, 0.0, 0.0]


def test_laws_of_the_importance():
    rng = np.random.default_rng(2)
    delta = rng.exponential(size=(9, 12)) * (rng.random((9, 12)) < 0.6)
    delta[:, 3] = 0.0
    delta = jnp.asarray(delta, jnp.float32)
    stats = quantize.update_stats(delta)
    found = quantize.channel_importance(delta, stats)
    assert float(found.min()) >= 1.0 and float(found[3]) == 10.0
    scaled = quantize.channel_importance(7.0 * delta, quantize.update_stats(7.0 * delta))
    np.testing.assert_allclose(scaled, found, rtol=1e-4)
    y = quantize.protect_ends(delta, stats)
    assert float(y.min()) >= 1.0 and float(y.max()) == pytest.approx(10.0)
    zeros = np.sum(np.asarray(delta) == 0, axis=0)
    np.testing.assert_array_equal(quantize.channel_importance(delta, stats, ratio=1.0), zeros + 1.0)
    # All moved alike: least, median and largest are one, and nothing divides by their distance.
    same = jnp.full((3, 2), 0.5)
    np.testing.assert_array_equal(
        quantize.channel_importance(same, quantize.update_stats(same)), [1.0, 1.0]
    )


def test_update_sizes_are_zero_where_the_stored_numbers_are():
    base = {"w": jnp.array([1.0, 2.0, 3.0], jnp.bfloat16)}
    tuned = {
        "w": (base["w"].astype(jnp.float32) + jnp.array([1e-4, 0.1, 0.0])).astype(jnp.bfloat16)
    }
    found = quantize.update_sizes(base, tuned)["w"]
    assert found.dtype == jnp.float32
    assert float(found[0]) == 0.0 and float(found[2]) == 0.0 and float(found[1]) > 0.05


@pytest.mark.parametrize("group", [None, 4])
def test_search_is_never_worse_than_rounding(group):
    for seed in range(4):
        w, x = layer(seed)
        importance = quantize.activation_importance(x)
        found = quantize.awq_search(w, x, importance, bits=3, group=group)
        plain = quantize.rtn(w, bits=3, group=group)
        assert float(found.errors[0]) == pytest.approx(output_error(w, plain.q, x), rel=1e-3)
        assert float(found.error) <= float(found.errors[0])
        scale = np.asarray(found.scale)
        np.testing.assert_allclose(scale, np.asarray(importance) ** float(found.ratio), rtol=1e-5)
        grid = quantize.uniform_grid(w * scale, bits=3, group_size=group)
        back = np.asarray(quantize.fake_quant(w * scale, *grid, bits=3)) / scale
        assert float(found.error) == pytest.approx(output_error(w, back, x), rel=1e-3)
        assert found.errors.shape == (20,)
        assert round(20 * float(found.ratio)) == int(np.argmin(found.errors))


def test_activations_of_unequal_size_are_helped():
    gains = []
    for seed in range(5):
        w, x = layer(seed, rows=32, columns=32, samples=400)
        found = quantize.awq_search(w, x, quantize.activation_importance(x), bits=3, group=None)
        gains.append(float(found.error / found.errors[0]))
    assert np.mean(gains) < 0.95


def test_constant_importance_changes_nothing():
    w, x = layer()
    found = quantize.awq_search(w, x, jnp.full(16, 4.0), bits=3, group=4)
    np.testing.assert_allclose(found.errors, np.full(20, float(found.errors[0])), rtol=2e-2)
    powers_of_two = found.errors[::10]  # 4^0, 4^(1/2)
    np.testing.assert_allclose(powers_of_two, np.full(2, float(found.errors[0])), rtol=1e-6)


def test_importances():
    _, x = layer()
    np.testing.assert_allclose(quantize.activation_importance(x), np.abs(x).mean(0), rtol=1e-5)
    h = quantize.input_hessian(x)
    np.testing.assert_allclose(
        quantize.hessian_importance(h / 2), np.sqrt(np.square(x).mean(0)), rtol=1e-4
    )
    assert float(quantize.activation_importance(jnp.zeros((3, 2))).min()) > 0


@pytest.mark.parametrize("group", [None, 4])
def test_clipping_is_the_best_of_the_grid(group):
    w, x = layer(seed=3, rows=3)
    w = w.at[0, 5].set(9.0)  # an outlier that is worth clipping
    second = np.asarray(x.T @ x / len(x), np.float64)
    bound = np.asarray(
        quantize.clip_search(w, jnp.asarray(second, jnp.float32), bits=3, group=group)
    )
    size = group or 16
    assert bound.shape == (3, 16 // size)
    for row in range(3):
        for k in range(16 // size):
            part = slice(k * size, (k + 1) * size)
            values, errors = np.asarray(w)[row, part], []
            most = np.abs(values).max()
            for shrink in 1 - np.arange(10) / 20:
                held = np.clip(values, -most * shrink, most * shrink)
                low, high = min(held.min(), 0), max(held.max(), 0)
                step = (high - low) / 7
                zero = np.round(-low / step)
                gap = step * (np.clip(np.round(held / step) + zero, 0, 7) - zero) - values
                errors.append(gap @ second[part, part] @ gap)
            index = round((1 - bound[row, k] / most) * 20)
            assert errors[index] <= min(errors) * (1 + 1e-3)
    h = quantize.input_hessian(x)
    clipped = quantize.clipped_rtn(w, h, bits=3, group=group)
    spread = np.repeat(bound, size, axis=1)
    assert (np.abs(clipped.q) <= spread * (1 + 0.51 / 3)).all()
    assert float(clipped.error) == pytest.approx(len(w) * output_error(w, clipped.q, x), rel=1e-3)
    if group == 4:  # one row's only group: what is searched is the whole error
        alone = quantize.clipped_rtn(w[:, :4], h[:4, :4], bits=3, group=4)
        assert float(alone.error) <= float(quantize.rtn(w[:, :4], h[:4, :4], bits=3).error) + 1e-6


def test_bad_input():
    w, x = layer()
    stats = quantize.update_stats(D)
    with pytest.raises(ValueError, match="tuned: expected shape"):
        quantize.update_sizes({"a": jnp.ones(2)}, {"a": jnp.ones(3)})
    with pytest.raises(ValueError, match="tuned: expected a tree like base"):
        quantize.update_sizes({"a": jnp.ones(2)}, {"b": jnp.ones(2)})
    with pytest.raises(ValueError, match="no entry is positive"):
        quantize.update_stats([jnp.zeros(3)])
    with pytest.raises(ValueError, match="at least one array"):
        quantize.update_stats([])
    for bad in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="negative or NaN"):
            quantize.update_stats([jnp.array([1.0, bad])])
        with pytest.raises(ValueError, match="negative or NaN"):
            quantize.protect_ends(jnp.array([1.0, bad]), stats)
    with pytest.raises(ValueError, match="ratio: expected"):
        quantize.protect_ends(D, stats, ratio=0.5)
    with pytest.raises(ValueError, match="delta: expected rank 2"):
        quantize.channel_importance(D[0], stats)
    with pytest.raises(ValueError, match="group_size: expected a divisor of 16"):
        quantize.awq_search(w, x, jnp.ones(16), bits=3, group=5)
    with pytest.raises(ValueError, match="importance: expected shape"):
        quantize.awq_search(w, x, jnp.ones(15), bits=3, group=4)
    with pytest.raises(ValueError, match="x: expected inputs of 16 channels, got 15"):
        quantize.awq_search(w, x[:, :15], jnp.ones(16), bits=3, group=4)
    with pytest.raises(ValueError, match="x: expected at least one row"):
        quantize.awq_search(w, x[:0], jnp.ones(16), bits=3, group=4)
    with pytest.raises(ValueError, match="n_grid"):
        quantize.awq_search(w, x, jnp.ones(16), bits=3, group=4, n_grid=0)
    with pytest.raises(ValueError, match="bits"):
        quantize.awq_search(w, x, jnp.ones(16), bits=1, group=4)
    with pytest.raises(ValueError, match="max_shrink"):
        quantize.clip_search(w, x.T @ x, bits=3, group=4, max_shrink=1.0)
    with pytest.raises(ValueError, match="second_moment: expected shape"):
        quantize.clip_search(w, x, bits=3, group=4)
