"""SAC with generalised Gaussian errors: one update derived once more, and that it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special, stats

from pgjax import agents, envs, uncertainty
from pgjax.envs import control
from pgjax.models import mlp
from pgjax.policies.distributions import sample_tanh_gaussian
from pgjax.sampling import replay

RATE, GAMMA, TAU = 0.05, 0.9, 0.25
POINT = control.point_mass(max_steps=3)


def test_an_update_descends_the_errors_of_every_member():
    options = {
        "num_envs": 2,
        "num_steps": 2,
        "batch_size": 24,
        "capacity": 50,
        "start_steps": 30,
        "discount": GAMMA,
        "tau": TAU,
        "optimizer": optax.sgd(RATE),
        "epistemic_weight": 0.5,
    }
    agent = agents.ggd_sac(
        POINT,
        agents.squashed_gaussian_policy(POINT, hidden=(5,)),
        agents.ggd_critics(POINT, hidden=(6,)),
        **options,
    )
    before = jax.jit(agent.init)(jax.random.key(0))
    old = jax.jit(agent.init)(jax.random.key(1)).learner.params["critic"]
    before = before._replace(learner=before.learner._replace(targets={"critic": old}))
    after, metrics = jax.jit(agent.update)(before)
    learn_key = jax.random.split(before.key, 3)[-1]
    sample_key, step_key = jax.random.split(jax.random.split(learn_key, 1)[0])
    batch = replay.sample(after.replay, sample_key, batch_size=24)
    next_key, own_key = jax.random.split(step_key)
    params = before.learner.params

    def policy(net, x):
        found = mlp.apply(net, x, activation=jax.nn.relu)
        return found[:, :2], jnp.clip(found[:, 2:], -20, 2)

    def judged(net, observation, action):
        both = jnp.concatenate([observation, action], -1)
        found = [
            mlp.apply(jax.tree.map(lambda x, i=i: x[i], net), both, activation=jax.nn.relu)
            for i in range(2)
        ]
        return [(x[:, :5], jnp.log1p(jnp.exp(x[:, 5:]))) for x in found]

    later, log_prob = sample_tanh_gaussian(
        next_key, policy(params["actor"], batch.next_observation)
    )
    (one, _), (two, _) = judged(old, batch.next_observation, later)
    y = jnp.minimum(one, two) - log_prob[:, None]  # a temperature of 1
    y = batch.reward[:, None] + GAMMA * (1 - batch.terminated[:, None]) * y

    weights = []
    for q, _ in judged(params["critic"], batch.observation, batch.action):
        d = np.asarray(y - q, np.float64)
        v = d.var(1) / (stats.kurtosis(d, axis=1, bias=False) / 5 + 6 / 4)
        weights.append(uncertainty.biv_weights(jnp.asarray(v, jnp.float32), min_effective=16))

    def critic_loss(net):
        total = 0.0
        for (q, b), w in zip(judged(net, batch.observation, batch.action), weights, strict=True):
            d = jnp.abs(y - q)
            rows = (
                b
                / b.sum(1, keepdims=True)
                * (d * b - jnp.log(b) + jax.scipy.special.gammaln(1 / b))
            )
            total += 0.5 * jnp.mean(rows.sum(1) + 0.5 * w * d.sum(1))
        return total

    def near(a, b):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=5e-5), a, b)

    critic = jax.tree.map(
        lambda x, g: x - RATE * g, params["critic"], jax.grad(critic_loss)(params["critic"])
    )
    near(after.learner.params["critic"], critic)
    np.testing.assert_allclose(metrics["critic_loss"], critic_loss(params["critic"]), rtol=1e-3)

    def policy_loss(net):
        action, log_prob = sample_tanh_gaussian(own_key, policy(net, batch.observation))
        (one, _), (two, _) = judged(critic, batch.observation, action)
        return jnp.mean(log_prob - jnp.minimum(one.mean(1), two.mean(1)))

    actor = jax.tree.map(
        lambda x, g: x - RATE * g, params["actor"], jax.grad(policy_loss)(params["actor"])
    )
    near(after.learner.params["actor"], actor)
    near(
        after.learner.targets["critic"],
        jax.tree.map(lambda a, b: TAU * a + (1 - TAU) * b, critic, old),
    )
    shapes = [b for _, b in judged(params["critic"], batch.observation, batch.action)]
    np.testing.assert_allclose(metrics["shape"], np.mean(shapes), rtol=1e-4)
    assert np.isfinite(special.gammaln(1 / np.asarray(shapes))).all()


def aim(length=4):
    """Shows a number in [-1, 1]; what is nearest to half of it pays most, and there is noise."""

    def reset(key):
        shown = jax.random.uniform(key, (1,), minval=-1.0)
        return shown, shown

    def step(key, state, action):
        shown, _ = reset(key)
        reward = -jnp.square(action - 0.5 * state).sum() + 0.1 * jax.random.t(key, 3.0)
        return envs.Step(shown, shown, reward, jnp.bool_(False), jnp.bool_(False))

    env = envs.Environment(reset, step, envs.Box((1,)), envs.Box((1,), -1.0, 1.0), "aim")
    return envs.with_time_limit(env, length)


def test_it_learns_from_noisy_rewards():
    agent = agents.ggd_sac(
        aim(),
        agents.squashed_gaussian_policy(aim(), hidden=(16,)),
        agents.ggd_critics(aim(), hidden=(16,)),
        num_envs=4,
        batch_size=64,
        start_steps=200,
        capacity=4_000,
        discount=0.5,
        tau=0.05,
        initial_temperature=0.1,
        target_entropy=-3.0,
        learning_rate=5e-3,
    )
    state, _ = jax.jit(lambda key: agents.train(agent, agent.init(key), num_updates=600))(
        jax.random.key(0)
    )
    shown = jnp.linspace(-0.8, 0.8, 5)[:, None]
    np.testing.assert_allclose(agent.act(state, jax.random.key(0), shown), shown / 2, atol=0.2)


def test_bad_input():
    with pytest.raises(ValueError, match="members"):
        agents.ggd_critics(POINT, members=3)
    with pytest.raises(ValueError, match="epistemic_weight"):
        agents.ggd_sac(POINT, epistemic_weight=-1.0)
    with pytest.raises(ValueError, match="tau"):
        agents.ggd_sac(POINT, tau=0.0)
