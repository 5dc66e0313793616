"""Scores of pairs and noise-contrastive losses: closed forms, enumeration, masks, gradients."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, special

import pgjax as pg
from pgjax import aggregate, contrastive


def drawn(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_logits_are_bilinear_forms():
    q, k, w = drawn(0, 3, 4), drawn(1, 5, 2), drawn(2, 4, 2)
    found = contrastive.bilinear_logits(q, k, w, temperature=0.5)
    wanted = np.einsum("id,de,je->ij", *(np.asarray(x, np.float64) for x in (q, w, k))) / 0.5
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert found.dtype == jnp.float32 and found.shape == (3, 5)
    same = contrastive.bilinear_logits(q, q)
    np.testing.assert_allclose(same, q @ q.T, rtol=1e-5)
    np.testing.assert_allclose(contrastive.bilinear_logits(q, q, jnp.eye(4)), same, rtol=1e-6)
    half = contrastive.bilinear_logits(q.astype(jnp.bfloat16), k.astype(jnp.bfloat16), w)
    assert half.dtype == jnp.float32


def test_info_nce_is_a_cross_entropy_by_row():
    logits = 3 * drawn(0, 6, 6)
    x = np.asarray(logits, np.float64)
    np.testing.assert_allclose(
        contrastive.info_nce(logits), special.logsumexp(x, axis=1) - np.diag(x), rtol=1e-5
    )
    np.testing.assert_array_equal(contrastive.matched(logits), x.argmax(1) == np.arange(6))
    np.testing.assert_allclose(contrastive.info_nce(jnp.full((8, 8), 2.5)), np.log(8), rtol=1e-6)
    assert not contrastive.matched(jnp.zeros((3, 3))).any()  # ties are no matches
    perfect = contrastive.info_nce(1e4 * jnp.eye(4))
    np.testing.assert_array_equal(perfect, 0.0)
    assert contrastive.matched(1e4 * jnp.eye(4)).all()


def test_a_shift_of_a_row_changes_nothing():
    logits = drawn(1, 5, 5)
    shift = jnp.arange(5.0)[:, None] * 100

    def of(x):
        return contrastive.info_nce(x).mean()

    np.testing.assert_allclose(of(logits), of(logits + shift), rtol=1e-4)
    np.testing.assert_allclose(jax.grad(of)(logits), jax.grad(of)(logits + shift), atol=1e-5)
    np.testing.assert_allclose(
        jax.grad(of)(logits),
        (special.softmax(np.asarray(logits), axis=1) - np.eye(5)) / 5,
        atol=1e-6,
    )


def test_permuting_the_batch_permutes_the_losses():
    q, k, order = drawn(2, 6, 3), drawn(3, 6, 3), np.random.default_rng(0).permutation(6)
    one = contrastive.info_nce(contrastive.bilinear_logits(q, k))
    other = contrastive.info_nce(contrastive.bilinear_logits(q[order], k[order]))
    np.testing.assert_allclose(one[order], other, rtol=1e-5)


def test_masked_pairs_are_neither_queries_nor_negatives():
    mask = jnp.array([True, False, True, True, False])
    logits = drawn(4, 5, 5).at[1].set(jnp.nan).at[:, 4].set(jnp.inf)
    kept = np.flatnonzero(mask)

    def of(x):
        return aggregate.masked_mean(contrastive.info_nce(x, mask=mask), mask)

    alone = contrastive.info_nce(logits[np.ix_(kept, kept)])
    np.testing.assert_allclose(contrastive.info_nce(logits, mask=mask)[kept], alone, rtol=1e-6)
    np.testing.assert_allclose(of(logits), alone.mean(), rtol=1e-6)
    slope = jax.grad(of)(logits)
    assert np.isfinite(slope).all()
    assert not slope[1].any() and not slope[4].any()
    assert not slope[:, 1].any() and not slope[:, 4].any()
    assert not contrastive.matched(logits, mask=mask)[jnp.array([1, 4])].any()
    none = jnp.zeros(5, bool)
    np.testing.assert_array_equal(contrastive.info_nce(logits, mask=none), 0.0)
    only = jnp.arange(5) == 2
    np.testing.assert_array_equal(contrastive.info_nce(logits, mask=only), 0.0)


def test_one_pair_has_no_negatives():
    with pytest.warns(UserWarning, match="a batch of one pair"):
        loss = contrastive.info_nce(jnp.array([[3.0]]))
    np.testing.assert_array_equal(loss, 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_array_equal(
            jax.grad(lambda x: contrastive.info_nce(x).sum())(loss[:, None]), 0
        )


def test_it_bounds_the_mutual_information_from_below():
    """Two correlated Gaussians, and the best scores there are: the log-ratio of densities."""
    rho, batch = 0.8, 64
    x, noise = np.random.default_rng(0).normal(size=(2, 200, batch))
    y = rho * x + np.sqrt(1 - rho**2) * noise
    u, v = x[:, :, None], y[:, None, :]
    logits = -((v - rho * u) ** 2) / (2 * (1 - rho**2)) + v**2 / 2
    losses = jax.vmap(contrastive.info_nce)(jnp.asarray(logits, jnp.float32))
    bound, information = np.log(batch) - losses.mean(), -0.5 * np.log(1 - rho**2)
    assert information - 0.05 < bound < information + 0.01


def test_binary_nce_is_smallest_for_the_ratio_of_densities():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(6)), rng.dirichlet(np.ones(6))

    def expected(log_f):
        # Expectation by enumeration of both sides.
        zero = jnp.zeros_like(log_f)
        positive = contrastive.binary_nce(log_f, zero) - jnp.log(2)
        negative = contrastive.binary_nce(zero, log_f) - jnp.log(2)
        return jnp.sum(p * positive + q * negative)

    with jax.enable_x64(True):
        best = jnp.log(jnp.asarray(p / q))
        np.testing.assert_allclose(jax.grad(expected)(best), 0.0, atol=1e-12)
        direct = np.sum(p * np.log1p(q / p) + q * np.log1p(p / q))
        np.testing.assert_allclose(expected(best), direct, rtol=1e-10)
        found = optimize.minimize(
            lambda s: float(expected(jnp.asarray(s))),
            np.zeros(6),
            jac=lambda s: np.asarray(jax.grad(expected)(jnp.asarray(s))),
            tol=1e-12,
        )
        np.testing.assert_allclose(np.exp(found.x), p / q, rtol=1e-3)
        np.testing.assert_allclose(np.sum(q * np.exp(best)), 1.0)
        for factor in (0.9, 1.1):
            assert expected(best + np.log(factor)) > expected(best)


def test_binary_nce_in_logs_is_the_direct_form_and_stays_finite():
    f = jnp.array([0.03, 0.5, 1.0, 7.0])
    direct = np.log1p(1 / np.asarray(f)) + np.log1p(np.asarray(f)[::-1])
    np.testing.assert_allclose(
        contrastive.binary_nce(jnp.log(f), jnp.log(f)[::-1]), direct, rtol=1e-6
    )
    far = jnp.array([-1e4, 1e4])
    np.testing.assert_allclose(contrastive.binary_nce(far, far), 1e4)
    slope = jax.grad(lambda s: contrastive.binary_nce(s, s).sum())(far)
    np.testing.assert_allclose(slope, [-1.0, 1.0])


def test_everything_works_inside_transformations():
    logits = drawn(5, 3, 4, 4)
    at_once = jax.jit(jax.vmap(contrastive.info_nce))(logits)
    np.testing.assert_allclose(at_once[1], contrastive.info_nce(logits[1]), rtol=1e-6)
    assert pg.contrastive is contrastive


def test_bad_input():
    q, square = jnp.ones((2, 3)), jnp.ones((2, 2))
    with pytest.raises(ValueError, match="temperature"):
        contrastive.bilinear_logits(q, q, temperature=0.0)
    with pytest.raises(ValueError, match=r"weight: expected shape \(3, 3\)"):
        contrastive.bilinear_logits(q, q, jnp.ones((3, 2)))
    with pytest.raises(ValueError, match="keys: expected rows of 3 entries"):
        contrastive.bilinear_logits(q, square)
    with pytest.raises(ValueError, match="queries: expected rank 2"):
        contrastive.bilinear_logits(q[0], q)
    with pytest.raises(ValueError, match=r"logits: expected shape \[B, B\]"):
        contrastive.info_nce(q)
    with pytest.raises(ValueError, match="logits: expected numbers, got NaN in 1 places"):
        contrastive.info_nce(square.at[0, 1].set(jnp.nan))
    with pytest.raises(ValueError, match="mask: expected shape"):
        contrastive.info_nce(square, mask=jnp.ones(3, bool))
    with pytest.raises(ValueError, match="mask: expected dtype bool"):
        contrastive.matched(square, mask=jnp.ones(2))
    with pytest.raises(ValueError, match="floating"):
        contrastive.info_nce(jnp.ones((2, 2), int))
    with pytest.raises(ValueError, match="negative_scores: expected shape"):
        contrastive.binary_nce(jnp.ones(2), jnp.ones(3))
