"""HPT's coefficients, losses on demonstrations, and the objective they share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax import surrogates
from pgjax.advantages import hybrid
from pgjax.surrogates import offline


@pytest.mark.parametrize(
    ("gate", "solved", "want"),
    [
        (0.0, 0, (0, 1)),
        (0.0, 1, (1, 0)),
        (0.25, 1, (0, 1)),
        (0.25, 2, (0, 1)),
        (0.25, 3, (1, 0)),
        (1.0, 8, (0, 1)),
    ],
)
def test_switch(gate, solved, want):
    alpha, beta = hybrid.switch_coefficients(jnp.array([solved / 8]), gate=gate)
    assert (float(alpha[0]), float(beta[0])) == want


def test_soft_table():
    alpha, beta = hybrid.soft_coefficients(jnp.arange(9) / 8)
    assert alpha.tolist() == [1, 0, 0.125, 0.25, 0.5, 1, 1, 1, 1]
    assert beta.tolist() == [1, 1, 0.5, 0.25, 0.125, 0, 0, 0, 0]
    alpha, beta = hybrid.soft_coefficients(jnp.array([0.05, 2 / 6, 0.99]))
    assert alpha.tolist() == [1, 0.25, 1] and beta.tolist() == [1, 0.25, 0]


def batch():
    rng = np.random.default_rng(0)
    logprobs = jnp.asarray(-rng.gamma(1.5, 1.2, (4, 5)), jnp.float32)
    advantages = jnp.asarray(rng.normal(size=4), jnp.float32)
    return logprobs, advantages, jnp.asarray(rng.random((4, 5)) < 0.7)


def gradient(function, logprobs):
    return jax.jit(jax.grad(lambda lp: function(lp).sum()))(logprobs)


def test_unit_denominator_is_probability_times_advantage():
    logprobs, advantages, mask = batch()
    found = gradient(lambda lp: offline.unit_denominator(lp, advantages, mask), logprobs)
    value_form = gradient(
        lambda lp: jnp.where(mask, -advantages[:, None] * jnp.exp(lp), 0), logprobs
    )
    np.testing.assert_allclose(found, value_form, rtol=1e-5)


@pytest.mark.parametrize("shape", [0.02, 0.1, 1.0])
def test_shaped_has_the_gradient_of_its_shape(shape):
    logprobs, advantages, mask = batch()
    found = gradient(lambda lp: offline.shaped(lp, advantages, mask, shape=shape), logprobs)

    def value_form(lp):
        p = jnp.exp(lp)
        return jnp.where(mask, -advantages[:, None] * p / (p + shape), 0)

    np.testing.assert_allclose(found, gradient(value_form, logprobs), rtol=1e-4)
    p = np.exp(np.asarray(logprobs, np.float64))
    weight = shape * p / (p + shape) ** 2
    np.testing.assert_allclose(offline.shaped_weight(logprobs, shape=shape), weight, rtol=1e-5)
    np.testing.assert_allclose(
        found, np.where(mask, -weight * np.asarray(advantages)[:, None], 0), rtol=1e-4
    )


def test_shaped_weight_is_largest_at_its_constant():
    p = np.geomspace(1e-4, 1, 401)
    weight = np.asarray(offline.shaped_weight(jnp.log(jnp.asarray(p)), shape=0.1))
    assert p[weight.argmax()] == pytest.approx(0.1, rel=0.02)
    assert weight.max() == pytest.approx(0.25, rel=1e-4)
    assert offline.shaped_weight(jnp.array([-1000.0]))[0] == 0


def test_supervised_row_is_the_likelihood():
    logprobs, _, mask = batch()
    found = gradient(lambda lp: surrogates.unified(lp, lp, jnp.ones(4), mask), logprobs)
    np.testing.assert_allclose(found, np.where(mask, -1.0, 0.0))


@pytest.mark.parametrize("reference", ["demonstrator", "policy", "uniform", "other"])
def test_the_common_objective_has_the_unified_gradient(reference):
    """E_ref[(r + c π_β/π) ∇π / π_ref] is the gradient of E_π[r] - c KL(π_β ‖ π), for any π_ref."""
    arms, coefficient = 5, 0.7
    rng = np.random.default_rng(3)
    logits, rewards = jnp.asarray(rng.normal(size=arms)), jnp.asarray(rng.normal(size=arms))
    demonstrator = jax.nn.softmax(jnp.asarray(rng.normal(size=arms)))
    policy = jax.nn.softmax(logits)
    sampler = {
        "demonstrator": demonstrator,
        "policy": policy,
        "uniform": jnp.full(arms, 1 / arms),
        "other": jax.nn.softmax(jnp.asarray(rng.normal(size=arms))),
    }[reference]

    def objective(logits):
        log_policy = jax.nn.log_softmax(logits)
        kl = jnp.sum(demonstrator * (jnp.log(demonstrator) - log_policy))
        return jnp.exp(log_policy) @ rewards - coefficient * kl

    advantage = rewards + coefficient * demonstrator / policy

    def loss(logits):
        chosen = jax.nn.log_softmax(logits)[:, None]
        terms = surrogates.unified(
            chosen, jnp.log(sampler)[:, None], advantage, jnp.ones((arms, 1), bool)
        )
        return jnp.sum(sampler * terms[:, 0])

    np.testing.assert_allclose(
        -jax.jit(jax.grad(loss))(logits), jax.jit(jax.grad(objective))(logits), atol=2e-6
    )


def test_errors():
    for gate in (-0.1, 1.5):
        with pytest.raises(ValueError, match="gate: expected a number in"):
            hybrid.switch_coefficients(jnp.zeros(1), gate=gate)
    with pytest.raises(ValueError, match="success_rate: expected a floating dtype"):
        hybrid.soft_coefficients(jnp.zeros(1, int))
    for function in (
        functools.partial(offline.shaped, advantages=jnp.ones(1), mask=jnp.ones((1, 1), bool)),
        offline.shaped_weight,
    ):
        with pytest.raises(ValueError, match="shape: expected a number in"):
            function(jnp.zeros((1, 1)), shape=0.0)
