"""Off-policy agents: what one update changes, derived once more, and that each learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pgjax import agents, envs, policies, sampling
from pgjax.agents import off_policy, on_policy
from pgjax.envs import control
from pgjax.models import layer_norm_mlp, mlp
from pgjax.policies.distributions import sample_tanh_gaussian
from pgjax.sampling import replay
from pgjax.types import Transition

RATE, DISCOUNT, TAU = 0.1, 0.9, 0.25
SMALL = {"hidden": (5,)}
POINT = control.point_mass(max_steps=3)


def signal(num=3, length=4):
    """Shows a number, which is the action that pays; episodes of fixed length, truncated."""

    def reset(key):
        shown = jax.random.randint(key, (), 0, num)
        return shown, jax.nn.one_hot(shown, num)

    def step(key, state, action):
        shown, observation = reset(key)
        reward = (action == state).astype(jnp.float32)
        ended = action == (state + 1) % num  # the wrong action next to it ends the episode
        return envs.Step(shown, observation, reward, ended, jnp.bool_(False))

    env = envs.Environment(reset, step, envs.Box((num,)), envs.Discrete(num), "signal")
    return envs.with_time_limit(env, length)


def aim(length=4):
    """Shows a number in [-1, 1]; what is nearest to half of it pays most."""

    def reset(key):
        shown = jax.random.uniform(key, (1,), minval=-1.0)
        return shown, shown

    def step(key, state, action):
        shown, _ = reset(key)
        reward = -jnp.square(action - 0.5 * state).sum()
        return envs.Step(shown, shown, reward, jnp.bool_(False), jnp.bool_(False))

    env = envs.Environment(reset, step, envs.Box((1,)), envs.Box((1,), -1.0, 1.0), "aim")
    return envs.with_time_limit(env, length)


def close(one, other, tolerance=2e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=tolerance), one, other
    )


def descended(loss, params):
    return jax.tree.map(lambda x, g: x - RATE * g, params, jax.grad(loss)(params))


def averaged(new, old):
    return jax.tree.map(lambda a, b: TAU * a + (1 - TAU) * b, new, old)


def one_update(agent, seed=0, updates=1):
    """Learner before and after, and batches and keys of the steps between."""
    before = jax.jit(agent.init)(jax.random.key(seed))
    # Copies that differ from their originals tell the two apart.
    other = jax.jit(agent.init)(jax.random.key(seed + 1)).learner.params
    targets = {name: other[name] for name in before.learner.targets}
    before = before._replace(learner=before.learner._replace(targets=targets))
    after, metrics = jax.jit(agent.update)(before)
    learn_key = jax.random.split(before.key, 3 if hasattr(before, "running") else 2)[-1]
    steps = []
    for key in jax.random.split(learn_key, updates):
        sample_key, step_key = jax.random.split(key)
        steps.append((replay.sample(after.replay, sample_key, batch_size=16), step_key))
    return before.learner, after.learner, steps, metrics


OPTIONS = {
    "optimizer": optax.sgd(RATE),
    "num_envs": 2,
    "num_steps": 2,
    "batch_size": 16,
    "capacity": 50,
    "start_steps": 20,
    "discount": DISCOUNT,
}


def relu_net(params, x):
    return (
        jax.nn.relu(x @ params[0]["kernel"] + params[0]["bias"]) @ params[1]["kernel"]
        + params[1]["bias"]
    )


def q_of(params, observation, action):
    both = jnp.concatenate([observation, action], -1)
    return jnp.stack(
        [
            relu_net(jax.tree.map(lambda x, i=i: x[i], params), both)[:, 0]
            for i in range(params[0]["kernel"].shape[0])
        ]
    )


@pytest.mark.parametrize("double", [False, True])
def test_dqn_descends_the_error_to_its_copy(double):
    env = signal(length=2)
    agent = agents.dqn(
        env, agents.q_network(env, **SMALL), double=double, target_period=2, **OPTIONS
    )
    before, after, [(batch, _)], metrics = one_update(agent)
    assert agent.steps == 4 and batch.terminated.any() and batch.truncated.any()
    old = before.targets["q"]
    later = relu_net(old, batch.next_observation)
    chooser = before.params["q"] if double else old
    best = jnp.argmax(relu_net(chooser, batch.next_observation), -1)
    y = batch.reward + DISCOUNT * (1 - batch.terminated) * later[jnp.arange(16), best]

    def loss(q):
        taken = relu_net(q, batch.observation)[jnp.arange(16), batch.action]
        return 0.5 * jnp.mean((taken - y) ** 2)

    close(after.params["q"], descended(loss, before.params["q"]))
    np.testing.assert_allclose(metrics["loss"], loss(before.params["q"]), rtol=1e-4)
    close(after.targets["q"], old, 0)  # copied on every second step only


def test_ddpg_moves_the_policy_by_the_slope_of_the_critic():
    agent = agents.ddpg(
        POINT,
        agents.deterministic_policy(POINT, **SMALL),
        agents.critics(POINT, num=1, **SMALL),
        tau=TAU,
        **OPTIONS,
    )
    before, after, [(batch, _)], _ = one_update(agent)
    old, params = before.targets, before.params
    later = jnp.tanh(relu_net(old["actor"], batch.next_observation))
    y = batch.reward + DISCOUNT * q_of(old["critic"], batch.next_observation, later)[0]

    def critic_loss(critic):
        return 0.5 * jnp.mean((q_of(critic, batch.observation, batch.action)[0] - y) ** 2)

    def actor_loss(actor):
        action = jnp.tanh(relu_net(actor, batch.observation))
        return -q_of(params["critic"], batch.observation, action)[0].mean()

    wanted = {
        "actor": descended(actor_loss, params["actor"]),
        "critic": descended(critic_loss, params["critic"]),
    }
    close(after.params, wanted)
    close(after.targets, averaged(wanted, old))


def test_td3_waits_smooths_and_takes_the_lower_critic():
    agent = agents.td3(
        POINT,
        agents.deterministic_policy(POINT, **SMALL),
        agents.critics(POINT, **SMALL),
        tau=TAU,
        gradient_steps=2,
        target_noise=0.4,
        target_noise_clip=0.5,
        **OPTIONS,
    )
    before, after, steps, metrics = one_update(agent, updates=2)
    old, critic = before.targets, before.params["critic"]
    for batch, key in steps:
        noise = jnp.clip(0.4 * jax.random.normal(key, (16, 2)), -0.5, 0.5)
        later = jnp.clip(jnp.tanh(relu_net(old["actor"], batch.next_observation)) + noise, -1, 1)
        y = batch.reward + DISCOUNT * q_of(old["critic"], batch.next_observation, later).min(0)

        def critic_loss(critic, batch=batch, y=y):
            found = q_of(critic, batch.observation, batch.action)
            return 0.5 * jnp.mean((found[0] - y) ** 2) + 0.5 * jnp.mean((found[1] - y) ** 2)

        critic = descended(critic_loss, critic)

    def actor_loss(actor):
        action = jnp.tanh(relu_net(actor, batch.observation))
        return -q_of(critic, batch.observation, action)[0].mean()

    wanted = {"actor": descended(actor_loss, before.params["actor"]), "critic": critic}
    close(after.params, wanted)
    close(after.targets, averaged(wanted, old))
    np.testing.assert_allclose(metrics["policy_loss"], actor_loss(before.params["actor"]), 1e-3)
    assert int(after.taken) == 2


def test_sac_adds_entropy_and_finds_its_temperature():
    agent = agents.sac(
        POINT,
        agents.squashed_gaussian_policy(POINT, **SMALL),
        agents.critics(POINT, **SMALL),
        tau=TAU,
        initial_temperature=0.3,
        **OPTIONS,
    )
    before, after, [(batch, key)], metrics = one_update(agent)
    next_key, own_key = jax.random.split(key)
    params, old = before.params, before.targets["critic"]

    def drawn(actor, observation, key):
        found = relu_net(actor, observation)
        mean, log_std = found[:, :2], jnp.clip(found[:, 2:], -20, 2)
        u = mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)
        normal = -0.5 * ((u - mean) / jnp.exp(log_std)) ** 2 - log_std - 0.5 * np.log(2 * np.pi)
        return jnp.tanh(u), (normal - jnp.log(1 - jnp.tanh(u) ** 2)).sum(-1)

    later, later_log_prob = drawn(params["actor"], batch.next_observation, next_key)
    soft = q_of(old, batch.next_observation, later).min(0) - 0.3 * later_log_prob
    y = batch.reward + DISCOUNT * soft

    def critic_loss(critic):
        found = q_of(critic, batch.observation, batch.action)
        return 0.5 * jnp.mean((found[0] - y) ** 2) + 0.5 * jnp.mean((found[1] - y) ** 2)

    critic = descended(critic_loss, params["critic"])

    def actor_loss(actor):
        action, log_prob = drawn(actor, batch.observation, own_key)
        return (0.3 * log_prob - q_of(critic, batch.observation, action).min(0)).mean()

    _, log_prob = drawn(params["actor"], batch.observation, own_key)
    close(after.params["critic"], critic)
    close(after.params["actor"], descended(actor_loss, params["actor"]))
    # Less entropy than -2 nats raises the temperature.
    wanted = np.log(0.3) + RATE * (log_prob - 2.0).mean()
    np.testing.assert_allclose(after.params["log_temperature"], wanted, rtol=1e-4)
    close(after.targets["critic"], averaged(critic, old))
    np.testing.assert_allclose(metrics["temperature"], 0.3, rtol=1e-5)
    np.testing.assert_allclose(metrics["entropy"], -log_prob.mean(), rtol=1e-3)


def recorded(env, number=40):
    """Uniformly random actions."""
    _, seen, _ = sampling.unroll_environments(
        env,
        lambda key, x: sampling.Decision(off_policy.random_actions(env, key, 8)),
        sampling.start_environments(env, jax.random.key(5), 8),
        jax.random.key(6),
        num_steps=number,
    )
    return seen


@pytest.mark.parametrize("beta", [0.0, 2.0])
def test_iql_takes_its_steps_in_order(beta):
    data = recorded(POINT)
    agent = agents.iql(
        POINT,
        data.replace(terminated=data.truncated),  # some of them, so that it counts
        agents.bounded_mean_policy(POINT, **SMALL),
        agents.critics(POINT, **SMALL),
        agents.value_network(POINT, **SMALL),
        optimizer=optax.sgd(RATE),
        batch_size=16,
        discount=DISCOUNT,
        tau=TAU,
        expectile=0.8,
        beta=beta,
    )
    assert agent.steps == 0
    before, after, [(batch, _)], _ = one_update(agent)
    assert 0 < batch.terminated.sum() < 16
    params, old = before.params, before.targets["critic"]
    q = q_of(old, batch.observation, batch.action).min(0)

    def value_loss(v):
        away = q - relu_net(v, batch.observation)[:, 0]
        return jnp.mean(jnp.abs(0.8 - (away <= 0)) * away**2)

    v = descended(value_loss, params["value"])
    weight = jnp.minimum(jnp.exp(beta * (q - relu_net(v, batch.observation)[:, 0])), 100)

    def log_prob(actor):
        mean, log_std = jnp.tanh(relu_net(actor["mlp"], batch.observation)), actor["log_std"]
        scaled = (batch.action - mean) / jnp.exp(log_std)
        return (-0.5 * scaled**2 - log_std - 0.5 * np.log(2 * np.pi)).sum(-1)

    actor = descended(lambda x: -jnp.mean(weight * log_prob(x)), params["actor"])
    following = relu_net(v, batch.next_observation)[:, 0]
    y = batch.reward + DISCOUNT * (1 - batch.terminated) * following

    def critic_loss(critic):
        found = q_of(critic, batch.observation, batch.action)
        return 0.5 * jnp.mean((found[0] - y) ** 2) + 0.5 * jnp.mean((found[1] - y) ** 2)

    critic = descended(critic_loss, params["critic"])
    close(after.params, {"value": v, "actor": actor, "critic": critic})
    close(after.targets["critic"], averaged(critic, old))
    if beta == 0:  # behaviour cloning
        close(actor, descended(lambda x: -jnp.mean(log_prob(x)), params["actor"]))


def test_iql_never_asks_about_an_action_outside_the_data():
    """Tables instead of networks: entries of actions that were not recorded stay as they were."""
    env = envs.Environment(None, None, envs.Box((3,)), envs.Box((2,), -1.0, 1.0))

    def table(key):
        return jax.random.normal(key, (2, 3, 2))

    state = np.array([0, 1, 1, 2])
    action = np.array([0, 0, 1, 1])
    agent = agents.iql(
        env,
        Transition(
            observation=jnp.eye(3)[state],
            action=jnp.eye(2)[action],
            reward=jnp.array([0.0, 1.0, 0.0, 2.0]),
            terminated=jnp.array([False, False, False, True]),
            truncated=jnp.zeros(4, bool),
            next_observation=jnp.eye(3)[(state + 1) % 3],
        ),
        agents.bounded_mean_policy(env, hidden=(4,)),
        # The one-hot action is rounded, for data are kept a little within [-1, 1].
        agents.Network(table, lambda q, s, a: jnp.einsum("ksa,bs,ba->kb", q, s, a.round())),
        agents.Network(lambda key: jnp.zeros(3), lambda v, s: s @ v),
        gradient_steps=50,
        batch_size=4,
    )
    start = agent.init(jax.random.key(0))
    state_after, metrics = jax.jit(agent.update)(start)
    before, after = start.learner.params["critic"], state_after.learner.params["critic"]
    seen = np.zeros((3, 2), bool)
    seen[state, action] = True
    np.testing.assert_array_equal(before[:, ~seen], after[:, ~seen])
    assert (before[:, seen] != after[:, seen]).all() and np.isfinite(metrics["weight"])


@pytest.mark.parametrize("bootstrap_truncated", [True, False])
def test_pqn_regresses_on_lambda_returns(bootstrap_truncated):
    env = signal()
    net = agents.layer_norm_q_network(env, **SMALL)
    agent = agents.pqn(
        env,
        net,
        optimizer=optax.sgd(RATE),
        num_envs=3,
        num_steps=9,
        num_epochs=1,
        num_minibatches=1,
        discount=DISCOUNT,
        lambda_=0.7,
        epsilon=(0.5, 0.5),
        bootstrap_truncated=bootstrap_truncated,
    )
    state = jax.jit(agent.init)(jax.random.key(2))

    def act(key, observation):
        found = net.apply(state.params, observation)
        return sampling.Decision(sampling.epsilon_greedy(key, found, epsilon=0.5))

    running, seen, _ = sampling.unroll_environments(
        env, act, state.running, jax.random.split(state.key, 3)[1], num_steps=9
    )
    terminated, truncated = np.asarray(seen.terminated), np.asarray(seen.truncated)
    assert terminated[:-1].any() and truncated[:-1].any()
    best = np.asarray(net.apply(state.params, seen.next_observation)).max(-1)
    target, later = np.zeros((9, 3)), None
    for t in reversed(range(9)):
        mixed = best[t] if later is None else 0.3 * best[t] + 0.7 * later
        following = np.where(truncated[t], best[t] if bootstrap_truncated else 0.0, mixed)
        later = np.asarray(seen.reward[t]) + DISCOUNT * np.where(terminated[t], 0, following)
        target[t] = later

    def loss(params):
        taken = (net.apply(params, seen.observation) * jax.nn.one_hot(seen.action, 3)).sum(-1)
        return 0.5 * jnp.mean((taken - target) ** 2)

    after, metrics = jax.jit(agent.update)(state)
    close(after.params, descended(loss, state.params))
    np.testing.assert_allclose(metrics["loss"], loss(state.params), rtol=1e-4)
    assert metrics["epsilon"] == 0.5
    close(after.running.observation, running.observation, 0)


def learns(agent, updates, seed=0):
    run = jax.jit(lambda key: agents.train(agent, agent.init(key), num_updates=updates))
    state, metrics = run(jax.random.key(seed))
    assert all(
        np.isfinite(x[-1]) for name, x in metrics.items() if name not in ("return", "length")
    )
    return state


def test_learning_one_action_of_three():
    env = signal()
    learning = {"discount": 0.5, "explore_over": 500, "learning_rate": 1e-2}
    for agent, updates in (
        (
            agents.dqn(
                env,
                agents.q_network(env, hidden=(16,)),
                **{**OPTIONS, **learning, "optimizer": None},
            ),
            300,
        ),
        (
            agents.pqn(
                env,
                agents.layer_norm_q_network(env, hidden=(16,)),
                num_envs=8,
                num_steps=8,
                num_minibatches=2,
                **learning,
            ),
            60,
        ),
    ):
        state = learns(agent, updates)
        found = agent.act(state, jax.random.key(0), jnp.eye(3))
        np.testing.assert_array_equal(found, [0, 1, 2])


@pytest.mark.parametrize("name", ["ddpg", "td3", "sac", "iql"])
def test_learning_half_of_a_number(name):
    env, net = aim(), {"hidden": (16,)}
    options = {"discount": 0.5, "learning_rate": 1e-2}
    if name == "iql":
        data = recorded(env, 250)
        policy = agents.bounded_mean_policy(env, **net)
        parts = policy, agents.critics(env, **net), agents.value_network(env, **net)
        options |= {"beta": 30.0, "gradient_steps": 5, "batch_size": 128}
        agent = agents.iql(env, data, *parts, **options)
        clone = agents.behavior_cloning(
            env, data, policy, gradient_steps=5, batch_size=128, learning_rate=1e-2
        )
    else:
        kind = agents.squashed_gaussian_policy if name == "sac" else agents.deterministic_policy
        parts = kind(env, **net), agents.critics(env, num=1 if name == "ddpg" else 2, **net)
        make = {"ddpg": agents.ddpg, "td3": agents.td3, "sac": agents.sac}[name]
        agent = make(env, *parts, num_envs=4, batch_size=64, start_steps=200, **options)
    shown = jnp.linspace(-1, 1, 9)[:, None]
    found = agent.act(learns(agent, 400), jax.random.key(0), shown)
    error = float(jnp.sqrt(jnp.mean((found - 0.5 * shown) ** 2)))
    assert error < 0.1, error
    if name == "iql":  # what was recorded has nothing to do with the number
        found = clone.act(learns(clone, 400), jax.random.key(0), shown)
        assert float(jnp.sqrt(jnp.mean((found - 0.5 * shown) ** 2))) > 0.2


def test_parts_are_the_whole_and_seeds_can_be_mapped_and_donated():
    env = signal()
    agent = agents.dqn(env, agents.q_network(env, **SMALL), target_period=6, **OPTIONS)
    run = jax.jit(lambda x: agents.train(agent, x, num_updates=3), donate_argnums=0)
    state, _ = run(run(jax.jit(agent.init)(jax.random.key(1)))[0])
    whole, metrics = jax.jit(lambda x: agents.train(agent, x, num_updates=6))(
        jax.jit(agent.init)(jax.random.key(1))
    )
    close(state.learner, whole.learner, 0)
    close(whole.learner.targets, whole.learner.params, 0)  # just copied
    assert int(whole.updates) == 6 and int(whole.replay.filled) == 20 + 6 * 4
    np.testing.assert_allclose(metrics["epsilon"], 1 - 0.95 * 4 * np.arange(6) / 25_000, rtol=1e-4)
    both, _ = jax.jit(jax.vmap(lambda x: agents.train(agent, agent.init(x), num_updates=6)))(
        jax.vmap(jax.random.key)(jnp.arange(2))
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-4, atol=1e-6),
        both.learner.params,
        whole.learner.params,
    )


def test_a_time_limit_is_no_end():
    batch = recorded(POINT)
    assert batch.truncated.any() and not batch.terminated.any()
    np.testing.assert_array_equal(off_policy.discounts(batch, 0.9), jnp.full((40, 8), 0.9))
    flat = off_policy.flat(batch)
    np.testing.assert_array_equal(flat.reward[8:16], batch.reward[1])


def test_normalised_layers_bound_their_output():
    sizes, key = (4, 32, 32, 3), jax.random.key(0)
    params = layer_norm_mlp.init(key, sizes)
    x = jax.random.normal(jax.random.key(1), (6, 4))
    found = layer_norm_mlp.apply(params, x, epsilon=0.0)
    np.testing.assert_allclose(layer_norm_mlp.apply(params, 1e3 * x, epsilon=0.0), found, rtol=1e-3)
    by_hand = np.asarray(x)
    for layer in params[:-1]:
        by_hand = by_hand @ np.asarray(layer["kernel"])
        by_hand = by_hand - by_hand.mean(-1, keepdims=True)
        by_hand = np.maximum(by_hand / by_hand.std(-1, keepdims=True), 0)
    np.testing.assert_allclose(found, by_hand @ params[-1]["kernel"], rtol=1e-3, atol=1e-5)
    for scale in (1.0, 1e4):  # whatever the weights before them
        wild = [
            {**layer, "kernel": scale * jax.random.normal(key, layer["kernel"].shape)}
            for layer in params[:-1]
        ]
        head = {"kernel": params[-1]["kernel"], "bias": jnp.array([1.0, -2.0, 0.0])}
        bound = jnp.linalg.norm(head["kernel"], axis=0) * 32**0.5 + jnp.abs(head["bias"])
        assert (jnp.abs(layer_norm_mlp.apply([*wild, head], 100 * x)) <= bound + 1e-4).all()
    # Nothing is normalised in the plain network, nor behind the last layer.
    plain = mlp.init(key, sizes)
    close(plain[-1], params[-1], 0)
    assert jnp.abs(mlp.apply(plain, 1e3 * x)).max() != jnp.abs(mlp.apply(plain, x)).max()


def test_bairds_star_with_normalised_features_and_a_penalty():
    """Expected semi-gradient TD under uniform behaviour, the target policy going to state 7.

    True values are 0. Plain features diverge; normalised ones of fixed features diverge as well,
    for the star's matrix has an eigenvalue of .55 then; with a penalty above that they come to 0.
    """
    features = np.zeros((7, 8), np.float32)
    features[np.arange(6), np.arange(6)], features[:6, 7] = 2, 1
    features[6, 6:] = 1, 2
    centred = features - features.mean(-1, keepdims=True)
    normalized = centred / centred.std(-1, keepdims=True)

    def largest(features, penalty):
        def step(w, _):
            value = features @ w
            error = 0.99 * value[6] - value
            w = w + 0.05 * ((error[:, None] * features).mean(0) - penalty * w)
            return w, jnp.abs(features @ w).max()

        start = jnp.ones(8).at[6].set(10.0)
        return jax.lax.scan(step, start, None, length=1000)[1]

    assert largest(features, 0.0)[-1] > 1e4
    assert largest(normalized, 0.0)[-1] > 1e4
    bounded = largest(normalized, 0.9)
    assert bounded.max() < 50 and bounded[-1] < 1e-2


def test_networks_and_their_ranges():
    x = 100 * jax.random.normal(jax.random.key(0), (7, 4))
    for kind, limits in (
        (agents.squashed_gaussian_policy, (-20, 2)),
        (agents.bounded_mean_policy, (-5, 2)),
    ):
        net = kind(POINT, **SMALL)
        params = jax.tree.map(lambda p: p + 9.0, net.init(jax.random.key(1)))
        mean, log_std = net.apply(params, x)
        assert mean.shape == log_std.shape == (7, 2)
        assert log_std.min() >= limits[0] and log_std.max() == limits[1]
        if kind is agents.bounded_mean_policy:
            assert jnp.abs(mean).max() <= 1
    net = agents.deterministic_policy(POINT, **SMALL)
    assert jnp.abs(net.apply(net.init(jax.random.key(0)), x)).max() <= 1
    net = agents.critics(POINT, num=3, **SMALL)
    found = net.apply(net.init(jax.random.key(0)), x, x[:, :2])
    assert found.shape == (3, 7) and len(set(found[:, 0].tolist())) == 3
    net = agents.value_network(POINT, **SMALL)
    assert net.apply(net.init(jax.random.key(0)), x).shape == (7,)
    action, log_prob = sample_tanh_gaussian(jax.random.key(0), (jnp.zeros((3, 2)),) * 2)
    np.testing.assert_allclose(
        policies.tanh_gaussian().log_prob((jnp.zeros((3, 2)),) * 2, action), log_prob, rtol=1e-3
    )


def test_bad_agents():
    discrete, free = signal(), control.pendulum()
    grid = envs.Environment(None, None, envs.Discrete(3), envs.Discrete(2))
    for make in (agents.ddpg, agents.td3, agents.sac):
        with pytest.raises(ValueError, match="expected a vector in .-1, 1."):
            make(free)
        with pytest.raises(ValueError, match="expected a vector in"):
            make(discrete)
        with pytest.raises(ValueError, match="tau"):
            make(POINT, tau=0.0)
        with pytest.raises(ValueError, match="discount"):
            make(POINT, discount=1.1)
    for make in (agents.dqn, agents.pqn):
        with pytest.raises(ValueError, match="expected Discrete"):
            make(POINT)
        with pytest.raises(ValueError, match="expected a vector"):
            make(grid)
        with pytest.raises(ValueError, match="epsilon"):
            make(discrete, epsilon=(1.2, 0.0))
        with pytest.raises(ValueError, match="explore_over"):
            make(discrete, explore_over=0)
    with pytest.raises(ValueError, match="num_minibatches: expected a divisor of 3 x 5"):
        agents.pqn(discrete, num_envs=3, num_steps=5, num_minibatches=4)
    with pytest.raises(ValueError, match="lambda_"):
        agents.pqn(discrete, lambda_=1.5)
    with pytest.raises(ValueError, match="target_period"):
        agents.dqn(discrete, target_period=0)
    with pytest.raises(ValueError, match="capacity"):
        agents.dqn(discrete, capacity=100, start_steps=101)
    with pytest.raises(ValueError, match="batch_size"):
        agents.sac(POINT, batch_size=0)
    with pytest.raises(ValueError, match="policy_delay"):
        agents.td3(POINT, policy_delay=0)
    with pytest.raises(ValueError, match="initial_temperature"):
        agents.sac(POINT, initial_temperature=0.0)
    unbounded = envs.Environment(None, None, envs.Box((3,)), envs.Box((2,)))
    with pytest.raises(ValueError, match="finite bounds"):
        off_policy.random_actions(unbounded, jax.random.key(0), 2)
    with pytest.raises(ValueError, match="num"):
        agents.critics(POINT, num=0)
    assert on_policy.annealed(0.1, None, 3) == 0.1


def test_bad_data():
    data = recorded(POINT, 2)
    with pytest.raises(ValueError, match="expectile"):
        agents.iql(POINT, data, expectile=1.0)
    with pytest.raises(ValueError, match="beta"):
        agents.iql(POINT, data, beta=-1.0)
    for make in (agents.iql, agents.behavior_cloning):
        with pytest.raises(ValueError, match="data.terminated: expected an array, got None"):
            make(POINT, data.replace(terminated=None))
        with pytest.raises(ValueError, match="data.terminated: expected dtype bool"):
            make(POINT, data.replace(terminated=data.reward))
        with pytest.raises(ValueError, match="data.action: expected numbers in"):
            make(POINT, data.replace(action=1.5 + data.action))
        with pytest.raises(ValueError, match="at least one transition"):
            make(POINT, jax.tree.map(lambda x: x[:0], data))
        with pytest.raises(ValueError, match="data.next_observation: expected shape"):
            make(POINT, data.replace(next_observation=data.observation[:1]))
        with pytest.raises(ValueError, match="data.action: expected rank 3"):
            make(POINT, data.replace(action=data.reward))
        with pytest.raises(ValueError, match="gradient_steps"):
            make(POINT, data, gradient_steps=0)
    kept = agents.offline.checked(data.replace(action=jnp.sign(data.action)))
    np.testing.assert_allclose(jnp.abs(kept.action), 1 - 1e-5)
    assert kept.reward.shape == (16,)
