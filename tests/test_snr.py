"""Step sizes from the signal-to-noise ratio, against closed forms on a quadratic."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pgjax import optim


def stacked(rng, count=4):
    return {
        "a": rng.normal(size=(count, 3)).astype(np.float32),
        "b": rng.normal(size=(count, 2, 2)).astype(np.float32),
    }


def test_moments_by_hand():
    tree = stacked(np.random.default_rng(0))
    rows = np.concatenate([tree["a"], tree["b"].reshape(4, -1)], axis=1).astype(np.float64)
    mean = rows.mean(0)
    found = optim.gradient_moments(tree)
    np.testing.assert_allclose(found.square_norm, mean @ mean, rtol=1e-5)
    want = ((rows - mean) ** 2).sum() / (4 * 3)
    np.testing.assert_allclose(found.variance, want, rtol=1e-5)
    from_norms = optim.gradient_moments_from_norms(
        jnp.asarray((rows**2).sum(-1), jnp.float32), jax.tree.map(lambda x: x.mean(0), tree)
    )
    np.testing.assert_allclose(from_norms, found, rtol=1e-4)


def test_moments_are_unbiased():
    """The variance of the mean, and with it the squared norm of the true gradient."""
    rng = np.random.default_rng(1)
    truth, scale, count = np.array([1.0, -2.0]), 1.5, 3
    draws = (truth + scale * rng.normal(size=(20_000, count, 2))).astype(np.float32)
    found = jax.vmap(optim.gradient_moments)(draws)
    np.testing.assert_allclose(found.variance.mean(), 2 * scale**2 / count, rtol=0.02)
    signal = np.mean(found.square_norm - found.variance)
    np.testing.assert_allclose(signal, truth @ truth, rtol=0.03)


def factors(moments, **options):
    transform = optim.scale_by_gradient_snr(**options)
    state, found = transform.init(None), []
    for m in moments:
        scaled, state = transform.update(jnp.ones([]), state, moments=m)
        found.append(float(scaled))
    return found


def test_limits():
    def moments(square_norm, variance):
        return optim.GradientMoments(jnp.float32(square_norm), jnp.float32(variance))

    assert factors([moments(3.0, 0.0)] * 3) == [1.0] * 3  # no noise
    assert factors([moments(0.0, 2.0)] * 3) == [pytest.approx(0.05)] * 3  # no signal
    assert factors([moments(0.0, 0.0)]) == [1.0]
    # Signal 3, noise 1: three quarters from the first step on, whatever the decay.
    assert factors([moments(4.0, 1.0)] * 4) == pytest.approx([0.75] * 4)
    # By hand with decay 1/2: signal 3, then (3/2 + 1) / 1.5; noise 1, then (1/2 + 3) / 1.5.
    got = factors([moments(4.0, 1.0), moments(5.0, 3.0)], decay=0.5)
    assert got[1] == pytest.approx((0.75 + 1.0) / (0.75 + 1.0 + 0.25 + 1.5))


def test_scale_of_gradients_does_not_matter():
    tree = stacked(np.random.default_rng(2))
    want = factors([optim.gradient_moments(tree)], min_scale=0.0)
    for scale in (1e-8, 1e6):
        scaled = jax.tree.map(lambda x, s=scale: s * x, tree)
        found = factors([optim.gradient_moments(scaled)], min_scale=0.0)
        assert found == pytest.approx(want, rel=1e-4)


def test_noise_alone_does_not_look_like_signal():
    rng = np.random.default_rng(3)
    moments = [
        optim.gradient_moments(rng.normal(size=(4, 2)).astype(np.float32)) for _ in range(400)
    ]
    assert np.mean(factors(moments, min_scale=0.0, decay=0.98)[200:]) < 0.1
    cut = [m._replace(square_norm=jnp.maximum(m.square_norm, m.variance)) for m in moments]
    assert np.mean(factors(cut, min_scale=0.0, decay=0.98)[200:]) > 0.2


@pytest.mark.parametrize(("gradient", "noise"), [(1.0, 0.1), (1.0, 1.0), (0.5, 4.0)])
def test_best_step_on_a_noisy_quadratic(gradient, noise):
    """J = -(L/2) x², gradient estimates ±noise with equal chance: the gain is known exactly."""
    curvature = 3.0
    x = -gradient / curvature

    def gain(step):
        ends = np.array([x + step * (gradient + noise), x + step * (gradient - noise)])
        return np.mean(-curvature / 2 * ends**2) + curvature / 2 * x**2

    best = float(optim.snr_factor(jnp.float32(gradient**2), jnp.float32(noise**2))) / curvature
    grid = np.linspace(0.0, 2 / curvature, 4001)
    gains = np.array([gain(step) for step in grid])
    assert abs(best - grid[gains.argmax()]) < 1e-3
    assert gain(best) >= gains.max() - 1e-6
    assert gain(best) > max(gain(1 / curvature), 0.0) + 1e-6


def test_behind_adam_in_a_chain_under_jit():
    optimizer = optax.chain(
        optax.scale_by_adam(), optim.scale_by_gradient_snr(min_scale=0.0), optax.scale(-0.1)
    )
    plain = optax.chain(optax.scale_by_adam(), optax.scale(-0.1))
    tree = jax.tree.map(lambda x: x + 2, stacked(np.random.default_rng(4)))
    params = jax.tree.map(lambda x: jnp.zeros_like(x[0]), tree)
    mean = jax.tree.map(lambda x: x.mean(0), tree)
    moments = optim.gradient_moments(tree)
    got, _ = jax.jit(optimizer.update)(mean, optimizer.init(params), params, moments=moments)
    want, _ = plain.update(mean, plain.init(params), params)
    signal = max(float(moments.square_norm - moments.variance), 0.0)
    factor = signal / (signal + float(moments.variance))
    assert 0.0 < factor < 1.0
    for name in want:
        np.testing.assert_allclose(got[name], factor * want[name], rtol=1e-4)


def test_dtype_of_updates_is_kept():
    transform = optim.scale_by_gradient_snr()
    update = {"x": jnp.ones(2, jnp.bfloat16)}
    moments = optim.gradient_moments({"x": jnp.ones((2, 2), jnp.bfloat16)})
    assert moments.variance.dtype == jnp.float32
    scaled, _ = transform.update(update, transform.init(None), moments=moments)
    assert scaled["x"].dtype == jnp.bfloat16


def test_bad_input():
    with pytest.raises(ValueError, match="at least 2 microbatches, got 1"):
        optim.gradient_moments({"a": jnp.ones((1, 3))})
    with pytest.raises(ValueError, match="same number of rows"):
        optim.gradient_moments({"a": jnp.ones((2, 3)), "b": jnp.ones((3, 3))})
    with pytest.raises(ValueError, match="same number of rows"):
        optim.gradient_moments({})
    with pytest.raises(ValueError, match="at least 2 microbatches"):
        optim.gradient_moments_from_norms(jnp.ones(1), jnp.ones(3))
    for options in ({"decay": 1.0}, {"decay": -0.1}, {"min_scale": 1.5}):
        with pytest.raises(ValueError, match=next(iter(options))):
            optim.scale_by_gradient_snr(**options)
    transform = optim.scale_by_gradient_snr()
    with pytest.raises(ValueError, match="moments: expected the gradient's GradientMoments"):
        transform.update(jnp.ones(2), transform.init(None))
