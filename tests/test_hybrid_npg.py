"""HNPG: without data it is TRPO with returns for a critic, without episodes fitted Q-evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pgjax import agents, envs, policies, values
from pgjax.agents import finite_horizon
from pgjax.envs import continuous_lock
from pgjax.optim import natural
from pgjax.types import Transition

KEY = jax.random.key(0)


def lock(horizon=3, num_actions=3):
    codes = continuous_lock.random_codes(KEY, horizon=horizon, num_actions=num_actions)
    return codes, continuous_lock.continuous_lock(codes, num_actions=num_actions)


def test_the_critics_loss():
    rng = np.random.default_rng(0)
    f, g = jnp.asarray(rng.normal(size=(2, 5)), jnp.float32)
    h, y = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)
    wanted = np.mean((f - g) ** 2) + 0.7 * np.mean((h - y) ** 2)
    np.testing.assert_allclose(values.hybrid_critic_loss(f, g, h, y, weight=0.7), wanted, rtol=1e-6)
    none = jnp.zeros(0)
    np.testing.assert_allclose(
        values.hybrid_critic_loss(f, g, none, none), np.mean((f - g) ** 2), rtol=1e-6
    )
    np.testing.assert_allclose(
        values.hybrid_critic_loss(none, none, h, y, weight=2.0),
        2 * np.mean((h - y) ** 2),
        rtol=1e-6,
    )
    slopes = jax.grad(values.hybrid_critic_loss, argnums=(0, 1, 2, 3))(f, g, h, y)
    np.testing.assert_allclose(slopes[0], 2 * (f - g) / 5, rtol=1e-5)
    np.testing.assert_array_equal(slopes[1], 0)
    np.testing.assert_array_equal(slopes[3], 0)
    exact = values.sampled_values(KEY, lambda k: jnp.arange(4.0), lambda a: 2 * a, number=7)
    np.testing.assert_allclose(exact, 2 * np.arange(4.0))


def tables(states, actions):
    """One-hot observations: a softmax table and a table of values."""
    return agents.ActorQ(
        init=lambda key: {
            "actor": jnp.zeros((states, actions)),
            "critic": jnp.zeros((states, actions)),
        },
        actor=lambda params, observation: observation @ params["actor"],
        q=lambda params, observation, action: jnp.sum(
            (observation @ params["critic"]) * jax.nn.one_hot(action, actions), axis=-1
        ),
        distribution=policies.categorical(),
    )


def every_transition(horizon=4, states=3, actions=2):
    """A deterministic world, all of whose transitions are recorded once; and its exact Q."""
    rng = np.random.default_rng(1)
    after = rng.integers(0, states, (horizon, states, actions))
    reward = rng.normal(size=(horizon, states, actions)).astype(np.float32)
    policy = rng.integers(0, actions, (horizon, states))
    q, v = np.zeros((horizon, states, actions)), np.zeros(states)
    for h in reversed(range(horizon)):
        q[h] = reward[h] + v[after[h]]
        v = q[h][np.arange(states), policy[h]]
    pairs = np.stack(np.meshgrid(range(states), range(actions), indexing="ij"), -1).reshape(-1, 2)
    s, a = pairs.T
    ended = np.broadcast_to((np.arange(horizon) == horizon - 1)[:, None], (horizon, len(s)))
    data = Transition(
        observation=jnp.broadcast_to(jnp.eye(states)[s], (horizon, len(s), states)),
        action=jnp.broadcast_to(jnp.asarray(a, jnp.int32), (horizon, len(s))),
        reward=jnp.asarray(reward[:, s, a]),
        terminated=jnp.asarray(ended),
        truncated=jnp.zeros(ended.shape, bool),
        next_observation=jnp.eye(states)[after[:, s, a]],
    )
    return data, policy, q


def test_without_episodes_the_critic_is_fitted_q_evaluation():
    data, policy, q = every_transition()
    net = tables(3, 2)
    params = {"actor": 1e3 * jax.nn.one_hot(policy, 2), "critic": jnp.zeros((4, 3, 2))}
    nothing = jax.tree.map(lambda x: x[:, :0], data)
    found, losses = jax.jit(
        lambda params: agents.fit_critics(
            net, params, KEY, nothing, data, num_steps=1500, learning_rate=0.02
        )
    )(params)
    np.testing.assert_allclose(found["critic"], q, atol=1e-3)
    assert np.all(losses < 1e-5)
    # With λ = 0 they would learn nothing from it.
    same, _ = agents.fit_critics(net, params, KEY, nothing, data, weight=0.0)
    np.testing.assert_array_equal(same["critic"], 0)


def test_without_data_it_is_trpo_on_returns():
    _, env = lock()
    data = continuous_lock.record(KEY, lock()[0], num_episodes=10, num_actions=3)
    net = agents.actor_q(env, hidden=(4,), critic_hidden=(8,))
    options = {"horizon": 3, "num_episodes": 32, "critic_rate": 0.01}
    agent = agents.hybrid_npg(env, data, net, offline_batch=0, **options)
    state = agent.init(KEY)
    after, metrics = jax.jit(agent.update)(state)
    _, play_key, _, _, policy_key = jax.random.split(state.key, 5)
    seen = finite_horizon.play(env, net, state.params, play_key, num_episodes=32)
    assert seen.terminated[-1].all() and seen.reward.shape == (3, 32)
    np.testing.assert_allclose(metrics["return"], seen.reward.sum(0).mean(), rtol=1e-5)
    last = lambda h: jax.tree.map(lambda x: x[h], state.params)  # noqa: E731
    gain = np.cumsum(np.asarray(seen.reward)[::-1], 0)[::-1]
    critics, q = [], []
    for h in range(3):
        critic, adam = last(h)["critic"], optax.adam(0.01)
        slot = adam.init(critic)

        def loss(critic, h=h):
            found = net.q({"critic": critic}, seen.observation[h], seen.action[h])
            return jnp.mean(jnp.square(found - gain[h]))

        for _ in range(30):
            updates, slot = adam.update(jax.grad(loss)(critic), slot, critic)
            critic = optax.apply_updates(critic, updates)
        critics.append(critic)
        q.append({**last(h), "critic": critic})
    jax.tree.map(
        lambda a, *b: np.testing.assert_allclose(a, np.stack(b), rtol=1e-3, atol=1e-5),
        after.params["critic"],
        *critics,
    )
    # Advantages by the definition: V from ten samples, GAE in a loop.
    keys = jax.random.split(jax.random.split(policy_key, 3)[0], 3)
    v = []
    for h in range(3):
        parameters = net.actor(q[h], seen.observation[h])
        draws = [net.distribution.sample(k, parameters) for k in jax.random.split(keys[h], 10)]
        v.append(np.mean([net.q(q[h], seen.observation[h], a) for a in draws], axis=0))
    v.append(np.zeros(32))
    carry = np.zeros(32)
    for h in reversed(range(3)):
        carry = np.asarray(seen.reward[h]) + v[h + 1] - v[h] + 0.97 * carry
        old = net.actor(last(h), seen.observation[h])
        before = net.distribution.log_prob(old, seen.action[h])

        def gained(actor, h=h, before=before, carry=carry):
            new = net.actor({"actor": actor}, seen.observation[h])
            ratio = jnp.exp(net.distribution.log_prob(new, seen.action[h]) - before)
            return jnp.mean(ratio * carry)

        def moved(actor, h=h, old=old):
            new = net.actor({"actor": actor}, seen.observation[h])
            return net.distribution.kl(old, new).mean()

        step = natural.trust_region_step(gained, moved, last(h)["actor"])
        wanted = optax.apply_updates(last(h)["actor"], step.update)
        jax.tree.map(
            lambda a, b, h=h: np.testing.assert_allclose(a[h], b, rtol=2e-2, atol=2e-3),
            after.params["actor"],
            wanted,
        )
    # λ = 0 with data has the same critics.
    mixed = agents.hybrid_npg(env, data, net, offline_batch=16, weight=0.0, **options)
    other, _ = jax.jit(mixed.update)(state)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        other.params["critic"],
        after.params["critic"],
    )


def test_steps_stay_near_and_failures_change_nothing():
    codes, env = lock()
    data = continuous_lock.record(KEY, codes, num_episodes=50, num_actions=3)
    net = agents.actor_q(env)
    params = jax.vmap(net.init)(jax.random.split(KEY, 3))
    for radius in (0.01, 0.1):
        found = agents.policy_steps(net, params, KEY, data, data, radius=radius)
        assert found.distance.shape == (3,) and found.accepted.all()
        assert np.all(found.distance <= 1.001 * radius) and np.all(found.distance > 0)
    # Critics without a preference give no slope, and broken ones no step.
    for spoil in (0.0, jnp.nan):
        critic = jax.tree.map(lambda x, s=spoil: s * x, params["critic"])
        still = data.replace(reward=jnp.zeros_like(data.reward))
        found = agents.policy_steps(net, {**params, "critic": critic}, KEY, still, still)
        assert not found.accepted.any()
        for x in jax.tree.leaves(found.update):
            np.testing.assert_array_equal(x, 0)
    # The direction solves (F + damping I) x = g.
    own = jax.tree.map(lambda x: x[0], params)
    observation, action = data.observation[0], data.action[0]
    old = net.actor(own, observation)

    def objective(actor):
        new = net.actor({**own, "actor": actor}, observation)
        return net.distribution.log_prob(new, action).mean()

    def distance(actor):
        return net.distribution.kl(old, net.actor({**own, "actor": actor}, observation)).mean()

    grads = jax.grad(objective)(own["actor"])
    x, _ = natural.natural_direction(grads, distance, own["actor"], damping=0.1, num_steps=60)
    image = natural.hessian_vector_product(distance, own["actor"], x, damping=0.1)
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, image, grads))
    assert difference < 1e-2 * optax.tree.norm(grads)


def test_offline_advantages_are_zero_on_average():
    """V is the mean of the same critic over the same policy's actions."""
    codes, env = lock()
    data = continuous_lock.record(KEY, codes, num_episodes=1, num_actions=3)
    net = agents.actor_q(env)
    own = net.init(KEY)
    observation = jnp.broadcast_to(data.observation[0], (20_000, 8))
    parameters = net.actor(own, observation)

    def draw(key):
        return net.distribution.sample(key, parameters)

    def judge(action):
        return net.q(own, observation, action)

    one, two = jax.random.split(KEY)
    advantage = judge(draw(one)) - values.sampled_values(two, draw, judge)
    error = float(advantage.std() / 20_000**0.5)
    assert abs(advantage.mean()) < 4 * error and advantage.std() > 0.05


