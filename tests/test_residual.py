"""Corrections of a frozen base policy: that they begin as it, and what reaches it; chunks."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.experimental import checkify

from pgjax import agents, envs, sampling
from pgjax.envs import control, peg
from pgjax.policies import residual

KEY = jax.random.key(0)
POINT = control.point_mass(max_steps=6)


def plan(key, observation, gain=1.0, horizon=4):
    """Towards the origin, with noise, the same for each of the moves."""
    size = observation.shape[-1] // 2
    move = -gain * observation[..., :size] + 0.1 * jax.random.normal(key, (size,))
    return jnp.repeat(jnp.clip(move, -1, 1)[..., None, :], horizon, axis=-2)


def unroll(env, act, steps=20, num=3):
    running = sampling.start_environments(env, KEY, num)
    return sampling.unroll_environments(env, act, running, KEY, num_steps=steps)[1]


def test_it_begins_as_the_base_policy():
    guided = agents.with_base_policy(POINT, plan, horizon=4)
    net = agents.residual_actor_critic(guided, hidden=(8,))
    params = net.init(KEY)
    observation = jax.random.normal(KEY, (50, 6))
    mean, log_std = net.actor(params, observation)
    np.testing.assert_array_equal(mean, 0)
    np.testing.assert_array_equal(log_std, -1)
    base = observation[:, 4:]
    np.testing.assert_array_equal(residual.residual_action(base, mean), base)
    assert "bias" not in params["actor"] and params["actor"]["head"].shape == (8, 2)
    np.testing.assert_array_equal(params["critic"][-1]["bias"], 0.25)
    np.testing.assert_allclose(jnp.linalg.norm(params["critic"][-1]["kernel"]), 0.25, rtol=1e-5)
    # Penalties vanish there, and their slopes.
    penalty = lambda m: residual.residual_penalty(m, l1=2.0, l2=3.0).sum()  # noqa: E731
    assert penalty(mean) == 0 and np.all(jax.grad(penalty)(mean) == 0)
    np.testing.assert_allclose(
        residual.residual_penalty(jnp.array([[1.0, -3.0]]), l1=2.0, l2=3.0), [2 * 2 + 3 * 5]
    )


def test_a_scale_of_0_is_the_base_whatever_the_correction():
    def act(far):
        return lambda key, observation: sampling.Decision(jnp.full((3, 2), far))

    guided = agents.with_base_policy(POINT, plan, horizon=4, scale=0.0)
    one, other = (unroll(guided, act(far)) for far in (0.0, 1e6))
    np.testing.assert_array_equal(one.reward, other.reward)
    np.testing.assert_array_equal(one.observation, other.observation)
    moved = unroll(agents.with_base_policy(POINT, plan, horizon=4, scale=0.1), act(5.0))
    assert not np.allclose(moved.reward, one.reward)


def test_no_gradient_reaches_the_base():
    gains = jnp.float32(1.0)

    def total(gain, shift):
        env = agents.with_base_policy(POINT, functools.partial(plan, gain=gain), horizon=4)
        act = lambda key, seen: sampling.Decision(seen[:, 4:] + shift)  # noqa: E731
        return unroll(env, act).reward.sum()

    base, own = jax.grad(total, argnums=(0, 1))(gains, jnp.float32(0.1))
    assert base == 0 and own != 0
    guided = agents.with_base_policy(POINT, plan, horizon=4)
    state = agents.ppo(guided, agents.residual_actor_critic(guided, hidden=(8,))).init(KEY)
    assert set(state.params) == {"actor", "critic"}  # there is nothing of the base to learn


def test_ratios_of_corrections_are_those_of_actions():
    base, first, second = jax.random.normal(KEY, (3, 40, 2))
    scale, std = 0.1, np.exp(-1.0)
    correction = first + std * jax.random.normal(jax.random.key(1), first.shape)
    executed = residual.residual_action(base, correction, scale=scale)

    def of_actions(mean):
        mean = np.asarray(base + scale * mean, float)
        return scipy.stats.norm(mean, scale * std).logpdf(np.asarray(executed, float)).sum(-1)

    normal = agents.residual_actor_critic(POINT, hidden=(8,)).distribution
    log_std = jnp.full((40, 2), -1.0)
    found = normal.log_prob((second, log_std), correction)
    found -= normal.log_prob((first, log_std), correction)
    np.testing.assert_allclose(found, of_actions(second) - of_actions(first), rtol=1e-4, atol=1e-5)
    # The two densities differ by A log α.
    both = normal.log_prob((first, log_std), correction) - 2 * np.log(scale)
    np.testing.assert_allclose(both, of_actions(first), rtol=1e-4, atol=1e-4)
    target = residual.residual_target(executed, base, scale=scale)
    np.testing.assert_allclose(target, correction, rtol=1e-4, atol=1e-5)


def test_a_chunk_is_planned_once_in_so_many_steps_and_after_a_reset():
    asked = []

    def numbered(key, observation):
        jax.debug.callback(lambda _: asked.append(1), observation.sum())
        return observation[:, None, None] + jnp.arange(3.0)[:, None] / 10

    chunk = residual.chunk_init(2, horizon=3, size=1)
    step = jax.jit(lambda chunk, seen: residual.chunk_step(KEY, chunk, numbered, seen))
    found = []
    for t in range(7):
        if t == 4:  # the second episode ends within its chunk
            chunk = residual.chunk_reset(chunk, jnp.array([False, True]))
        action, chunk = step(chunk, jnp.array([t, 10.0 + t]) / 1)
        found.append(np.asarray(action[:, 0]))
    jax.effects_barrier()
    np.testing.assert_allclose(
        np.array(found).T, [[0, 0.1, 0.2, 3, 3.1, 3.2, 6], [10, 10.1, 10.2, 13, 14, 14.1, 14.2]]
    )
    assert len(asked) == 4  # at 0, at 3, at 4 for the second alone, at 6 for the first


def test_an_episode_starts_with_a_plan_of_its_own():
    guided = agents.with_base_policy(POINT, plan, horizon=4)
    still = lambda key, seen: sampling.Decision(jnp.zeros((3, 2)))  # noqa: E731
    seen = unroll(guided, still, steps=12)
    base = np.asarray(seen.observation[..., 4:])
    same = (base[1:] == base[:-1]).all(-1)
    # Episodes of six steps: a plan of four moves, and two of the next.
    np.testing.assert_array_equal(same[:, 0], [1, 1, 1, 0, 1, 0, 1, 1, 1, 0, 1])
    assert (same == same[:, :1]).all()
    np.testing.assert_array_equal(np.abs(seen.observation[..., :4]) <= 3, True)


def test_ppo_stops_where_the_policy_has_moved_far_enough():
    env = agents.with_base_policy(POINT, plan, horizon=4)
    net = agents.residual_actor_critic(env, hidden=(8,))
    options = {"num_steps": 16, "learning_rate": 0.1, "bootstrap_truncated": False}
    state = agents.ppo(env, net, **options).init(KEY)
    free, _ = agents.ppo(env, net, **options).update(state)
    wide, metrics = agents.ppo(env, net, max_kl=1e9, **options).update(state)
    assert metrics["taken"] == 1
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, free.params, wide.params)
    narrow, metrics = agents.ppo(env, net, max_kl=1e-6, **options).update(state)
    # The first step is where old and new policy are equal; the second sees that they no longer are.
    np.testing.assert_allclose(metrics["taken"], 2 / 16)
    assert np.isfinite(metrics["loss"]) and metrics["kl"] > 1e-6
    counts = [x for x in jax.tree.leaves(narrow.opt_state) if x.dtype == jnp.int32]
    assert counts and all(x == 2 for x in counts)


def test_ppo_adds_what_it_is_given():
    env = agents.with_base_policy(POINT, plan, horizon=4)
    net = agents.residual_actor_critic(env, hidden=(8,))
    options = {"num_steps": 16, "num_epochs": 1, "num_minibatches": 1}

    def penalty(params, part, key):
        del key
        cost = residual.residual_penalty(net.actor(params, part.observation)[0] + 1, l2=3.0).mean()
        return cost, {"penalty": cost}

    def loss(metrics):
        return metrics["policy_loss"] + 0.5 * metrics["value_loss"] - 0.01 * metrics["entropy"]

    agent = agents.ppo(env, net, auxiliary=penalty, **options)
    state = agent.init(KEY)
    _, metrics = jax.jit(agent.update)(state)
    np.testing.assert_allclose(metrics["penalty"], 3.0, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], loss(metrics) + 3.0, rtol=1e-5)


def test_the_peg_goes_in_only_at_the_hole():
    env = peg.peg_insertion(noise=0.0)
    down = jnp.array([0.0, -1.0])
    for beside, inserted in ((0.019, True), (0.021, False), (-0.019, True), (-0.03, False)):
        state, _ = env.reset(KEY)
        state = state._replace(state=jnp.array([0.1 + beside, 0.08, 0.1]))
        for _ in range(4):
            found = env.step(KEY, state, down)
            state = found.state
            if found.terminated:
                break
        assert bool(found.terminated) == inserted and float(found.reward) == inserted
        np.testing.assert_allclose(state.state[1], -0.05 if inserted else 0.0, atol=1e-7)
    # Once in it the walls hold it.
    state = state._replace(state=jnp.array([0.1, -0.01, 0.1]))
    found = env.step(KEY, state, jnp.array([1.0, 0.0]))
    np.testing.assert_allclose(found.state.state, [0.12, -0.01, 0.1], atol=1e-6)
    start = jax.vmap(env.reset)(jax.random.split(KEY, 100))[0].state
    assert np.all(np.abs(start[:, 0]) <= 0.5) and np.all(np.abs(start[:, 2]) <= 0.3)


def test_bad_input():
    base = jnp.zeros((5, 2))
    with pytest.raises(ValueError, match="scale: expected a number in"):
        residual.residual_action(base, base, scale=-0.1)
    with pytest.raises(ValueError, match="correction: expected shape"):
        residual.residual_action(base, jnp.zeros((5, 3)))
    with pytest.raises(ValueError, match="base_action: expected axes"):
        residual.residual_observation(jnp.zeros((4, 3)), base)
    with pytest.raises(ValueError, match="clip"):
        residual.residual_observation(jnp.zeros((5, 3)), base, clip=0.0)
    with pytest.raises(ValueError, match="scale"):
        residual.residual_target(base, base, scale=0.0)
    with pytest.raises(ValueError, match="l1"):
        residual.residual_penalty(base, l1=-1.0)
    with pytest.raises(ValueError, match="horizon"):
        residual.chunk_init(3, horizon=0, size=1)
    with pytest.raises(ValueError, match="ended: expected dtype bool"):
        residual.chunk_reset(residual.chunk_init(3, horizon=2, size=1), jnp.zeros(3))
    for make in (
        agents.residual_actor_critic,
        lambda env: agents.with_base_policy(env, plan, horizon=4),
    ):
        with pytest.raises(ValueError, match="env.action: expected a vector"):
            make(control.cart_pole())
    with pytest.raises(ValueError, match="scale"):
        agents.with_base_policy(POINT, plan, horizon=4, scale=-1.0)
    with pytest.raises(ValueError, match="plan: expected actions of shape"):
        agents.with_base_policy(POINT, plan, horizon=5).reset(KEY)
    with pytest.raises(ValueError, match="max_kl"):
        agents.ppo(POINT, max_kl=0.0)
    with pytest.raises(ValueError, match="radius"):
        peg.peg_insertion(radius=0.0)


def test_bases_that_are_no_numbers_or_too_large():
    chunk = residual.chunk_init(3, horizon=2, size=1)
    always = lambda value: lambda key, seen: jnp.full((3, 2, 1), value)  # noqa: E731
    with pytest.raises(ValueError, match="plan: expected finite actions"):
        residual.chunk_step(KEY, chunk, always(jnp.nan), jnp.zeros(3))
    with pytest.warns(UserWarning, match="normalised ones are within"):
        residual.chunk_step(KEY, chunk, always(2.0), jnp.zeros(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        residual.chunk_step(KEY, chunk, always(1.5), jnp.zeros(3))
    compiled = jax.jit(lambda: residual.chunk_step(KEY, chunk, always(jnp.nan), jnp.zeros(3)))
    error, _ = checkify.checkify(compiled, errors=checkify.user_checks)()
    with pytest.raises(Exception, match="finite actions"):
        error.throw()


def test_corrections_are_learnt():
    """The base is beside the action that pays most by a constant."""

    def reset(key):
        shown = jax.random.uniform(key, (1,), minval=-1.0)
        return shown, shown

    def step(key, state, action):
        shown, _ = reset(key)
        reward = -jnp.square(action - 0.5 * state).sum()
        return envs.Step(shown, shown, reward, jnp.bool_(False), jnp.bool_(False))

    aim = envs.Environment(reset, step, envs.Box((1,)), envs.Box((1,), -1.0, 1.0), "aim")
    base = lambda key, seen: 0.5 * seen[None] + 0.4  # noqa: E731
    env = agents.with_base_policy(envs.with_time_limit(aim, 4), base, horizon=1, scale=0.5)
    net = agents.residual_actor_critic(env, hidden=(16,))
    agent = agents.ppo(env, net, num_envs=16, num_steps=16, learning_rate=3e-3, discount=0.5)
    run = jax.jit(lambda key: agents.train(agent, agent.init(key), num_updates=40))
    state, metrics = run(KEY)
    assert metrics["return"][0] < -0.6 and metrics["return"][-5:].mean() > -0.25
    found = agent.act(state, KEY, jnp.array([[-0.5, 0.15], [0.5, 0.65]]))
    np.testing.assert_allclose(0.5 * found, -0.4, atol=0.1)
