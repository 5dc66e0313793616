"""Generalised Gaussian errors and inverse-variance weights: closed forms, SciPy, limits."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, special, stats

from pgjax import uncertainty

RNG = np.random.default_rng(0)
BETAS = (0.5, 1.0, 2.0, 4.0, 8.0)


def test_known_losses():
    two = jnp.array([2.0, 2.0, 2.0])
    beta = jnp.array([1.0, 0.5, 2.0])
    np.testing.assert_allclose(
        uncertainty.ggd_linear_loss(two, beta), [2.0, 1.69315, 3.87922], rtol=1e-5
    )
    np.testing.assert_allclose(uncertainty.ggd_nll(two, beta), [2.0, 2.10736, 3.87922], rtol=1e-5)
    delta = jnp.linspace(-3, 3, 7)
    np.testing.assert_allclose(
        uncertainty.ggd_linear_loss(delta, jnp.ones(7)), uncertainty.ggd_nll(delta, jnp.ones(7))
    )


def test_it_is_the_likelihood_of_scipy():
    delta = RNG.normal(size=40).astype(np.float32)
    for beta in BETAS:
        found = uncertainty.ggd_nll(jnp.asarray(delta), jnp.full(40, beta, jnp.float32))
        wanted = -stats.gennorm.logpdf(delta, beta) - np.log(2)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    # Shape 2 is a normal of variance 1/2, up to a constant.
    gap = uncertainty.ggd_nll(jnp.asarray(delta), jnp.full(40, 2.0)) - uncertainty.gaussian_nll(
        jnp.asarray(delta), jnp.full(40, 0.5)
    )
    np.testing.assert_allclose(gap, gap[0], atol=1e-5)
    np.testing.assert_allclose(
        uncertainty.gaussian_nll(jnp.asarray(delta), jnp.full(40, 3.0)),
        -stats.norm.logpdf(delta, scale=3**0.5) - 0.5 * np.log(2 * np.pi),
        rtol=1e-4,
    )


def test_moments_and_draws():
    beta = jnp.array(BETAS)
    np.testing.assert_allclose(
        uncertainty.ggd_variance(beta), [120, 2, 0.5, 0.338, 0.315], rtol=2e-3
    )
    np.testing.assert_allclose(uncertainty.ggd_kurtosis(beta), [25.2, 6, 3, 2.19, 1.92], rtol=2e-3)
    variance, excess = stats.gennorm.stats(np.array(BETAS), moments="vk")
    np.testing.assert_allclose(uncertainty.ggd_variance(beta), variance, rtol=1e-4)
    np.testing.assert_allclose(uncertainty.ggd_kurtosis(beta), excess + 3, rtol=1e-4)
    drawn = uncertainty.sample_ggd(jax.random.key(0), beta, (4000,))
    assert drawn.shape == (4000, 5)
    for i, shape in enumerate(BETAS):
        assert stats.kstest(np.asarray(drawn[:, i]), stats.gennorm(shape).cdf).pvalue > 1e-3


def test_the_shape_is_recovered_by_likelihood():
    for beta in (0.7, 1.0, 2.0, 4.0):
        drawn = jnp.asarray(stats.gennorm.rvs(beta, size=3000, random_state=1), jnp.float32)
        best = optimize.minimize_scalar(
            lambda x, drawn=drawn: float(
                uncertainty.ggd_nll(drawn, jnp.full(3000, np.exp(x), jnp.float32)).mean()
            ),
            bounds=(-2, 3),
            method="bounded",
        )
        assert abs(np.exp(best.x) / beta - 1) < 0.2


def test_slopes_are_finite_at_zero_and_far_away():
    delta = jnp.array([0.0, 1e-30, 1.0, 1e4, 1e30])
    for loss in (uncertainty.ggd_nll, uncertainty.ggd_linear_loss):
        for beta in BETAS:
            value, slopes = jax.value_and_grad(
                lambda d, b, loss=loss: loss(d, b).sum(), argnums=(0, 1)
            )(delta[:4], jnp.full(4, beta))
            assert np.isfinite(value) and np.isfinite(slopes[1]).all()
            assert loss is uncertainty.ggd_linear_loss or slopes[0][0] == 0
        far = loss(delta, jnp.full(5, 8.0))
        assert np.isfinite(far).all()
        slope = jax.grad(lambda b, loss=loss: loss(delta, b).sum())(jnp.full(5, 8.0))
        assert np.isfinite(slope).all()
    # Against differences.
    with jax.enable_x64(True):
        d, b, h = jnp.float64(1.7), jnp.float64(1.3), 1e-6
        for loss in (uncertainty.ggd_nll, uncertainty.ggd_linear_loss):
            slopes = jax.grad(loss, argnums=(0, 1))(d, b)
            wanted = (
                (loss(d + h, b) - loss(d - h, b)) / (2 * h),
                (loss(d, b + h) - loss(d, b - h)) / (2 * h),
            )
            np.testing.assert_allclose(slopes, wanted, rtol=1e-6)


def test_risk_averse_weights():
    beta = jnp.array([[1.0, 3.0], [2.0, 2.0]])
    np.testing.assert_allclose(
        uncertainty.risk_averse_weights(beta), [[0.25, 0.75], [0.5, 0.5]], rtol=1e-6
    )
    np.testing.assert_allclose(
        uncertainty.risk_averse_weights(beta, axis=0)[:, 0], [1 / 3, 2 / 3], rtol=1e-6
    )
    slope = jax.grad(lambda b: uncertainty.risk_averse_weights(b)[0, 0])(beta)
    np.testing.assert_allclose(slope[0], [3 / 16, -1 / 16], rtol=1e-5)


def test_variance_of_an_ensembles_errors():
    np.testing.assert_allclose(uncertainty.biev_variance(jnp.arange(5.0)), 1.587302, rtol=1e-6)
    assert abs(stats.kurtosis(np.arange(5), bias=False) + 1.2) < 1e-9
    for members in (4, 5, 9):
        x = RNG.standard_t(3, size=(20, members))
        k = stats.kurtosis(x, axis=1, bias=False)
        wanted = x.var(1) / (k / members + (members + 1) / (members - 1))
        with jax.enable_x64(True):
            np.testing.assert_allclose(uncertainty.biev_variance(jnp.asarray(x)), wanted, rtol=1e-9)
    values = RNG.normal(size=(6, 5)).astype(np.float32)
    np.testing.assert_allclose(
        uncertainty.biv_variance(jnp.asarray(values), discount=0.9),
        0.81 * values.var(1, ddof=1),
        rtol=1e-5,
    )


def test_the_shift_is_the_smallest_that_suffices():
    v = jnp.asarray(RNG.gamma(0.3, size=32) + 1e-5, jnp.float32)

    def size(shift):
        return float(uncertainty.effective_batch_size(1 / (v + shift)))

    sizes = [size(x) for x in (0.0, 1e-3, 1e-2, 0.1, 1.0, 10.0)]
    assert sizes == sorted(sizes) and sizes[0] < 8 and sizes[-1] > 31
    for wanted in (8, 16, 31):
        shift = float(jax.jit(lambda x, n=wanted: uncertainty.min_ess_shift(x, min_effective=n))(v))
        assert size(shift) >= wanted - 1e-3
        root = optimize.brentq(
            lambda s, n=wanted: (
                (w := 1 / (np.asarray(v, np.float64) + s)).sum() ** 2 / (w**2).sum() - n
            ),
            0,
            1e4,
        )
        np.testing.assert_allclose(shift, root, rtol=2e-3)
        weights = uncertainty.biv_weights(v, min_effective=wanted)
        np.testing.assert_allclose(weights, (w := 1 / (np.asarray(v) + root)) / w.sum(), rtol=5e-3)
        np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-6)
    assert uncertainty.min_ess_shift(v, min_effective=2) == 0.0
    equal = jnp.full(6, 3.0)
    assert uncertainty.min_ess_shift(equal, min_effective=5) == 0.0
    np.testing.assert_allclose(uncertainty.biv_weights(equal, min_effective=5), 1 / 6, rtol=1e-6)
    tiny = jnp.array([1e-30, 1e-30, 1.0])
    np.testing.assert_allclose(
        uncertainty.biv_weights(tiny, min_effective=2), [0.5, 0.5, 0], atol=1e-6
    )


def test_weights_have_no_gradient_and_the_whole_loss_has_its_parts():
    errors = jnp.asarray(RNG.normal(size=(24, 5)), jnp.float32)
    shapes = jnp.asarray(RNG.uniform(0.5, 3, size=(24, 5)), jnp.float32)

    def weighed(x):
        v = uncertainty.biev_variance(x)
        return (jnp.arange(24.0) * uncertainty.biv_weights(v)).sum()

    assert not jax.grad(weighed)(errors).any()
    found = uncertainty.ggd_td_losses(errors, shapes, epistemic_weight=0.3)
    d, b = np.abs(np.asarray(errors)), np.asarray(shapes)

    loss = d * b - np.log(b) + special.gammaln(1 / b)
    aleatoric = (b / b.sum(1, keepdims=True) * loss).sum(1)
    k = stats.kurtosis(errors, axis=1, bias=False)
    v = np.asarray(errors).var(1) / (k / 5 + 6 / 4)
    weights = uncertainty.biv_weights(jnp.asarray(v, jnp.float32))
    np.testing.assert_allclose(found, aleatoric + 0.3 * weights * d.sum(1), rtol=1e-3)
    assert uncertainty.ggd_td_losses(errors, shapes).shape == (24,)


def test_members_that_agree():
    same = jnp.ones((20, 5))

    def loss(x):
        return uncertainty.ggd_td_losses(x, jnp.ones((20, 5))).mean()

    np.testing.assert_allclose(uncertainty.biev_variance(same), 1e-6)
    value, slope = jax.jit(jax.value_and_grad(loss))(same)
    assert np.isfinite(value) and np.isfinite(slope).all()
    np.testing.assert_allclose(
        uncertainty.biv_weights(uncertainty.biev_variance(same)), 1 / 20, rtol=1e-6
    )


def test_bad_input():
    one = jnp.ones(3)
    with pytest.raises(ValueError, match="shapes: expected numbers > 0"):
        uncertainty.ggd_nll(one, jnp.array([1.0, 0.0, 1.0]))
    with pytest.raises(ValueError, match="shapes: expected numbers > 0"):
        uncertainty.ggd_variance(-one)
    with pytest.raises(ValueError, match="shapes: expected shape"):
        uncertainty.ggd_linear_loss(one, jnp.ones(2))
    with pytest.raises(ValueError, match="variances: expected numbers > 0"):
        uncertainty.gaussian_nll(one, 0 * one)
    with pytest.raises(ValueError, match="axis: expected one of"):
        uncertainty.risk_averse_weights(one, axis=1)
    with pytest.raises(ValueError, match="errors: expected at least 4 members"):
        uncertainty.biev_variance(jnp.ones((5, 3)))
    with pytest.raises(ValueError, match="errors: expected at least 4 members"):
        uncertainty.ggd_td_losses(jnp.ones((5, 3)), jnp.ones((5, 3)))
    with pytest.raises(ValueError, match="values: expected at least 2 members"):
        uncertainty.biv_variance(jnp.ones((5, 1)), discount=0.9)
    with pytest.raises(ValueError, match="discount"):
        uncertainty.biv_variance(jnp.ones((5, 2)), discount=1.1)
    with pytest.raises(ValueError, match="min_effective"):
        uncertainty.min_ess_shift(one, min_effective=0)
    with pytest.raises(ValueError, match="variances: expected rank 1"):
        uncertainty.biv_weights(jnp.ones((2, 2)))
    with pytest.raises(ValueError, match="variances: expected numbers > 0"):
        uncertainty.biv_weights(0 * one, min_effective=2)
    with pytest.raises(ValueError, match="epistemic_weight"):
        uncertainty.ggd_td_losses(jnp.ones((5, 4)), jnp.ones((5, 4)), epistemic_weight=-1.0)
    with pytest.warns(UserWarning, match="min_effective: 16 is above B - 1 = 2"):
        uncertainty.biv_weights(one)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        uncertainty.biv_weights(one, min_effective=2)
