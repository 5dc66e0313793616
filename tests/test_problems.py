"""Enumerable problems: sums over all sequences against closed forms and sampling."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pgjax as pg
from pgjax import objectives
from pgjax.diagnostics import problems

TABLE = jnp.array([[0.0, 1.0, 0.5], [2.0, 0.0, -1.0]])


def staged():
    """Token 1 chooses a door; behind door 0 it ends, behind 1 the policy draws again, then nature
    decides with probability 1/4 or 3/4 by that token."""

    def roles(tokens):
        again = tokens[:, 1] == 1
        policy = jnp.full(again.shape, problems.POLICY)
        none = jnp.full(again.shape, problems.NOBODY)
        return jnp.stack(
            [none, policy, jnp.where(again, policy, none), jnp.where(again, problems.NATURE, none)],
            axis=1,
        )

    def nature(tokens):
        win = jnp.where(tokens[:, 2] == 1, 0.75, 0.25)
        return jnp.broadcast_to(jnp.stack([1 - win, win], -1)[:, None], (*tokens.shape, 2))

    def logits(params, tokens):
        zero = jnp.zeros((tokens.shape[0], 2), params.dtype)
        first = jnp.broadcast_to(params[0], zero.shape)
        return jnp.stack([zero, first, params[1 + tokens[:, 1]], zero], axis=1)

    return problems.TokenProblem(
        num_prompts=1,
        num_actions=2,
        horizon=3,
        logits=logits,
        reward=lambda tokens: jnp.where(tokens[:, 1] == 0, 0.4, tokens[:, 3].astype(jnp.float32)),
        roles=roles,
        nature=nature,
    )


def test_a_bandit_is_its_table():
    problem = problems.bandit(TABLE)
    params = jax.random.normal(jax.random.key(0), (2, 3))
    want = jnp.mean(jnp.sum(jax.nn.softmax(params) * TABLE, -1))
    np.testing.assert_allclose(problems.expected_reward(problem, params), want, rtol=1e-6)
    np.testing.assert_allclose(
        jax.grad(lambda p: problems.expected_reward(problem, p))(params),
        pg.diagnostics.policy_gradient(params, TABLE),
        rtol=1e-5,
        atol=1e-7,
    )
    assert problems.all_sequences(problem).tolist() == [[p, a] for p in range(2) for a in range(3)]


def test_stages_nature_and_endings():
    problem, params = staged(), jnp.array([[0.3, -0.2], [9.0, 9.0], [0.1, 0.7]])
    rows = problems.all_sequences(problem)
    # Door 0 once; door 1 with two tokens of the policy and two of nature.
    assert rows.tolist() == [[0, 0, 0, 0], *[[0, 1, a, b] for a in (0, 1) for b in (0, 1)]]
    probability = np.exp(problems.log_probability(problem, params, jnp.asarray(rows)))
    assert probability.sum() == pytest.approx(1.0)
    door, arm = jax.nn.softmax(params[0]), jax.nn.softmax(params[2])
    want = door[0] * 0.4 + door[1] * (arm[0] * 0.25 + arm[1] * 0.75)
    assert float(problems.expected_reward(problem, params)) == pytest.approx(float(want))
    compiled = jax.jit(lambda params: problems.expected_reward(problem, params))
    assert float(compiled(params)) == pytest.approx(float(want))
    rollout = problems.sample(problem, params, jax.random.key(0), group_size=4000)
    assert float(rollout.rewards.mean()) == pytest.approx(float(want), abs=0.03)
    assert set(map(tuple, np.asarray(rollout.tokens))) == set(map(tuple, rows))
    again = rollout.tokens[:, 1] == 1
    np.testing.assert_array_equal(rollout.mask[:, 2], again)
    assert not rollout.mask[:, [0, 3]].any()
    out = problems.outputs(problem, params, rollout, frozenset({"entropy", "square_sum"}))
    np.testing.assert_allclose(out.logprobs, rollout.behavior_logprobs, atol=1e-6)
    np.testing.assert_allclose(out.square_sum[:, 1], jnp.sum(door**2), rtol=1e-6)


def test_training_on_one_goes_uphill():
    problem = staged()
    update = pg.train.make_update(
        functools.partial(problems.outputs, problem), objectives.rloo(), optax.sgd(1.0)
    )
    state = pg.train.init(jnp.zeros((3, 2)), optax.sgd(1.0), jax.random.key(0))
    start = float(problems.expected_reward(problem, state.params))
    for step in range(60):
        batch = problems.sample(
            problem, state.params, jax.random.fold_in(state.key, step), group_size=16
        )
        state, _ = update(state, batch)
    assert start == pytest.approx(0.45) and problems.expected_reward(problem, state.params) > 0.65


def test_errors():
    with pytest.raises(ValueError, match="num_actions"):
        problems.TokenProblem(
            num_prompts=1, num_actions=0, horizon=1, logits=lambda p, t: t, reward=lambda t: t
        )
    big = problems.TokenProblem(
        num_prompts=1,
        num_actions=10,
        horizon=9,
        logits=lambda p, t: jnp.zeros((*t.shape, 10)),
        reward=lambda t: t[:, 1],
    )
    with pytest.raises(ValueError, match="at most 200000 sequences"):
        problems.all_sequences(big)
    with pytest.raises(ValueError, match="group_size"):
        problems.sample(big, None, jax.random.key(0), group_size=0)
