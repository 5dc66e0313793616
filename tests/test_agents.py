"""Agents: what PPO's update is, what it is in the limit, and that whole runs are one program."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pgjax import agents, envs, policies, sampling
from pgjax.agents import on_policy
from pgjax.envs import control
from pgjax.types import Transition


def same(one, other):
    def raw(x):
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    jax.tree.map(lambda a, b: np.testing.assert_array_equal(raw(a), raw(b)), one, other)


def signal(num=3, length=4):
    """Shows a number, which is the action that pays; episodes of fixed length, truncated."""

    def reset(key):
        shown = jax.random.randint(key, (), 0, num)
        return shown, jax.nn.one_hot(shown, num)

    def step(key, state, action):
        shown, observation = reset(key)
        reward = (action == state).astype(jnp.float32)
        return envs.Step(shown, observation, reward, jnp.bool_(False), jnp.bool_(False))

    env = envs.Environment(reset, step, envs.Box((num,)), envs.Discrete(num), "signal")
    return envs.with_time_limit(env, length)


def agent_of(env=None, **options):
    options = {"num_envs": 8, "num_steps": 16, "learning_rate": 3e-3, **options}
    return agents.ppo(signal() if env is None else env, **options)


def test_it_learns_and_parts_are_the_whole():
    agent = agent_of()
    start = agent.init(jax.random.key(0))
    run = jax.jit(lambda state: agents.train(agent, state, num_updates=30))
    state, metrics = run(start)
    assert metrics["return"][0] < 2.5 and metrics["return"][-1] > 3.8
    assert metrics["length"][-1] == 4 and metrics["explained_variance"].shape == (30,)
    assert int(state.updates) == 30 and agent.steps == 128
    third = jax.jit(lambda state: agents.train(agent, state, num_updates=10))
    other = start
    for _ in range(3):
        other, _ = third(other)
    same(other, state)
    action = agent.act(state, jax.random.key(0), jnp.eye(3))
    np.testing.assert_array_equal(action, [0, 1, 2])
    # Many seeds at once are the seeds alone.
    keys = jax.vmap(jax.random.key)(jnp.arange(2))
    both, _ = jax.vmap(lambda key: agents.train(agent, agent.init(key), num_updates=3))(keys)
    alone, _ = agents.train(agent, agent.init(jax.random.key(1)), num_updates=3)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-4, atol=1e-5),
        both.params,
        alone.params,
    )


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (agents.a2c, {"num_envs": 8, "num_steps": 8, "learning_rate": 1e-2}),
        (agents.reinforce, {"max_steps": 4, "num_envs": 16, "learning_rate": 1e-2}),
        (
            agents.reinforce,
            {"max_steps": 4, "num_envs": 16, "learning_rate": 1e-2, "baseline": False},
        ),
        (agents.npg, {"num_envs": 8, "num_steps": 16, "radius": 0.02}),
        (agents.trpo, {"num_envs": 8, "num_steps": 16, "radius": 0.02}),
    ],
)
def test_the_other_on_policy_agents_learn(make, options):
    agent = make(signal(), **options)
    run = jax.jit(lambda key: agents.train(agent, agent.init(key), num_updates=100))
    state, metrics = run(jax.random.key(0))
    assert metrics["return"][0] < 2.5 and metrics["return"][-5:].mean() > 3.6
    assert np.all(metrics["length"] == 4)
    np.testing.assert_array_equal(agent.act(state, jax.random.key(0), jnp.eye(3)), [0, 1, 2])
    if make is agents.trpo:
        assert np.all(metrics["kl"] <= 0.02) and np.all(metrics["improvement"] >= 0)


def early(ends):
    """Pays 1 a step and terminates after as many steps as were drawn."""

    def reset(key):
        length = jax.random.choice(key, jnp.asarray(ends))
        return (length, jnp.int32(0)), jnp.stack([length, 0]).astype(jnp.float32)

    def step(key, state, action):
        length, steps = state
        steps = steps + 1
        observation = jnp.stack([length, steps]).astype(jnp.float32)
        return envs.Step(
            (length, steps), observation, jnp.float32(1), steps >= length, jnp.bool_(False)
        )

    return envs.Environment(reset, step, envs.Box((2,)), envs.Discrete(2))


def test_reinforce_counts_every_episode_once_and_to_its_end():
    agent = agents.reinforce(early([2, 5]), max_steps=5, num_envs=32, discount=1.0)
    _, metrics = agent.update(agent.init(jax.random.key(1)))
    assert metrics["episodes"] == 32
    assert 2 < metrics["return"] < 5
    np.testing.assert_allclose(metrics["return"], metrics["length"])


def test_with_gaussian_actions_it_learns_too():
    env = control.point_mass(max_steps=20)
    agent = agent_of(env, num_envs=16, num_steps=40, learning_rate=1e-3)
    run = jax.jit(lambda key: agents.train(agent, agent.init(key), num_updates=30))
    _, metrics = run(jax.random.key(0))
    assert metrics["return"][-5:].mean() > metrics["return"][:5].mean() + 2


def test_the_first_gradient_is_that_of_the_policy_gradient():
    """Where old and new policy are equal, nothing is clipped and the ratio's slope is the score."""
    env = signal()

    def spy():
        def update(grads, state, params=None):
            return jax.tree.map(jnp.zeros_like, grads), grads

        return optax.GradientTransformation(lambda params: params, update)

    for normalized in (False, True):
        options = {"num_epochs": 1, "num_minibatches": 1, "normalize_advantages": normalized}
        agent = agent_of(env, optimizer=spy(), **options)
        state = agent.init(jax.random.key(0))
        net = agents.actor_critic(env)
        _, act_key, _ = jax.random.split(state.key, 3)
        running, seen, _ = sampling.unroll_environments(
            env, on_policy.decide(net, state.params), state.running, act_key, num_steps=16
        )
        advantage, target = on_policy.estimate(
            net,
            state.params,
            seen,
            running.observation,
            discount=0.99,
            lambda_=0.95,
            bootstrap_truncated=True,
        )
        if normalized:
            advantage = (advantage - advantage.mean()) / advantage.std()

        def loss(params, seen=seen, advantage=advantage, target=target, net=net):
            logits = net.actor(params, seen.observation)
            log_prob = net.distribution.log_prob(logits, seen.action)
            error = jnp.square(net.critic(params, seen.observation) - target)
            entropy = net.distribution.entropy(logits)
            return -(log_prob * advantage).mean() + 0.25 * error.mean() - 0.01 * entropy.mean()

        wanted = jax.grad(loss)(state.params)
        after, metrics = agent.update(state)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            after.opt_state,
            wanted,
        )
        assert abs(metrics["kl"]) < 1e-6 and metrics["clipped"] == 0
        same(after.params, state.params)


