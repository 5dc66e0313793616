"""Sharpness-aware gradients, against closed forms and Optax's own SAM."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pgjax.optim import sam


def loss(params, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params["w"] + params["b"])
    return jnp.mean((hidden @ params["v"] - y) ** 2)


def problem():
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {"w": draw(3, 4), "b": draw(4), "v": draw(4)}, (draw(8, 3), draw(8))


@pytest.mark.parametrize("gradient", [sam.sam_gradient, sam.asam_gradient])
def test_no_distance_is_the_plain_gradient(gradient):
    params, batch = problem()
    found = gradient(loss, params, batch, rho=0.0)
    want = jax.grad(loss)(params, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, want)


def test_quadratic():
    def square(x, _):
        return 0.5 * jnp.sum(x**2)

    for x in (0.1, 2.0):
        found = jax.jit(lambda x, rho: sam.sam_gradient(square, x, None, rho=rho))(x, 0.3)
        assert float(found) == pytest.approx(x + 0.3, rel=1e-6)
        # T = |x|: x + ρ x² g / |x g| = x + ρ x.
        found = sam.asam_gradient(square, jnp.float32(x), None, rho=0.3)
        assert float(found) == pytest.approx(1.3 * x, rel=1e-6)
    x = np.array([3.0, 4.0])
    found = sam.sam_gradient(square, jnp.asarray(x), None, rho=0.5)
    np.testing.assert_allclose(found, x + 0.5 * x / 5, rtol=1e-6)
    for gradient in (sam.sam_gradient, sam.asam_gradient):
        np.testing.assert_array_equal(gradient(square, jnp.zeros(2), None, rho=0.5), 0.0)


def test_adaptive_steps_do_not_notice_a_rescaling():
    """Layers scaled by c and 1/c compute the same function; so do the points uphill of them."""

    def product(p, _):
        return (p[0] * p[1] - 1.0) ** 2

    p = jnp.array([0.7, 0.5])
    scale = jnp.array([4.0, 0.25])
    one = sam.asam_gradient(product, p, None, rho=0.2)
    two = sam.asam_gradient(product, p * scale, None, rho=0.2)
    np.testing.assert_allclose(two * scale, one, rtol=1e-5)
    plain = sam.sam_gradient(product, p * scale, None, rho=0.2) * scale
    assert not np.allclose(plain, sam.sam_gradient(product, p, None, rho=0.2), rtol=1e-2)


def test_same_as_optax():
    params, batch = problem()
    outer = optax.sgd(0.1)
    optimizer = optax.contrib.sam(
        outer, optax.chain(optax.contrib.normalize(), optax.sgd(0.2)), opaque_mode=True
    )
    gradient = jax.grad(loss)
    want, _ = optimizer.update(
        gradient(params, batch),
        optimizer.init(params),
        params,
        grad_fn=lambda p, _: gradient(p, batch),
    )
    found, _ = outer.update(sam.sam_gradient(loss, params, batch, rho=0.2), outer.init(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, want)


def test_bad_input():
    params, batch = problem()
    for gradient in (sam.sam_gradient, sam.asam_gradient):
        with pytest.raises(ValueError, match="rho"):
            gradient(loss, params, batch, rho=-0.1)
