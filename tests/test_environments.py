"""Control tasks against gymnax and closed forms, resets at every boundary, wrappers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax import envs, sampling
from pgjax.envs import control

GYMNAX = {
    "CartPole-v1": control.cart_pole,
    "MountainCar-v0": control.mountain_car,
    "Acrobot-v1": control.acrobot,
    "Pendulum-v1": control.pendulum,
}
ALL = {**GYMNAX, "PointMass": control.point_mass}


def random_action(env, key):
    if isinstance(env.action, envs.Discrete):
        return jax.random.randint(key, (), 0, env.action.num)
    return jax.random.uniform(key, env.action.shape, minval=env.action.low, maxval=env.action.high)


@pytest.mark.parametrize("name", GYMNAX)
def test_dynamics_are_gymnaxs(name):
    gymnax = pytest.importorskip("gymnax")
    other, params = gymnax.make(name)
    env = GYMNAX[name]()
    _, theirs = other.reset(jax.random.key(0), params)
    (timed, _), fields = env.reset(jax.random.key(0)), [f for f in theirs.__dict__ if f != "time"]
    step, key = jax.jit(env.step), jax.random.key(1)
    their_step = jax.jit(other.step_env)
    for t in range(60):
        key, own = jax.random.split(key)
        numbers = [np.ravel(getattr(theirs, f)) for f in fields if f != "last_u"]
        state = timed._replace(state=jnp.asarray(np.concatenate(numbers)[: timed.state.size]))
        action = random_action(env, own)
        found = step(own, state, action)
        observation, theirs, reward, ended, _ = their_step(own, theirs, action, params)
        np.testing.assert_allclose(found.observation, observation, rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(found.reward, reward, rtol=2e-5, atol=1e-5)
        assert bool(found.terminated) == bool(ended), t
        if ended:
            break
    assert t > 5


def test_a_pendulum_keeps_its_energy():
    """Without torque the energy of the undamped pendulum is kept as the step shrinks."""
    env = control.pendulum()
    state, _ = env.reset(jax.random.key(0))
    state = state._replace(state=jnp.array([np.pi - 0.1, 0.0]))
    energy = []
    for _ in range(100):
        angle, velocity = state.state
        energy.append(velocity**2 / 6 + 5.0 * jnp.cos(angle))
        state = env.step(jax.random.key(0), state, jnp.zeros(1)).state
    assert np.ptp(energy) < 0.02 * abs(np.mean(energy))


@pytest.mark.parametrize("name", ["Pendulum-v1", "PointMass"])
def test_gradients_reach_the_actions(name):
    env = ALL[name]()
    start, _ = env.reset(jax.random.key(3))

    def total(actions):
        def one(state, action):
            found = env.step(jax.random.key(0), state, action)
            return found.state, found.reward

        return jax.lax.scan(one, start, actions)[1].sum()

    actions = 0.3 * jax.random.normal(jax.random.key(0), (5, *env.action.shape))
    found = jax.grad(total)(actions)
    step = np.zeros_like(actions)
    step[1, 0] = 1e-2
    slope = (total(actions + step) - total(actions - step)) / 2e-2
    np.testing.assert_allclose(found[1, 0], slope, rtol=1e-2)
    assert np.all(found[:-1] != 0)


def counting(length, *, terminates):
    """Observes how many steps the episode has; its start's number is drawn."""

    def reset(key):
        label = jax.random.randint(key, (), 1, 1_000_000)
        return {"label": label, "steps": jnp.int32(0)}, jnp.array([label, 0])

    def step(key, state, action):
        state = {**state, "steps": state["steps"] + 1}
        observation = jnp.stack([state["label"], state["steps"]])
        over = (state["steps"] >= length) & terminates
        return envs.Step(state, observation, 1.0 * action, over, jnp.bool_(False))

    env = envs.Environment(reset, step, envs.Box((2,)), envs.Discrete(2))
    return env if terminates else envs.with_time_limit(env, length)