@pytest.mark.parametrize("options", [{}, {"max_kl": 1e-3}, {"value_clip": None}])
def test_a_gradient_in_blocks_is_the_whole_minibatch_s(options):
    """Also with advantages normalised over all of it, and with a loss that is no mean over rows."""

    def auxiliary(params, part, key):
        spread = jnp.std(part.advantage) * sum(jnp.sum(x**2) for x in jax.tree.leaves(params))
        return spread + jax.random.uniform(key), {"spread": spread}

    # Plain descent: Adam would hide a gradient of another size.
    options = {"auxiliary": auxiliary, "optimizer": optax.sgd(0.1), **options}
    whole, blocks = (agent_of(block_size=size, **options) for size in (None, 4))
    state = whole.init(jax.random.key(0))
    (one, reported), (other, also) = (jax.jit(agent.update)(state) for agent in (whole, blocks))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        (one.params, reported),
        (other.params, also),
    )
    assert reported.keys() == also.keys() >= {"spread", "kl", "clipped"}


def test_blocks_are_taken_of_large_minibatches_only():
    assert on_policy.block_of(4096, None) == 4096
    assert on_policy.block_of(131072, None) == 2048
    assert on_policy.block_of(6000, None) == 2000
    assert on_policy.block_of(4099, None) == 4099  # a prime
    with pytest.raises(ValueError, match="block_size: expected a divisor of the minibatch's 32"):
        agent_of(block_size=5)
    with pytest.raises(ValueError, match="block_size"):
        agent_of(block_size=0)
    with pytest.raises(ValueError, match="block_size: expected a divisor of the minibatch's 3"):
        on_policy.gradient_in_blocks(lambda p, x: p, 1.0, jnp.ones(3), block_size=2)


