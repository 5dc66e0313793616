"""MiniRL's surrogate, and the gap between token and sequence objectives by enumeration."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax import surrogates
from pgjax.diagnostics import problems, surrogate_gap
from pgjax.surrogates.minirl import minirl

B, T = 6, 5


def batch():
    rng = np.random.default_rng(0)
    current = jnp.asarray(-rng.gamma(2.0, 1.0, (B, T)), jnp.float32)
    old = current - jnp.asarray(rng.normal(0, 0.3, (B, T)), jnp.float32)
    engine = old - jnp.asarray(rng.normal(0, 0.8, (B, T)), jnp.float32)
    advantages = jnp.asarray(rng.normal(size=B), jnp.float32).at[2].set(0.0)
    return current, old, engine, advantages


def gradient(function, logprobs):
    return np.asarray(jax.jit(jax.grad(lambda lp: function(lp).sum()))(logprobs))


@pytest.mark.parametrize(("low", "high", "cap"), [(0.2, 0.27, 3.0), (0.1, 0.0, 1.0), (1, 9, 2.0)])
def test_gradient_is_mask_times_capped_weight(low, high, cap):
    current, old, engine, advantages = batch()
    found = gradient(
        lambda lp: minirl(lp, old, engine, advantages, low=low, high=high, cap=cap), current
    )
    r = np.exp(np.asarray(current - old, np.float64))
    weight = np.minimum(np.exp(np.asarray(current - engine, np.float64)), cap)
    a = np.asarray(advantages, np.float64)[:, None]
    removed = ((a > 0) & (r > 1 + high)) | ((a < 0) & (r < 1 - low))
    np.testing.assert_allclose(found, np.where(removed, 0, -weight * a), rtol=2e-5, atol=1e-7)
    assert (weight == cap).any()
    assert removed.any() == (low < 1)


def test_limits():
    current, old, engine, advantages = batch()
    never = {"low": 1.0, "high": np.inf, "cap": np.inf}
    # Nothing has moved and the engine agrees: REINFORCE.
    np.testing.assert_allclose(
        gradient(lambda lp: minirl(lp, current, current, advantages), current),
        gradient(lambda lp: surrogates.score_function(lp, advantages), current),
        rtol=1e-6,
    )
    # The engine agrees: PPO's clip; and without it importance weighting.
    ratio = functools.partial(surrogates.importance_ratio, behavior_logprobs=old)
    np.testing.assert_allclose(
        gradient(lambda lp: minirl(lp, old, old, advantages, cap=np.inf), current),
        gradient(lambda lp: surrogates.clipped(ratio(lp), advantages, low=0.2, high=0.27), current),
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        gradient(lambda lp: minirl(lp, old, old, advantages, **never), current),
        gradient(lambda lp: surrogates.importance_weighted(ratio(lp), advantages), current),
        rtol=1e-5,
    )
    # Data are data.
    for position in (1, 2, 3):
        arguments = [current, old, engine, advantages]

        def of(x, position=position, arguments=tuple(arguments)):
            return minirl(*arguments[:position], x, *arguments[position + 1 :])

        assert not gradient(of, arguments[position]).any()


def tree(horizon, actions=3):
    """One prompt; the policy at a position sees the sum of the tokens before it."""
    rng = np.random.default_rng(1)
    table = jnp.asarray(rng.normal(size=(actions,) * horizon), jnp.float32)

    def logits(params, tokens):
        before = (jnp.cumsum(tokens, axis=1) - tokens) % actions
        rows = params[jnp.arange(tokens.shape[1]), before]
        return rows.astype(params.dtype)

    problem = problems.TokenProblem(
        num_prompts=1,
        num_actions=actions,
        horizon=horizon,
        logits=logits,
        reward=lambda tokens: table[tuple(tokens[:, 1:].T)],
    )
    params = jnp.asarray(rng.normal(size=(horizon + 1, actions, actions)))
    direction = jnp.asarray(rng.normal(size=params.shape))
    return problem, params, direction


def test_the_gap_closes_as_theory_says():
    with jax.enable_x64(True):
        problem, params, direction = tree(3)
        gap = jax.jit(
            lambda size: surrogate_gap.exact_gap(problem, params + size * direction, params)
        )
        found = [gap(0.04 / 2**k) for k in range(4)]
        values = np.abs([float(g.value) for g in found])
        norms = np.array([float(g.gradient_norm) for g in found])
        np.testing.assert_allclose(values[:-1] / values[1:], 4, rtol=0.15)
        np.testing.assert_allclose(norms[:-1] / norms[1:], 2, rtol=0.15)
        same = gap(0.0)
        assert abs(float(same.value)) < 1e-7 and float(same.gradient_norm) < 1e-7
        assert float(same.cosine) == pytest.approx(1)


def test_one_token_has_no_gap_whatever_sampled():
    problem, params, direction = tree(1)
    found = surrogate_gap.exact_gap(problem, params + 0.8 * direction, params)
    assert abs(float(found.value)) < 1e-6 and float(found.gradient_norm) < 1e-6


def test_an_engine_that_computes_otherwise():
    problem, params, _ = tree(2)

    def rounded(params, tokens):
        return jnp.round(2 * problem.logits(params, tokens)) / 2

    other = dataclasses.replace(problem, logits=rounded)
    tokens = jnp.asarray(problems.all_sequences(problem))
    engine = problems.rollout_of(other, tokens, params).behavior_logprobs
    learner = problems.rollout_of(problem, tokens, params).behavior_logprobs
    ratio = np.exp(np.asarray(learner - engine))[:, 1:]
    want = np.sum(np.exp(np.asarray(engine).sum(-1)) * ratio.sum(-1) * problem.reward(tokens))
    found = surrogate_gap.token_objective(problem, params, params, engine=rounded)
    assert float(found) == pytest.approx(float(want), rel=1e-5)
    assert (
        float(surrogate_gap.exact_gap(problem, params, params, engine=rounded).gradient_norm) > 0.01
    )


def test_samples_tell_the_same():
    problem, params, direction = tree(3)
    moved = params + 0.2 * direction
    rollout = problems.sample(problem, params, jax.random.key(0), group_size=40_000)
    current = problems.outputs(problem, moved, rollout, frozenset()).logprobs
    found = surrogate_gap.sampled_mismatch(
        current, rollout.behavior_logprobs, rollout.mask, rewards=rollout.rewards
    )
    exact = surrogate_gap.exact_gap(problem, moved, params)
    # The sampled difference of values leaves out E[(T-1) R] in the same way.
    assert float(found.gap) == pytest.approx(float(exact.value), abs=0.1 * abs(float(exact.value)))
    d = np.asarray(current - rollout.behavior_logprobs)[:, 1:]
    assert float(found.mean) == pytest.approx(d.mean(), abs=1e-5)
    assert float(found.largest) == pytest.approx(np.abs(d).max(), rel=1e-5)
    assert float(found.divergence) == pytest.approx((np.exp(d) - 1 - d).mean(), rel=1e-3)
    nothing = surrogate_gap.sampled_mismatch(
        current, current, jnp.zeros_like(rollout.mask), rewards=rollout.rewards
    )
    assert float(nothing.gap) == float(nothing.largest) == float(nothing.divergence) == 0


def test_errors():
    current, old, engine, advantages = batch()
    for cap in (0.5, np.nan):
        with pytest.raises(ValueError, match="cap: expected a number in"):
            minirl(current, old, engine, advantages, cap=cap)
    with pytest.raises(ValueError, match="behavior_logprobs: expected shape"):
        minirl(current, old, engine[:2], advantages)
    with pytest.raises(ValueError, match="advantages: expected a shape that broadcasts"):
        minirl(current, old, engine, advantages[:2])
    with pytest.raises(ValueError, match="low: "):
        minirl(current, old, engine, advantages, low=1.5)
    with pytest.raises(ValueError, match="mask: expected dtype bool"):
        surrogate_gap.sampled_mismatch(current, old, jnp.ones((B, T)))
