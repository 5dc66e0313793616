"""Distributions against scipy and distrax."""

import distrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from pgjax import policies
from pgjax.policies import distributions

KEY = jax.random.key(0)
LOGITS = jax.random.normal(KEY, (3, 5, 4)) * 2
PAIR = (jax.random.normal(KEY, (6, 3)), 0.3 * jax.random.normal(jax.random.key(1), (6, 3)) - 0.5)


def test_categorical():
    own, other = policies.categorical(), distrax.Categorical(LOGITS)
    actions = own.sample(KEY, LOGITS)
    assert actions.shape == (3, 5) and actions.dtype == jnp.int32
    np.testing.assert_allclose(own.log_prob(LOGITS, actions), other.log_prob(actions), rtol=1e-5)
    np.testing.assert_allclose(own.entropy(LOGITS), other.entropy(), rtol=1e-5)
    np.testing.assert_array_equal(own.mode(LOGITS), other.mode())
    barred = LOGITS.at[..., 1].set(-jnp.inf)
    assert not np.any(own.sample(KEY, jnp.broadcast_to(barred, (100, *barred.shape))) == 1)
    left = jnp.delete(LOGITS, 1, axis=-1)
    np.testing.assert_allclose(own.entropy(barred), own.entropy(left), rtol=1e-5)
    slope = jax.grad(lambda x: own.entropy(x).sum())(barred)
    assert np.all(np.isfinite(slope)) and np.all(slope[..., 1] == 0)
    taken = jnp.where(actions == 1, 0, actions)
    log_prob, slope = jax.value_and_grad(lambda x: own.log_prob(x, taken).sum())(barred)
    np.testing.assert_allclose(log_prob, distrax.Categorical(barred).log_prob(taken).sum(), 1e-5)
    np.testing.assert_allclose(slope, jax.nn.one_hot(taken, 4) - jax.nn.softmax(barred), atol=1e-6)
    assert np.all(own.log_prob(barred, jnp.ones_like(taken)) == -np.inf)


def test_gaussian():
    own, (mean, log_std) = policies.gaussian(), PAIR
    actions = own.sample(KEY, PAIR)
    normal = scipy.stats.norm(np.asarray(mean), np.exp(log_std))
    np.testing.assert_allclose(
        own.log_prob(PAIR, actions), normal.logpdf(actions).sum(-1), rtol=1e-5
    )
    np.testing.assert_allclose(own.entropy(PAIR), normal.entropy().sum(-1), rtol=1e-5)
    many = own.sample(KEY, jax.tree.map(lambda x: jnp.broadcast_to(x, (50_000, 6, 3)), PAIR))
    error = 5 / 50_000**0.5
    np.testing.assert_allclose(many.mean(0), mean, atol=2 * error)
    np.testing.assert_allclose(many.std(0), np.exp(log_std), atol=2 * error)


def test_tanh_gaussian():
    own = policies.tanh_gaussian()
    other = distrax.Independent(
        distrax.Transformed(distrax.Normal(PAIR[0], jnp.exp(PAIR[1])), distrax.Tanh()), 1
    )
    actions, log_prob = distributions.sample_tanh_gaussian(KEY, PAIR)
    assert np.all(np.abs(actions) < 1)
    np.testing.assert_allclose(log_prob, other.log_prob(actions), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(own.log_prob(PAIR, actions), log_prob, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(own.sample(KEY, PAIR), actions)
    assert own.entropy is None
    far = (jnp.full((1, 3), 30.0), jnp.zeros((1, 3)))
    found, slope = jax.value_and_grad(
        lambda x: distributions.sample_tanh_gaussian(KEY, (x, far[1]))[1].sum()
    )(far[0])
    assert np.isfinite(found) and np.all(np.isfinite(slope))
    # In one dimension the density integrates to 1.
    grid = jnp.linspace(-1, 1, 20_001)[1:-1, None]
    one = (jnp.array([0.3]), jnp.array([-0.7]))
    density = np.exp(
        own.log_prob(jax.tree.map(lambda x: jnp.broadcast_to(x, grid.shape), one), grid)
    )
    np.testing.assert_allclose(np.trapezoid(density, grid[:, 0]), 1.0, atol=1e-4)


@pytest.mark.parametrize("make", [policies.categorical, policies.gaussian, policies.tanh_gaussian])
def test_scores_have_mean_zero(make):
    """E[∇ log π] = 0, which every policy gradient rests on."""
    own, number = make(), 100_000
    start = LOGITS[0, 0] if make is policies.categorical else jax.tree.map(lambda x: x[0], PAIR)
    many = jax.tree.map(lambda x: jnp.broadcast_to(x, (number, *x.shape)), start)
    actions = own.sample(KEY, many)
    scores = jax.vmap(jax.grad(own.log_prob))(many, actions)
    for score in jax.tree.leaves(scores):
        error = score.std(0) / number**0.5
        assert np.all(np.abs(score.mean(0)) < 5 * error)


@pytest.mark.parametrize("make", [policies.categorical, policies.gaussian])
def test_divergences(make):
    own = make()
    if make is policies.categorical:
        p, q = LOGITS[0], LOGITS[1]
        wanted = distrax.Categorical(p).kl_divergence(distrax.Categorical(q))
        barred = p.at[:, 0].set(-jnp.inf)
        assert np.all(np.isfinite(own.kl(barred, q)))
    else:
        p, q = PAIR, jax.tree.map(lambda x: x[::-1], PAIR)
        one, two = (distrax.MultivariateNormalDiag(m, jnp.exp(s)) for m, s in (p, q))
        wanted = one.kl_divergence(two)
    np.testing.assert_allclose(own.kl(p, q), wanted, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(own.kl(p, p), 0.0, atol=1e-6)