def test_a_time_limit_is_no_end_unless_it_is_taken_for_one():
    """With the values known, truncated steps bootstrap from the state before the reset."""
    values = jnp.array([1.0, 2.0, 4.0])
    net = agents.ActorCritic(
        init=lambda key: {},
        actor=lambda params, observation: observation,
        critic=lambda params, observation: observation @ values,
        distribution=policies.categorical(),
    )
    one_hot = jax.nn.one_hot(jnp.array([[0], [1], [0]]), 3)
    seen = Transition(
        observation=one_hot,
        action=jnp.zeros((3, 1), jnp.int32),
        reward=jnp.array([[1.0], [10.0], [100.0]]),
        terminated=jnp.zeros((3, 1), bool),
        truncated=jnp.array([[False], [True], [False]]),
        next_observation=jax.nn.one_hot(jnp.array([[1], [2], [1]]), 3),
        value=one_hot @ values,
    )
    options = {"discount": 0.5, "lambda_": 0.0}
    last = one_hot[1]
    found, target = on_policy.estimate(net, {}, seen, last, bootstrap_truncated=True, **options)
    np.testing.assert_allclose(found[:, 0], [1 + 1 - 1, 10 + 2 - 2, 100 + 1 - 1])
    np.testing.assert_allclose(target, found + seen.value)
    found, _ = on_policy.estimate(net, {}, seen, last, bootstrap_truncated=False, **options)
    np.testing.assert_allclose(found[:, 0], [1 + 1 - 1, 10 - 2, 100 + 1 - 1])
    # With λ = 1 nothing of the second episode comes over the cut.
    options["lambda_"] = 1.0
    found, _ = on_policy.estimate(net, {}, seen, last, bootstrap_truncated=True, **options)
    np.testing.assert_allclose(found[:, 0], [1 + 5 + 1 - 1, 10 + 2 - 2, 100 + 1 - 1])


def test_the_rate_falls_from_update_to_update():
    rate = on_policy.annealed(0.1, 4, 6)
    found = [float(rate(count)) for count in (0, 5, 6, 17, 18, 23, 24, 100)]
    np.testing.assert_allclose(found, [0.1, 0.1, 0.075, 0.05, 0.025, 0.025, 0, 0], atol=1e-9)
    assert on_policy.annealed(0.1, None, 6) == 0.1


def test_an_agent_in_parts_over_devices_and_bad_input():
    agent = agent_of()
    with pytest.raises(ValueError, match="num_minibatches: expected a divisor of 8 x 16"):
        agent_of(num_minibatches=5)
    with pytest.raises(ValueError, match="num_envs"):
        agent_of(num_envs=0)
    with pytest.raises(ValueError, match="clip"):
        agent_of(clip=0.0)
    with pytest.raises(ValueError, match="backtracks"):
        agents.npg(signal(), backtracks=3)
    with pytest.raises(ValueError, match="value_minibatches: expected a divisor"):
        agents.trpo(signal(), value_minibatches=3)
    with pytest.raises(ValueError, match="max_steps"):
        agents.reinforce(signal(), max_steps=0)
    with pytest.raises(ValueError, match="num_updates"):
        agents.train(agent, None, num_updates=0)
    grid = envs.Environment(None, None, envs.Discrete(3), envs.Discrete(2))
    with pytest.raises(ValueError, match="expected a vector"):
        agents.ppo(grid)
