"""Errors, targets and weights of values against closed forms, SciPy and RLax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax
from scipy import stats

from pgjax import surrogates, values

RNG = np.random.default_rng(0)


def test_huber_is_a_parabola_between_two_lines():
    away = jnp.array([-3.0, -1.0, -0.2, 0.0, 0.5, 1.0, 4.0])
    targets = jnp.linspace(-1, 1, 7)
    for delta in (0.5, 1.0, 2.0):
        found = values.huber_error(targets - away, targets, delta=delta)
        wanted = np.where(np.abs(away) <= delta, away**2 / 2, delta * (np.abs(away) - delta / 2))
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(found, rlax.huber_loss(away, delta), rtol=1e-5, atol=1e-7)
        slope = jax.grad(lambda v, delta=delta: values.huber_error(v, targets, delta=delta).sum())(
            targets - away
        )
        np.testing.assert_allclose(slope, -np.clip(away, -delta, delta), rtol=1e-5, atol=1e-6)
    # Far from both ends it is the squared error.
    np.testing.assert_allclose(
        values.huber_error(-away, 0 * away, delta=100.0), values.value_error(-away, 0 * away)
    )


def test_an_expectile_is_where_its_error_is_least():
    assert values.value_error is surrogates.value_error
    v, targets = jnp.asarray(RNG.normal(size=(2, 4, 5)), jnp.float32)
    np.testing.assert_allclose(
        values.expectile_error(v, targets, expectile=0.5), values.value_error(v, targets), rtol=1e-6
    )
    np.testing.assert_allclose(
        values.expectile_error(jnp.zeros(3), jnp.array([2.0, -2.0, 0.0]), expectile=0.9),
        [3.6, 0.4, 0.0],
        rtol=1e-6,
    )

    def slope(at, sample, expectile):
        def total(v):
            return values.expectile_error(
                jnp.full(len(sample), v), jnp.asarray(sample, jnp.float32), expectile=expectile
            ).mean()

        return jax.grad(total)(jnp.float32(at))

    known = {0.5: 1 / 3, 0.7: 0.53846, 0.9: 0.81818, 0.99: 0.98020}
    for expectile, at in known.items():
        assert abs(expectile / (expectile + 2 * (1 - expectile)) - at) < 1e-5
        assert abs(slope(at, [0.0, 0.0, 1.0], expectile)) < 1e-5
        assert slope(at + 0.01, [0.0, 0.0, 1.0], expectile) > 0
    sample = RNG.normal(size=50)
    for expectile in (0.1, 0.5, 0.8):
        assert abs(slope(stats.expectile(sample, expectile), sample, expectile)) < 1e-5


def test_one_step_targets_are_those_of_rlax_and_by_hand():
    rewards, discounts = jnp.array([1.0, 2.0, 3.0]), 0.9 * jnp.array([1.0, 0.0, 1.0])
    next_q = jnp.array([[1.0, 5.0], [7.0, 2.0], [0.0, -1.0]])
    other = jnp.array([[10.0, 20.0], [30.0, 40.0], [50.0, 60.0]])
    target = values.one_step_targets(rewards, values.greedy_values(next_q), discounts)
    np.testing.assert_allclose(target, [1 + 0.9 * 5, 2, 3], rtol=1e-6)
    double = values.double_greedy_values(next_q, other)
    np.testing.assert_allclose(double, [20, 30, 50])
    q, action = jnp.asarray(RNG.normal(size=(3, 2)), jnp.float32), jnp.array([0, 1, 1])
    taken = values.taken_values(q, action)
    np.testing.assert_array_equal(taken, [q[0, 0], q[1, 1], q[2, 1]])
    np.testing.assert_allclose(
        target - taken, jax.vmap(rlax.q_learning)(q, action, rewards, discounts, next_q), rtol=1e-5
    )
    np.testing.assert_allclose(
        values.one_step_targets(rewards, double, discounts) - taken,
        jax.vmap(rlax.double_q_learning)(q, action, rewards, discounts, other, next_q),
        rtol=1e-5,
    )
    # Only the actions taken get a gradient, and targets none at all.
    slope = jax.grad(lambda q: values.taken_values(q, action).sum())(q)
    np.testing.assert_array_equal(slope, [[1, 0], [0, 1], [0, 1]])
    slope = jax.grad(
        lambda q: values.one_step_targets(rewards, values.greedy_values(q), discounts).sum()
    )(q)
    np.testing.assert_array_equal(slope, jnp.zeros((3, 2)))


def test_q_lambda_targets_are_lambda_returns_of_the_greedy_value():
    rewards, q = RNG.normal(size=(4, 10)), RNG.normal(size=(4, 10, 3))
    done = np.zeros((4, 10), bool)
    done[1, 4] = done[2, 9] = done[3, 0] = done[3, 9] = True  # nowhere, inside, last, both
    arrays = [jnp.asarray(x, jnp.float32) for x in (rewards, q, 0.97 * (1 - done))]
    for lambda_ in (0.0, 0.65, 1.0):
        found = values.q_lambda_targets(*arrays, lambda_=lambda_)
        wanted = jax.vmap(rlax.lambda_returns, in_axes=(0, 0, 0, None))(
            arrays[0], arrays[2], arrays[1].max(-1), lambda_
        )
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
        # As the authors write it: from the end, the discount inside and `done` as a switch.
        best, later, by_hand = q.max(-1), None, np.zeros_like(rewards)
        for t in reversed(range(10)):
            inside = best[:, t] if later is None else best[:, t] + lambda_ * (later - best[:, t])
            later = rewards[:, t] + np.where(done[:, t], 0.0, 0.97 * inside)
            by_hand[:, t] = later
        np.testing.assert_allclose(found, by_hand, rtol=1e-5, atol=1e-5)
    one_step = values.q_lambda_targets(*arrays, lambda_=0.0)
    np.testing.assert_allclose(
        one_step,
        values.one_step_targets(arrays[0], values.greedy_values(arrays[1]), arrays[2]),
        rtol=1e-5,
    )
    # λ = 1: rewards until the end, or until the last step and its bootstrap.
    found = values.q_lambda_targets(*arrays, lambda_=1.0)
    weights = 0.97 ** np.arange(11)
    np.testing.assert_allclose(
        found[0, 0], np.append(rewards[0], q[0, 9].max()) @ weights, rtol=1e-5
    )
    np.testing.assert_allclose(found[1, 0], rewards[1, :5] @ weights[:5], rtol=1e-5)
    # A cut bootstraps and lets nothing over.
    cut = jnp.zeros((4, 10), bool).at[0, 2].set(True)
    found = values.q_lambda_targets(*arrays, lambda_=1.0, truncated=cut)
    wanted = rewards[0, :3] @ weights[:3] + weights[3] * q[0, 2].max()
    np.testing.assert_allclose(found[0, 0], wanted, rtol=1e-5)
    slope = jax.grad(lambda q: values.q_lambda_targets(arrays[0], q, arrays[2], lambda_=0.5).sum())
    np.testing.assert_array_equal(slope(arrays[1]), jnp.zeros_like(arrays[1]))


def test_weights_of_recorded_actions():
    advantages = jnp.array([-1e9, -1.0, 0.0, 1.0, 1e9])
    np.testing.assert_array_equal(values.advantage_weights(advantages, beta=0.0), jnp.ones(5))
    found = values.advantage_weights(advantages, beta=2.0)
    np.testing.assert_allclose(found, [0, np.exp(-2), 1, np.exp(2), 100], rtol=1e-5)
    edge = np.log(100.0) / 3
    found = values.advantage_weights(jnp.array([edge - 0.01, edge + 0.01]), beta=3.0)
    assert found[0] < 100 * (1 - 1e-3) and abs(found[1] - 100) < 1e-3
    assert values.advantage_weights(advantages, beta=1.0, limit=np.inf)[-1] == np.inf
    slope = jax.grad(lambda x: values.advantage_weights(x, beta=1.0).sum())(advantages)
    np.testing.assert_array_equal(slope, jnp.zeros(5))


def test_an_expectile_of_action_values_does_not_buy_luck():
    """One lucky outcome of a bad action; the expectation over outcomes stays in Q."""
    state_action = jnp.array([0, 0, 1])  # from the one state: action 0 twice, action 1 once
    rewards = jnp.array([1.0, 0.0, 0.6])
    discounts = jnp.zeros(3)

    def step(tables, _, expectile):
        v, q = tables
        v = v - 0.2 * jax.grad(
            lambda v: values.expectile_error(
                jnp.full(3, v), q[state_action], expectile=expectile
            ).sum()
        )(v)
        target = values.one_step_targets(rewards, jnp.zeros(3), discounts)
        q = q - 0.2 * jax.grad(lambda q: values.value_error(q[state_action], target).sum())(q)
        return (v, q), None

    found = []
    for expectile in (0.5, 0.9, 0.999):
        (v, q), _ = jax.lax.scan(
            lambda x, _, expectile=expectile: step(x, _, expectile),
            (jnp.float32(0), jnp.zeros(2)),
            None,
            length=300,
        )
        np.testing.assert_allclose(q, [0.5, 0.6], rtol=1e-5)
        low = 2 * (1 - expectile)
        wanted = (low * 0.5 + expectile * 0.6) / (low + expectile)
        np.testing.assert_allclose(v, wanted, rtol=1e-4)
        found.append(float(v))
    assert found[0] < found[1] < found[2] <= 0.6 and found[2] > 0.599


def test_bad_values():
    x, q = jnp.zeros(3), jnp.zeros((3, 2))
    for wrong in (0.0, 1.0, -0.1, np.nan):
        with pytest.raises(ValueError, match="expectile"):
            values.expectile_error(x, x, expectile=wrong)
    with pytest.raises(ValueError, match="targets: expected shape"):
        values.expectile_error(x, jnp.zeros(4), expectile=0.5)
    with pytest.raises(ValueError, match="delta"):
        values.huber_error(x, x, delta=0.0)
    with pytest.raises(ValueError, match="values: expected a floating dtype"):
        values.huber_error(jnp.zeros(3, int), x)
    with pytest.raises(ValueError, match="beta"):
        values.advantage_weights(x, beta=-1.0)
    with pytest.raises(ValueError, match="limit"):
        values.advantage_weights(x, beta=1.0, limit=0.0)
    with pytest.raises(ValueError, match="discounts: expected shape"):
        values.one_step_targets(x, x, jnp.zeros(2))
    with pytest.raises(ValueError, match="lambda_"):
        values.q_lambda_targets(x, q, x, lambda_=1.5)
    with pytest.raises(ValueError, match="next_action_values: expected shape"):
        values.q_lambda_targets(
            x, q[:2], x, lambda_=0.5
        )  # the value behind the last step is missing
    with pytest.raises(ValueError, match="next_action_values: expected shape"):
        values.q_lambda_targets(x, x, x, lambda_=0.5)
    with pytest.raises(ValueError, match="actions: expected an integer"):
        values.taken_values(q, jnp.zeros(3))
    with pytest.raises(ValueError, match="actions: expected shape"):
        values.taken_values(q, jnp.zeros(2, int))
    with pytest.raises(ValueError, match="target_action_values"):
        values.double_greedy_values(q, jnp.zeros((3, 4)))
    with pytest.raises(ValueError, match="action_values: expected shape"):
        values.greedy_values(jnp.float32(0))