@pytest.mark.parametrize("terminates", [True, False])
def test_unrolls_know_their_boundaries(terminates):
    env, length, steps, number = counting(3, terminates=terminates), 3, 8, 4
    running = sampling.start_environments(env, jax.random.key(0), number)

    def act(key, observation):
        return sampling.Decision(jnp.ones(number, jnp.int32))

    whole = sampling.unroll_environments(env, act, running, jax.random.key(1), num_steps=steps)
    running, seen, episodes = whole
    ends = (np.arange(steps) % length == length - 1)[:, None] & np.ones(number, bool)
    np.testing.assert_array_equal(seen.terminated, ends & terminates)
    np.testing.assert_array_equal(seen.truncated, ends & (not terminates))
    np.testing.assert_array_equal(episodes.ended, ends)
    np.testing.assert_array_equal(episodes.returns[ends], 3.0)
    np.testing.assert_array_equal(episodes.lengths[ends], length)
    np.testing.assert_array_equal(running.lengths, steps % length)
    labels, counts = seen.observation[..., 0], seen.observation[..., 1]
    np.testing.assert_array_equal(counts, np.arange(steps)[:, None] % length + np.zeros(number))
    # Before the reset: the same episode, one step on. After it: another one.
    np.testing.assert_array_equal(seen.next_observation[..., 0], labels)
    np.testing.assert_array_equal(seen.next_observation[..., 1], counts + 1)
    same = labels[1:] == labels[:-1]
    np.testing.assert_array_equal(same, ~ends[:-1])
    assert len(np.unique(labels)) == 3 * number
    assert seen.log_prob is None and seen.value is None


def test_each_episode_counts_once():
    """Lengths are drawn from 1, 2 and 9; episodes that ended early are not repeated."""

    def reset(key):
        left = jax.random.choice(key, jnp.array([1, 2, 9]))
        return left, left

    def step(key, left, action):
        return envs.Step(left - 1, left - 1, 1.0 * action, left == 1, jnp.bool_(False))

    env = envs.Environment(reset, step, envs.Box(()), envs.Discrete(2))
    key = jax.random.key(3)
    keys = jax.random.split(jax.random.split(key)[0], 64)
    lengths = jax.vmap(lambda key: reset(key)[1])(keys)

    def act(key, observation):
        return jnp.ones(64, jnp.int32)

    found = sampling.episode_returns(env, act, key, num_episodes=64)
    np.testing.assert_array_equal(found, lengths)
    assert len(np.unique(found)) == 3
    cut = sampling.episode_returns(env, act, key, num_episodes=64, max_steps=5)
    np.testing.assert_array_equal(cut, np.where(lengths == 9, np.nan, lengths))


def test_wrappers():
    env = envs.with_scaled_actions(control.pendulum())
    plain = control.pendulum()
    state, _ = env.reset(jax.random.key(0))
    key = jax.random.key(1)
    for scaled, own in ((-1.0, -2.0), (0.25, 0.5), (3.0, 2.0)):
        one, two = (
            env.step(key, state, jnp.array([scaled])),
            plain.step(key, state, jnp.array([own])),
        )
        np.testing.assert_allclose(one.observation, two.observation, rtol=1e-6)
    with pytest.raises(ValueError, match="expected a Box"):
        envs.with_scaled_actions(control.cart_pole())
    grid = envs.Environment(
        lambda key: (jnp.int32(0), jnp.int32(2)),
        lambda key, state, action: envs.Step(
            state, jnp.int32(1), jnp.float32(0), jnp.bool_(True), jnp.bool_(False)
        ),
        envs.Discrete(3),
        envs.Discrete(2),
    )
    flat = envs.with_flat_observations(grid)
    state, observation = flat.reset(key)
    np.testing.assert_array_equal(observation, [0, 0, 1])
    np.testing.assert_array_equal(flat.step(key, state, 0).observation, [0, 1, 0])
    assert flat.observation == envs.Box((3,))
    # A limit does not truncate what terminates at the same step.
    limited = envs.with_time_limit(grid, 1)
    found = limited.step(key, limited.reset(key)[0], 0)
    assert found.terminated and not found.truncated
    with pytest.raises(ValueError, match="max_steps"):
        envs.with_time_limit(grid, 0)
    with pytest.raises(ValueError, match="num_steps"):
        sampling.unroll_environments(grid, None, None, key, num_steps=0)
    with pytest.raises(ValueError, match="num_envs"):
        sampling.start_environments(grid, key, 0)