def test_it_opens_a_lock_and_acts():
    """Two steps and tables of the code: everything there is to learn, learnt."""
    codes, env = lock(horizon=2)
    data = continuous_lock.record(KEY, codes, num_episodes=500, num_actions=3)
    agent = agents.hybrid_npg(
        env, data, horizon=2, num_episodes=50, offline_batch=50, radius=0.05, critic_rate=3e-3
    )
    run = jax.jit(lambda key: agents.train(agent, agent.init(key), num_updates=60))
    state, metrics = run(KEY)
    assert metrics["return"][0] < 0.4 and metrics["return"][-5:].mean() > 0.85
    assert np.all(metrics["kl"] <= 0.0501) and agent.steps == 100
    action = agent.act(state, KEY, (jnp.int32(1), data.observation[1, :8]))
    assert action.shape == (8, 3)
    lonely = agents.hybrid_npg(env, data, horizon=2, num_episodes=0, offline_batch=50)
    _, metrics = jax.jit(lonely.update)(lonely.init(KEY))
    assert np.isnan(metrics["return"]) and metrics["critic_loss"] > 0 and lonely.steps == 0


def test_bad_input():
    codes, env = lock()
    data = continuous_lock.record(KEY, codes, num_episodes=4, num_actions=3)
    make = agents.hybrid_npg
    with pytest.raises(ValueError, match=r"data: expected shape \[5, M"):
        make(env, data, horizon=5)
    with pytest.raises(ValueError, match=r"data.terminated: expected true at the last step"):
        make(env, data.replace(terminated=jnp.zeros((3, 4), bool)), horizon=3)
    with pytest.raises(ValueError, match=r"data.reward: expected finite"):
        make(env, data.replace(reward=data.reward.at[-1].set(jnp.nan)), horizon=3)
    with pytest.raises(ValueError, match=r"data.reward: expected an array"):
        make(env, data.replace(reward=None), horizon=3)
    with pytest.raises(ValueError, match="radius"):
        make(env, data, horizon=3, radius=0.0)
    with pytest.raises(ValueError, match=r"data.action: expected actions of shape \(3,\), got"):
        make(env, data.replace(action=data.action[..., :2]), horizon=3)
    with pytest.raises(ValueError, match="expected one of them above 0"):
        make(env, data, horizon=3, num_episodes=0, offline_batch=0)
    with pytest.raises(ValueError, match="kl"):
        make(
            env,
            data,
            agents.actor_q(env)._replace(distribution=policies.gaussian()._replace(kl=None)),
            horizon=3,
        )
    with pytest.raises(ValueError, match="size: expected a power of two, got 12"):
        continuous_lock.hadamard(12)
    with pytest.raises(ValueError, match=r"codes: expected shape \[H, 2\]"):
        continuous_lock.continuous_lock(jnp.zeros((3, 3), int))
    with pytest.raises(ValueError, match=r"codes: expected actions in \[0, 2\)"):
        continuous_lock.continuous_lock(codes + 2, num_actions=2)
    with pytest.raises(ValueError, match="random_share"):
        continuous_lock.record(KEY, codes, num_episodes=3, random_share=1.5)
    with pytest.raises(ValueError, match="horizon"):
        continuous_lock.random_codes(KEY, horizon=0)
    zeros = jnp.zeros(3)
    with pytest.raises(ValueError, match="weight"):
        values.hybrid_critic_loss(zeros, zeros, zeros, zeros, weight=-1.0)
    with pytest.raises(ValueError, match="offline_targets: expected shape"):
        values.hybrid_critic_loss(zeros, zeros, zeros, jnp.zeros(2))
    with pytest.raises(ValueError, match="number"):
        values.sampled_values(KEY, lambda k: zeros, lambda a: a, number=0)
    assert envs.continuous_lock is continuous_lock
