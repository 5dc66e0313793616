"""Conjugate gradients against numpy, Fisher products against scores, trust regions kept."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pgjax import policies
from pgjax.optim import natural

FAMILY = policies.categorical()


@pytest.mark.parametrize("size", [1, 3, 5])
def test_conjugate_gradients_solve_exactly(size):
    with jax.enable_x64(True):
        rng = np.random.default_rng(size)
        root = rng.normal(size=(size, size))
        matrix = root @ root.T + 0.5 * np.eye(size)
        b = {"a": jnp.asarray(rng.normal(size=size))}
        found = natural.conjugate_gradient(
            lambda x: {"a": jnp.asarray(matrix) @ x["a"]}, b, num_steps=size, tolerance=0.0
        )
        np.testing.assert_allclose(found["a"], np.linalg.solve(matrix, b["a"]), rtol=1e-9)


def test_conjugate_gradients_keep_what_they_have():
    def product(x):
        return jnp.array([2.0, -1.0]) * x

    b = jnp.array([1.0, 1.0])
    found = natural.conjugate_gradient(product, b)
    assert np.all(np.isfinite(found))
    np.testing.assert_array_equal(natural.conjugate_gradient(product, jnp.zeros(2)), 0.0)
    # The first direction has positive curvature, 2 - 1, and a step along it was taken.
    assert np.any(found != 0)
    nan = natural.conjugate_gradient(lambda x: x * jnp.nan, b)
    np.testing.assert_array_equal(nan, 0.0)
    small = natural.conjugate_gradient(lambda x: 4.0 * x, b, tolerance=10.0)
    np.testing.assert_array_equal(small, 0.0)
    with pytest.raises(ValueError, match="num_steps"):
        natural.conjugate_gradient(product, b, num_steps=0)


def policy(key=0):
    states = jax.random.normal(jax.random.key(key), (7, 3))
    params = {"w": 0.5 * jax.random.normal(jax.random.key(key + 1), (3, 4)), "b": jnp.zeros(4)}
    return params, lambda p: states @ p["w"] + p["b"]


def test_the_hessian_of_the_divergence_is_the_fisher_matrix():
    """E[s sᵀ] over states and actions, by enumeration."""
    with jax.enable_x64(True):
        params, logits = policy()
        params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
        flat, unravel = jax.flatten_util.ravel_pytree(params)
        old = logits(params)

        def log_probs(flat):
            return jax.nn.log_softmax(logits(unravel(flat)))

        scores = jax.jacobian(log_probs)(flat)
        weights = jnp.exp(log_probs(flat))
        fisher = jnp.einsum("sa,sai,saj->ij", weights, scores, scores) / old.shape[0]

        def distance(params):
            return FAMILY.kl(old, logits(params)).mean()

        vector = jax.random.normal(jax.random.key(5), flat.shape, jnp.float64)
        found = natural.hessian_vector_product(distance, params, unravel(vector), damping=0.3)
        wanted = fisher @ vector + 0.3 * vector
        np.testing.assert_allclose(jax.flatten_util.ravel_pytree(found)[0], wanted, rtol=1e-6)

        grads = unravel(jax.random.normal(jax.random.key(6), flat.shape, jnp.float64))
        direction, _ = natural.natural_direction(
            grads, distance, params, damping=0.3, num_steps=flat.size
        )
        wanted = jnp.linalg.solve(
            fisher + 0.3 * jnp.eye(flat.size), jax.flatten_util.ravel_pytree(grads)[0]
        )
        # A residual of 1e-5, where it stops, is an error of 1e-5 over the smallest eigenvalue.
        np.testing.assert_allclose(
            jax.flatten_util.ravel_pytree(direction)[0], wanted, rtol=0, atol=1e-5 / 0.3
        )


def setting(reward_scale=1.0):
    params, logits = policy()
    old = logits(params)
    rewards = reward_scale * jax.random.normal(jax.random.key(9), old.shape)

    def objective(p):
        return jnp.sum(jax.nn.softmax(logits(p)) * rewards, -1).mean()

    def distance(p):
        return FAMILY.kl(old, logits(p)).mean()

    return params, objective, distance


@pytest.mark.parametrize("radius", [1e-4, 1e-2])
def test_steps_have_the_length_that_was_asked_for(radius):
    params, objective, distance = setting()
    grads = jax.grad(objective)(params)
    step = natural.natural_step(grads, distance, params, radius=radius, damping=1e-4)
    there = optax.apply_updates(params, step)
    np.testing.assert_allclose(distance(there), radius, rtol=0.15 if radius > 1e-3 else 0.02)
    assert objective(there) > objective(params)
    # The scale of the reward does not matter.
    other, larger, _ = setting(reward_scale=10.0)
    again = natural.natural_step(
        jax.grad(larger)(other), distance, params, radius=radius, damping=1e-4
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-6), again, step)
    zero = natural.natural_step(jax.tree.map(jnp.zeros_like, params), distance, params)
    assert all(np.all(x == 0) for x in jax.tree.leaves(zero))


def test_a_trust_region_is_kept_or_nothing_happens():
    params, objective, distance = setting()
    options = {"radius": 0.05, "damping": 1e-4}
    found = natural.trust_region_step(objective, distance, params, **options)
    there = optax.apply_updates(params, found.update)
    assert found.accepted and distance(there) <= 0.05 and found.improvement > 0
    np.testing.assert_allclose(found.improvement, objective(there) - objective(params), rtol=1e-3)
    # A huge radius leads beyond where the model holds: shortened, but still within.
    far = natural.trust_region_step(objective, distance, params, radius=3.0, damping=1e-4)
    assert far.distance <= 3.0 and far.improvement > 0

    def trap(p):
        """Better along the slope, but worse wherever one steps."""
        moved = optax.tree.sub(p, params)
        return objective(p) - jnp.where(optax.tree.vdot(moved, moved) > 1e-12, 1e3, 0.0)

    none = natural.trust_region_step(trap, distance, params, **options)
    assert not none.accepted and none.distance == 0 and none.improvement == 0
    assert all(np.all(x == 0) for x in jax.tree.leaves(none.update))
    with pytest.raises(ValueError, match="radius"):
        natural.trust_region_step(objective, distance, params, radius=0.0)
    with pytest.raises(ValueError, match="shrink"):
        natural.trust_region_step(objective, distance, params, shrink=1.0)
