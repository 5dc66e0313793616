"""The lock for vectors: its optimum as published, what is seen of it, and what a guide records."""

import jax
import jax.numpy as jnp
import numpy as np

from pgjax.envs import continuous_lock

KEY = jax.random.key(0)


def lock(horizon=3, num_actions=3):
    codes = continuous_lock.random_codes(KEY, horizon=horizon, num_actions=num_actions)
    return codes, continuous_lock.continuous_lock(codes, num_actions=num_actions)


def guide(codes, key, number, num_actions=10, action_of=None):
    """Rewards of whole episodes by a policy of the latent state, `[number]`."""
    env = continuous_lock.continuous_lock(codes, num_actions=num_actions)
    if action_of is None:

        def action_of(state):
            return continuous_lock.optimal_action(codes, state, num_actions=num_actions)

    def episode(key):
        start, key = jax.random.split(key)
        state, _ = env.reset(start)

        def one(state, key):
            found = env.step(key, state, action_of(state))
            return found.state, (found.reward, found.terminated)

        _, (reward, ended) = jax.lax.scan(one, state, jax.random.split(key, len(codes)))
        return reward, ended

    return jax.jit(jax.vmap(episode))(jax.random.split(key, number))


def test_the_locks_optimum_is_as_published():
    chance = np.exp(10) / (np.exp(10) + 9)
    np.testing.assert_allclose([chance**5, chance**50], [0.99796, 0.97978], atol=1e-5)
    codes = continuous_lock.random_codes(KEY, horizon=50)
    reward, ended = guide(codes, jax.random.key(1), 4000)
    assert np.all(np.asarray(ended) == (np.arange(50) == 49)) and np.all(reward[:, :-1] == 0)
    success = (reward[:, -1] == 1).mean()
    assert abs(success - chance**50) < 4 * (0.02 * 0.98 / 4000) ** 0.5
    # Whoever is lost gets .1 half of the time; so does a random policy, to 1e-50.
    wrong = guide(codes, jax.random.key(2), 4000, action_of=lambda s: jnp.zeros(10))
    np.testing.assert_allclose(np.unique(wrong[0][:, -1]), [0.0, 0.1], rtol=1e-6)
    assert abs(wrong[0][:, -1].mean() - 0.05) < 4 * 0.05 / 4000**0.5
    # Actions that are not bounded beat the optimum of those that are.
    codes = continuous_lock.random_codes(KEY, horizon=5)

    def sure(state):
        return 10 * continuous_lock.optimal_action(codes, state)

    assert np.all(guide(codes, KEY, 2000, action_of=sure)[0][:, -1] == 1)


def test_observations_of_the_lock():
    codes, env = lock(horizon=4)
    clean = continuous_lock.continuous_lock(codes, num_actions=3, noise=0.0)
    state, observation = clean.reset(KEY)
    mixing = continuous_lock.hadamard(8)
    np.testing.assert_array_equal(mixing @ mixing.T, 8 * np.eye(8))
    wanted = np.eye(8)[int(state.latent)] + np.eye(8)[3]
    np.testing.assert_allclose(mixing.T @ observation / 8, wanted, atol=1e-6)
    right = continuous_lock.optimal_action(codes, state, num_actions=3)
    assert right[codes[0, int(state.latent)]] == 1 and right.sum() == 1
    found = clean.step(KEY, state, 100 * right)
    assert found.state.latent < 2 and found.state.steps == 1
    decoded = mixing.T @ found.observation / 8
    np.testing.assert_allclose(
        decoded, np.eye(8)[int(found.state.latent)] + np.eye(8)[4], atol=1e-6
    )
    lost = clean.step(KEY, state, -100 * right)
    assert lost.state.latent == continuous_lock.LOST
    assert clean.step(KEY, lost.state, 100 * right).state.latent == continuous_lock.LOST
    # Noise has the size given, in all entries but the last.
    starts = jax.vmap(env.reset)(jax.random.split(KEY, 4000))
    noise = starts[1] @ mixing / 8 - (jnp.eye(8)[starts[0].latent] + jnp.eye(8)[3])
    np.testing.assert_allclose(noise.std(0), [0.1] * 7 + [0.0], atol=0.005)
    assert env.observation.shape == (8,) and abs(starts[0].latent.mean() - 0.5) < 0.04
    _, longer = lock(horizon=5)
    assert longer.observation.shape == (16,)


def test_what_the_guide_records():
    codes = continuous_lock.random_codes(KEY, horizon=5)
    data = continuous_lock.record(KEY, codes, num_episodes=2000)
    assert data.action.shape == (5, 2000, 10) and data.observation.shape == (5, 2000, 16)
    np.testing.assert_array_equal(data.next_observation[:-1], data.observation[1:])
    right = (data.action == 1).any(-1) & (data.action.sum(-1) == 1)
    assert abs(right.mean() - 0.8) < 0.02
    # An error at random still hits the right index with chance 1/10.
    assert abs((data.reward[-1] == 1).mean() - 0.82**5) < 0.05
    assert data.terminated[-1].all() and not data.terminated[:-1].any()
    chaos = continuous_lock.record(KEY, codes, num_episodes=500, random_share=1.0)
    assert chaos.action.min() >= 0 and chaos.action.max() <= 1 and (chaos.reward == 1).sum() <= 2
