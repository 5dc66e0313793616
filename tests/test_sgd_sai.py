"""SGD-SaI, against numbers by hand and momentum written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pgjax.optim import sai


def tree(seed=0, count=1):
    rng = np.random.default_rng(seed)
    return [
        {
            "a": jnp.asarray(rng.normal(size=(4, 5)), jnp.float32),
            "b": jnp.asarray(rng.normal(size=7), jnp.float32),
        }
        for _ in range(count)
    ]


def numpy_gsnr(g):
    g = np.asarray(g, np.float64)
    return np.linalg.norm(g) / (g.std(ddof=1) + 1e-8)


def run(transform, gradients, params=None):
    params = jax.tree.map(jnp.zeros_like, gradients[0]) if params is None else params
    state, found = transform.init(params), []
    for g in gradients:
        update, state = transform.update(g, state, params)
        found.append(update)
    return found, state


def test_by_hand():
    assert sai.gradient_snr(jnp.array([3.0, 4.0])) == pytest.approx(7.0710678, rel=1e-6)
    found = sai.gradient_snr(jnp.array([1.0, -1.0, 1.0, -1.0]))
    assert found == pytest.approx(3**0.5, rel=1e-6)


@pytest.mark.parametrize("shift", [0.0, 0.5, 5.0])
def test_identity_with_the_mean(shift):
    for seed in range(3):
        g = np.random.default_rng(seed).normal(size=(6, 7)) + shift
        rho = g.size * g.mean() ** 2 / np.sum(g**2)
        want = np.sqrt((g.size - 1) / (1 - rho))
        found = float(sai.gradient_snr(jnp.asarray(g, jnp.float32)))
        assert found == pytest.approx(want, rel=1e-5)
        assert found == pytest.approx(numpy_gsnr(g), rel=1e-5)


def test_scale_does_not_matter_so_that_the_first_update_is_linear():
    (g,) = tree()
    once, _ = run(sai.scale_by_gsnr(), [g])
    for c in (1e-3, 1e3, -2.0):
        scaled, state = run(sai.scale_by_gsnr(), [jax.tree.map(lambda x, c=c: c * x, g)])
        jax.tree.map(
            lambda s, o, c=c: np.testing.assert_allclose(s, c * o, rtol=1e-4), scaled[0], once[0]
        )
    assert float(state.gsnr["a"]) == pytest.approx(numpy_gsnr(g["a"]), rel=1e-5)
    for tiny in (1e-30, 1e30):  # squares leave float32's range
        found = sai.gradient_snr(tiny * jnp.array([3.0, 4.0]), eps=0.0)
        assert found == pytest.approx(7.0710678, rel=1e-5)


def test_whole_steps_against_numpy():
    gradients, params = tree(1, 4), tree(2)[0]
    optimizer = sai.sgd_sai(0.1, beta=0.8, weight_decay=0.3)
    state, now = optimizer.init(params), params
    update = jax.jit(optimizer.update)
    for g in gradients:
        step, state = update(g, state, now)
        now = optax.apply_updates(now, step)
    for name in params:
        w = np.asarray(params[name], np.float64)
        scale, m = numpy_gsnr(gradients[0][name]), None
        for g in gradients:
            g = np.asarray(g[name], np.float64)
            m = g if m is None else 0.8 * m + 0.2 * g
            w = (1 - 0.1 * 0.3) * w - 0.1 * scale * m
        np.testing.assert_allclose(now[name], w, rtol=1e-4, atol=1e-5)


def test_frozen_after_the_first_gradient():
    g, later = tree(3, 2)
    plain, _ = run(sai.scale_by_gsnr(beta=0.5), [g, later])
    double, state = run(sai.scale_by_gsnr(beta=0.5), [g, jax.tree.map(lambda x: 2 * x, later)])
    for name in g:
        scale = numpy_gsnr(g[name])
        extra = double[1][name] - plain[1][name]
        np.testing.assert_allclose(extra, 0.5 * scale * later[name], rtol=1e-4, atol=1e-5)
        assert float(state.gsnr[name]) == pytest.approx(scale, rel=1e-5)


def test_without_its_scale_it_is_averaged_momentum():
    gradients = tree(4, 3)
    found, state = run(sai.scale_by_gsnr(beta=0.7), gradients)
    trace = optax.trace(0.7)
    memory = trace.init(gradients[0])
    for step, g in enumerate(gradients):
        # optax.trace sums β^k g; averaging from a buffer that is set first weighs the first by 1.
        share = 1.0 if step == 0 else 0.3
        want, memory = trace.update(jax.tree.map(lambda x, s=share: s * x, g), memory)
        for name in g:
            unscaled = found[step][name] / state.gsnr[name]
            np.testing.assert_allclose(unscaled, want[name], rtol=1e-4, atol=1e-6)


def test_memory_is_half_of_adams():
    params = {"w": jnp.zeros((64, 32)), "b": jnp.zeros(32)}

    def bytes_of(state):
        return sum(x.nbytes for x in jax.tree.leaves(state))

    weights = bytes_of(params)
    found = bytes_of(sai.sgd_sai(0.1).init(params))
    adam = bytes_of(optax.adamw(0.1).init(params))
    scalars = 4 * (1 + len(params))  # the step, and a number for each tensor
    assert found == weights + scalars
    assert adam >= 2 * weights and found / adam < 0.51


def test_degenerate_gradients():
    constant, single = jnp.full(9, 0.3), jnp.array([2.0])
    assert sai.gradient_snr(constant) == pytest.approx(8**0.5)
    assert sai.gradient_snr(single) == 1.0
    assert sai.gradient_snr(jnp.float32(-2.0)) == 1.0
    assert sai.gradient_snr(jnp.zeros(5)) == 0.0
    # As released: a step 1e8 too large.
    assert sai.gradient_snr(single, guard=False) == pytest.approx(2e8, rel=1e-5)
    assert sai.gradient_snr(constant, guard=False) > 1e6
    for x in (constant, jnp.zeros(9)):
        assert jnp.all(jnp.isfinite(jax.jit(jax.grad(sai.gradient_snr))(x)))
    # Nearly constant, but not to within 1e-6: measured.
    near = 1 + 1e-4 * np.random.default_rng(0).normal(size=50)
    found = sai.gradient_snr(jnp.asarray(near, jnp.float32))
    assert found == pytest.approx(numpy_gsnr(near.astype(np.float32)), rel=1e-2)


def test_unused_tensors_are_measured_when_they_are_used():
    g = jnp.array([3.0, 4.0])
    zero = jnp.zeros(2)
    found, state = run(sai.scale_by_gsnr(beta=0.5), [zero, zero, g, 5 * g + 1])
    np.testing.assert_array_equal(found[0], 0)
    assert float(state.gsnr) == pytest.approx(7.0710678, rel=1e-5)
    np.testing.assert_allclose(found[2], 7.0710678 * 0.5 * g, rtol=1e-5)


def test_dtypes():
    params = {"w": jnp.ones((3, 4), jnp.bfloat16)}
    transform = sai.scale_by_gsnr()
    state = transform.init(params)
    g = {"w": jnp.arange(12.0).reshape(3, 4).astype(jnp.bfloat16)}
    update, state = transform.update(g, state)
    assert update["w"].dtype == state.mu["w"].dtype == jnp.bfloat16
    assert state.gsnr["w"].dtype == jnp.float32
    assert float(state.gsnr["w"]) == pytest.approx(numpy_gsnr(np.arange(12.0)), rel=1e-4)


def test_bad_input():
    for name, value in (("beta", 1.0), ("beta", -0.1), ("eps", -1e-8), ("weight_decay", -1.0)):
        with pytest.raises(ValueError, match=name):
            sai.sgd_sai(0.1, **{name: value})
    with pytest.raises(ValueError, match="learning_rate"):
        sai.sgd_sai(-0.1)
    sai.sgd_sai(optax.constant_schedule(0.1))
    with pytest.raises(ValueError, match="w: expected a floating dtype, got int32"):
        sai.scale_by_gsnr().init({"w": jnp.ones(3, jnp.int32)})
    with pytest.raises(ValueError, match="gradient: expected a floating dtype"):
        sai.gradient_snr(jnp.ones(3, jnp.int32))
