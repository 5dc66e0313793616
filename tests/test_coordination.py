"""The coordination game and Aloha: optima as published, rewards, steps and chances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax import envs
from pgjax.envs import aloha, coordination

KEY = jax.random.key(0)


@pytest.mark.parametrize(("size", "best"), [(2, 47.80), (3, 43.10), (5, 53.78)])
def test_the_coordination_games_optimum(size, best):
    game = coordination.tables(size)
    np.testing.assert_allclose(game.transitions.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(coordination.best_return(game), best, atol=0.006)
    always = jnp.zeros(game.transitions.shape).at[:, 0].set(1.0)
    everyone = coordination.expected_return(game, always)
    assert everyone <= coordination.best_return(game) + 1e-3
    # A policy of the joint action, full in its graph, can be that.
    np.testing.assert_allclose(everyone, best, atol=0.01)


def test_rewards_and_steps_of_the_game():
    bits = jnp.array([[0, 0, 0], [0, 0, 1], [0, 1, 1], [1, 1, 1]])
    np.testing.assert_array_equal(coordination.reward(bits, slack=1), [3, 0, 1, 2])
    env = envs.coordination.coordination_game(3, error=0.25, max_steps=4)
    state, observation = env.reset(KEY)
    assert observation.shape == (3,) and env.action.shape == (3,)
    wanted = jnp.array([1, 0, 1])
    keys = jax.random.split(KEY, 4000)
    found = jax.vmap(lambda k: env.step(k, state, wanted))(keys)
    np.testing.assert_allclose((found.observation == wanted).mean(0), 0.75, atol=0.03)
    paid = coordination.reward(observation.astype(int), slack=1)
    np.testing.assert_array_equal(found.reward, jnp.full(4000, paid))
    # The tables say the same.
    game = coordination.tables(3, error=0.25)
    counts = np.bincount(np.asarray(found.state.state) @ [4, 2, 1], minlength=8) / 4000
    np.testing.assert_allclose(counts, game.transitions[0b101], atol=0.03)
    assert not found.truncated.any()
    for _ in range(3):
        state = env.step(KEY, state, wanted).state
    assert env.step(KEY, state, wanted).truncated


def test_aloha():
    near = aloha.two_rows()
    assert near.sum() == 2 * 13 and near[0, 1] and near[0, 5] and not near[4, 5]
    env = aloha.aloha(arrival=0.0)
    state, observation = env.reset(KEY)
    np.testing.assert_array_equal(observation, np.ones(10))
    apart = jnp.array([1, 0, 1, 0, 1, 0, 1, 0, 1, 0])
    found = env.step(KEY, state, apart)
    np.testing.assert_allclose(found.reward, 0.5, rtol=1e-6)
    np.testing.assert_array_equal(found.observation, 1 - apart)
    together = env.step(KEY, state, jnp.ones(10, int))
    assert together.reward == -100 and together.observation.sum() == 10
    # Two that disturb each other; an island without a message disturbs nobody.
    pair = env.step(KEY, state, jnp.zeros(10, int).at[:2].set(1))
    assert pair.reward == -20
    quiet = env.step(KEY, found.state, jnp.zeros(10, int).at[0].set(1).at[1].set(1))
    np.testing.assert_allclose(quiet.reward, 0.1, rtol=1e-6)
    rain = aloha.aloha(arrival=1.0, capacity=3, max_steps=20)
    state, _ = rain.reset(KEY)
    for index in range(20):
        step = rain.step(KEY, state, jnp.zeros(10, int))
        state = step.state
        assert step.truncated == (index == 19)
    np.testing.assert_array_equal(step.observation, np.full(10, 3.0))
    often = jax.vmap(
        lambda k: aloha.aloha().step(k, aloha.aloha().reset(k)[0], jnp.zeros(10, int))
    )(jax.random.split(KEY, 2000))
    np.testing.assert_allclose(often.observation.mean(), 1.6, atol=0.02)
