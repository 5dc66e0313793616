"""Interquartile means against SciPy, and bootstrap intervals against their distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from pgjax.diagnostics import intervals


@pytest.mark.parametrize("shape", [(1,), (3,), (4,), (5, 3), (10, 7)])
def test_interquartile_mean_is_the_trimmed_mean(shape):
    scores = np.random.default_rng(0).normal(size=shape)
    want = scipy.stats.trim_mean(scores, 0.25, axis=None)
    np.testing.assert_allclose(intervals.interquartile_mean(scores), want, rtol=1e-5)


def test_interquartile_mean_ignores_one_bad_run_but_not_nan():
    scores = jnp.array([1.0, 1.0, 1.0, 1.0, 1e9])
    assert intervals.interquartile_mean(scores) == 1.0
    assert jnp.isnan(intervals.interquartile_mean(scores.at[0].set(jnp.nan)))
    assert jnp.isnan(intervals.interquartile_mean(jnp.array([0.0, 1.0, 2.0, jnp.nan])))


def test_interquartile_mean_under_transformations():
    scores = jnp.arange(12.0).reshape(3, 4)
    np.testing.assert_allclose(
        jax.jit(jax.vmap(intervals.interquartile_mean))(scores), [1.5, 5.5, 9.5]
    )
    np.testing.assert_allclose(
        jax.grad(intervals.interquartile_mean)(jnp.arange(4.0)), [0, 0.5, 0.5, 0]
    )
    assert intervals.interquartile_mean(jnp.arange(4)).dtype == jnp.float32


def test_runs_are_drawn_within_their_task():
    # Two tasks whose runs agree: however runs are drawn, nothing changes. Pooled draws would mix.
    scores = jnp.array([[0.0, 10.0]] * 5)
    low, high = intervals.stratified_bootstrap(scores, jnp.mean, jax.random.key(0))
    assert low == high == 5.0


def test_tasks_are_drawn_independently():
    # With R = 2 runs, two tasks and whole runs drawn together, task 0 - task 1 would be 0 always.
    scores = jnp.array([[0.0, 0.0], [1.0, 1.0]])
    low, high = intervals.stratified_bootstrap(
        scores, lambda x: jnp.mean(x[:, 0] - x[:, 1]), jax.random.key(0)
    )
    assert low == -1.0 and high == 1.0
    # Trailing axes stay with their run.
    together = scores[:, None, :]
    low, high = intervals.stratified_bootstrap(
        together, lambda x: jnp.mean(x[..., 0] - x[..., 1]), jax.random.key(0)
    )
    assert low == high == 0.0


def test_the_interval_of_a_mean_is_that_of_its_binomial():
    # The mean of R draws from a 0/1 sample with half ones is Binomial(R, 1/2) / R.
    runs = 20
    scores = jnp.array([0.0, 1.0] * (runs // 2))[:, None]
    low, high = intervals.stratified_bootstrap(
        scores, jnp.mean, jax.random.key(1), resamples=20_000, confidence=0.9
    )
    want = scipy.stats.binom.ppf([0.05, 0.95], runs, 0.5) / runs
    np.testing.assert_allclose([low, high], want, atol=1e-6)


def test_coverage():
    def covers(key):
        data_key, key = jax.random.split(key)
        scores = jax.random.normal(data_key, (10, 4))
        low, high = intervals.stratified_bootstrap(
            scores, intervals.interquartile_mean, key, resamples=300
        )
        return (low <= 0) & (high >= 0)

    share = jax.jit(jax.vmap(covers))(jax.random.split(jax.random.key(2), 200)).mean()
    # A percentile bootstrap of ten runs is a little narrow.
    assert 0.88 <= share <= 0.97


def test_one_run_and_statistics_of_any_shape():
    scores = jnp.array([[1.0, 2.0, 4.0]])
    low, high = intervals.stratified_bootstrap(scores, lambda x: x.mean(0), jax.random.key(0))
    np.testing.assert_array_equal(low, [1.0, 2.0, 4.0])
    np.testing.assert_array_equal(high, low)


def test_errors():
    with pytest.raises(ValueError, match="scores: expected at least one"):
        intervals.interquartile_mean(jnp.zeros((0, 2)))
    key = jax.random.key(0)
    for shape in ((3,), (0, 2), (2, 0)):
        with pytest.raises(ValueError, match=r"scores: expected runs by tasks"):
            intervals.stratified_bootstrap(jnp.zeros(shape), jnp.mean, key)
    with pytest.raises(ValueError, match="resamples"):
        intervals.stratified_bootstrap(jnp.zeros((2, 1)), jnp.mean, key, resamples=0)
    with pytest.raises(ValueError, match="confidence"):
        intervals.stratified_bootstrap(jnp.zeros((2, 1)), jnp.mean, key, confidence=1.0)
