"""Mixtures of experts: densities against scipy and integrals, whom a loss reaches, one expert."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.integrate
import scipy.stats

from pgjax import agents, envs, policies, surrogates
from pgjax.agents.sac import Actor
from pgjax.envs import control
from pgjax.policies import distributions, mixture

KEY = jax.random.key(0)
POINT = envs.with_flat_observations(control.point_mass(max_steps=3))


def some(batch=5, experts=3, size=2, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    mean = jax.random.normal(keys[1], (batch, experts, size))
    log_std = 0.3 * jax.random.normal(keys[2], mean.shape) - 0.7
    return mixture.Mixture(jax.random.normal(keys[0], (batch, experts)), mean, log_std)


def one(logits, mean, log_std):
    return mixture.Mixture(jnp.array(logits), jnp.array(mean)[:, None], jnp.array(log_std)[:, None])


@pytest.mark.parametrize("family", [mixture.gaussian_mixture, mixture.tanh_gaussian_mixture])
def test_density_integrates_to_1(family):
    parameters = one([0.3, -1.0, 0.0], [-0.8, 0.1, 1.5], [-1.0, -0.3, -2.0])
    # The tangent's scale for both, so that ends are no trouble: a = tanh u, da = (1 - a²) du.
    grid = jnp.linspace(-5, 5, 20_001)
    at, slope = (jnp.tanh(grid), 1 - jnp.tanh(grid) ** 2)
    if family is mixture.gaussian_mixture:
        at, slope = grid, jnp.ones_like(grid)
    density = jnp.exp(jax.vmap(lambda a: family().log_prob(parameters, a[None]))(at)) * slope
    total = scipy.integrate.trapezoid(np.asarray(density, float), np.asarray(grid, float))
    np.testing.assert_allclose(total, 1.0, atol=1e-3)


def test_log_prob_is_scipys_and_stays_finite():
    parameters = some()
    own = mixture.gaussian_mixture()
    action = own.sample(KEY, parameters)
    normal = scipy.stats.norm(np.asarray(parameters.mean, float), np.exp(parameters.log_std))
    each = normal.pdf(np.asarray(action, float)[:, None]).prod(-1)
    weights = np.asarray(jax.nn.softmax(parameters.logits))
    np.testing.assert_allclose(
        own.log_prob(parameters, action), np.log((weights * each).sum(-1)), rtol=1e-4, atol=1e-5
    )
    narrow = one([0.0, 0.0], [0.0, 1.0], [-20.0, -20.0])
    for value in (0.0, 0.5, 1.0):
        found, slope = jax.value_and_grad(lambda p, a: own.log_prob(p, a))(
            narrow, jnp.array([value])
        )
        assert np.isfinite(found)
        assert all(np.all(np.isfinite(x)) for x in slope)
    peak = own.log_prob(narrow, jnp.array([0.0]))
    np.testing.assert_allclose(peak, np.log(0.5) + 20 - 0.5 * np.log(2 * np.pi), rtol=1e-6)
    squashed = mixture.tanh_gaussian_mixture()
    assert np.isfinite(squashed.log_prob(parameters, jnp.ones((5, 2)))).all()
    every = jax.tree.map(lambda x: x[:, :1], parameters)
    np.testing.assert_allclose(
        squashed.log_prob(every, 0.5 * jnp.ones((5, 2))),
        policies.tanh_gaussian().log_prob(
            (every.mean[:, 0], every.log_std[:, 0]), 0.5 * jnp.ones((5, 2))
        ),
        rtol=1e-5,
    )


def test_samples_follow_weights_and_experts():
    parameters = one([0.0, 1.0, 2.0], [-20.0, 0.0, 20.0], [-1.0, 0.0, 0.5])
    many = jax.tree.map(lambda x: jnp.broadcast_to(x, (40_000, *x.shape)), parameters)
    found = np.asarray(mixture.gaussian_mixture().sample(KEY, many))[:, 0]
    expert = np.round(found / 20).clip(-1, 1)
    shares = [(expert == i).mean() for i in (-1, 0, 1)]
    np.testing.assert_allclose(shares, jax.nn.softmax(parameters.logits), atol=0.01)
    np.testing.assert_allclose(
        [found[expert == i].std() for i in (-1, 0, 1)], np.exp([-1, 0, 0.5]), rtol=0.05
    )
    assert mixture.gaussian_mixture().mode(parameters) == 20.0
    tied = parameters._replace(logits=jnp.zeros(3))
    assert mixture.gaussian_mixture().mode(tied) == -20.0  # the first of equals
    actions, log_probs = mixture.sample_experts(KEY, some())
    assert actions.shape == (5, 3, 2) and log_probs.shape == (5, 3)
    again = policies.tanh_gaussian().log_prob((some().mean, some().log_std), actions)
    np.testing.assert_allclose(log_probs, again, rtol=1e-3, atol=1e-3)


def test_frequencies_are_what_the_loss_ends_at():
    """Experts whose value is normal around a mean of their own: P(best) by quadrature."""
    means = np.array([0.0, 0.5, 1.0])
    grid = np.linspace(-7, 8, 5001)
    density = scipy.stats.norm.pdf(grid[:, None] - means)
    below = scipy.stats.norm.cdf(grid[:, None] - means)
    wanted = [
        scipy.integrate.trapezoid(density[:, k] * np.delete(below, k, axis=1).prod(1), grid)
        for k in range(3)
    ]
    assert abs(sum(wanted) - 1) < 1e-6

    def step(logits, key):
        values = jnp.asarray(means) + jax.random.normal(key, (256, 3))
        loss = lambda x: surrogates.frequency_loss(  # noqa: E731
            jnp.broadcast_to(jax.nn.softmax(x), (256, 3)), values
        ).mean()
        return logits - 1.0 * jax.grad(loss)(logits), None

    logits, _ = jax.jit(lambda keys: jax.lax.scan(step, jnp.zeros(3), keys))(
        jax.random.split(KEY, 2000)
    )
    np.testing.assert_allclose(jax.nn.softmax(logits), wanted, atol=0.02)


def test_frequency_loss_reaches_the_weights_alone():
    parameters, target = some(), jnp.array([0.3, -0.4])

    def routing(parameters, target):
        actions, _ = mixture.sample_experts(KEY, parameters)
        values = -jnp.square(actions - target).sum(-1)
        return surrogates.frequency_loss(jax.nn.softmax(parameters.logits), values).sum()

    slope, of_value = jax.grad(routing, argnums=(0, 1))(parameters, target)
    assert np.all(slope.mean == 0) and np.all(slope.log_std == 0) and np.all(of_value == 0)
    assert np.all(np.abs(slope.logits).sum(-1) > 0)
    # Other names of the experts, the same numbers.
    values = jax.random.normal(KEY, (5, 3))
    order = jnp.array([2, 0, 1])
    of = jax.grad(lambda w, q: surrogates.frequency_loss(w, q).sum())
    weights = jax.nn.softmax(parameters.logits)
    np.testing.assert_allclose(
        of(weights[:, order], values[:, order]), of(weights, values)[:, order], rtol=1e-6
    )
    # Of equals the first.
    tied = surrogates.frequency_loss(jnp.full((1, 2), 0.5), jnp.zeros((1, 2)))
    np.testing.assert_allclose(tied, [[0.25, 0.25]])
    np.testing.assert_allclose(of(jnp.full((1, 2), 0.5), jnp.zeros((1, 2))), [[-1, 1]])
    np.testing.assert_array_equal(surrogates.frequency_loss(jnp.ones((4, 1)), jnp.zeros((4, 1))), 0)


def test_the_best_expert_alone_learns():
    parameters = some()
    target = jnp.array([0.3, -0.4])
    value = lambda action: -jnp.square(action - target).sum(-1)  # noqa: E731

    def policy(parameters):
        actions, log_probs = mixture.sample_experts(KEY, parameters)
        return surrogates.best_expert_loss(log_probs, value(actions), jnp.float32(0.1)).sum()

    slope = jax.grad(policy)(parameters)
    best = np.argmax(value(mixture.sample_experts(KEY, parameters)[0]), axis=-1)
    for row, k in enumerate(best):
        others = np.delete(np.arange(3), k)
        assert np.all(slope.mean[row, others] == 0) and np.all(slope.log_std[row, others] == 0)
        assert np.all(slope.mean[row, k] != 0) and np.all(slope.log_std[row, k] != 0)
    assert np.all(slope.logits == 0)
    # In the actor as well, where the weights learn by frequency.
    actor = agents.best_expert()
    loss, log_prob = actor.loss(KEY, parameters, value, jnp.float32(0.1))
    actions, log_probs = mixture.sample_experts(KEY, parameters)
    rows = np.arange(5)
    routing = np.square(jax.nn.softmax(parameters.logits) - np.eye(3)[best]).mean(-1)
    wanted = 0.1 * log_probs[rows, best] - value(actions)[rows, best] + routing
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    np.testing.assert_allclose(log_prob, log_probs[rows, best], rtol=1e-6)
    action, log_prob = actor.sample(KEY, parameters)
    found = np.argmin(np.abs(np.asarray(actions) - np.asarray(action)[:, None]).sum(-1), axis=-1)
    np.testing.assert_allclose(action, actions[rows, found])
    np.testing.assert_allclose(log_prob, log_probs[rows, found])


@pytest.mark.parametrize("make", [agents.score_routed, agents.gumbel_routed])
def test_the_other_routers_descend_the_same_objective(make):
    """Means over many draws against the derivative of Σ_k w_k E_k[-Q], α = 0, by quadrature."""
    logits, mean = jnp.array([0.2, -0.3]), jnp.array([[-0.5], [0.9]])
    log_std = jnp.full((2, 1), -1.5)
    value = lambda action: jnp.sin(2 * action).sum(-1)  # noqa: E731
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    weights = weights / weights.sum()

    def exact(logits):
        actions = jnp.tanh(mean + jnp.exp(log_std) * nodes)
        return -(jax.nn.softmax(logits) * (jnp.sin(2 * actions) * weights).sum(-1)).sum()

    many = 40_000

    def estimate(logits):
        parameters = mixture.Mixture(logits, mean, log_std)
        parameters = jax.tree.map(lambda x: jnp.broadcast_to(x, (many, *x.shape)), parameters)
        return make().loss(KEY, parameters, value, jnp.float32(0.0))[0].mean()

    found, wanted = jax.grad(estimate)(logits), jax.grad(exact)(logits)
    if make is agents.score_routed:  # unbiased; the straight-through choice only points there
        np.testing.assert_allclose(found, wanted, atol=0.01)
    assert np.all(np.sign(found) == np.sign(wanted))


def equal(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, other)


def test_one_expert_is_soft_actor_critic():
    options = {"batch_size": 16, "start_steps": 20, "gradient_steps": 3, "capacity": 100}
    judge = agents.critics(POINT, hidden=(8,))
    plain = agents.sac(POINT, agents.squashed_gaussian_policy(POINT, hidden=(8,)), judge, **options)
    policy = agents.expert_policy(POINT, num_experts=1, hidden=(8,))
    single = agents.sac(POINT, policy, judge, actor=agents.best_expert(), **options)
    one, other = (jax.jit(agent.update)(agent.init(KEY)) for agent in (plain, single))
    params = dict(other[0].learner.params)
    equal(one[0].learner.params["actor"], params["actor"]["experts"])
    for name in ("critic", "log_temperature"):
        equal(one[0].learner.params[name], params[name])
    equal(one[0].running.observation, other[0].running.observation)
    equal(one[1]["policy_loss"], other[1]["policy_loss"])
    equal(plain.act(one[0], KEY, jnp.ones((2, 4))), single.act(other[0], KEY, jnp.ones((2, 4))))


def test_one_expert_is_proximal_policy_optimisation():
    options = {"num_steps": 8, "num_minibatches": 2, "num_epochs": 2, "entropy_coefficient": 0.0}
    options["optimizer"] = optax.adam(1e-2)  # without a clip of the norm, which sees all networks
    net = agents.mixture_actor_critic(POINT, num_experts=1, hidden=(8,))
    plain = agents.ppo(POINT, agents.actor_critic(POINT, hidden=(8,)), **options)
    single = agents.ppo(POINT, net, auxiliary=agents.expert_routing(net), **options)
    one, metrics = jax.jit(plain.update)(plain.init(KEY))
    other, more = jax.jit(single.update)(single.init(KEY))
    equal(one.params["actor"]["mlp"], other.params["actor"]["mlp"])
    equal(one.params["actor"]["log_std"], other.params["actor"]["log_std"][0])
    equal(one.params["critic"], other.params["critic"])
    assert more["frequency_loss"] == 0 and more["action_value_loss"] > 0
    equal(metrics["policy_loss"], more["policy_loss"])


def test_routing_in_ppo_reaches_gate_and_action_value_alone():
    net = agents.mixture_actor_critic(POINT, num_experts=3, hidden=(8,))
    params = net.init(KEY)
    from pgjax.agents.ppo import Batch

    seen = jax.random.normal(KEY, (6, 4))
    part = Batch(seen, seen[:, :2], *(jnp.ones(6),) * 4)
    slope = jax.grad(lambda p: agents.expert_routing(net)(p, part, KEY)[0])(params)
    norm = lambda x: optax.global_norm(x)  # noqa: E731
    assert norm(slope["actor"]["mlp"]) == 0 and norm(slope["actor"]["log_std"]) == 0
    assert norm(slope["critic"]) == 0
    assert norm(slope["actor"]["gate"]) > 0 and norm(slope["action_critic"]) > 0
    # While the ratio's log-prob reaches all of the actor.
    score = jax.grad(lambda p: net.distribution.log_prob(net.actor(p, seen), seen[:, :2]).sum())(
        params
    )
    assert all(norm(x) > 0 for x in score["actor"].values())


def test_sac_takes_an_optimizer_for_each():
    still = {name: optax.set_to_zero() for name in ("actor", "critic", "log_temperature")}
    options = {"batch_size": 8, "start_steps": 10, "capacity": 100}
    judge = agents.critics(POINT, hidden=(8,))
    policy = agents.expert_policy(POINT, num_experts=2, hidden=(8,))
    make = functools.partial(
        agents.sac, POINT, policy, judge, actor=agents.best_expert(), **options
    )
    agent = make(optimizer=still | {"critic": optax.sgd(0.1)})
    before = agent.init(KEY)
    after, _ = agent.update(before)
    equal(before.learner.params["actor"], after.learner.params["actor"])
    assert before.learner.params["log_temperature"] == after.learner.params["log_temperature"]
    assert not np.allclose(
        before.learner.params["critic"][0]["kernel"], after.learner.params["critic"][0]["kernel"]
    )
    with pytest.raises(ValueError, match="optimizer: expected one for each"):
        make(optimizer={"actor": optax.sgd(0.1)})
    assert isinstance(agents.best_expert(), Actor)


def test_bad_input():
    with pytest.raises(ValueError, match="num_experts"):
        agents.expert_policy(POINT, num_experts=0)
    with pytest.raises(ValueError, match="num_experts"):
        agents.mixture_actor_critic(POINT, num_experts=0)
    with pytest.raises(ValueError, match="env.action: expected a vector"):
        agents.mixture_actor_critic(control.cart_pole(), num_experts=2)
    weights, values = jnp.full((4, 2), 0.5), jnp.zeros((4, 2))
    with pytest.raises(ValueError, match="weights: expected rows that sum to 1"):
        surrogates.frequency_loss(weights * 0.8, values)
    with pytest.raises(ValueError, match="weights: expected rows that sum to 1"):
        surrogates.frequency_loss(weights * jnp.nan, values)
    with pytest.raises(ValueError, match="values: expected rank 2"):
        surrogates.frequency_loss(weights, values[:, 0])
    with pytest.raises(ValueError, match="weights: expected shape"):
        surrogates.frequency_loss(weights[:, :1], values)
    with pytest.raises(ValueError, match="number of experts"):
        surrogates.frequency_loss(jnp.zeros((4, 0)), jnp.zeros((4, 0)))
    with pytest.raises(ValueError, match="values: expected rank 2"):
        surrogates.best_expert_loss(weights, values[:, 0], jnp.float32(1.0))
    with pytest.raises(ValueError, match="logprobs: expected shape"):
        surrogates.best_expert_loss(weights[:, :1], values, jnp.float32(1.0))
    short = some()._replace(logits=jnp.zeros((5, 2)))
    with pytest.raises(ValueError, match="logits: expected one for each expert"):
        mixture.gaussian_mixture().log_prob(short, jnp.zeros((5, 2)))
    with pytest.raises(ValueError, match="softness"):
        agents.gumbel_routed(softness=0.0)
    assert distributions.gaussian() is not None
