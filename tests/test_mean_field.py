"""Many agents alike: kernel rules, the limit of the flow, dynamic programming, swarms."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.experimental import checkify

from pgjax import agents, envs, sampling
from pgjax.envs import mean_field, swarms
from pgjax.policies import kernel_rule

KEY = jax.random.key(0)
TURN = 2 * np.pi
ANCHORS = kernel_rule.anchor_grid(-np.pi, np.pi, number=7)
WIDTH = TURN / 7


def circle(points, bandwidth=WIDTH):
    return kernel_rule.rbf_weights(points, ANCHORS, bandwidth=bandwidth, period=TURN)


def test_weights_sum_to_1_and_end_as_a_histogram():
    points = jax.random.uniform(KEY, (500, 1), minval=-np.pi, maxval=np.pi)
    for bandwidth in (10.0, WIDTH, 0.01):
        np.testing.assert_allclose(circle(points, bandwidth).sum(-1), 1.0, rtol=1e-5)
    nearest = kernel_rule.nearest_weights(points, ANCHORS, period=TURN)
    edges = np.linspace(-np.pi, np.pi, 8)
    bins = np.digitize(np.asarray(points)[:, 0], edges) - 1
    np.testing.assert_array_equal(nearest, np.eye(7)[bins])
    clear = np.abs(np.asarray(points) - edges).min(-1) > 0.01  # not on the border of two bins
    np.testing.assert_allclose(circle(points, 0.02)[clear], nearest[clear], atol=1e-6)
    # A circle has no end, and far from all anchors weights still are.
    np.testing.assert_allclose(circle(points + TURN), circle(points), rtol=1e-3, atol=1e-5)
    far = kernel_rule.rbf_weights(jnp.array([[1e4]]), ANCHORS, bandwidth=0.1)
    np.testing.assert_allclose(far, np.eye(7)[[6]], atol=1e-6)
    squared = np.square(np.asarray(points) - np.asarray(ANCHORS)[:, 0])
    kernel = np.exp(-squared / (2 * 0.7**2))
    np.testing.assert_allclose(
        kernel_rule.rbf_weights(points, ANCHORS, bandwidth=0.7),
        kernel / kernel.sum(-1, keepdims=True),
        rtol=1e-4,
        atol=1e-7,
    )


def test_one_anchor_sees_nothing():
    points = jax.random.normal(KEY, (4, 2))
    weights = kernel_rule.rbf_weights(points, jnp.zeros((1, 2)), bandwidth=0.3)
    np.testing.assert_array_equal(weights, 1)
    xi = jnp.array([[0.3, -1.0]])
    actions = jnp.linspace(-1, 1, 4)[:, None]
    found = kernel_rule.kernel_rule_log_prob(xi, weights, actions)
    normal = scipy.stats.norm(0.3, np.exp(-1))
    np.testing.assert_allclose(found, normal.logpdf(actions[:, 0]), rtol=1e-5)
    shifted = kernel_rule.rbf_weights(points + 3, jnp.zeros((1, 2)), bandwidth=0.3)
    np.testing.assert_array_equal(
        kernel_rule.kernel_rule_sample(KEY, xi, shifted),
        kernel_rule.kernel_rule_sample(KEY, xi, weights),
    )


def test_rules_blend_distributions_or_their_parameters():
    point = jnp.array([[0.4]])
    weights = circle(point)
    xi = jnp.concatenate([jax.random.normal(KEY, (7, 1)), jnp.full((7, 1), -1.0)], axis=1)
    action = jnp.array([[0.2]])
    density = (np.asarray(weights) * scipy.stats.norm(xi[:, 0], np.exp(-1)).pdf(0.2)).sum()
    np.testing.assert_allclose(
        kernel_rule.kernel_rule_log_prob(xi, weights, action)[0], np.log(density), rtol=1e-5
    )
    many = jnp.broadcast_to(weights, (50_000, 7))
    mean = float((weights @ xi[:, :1])[0, 0])
    of_mixture = kernel_rule.kernel_rule_sample(KEY, xi, many)
    of_mean = kernel_rule.interpolated_rule_sample(KEY, xi, many)
    np.testing.assert_allclose([of_mixture.mean(), of_mean.mean()], mean, atol=0.02)
    np.testing.assert_allclose(of_mean.std(), np.exp(-1), rtol=0.02)
    spread = np.asarray(weights[0]) @ np.square(xi[:, 0] - mean) + np.exp(-2)
    np.testing.assert_allclose(of_mixture.var(), spread, rtol=0.03)
    # In a bin of a histogram both are its Gaussian.
    bins = jnp.broadcast_to(kernel_rule.nearest_weights(point, ANCHORS, period=TURN), (50_000, 7))
    for sample in (kernel_rule.kernel_rule_sample, kernel_rule.interpolated_rule_sample):
        found = sample(KEY, xi, bins)
        np.testing.assert_allclose([found.mean(), found.std()], [xi[3, 0], np.exp(-1)], atol=0.01)
    logits = jax.random.normal(KEY, (7, 4))
    probabilities = kernel_rule.discrete_rule(logits, weights)
    np.testing.assert_allclose(probabilities.sum(-1), 1.0, rtol=1e-6)
    exp = np.exp(np.asarray(logits, float))
    np.testing.assert_allclose(
        probabilities, np.asarray(weights) @ (exp / exp.sum(-1, keepdims=True)), rtol=1e-5
    )
    slope = jax.grad(lambda x: kernel_rule.kernel_rule_log_prob(x, bins[:1], action).sum())(xi)
    assert np.all(np.isfinite(slope)) and np.all(slope[3] != 0) and np.all(slope[:3] == 0)


def test_features_and_rewards_do_not_know_the_order_of_agents():
    swarm = swarms.vicsek()
    states = swarm.reset(KEY, 30)
    order = jax.random.permutation(KEY, 30)
    other = jax.tree.map(lambda x: x[order], states)
    actions = jax.random.normal(KEY, (30, 1))

    def features(states):
        return kernel_rule.mean_field_features(
            swarm.coordinates(states), ANCHORS, bandwidth=WIDTH, period=TURN
        )

    np.testing.assert_allclose(features(states), features(other), rtol=1e-5)
    np.testing.assert_allclose(features(states).sum(), 1.0, rtol=1e-6)
    np.testing.assert_allclose(
        swarm.reward(states, actions), swarm.reward(other, actions[order]), rtol=1e-5
    )
    # What an agent does depends on its own observation alone.
    quiet = swarms.vicsek(observation_noise=0.0)
    seen, seen_other = quiet.observe(KEY, states), quiet.observe(KEY, other)
    np.testing.assert_allclose(seen[order], seen_other, atol=1e-5)
    np.testing.assert_allclose(circle(seen)[order], circle(seen_other), atol=1e-4)
    # Closed form: κ at distances 0 and 1, of two agents.
    found = kernel_rule.mean_field_features(
        jnp.array([[0.0], [1.0]]), jnp.array([[0.0], [2.0]]), bandwidth=1.0
    )
    one, two = 1 + np.exp(-0.5), np.exp(-2) + np.exp(-0.5)
    np.testing.assert_allclose(found, np.array([one, two]) / (one + two), rtol=1e-5)


def crowding(num_actions=2):
    """Two places; it is the harder to move to one the more are there."""

    def transition(mu):
        stay = jnp.eye(2)
        to_other = 0.9 - 0.6 * mu[::-1]
        move = jnp.stack(
            [jnp.stack([1 - to_other[0], to_other[0]]), jnp.stack([to_other[1], 1 - to_other[1]])]
        )
        return jnp.stack([stay, move], axis=1)

    return mean_field.FiniteModel(
        observation=lambda mu: jnp.array([[0.8, 0.2], [0.3, 0.7]]),
        transition=transition,
        reward=lambda mu: -jnp.square(mu[0] - 0.3),
    )


def test_the_flow_is_the_sum_over_what_may_happen():
    model, mu = crowding(), np.array([0.6, 0.4])
    rule = np.array([[0.25, 0.75], [0.9, 0.1]])
    seen, moves = np.asarray(model.observation(mu)), np.asarray(model.transition(jnp.array(mu)))
    wanted = np.zeros(2)
    for x, y, u, z in itertools.product(range(2), repeat=4):
        wanted[z] += mu[x] * seen[x, y] * rule[y, u] * moves[x, u, z]
    found = mean_field.flow(model, jnp.array(mu), jnp.array(rule))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    np.testing.assert_allclose(found.sum(), 1.0, rtol=1e-6)


def test_many_agents_approach_the_flow_by_the_root_of_their_number():
    model, rule = crowding(), jnp.array([[0.25, 0.75], [0.9, 0.1]])
    mu = jnp.array([0.6, 0.4])
    wanted = mu
    for _ in range(5):
        wanted = mean_field.flow(model, wanted, rule)

    def error(number, repeats):
        def one(key):
            states = (jnp.arange(number) >= 0.6 * number).astype(jnp.int32)
            for own in jax.random.split(key, 5):
                states = mean_field.agents_step(own, model, states, rule, num_states=2)
            return jnp.abs(mean_field.empirical(states, num_states=2) - wanted).sum()

        return float(jax.jit(jax.vmap(one))(jax.random.split(KEY, repeats)).mean())

    few, many = error(100, 200), error(10_000, 40)
    assert 5 < few / many < 20, (few, many)


def test_dynamic_programming_is_the_best_of_all_sequences():
    """Staying or swapping for certain: shares p, 1 - p, 0 and 1 are all there ever are."""
    model = mean_field.FiniteModel(
        observation=lambda mu: jnp.eye(2),
        transition=lambda mu: jnp.stack([jnp.eye(2), jnp.eye(2)[::-1]], axis=1),
        reward=lambda mu: -jnp.square(mu[0] - 0.35) - 0.2 * (mu[0] == 1.0),
    )
    shares = np.array([0.7, 0.3, 0.0, 1.0], np.float32)
    grid = jnp.stack([shares, 1 - shares], axis=1)
    swaps = list(itertools.product(range(2), repeat=2))  # of those in either place
    rules = jnp.eye(2)[jnp.array(swaps)]
    horizon, discount = 4, 0.8
    values, choices = mean_field.backward_induction(
        model, grid, rules, horizon=horizon, discount=discount
    )
    assert values.shape == choices.shape == (4, 4)
    for start in range(4):
        totals = []
        for sequence in itertools.product(swaps, repeat=horizon):
            mu, total = [shares[start], 1 - shares[start]], 0.0
            for t, swap in enumerate(sequence):
                total += discount**t * (-((mu[0] - 0.35) ** 2) - 0.2 * (mu[0] == 1.0))
                after = [0.0, 0.0]
                for place in range(2):
                    after[place ^ swap[place]] += mu[place]
                mu = after
            totals.append(total)
        np.testing.assert_allclose(values[0, start], max(totals), rtol=1e-4)
    # Nearest to .35 is .3: from .7 all swap.
    np.testing.assert_allclose(values[0, 0], -(0.35**2) - 0.05**2 * (0.8 + 0.64 + 0.512), rtol=1e-4)
    assert choices[0, 0] == 3


def environment(number, decide=None, **options):
    swarm = swarms.kuramoto(**options)

    def usual(key, xi, seen):
        return kernel_rule.kernel_rule_sample(key, xi.reshape(7, 2), circle(seen))

    return mean_field.mean_field_environment(
        swarm,
        decide or usual,
        lambda x: kernel_rule.mean_field_features(x, ANCHORS, bandwidth=WIDTH, period=TURN),
        num_agents=number,
        num_parameters=14,
        num_features=7,
        max_steps=10,
    )


def test_the_number_of_agents_does_not_show_in_the_problem():
    params = []
    for number in (2, 40):
        env = environment(number)
        assert env.observation == envs.Box((7,)) and env.action == envs.Box((14,))
        agent = agents.ppo(env, agents.actor_critic(env, hidden=(8,)), num_steps=12)
        state, metrics = jax.jit(agent.update)(agent.init(KEY))
        assert np.isfinite(metrics["loss"])
        params.append(jax.tree.map(jnp.shape, state.params))
    assert params[0] == params[1]


@pytest.mark.parametrize(("number", "wanted"), [(10, 0.954), (1000, 0.946)])
def test_phases_fall_into_step_by_a_proportional_rule(number, wanted):
    """Published numbers of u = clip(3 Im(z exp(-ix))), z the mean of exp(ix)."""
    swarm = swarms.kuramoto(observation_noise=0.0)

    def one(key, states):
        move_key, see_key = jax.random.split(key)
        seen = swarm.observe(see_key, states)
        length = jnp.sqrt(swarms.order(states["angle"]))
        actions = jnp.clip(-3 * length * jnp.sin(seen), -1, 1)
        states = swarm.step(move_key, states, actions)
        return states, swarm.reward(states, actions)

    def run(key):
        keys = jax.random.split(key, 101)
        begun = swarm.reset(keys[0], number)
        return jax.lax.scan(lambda s, k: one(k, s), begun, keys[1:])[1][-30:].mean()

    found = jax.jit(jax.vmap(run))(jax.random.split(KEY, 64 if number == 10 else 8))
    np.testing.assert_allclose(found.mean(), wanted, atol=0.01)


def test_without_a_rule_phases_stay_random():
    env = environment(50, decide=lambda key, xi, seen: jnp.zeros((50, 1)))
    act = lambda key, seen: sampling.Decision(jnp.zeros((200, 14)))  # noqa: E731
    running = sampling.start_environments(env, KEY, 200)
    _, seen, _ = sampling.unroll_environments(env, act, running, KEY, num_steps=10)
    np.testing.assert_allclose(seen.reward.mean(), 1 / 50, rtol=0.15)
    assert seen.truncated[-1].all() and not seen.terminated.any()


def test_neighbours_are_those_within_the_radius():
    states = {
        "angle": jnp.array([0.1, 0.5, 3.0]),
        "place": jnp.array([[0.02, 0.5], [0.97, 0.5], [0.5, 0.5]]),  # the torus joins its ends
    }
    swarm = swarms.kuramoto(radius=0.1, observation_noise=0.0)
    np.testing.assert_allclose(swarm.observe(KEY, states)[:, 0], [-0.2, 0.2, 0.0], atol=1e-6)
    flying = swarms.vicsek(noise=0.0, speed=0.05)
    moved = flying.step(KEY, states | {"angle": jnp.zeros(3)}, jnp.zeros((3, 1)))
    np.testing.assert_allclose(moved["place"][:, 0], [0.07, 0.02, 0.55], atol=1e-6)
    moved = flying.step(KEY, states, jnp.array([[1.0], [0.0], [-1.0]]))
    np.testing.assert_allclose(moved["angle"], [0.3, 0.5, 2.8], atol=1e-6)
    everyone = swarms.circular_mean(jnp.array([0.0, np.pi / 2]))
    np.testing.assert_allclose(everyone, [np.pi / 4] * 2, rtol=1e-6)


def test_places_gather():
    swarm = swarms.aggregation(noise=0.0, observation_noise=0.0, cost=0.5)
    states = jnp.array([[0.0, 0.0], [3.0, 4.0]]) / 5
    none, full = jnp.zeros((2, 2)), jnp.array([[3.0, 4.0], [0.0, 0.0]]) / 5
    np.testing.assert_allclose(swarm.reward(states, none), -0.5)  # of four pairs two are apart by 1
    np.testing.assert_allclose(swarm.reward(states, full), -0.5 - 0.25, rtol=1e-6)
    moved = swarm.step(KEY, states, 3 * full)  # no longer than the stride
    np.testing.assert_allclose(moved[0], 0.1 * full[0], rtol=1e-5)
    np.testing.assert_allclose(swarm.observe(KEY, states), states)
    slope = jax.grad(lambda x: swarm.reward(x, none))(states)
    assert np.all(np.isfinite(slope))


def test_bad_input():
    points = jnp.zeros((3, 1))
    with pytest.raises(ValueError, match="bandwidth"):
        circle(points, 0.0)
    with pytest.raises(ValueError, match="bandwidth"):
        kernel_rule.mean_field_features(points, ANCHORS, bandwidth=-1.0)
    with pytest.raises(ValueError, match="anchors: expected distinct points"):
        kernel_rule.rbf_weights(points, jnp.zeros((2, 1)), bandwidth=1.0)
    with pytest.raises(ValueError, match="number of anchors"):
        kernel_rule.rbf_weights(points, jnp.zeros((0, 1)), bandwidth=1.0)
    with pytest.raises(ValueError, match="observations: expected 1 entries like the anchors"):
        kernel_rule.nearest_weights(jnp.zeros((3, 2)), ANCHORS)
    with pytest.raises(ValueError, match="observations: expected finite"):
        circle(points * jnp.nan)
    with pytest.raises(ValueError, match="anchors: expected finite"):
        kernel_rule.rbf_weights(points, ANCHORS * jnp.nan, bandwidth=1.0)
    error, _ = checkify.checkify(jax.jit(circle), errors=checkify.user_checks)(points * jnp.nan)
    with pytest.raises(Exception, match="finite numbers"):
        error.throw()
    with pytest.raises(ValueError, match="number of states"):
        kernel_rule.mean_field_features(jnp.zeros((0, 1)), ANCHORS, bandwidth=1.0)
    with pytest.raises(ValueError, match="xi: expected a row for each of 7 anchors"):
        kernel_rule.kernel_rule_sample(KEY, jnp.zeros((6, 2)), circle(points))
    with pytest.raises(ValueError, match="xi: expected means and log standard deviations"):
        kernel_rule.kernel_rule_sample(KEY, jnp.zeros((7, 3)), circle(points))
    with pytest.raises(ValueError, match="number"):
        kernel_rule.anchor_grid(0, 1, number=0)
    with pytest.raises(ValueError, match="num_agents"):
        environment(0)
    with pytest.raises(ValueError, match="num_agents"):
        swarms.aggregation().reset(KEY, 0)
    with pytest.raises(ValueError, match="decide: expected actions of shape"):
        env = environment(5, decide=lambda key, xi, seen: xi)
        env.step(KEY, env.reset(KEY)[0], jnp.zeros(14))
    with pytest.raises(ValueError, match="radius"):
        swarms.kuramoto(radius=0.0)
    with pytest.raises(ValueError, match="observation_noise"):
        swarms.aggregation(observation_noise=-1.0)
    model = crowding()
    with pytest.raises(ValueError, match="model.observation: expected shape"):
        mean_field.flow(model, jnp.ones(2) / 2, jnp.ones((3, 2)) / 2)
    with pytest.raises(ValueError, match="model.transition: expected shape"):
        mean_field.flow(model, jnp.ones(2) / 2, jnp.ones((2, 3)) / 3)
    with pytest.raises(ValueError, match="number of agents"):
        mean_field.empirical(jnp.zeros(0, jnp.int32), num_states=2)
    with pytest.raises(ValueError, match="states: expected ids"):
        mean_field.empirical(jnp.array([0, 2]), num_states=2)
    with pytest.raises(ValueError, match="horizon"):
        mean_field.backward_induction(model, jnp.eye(2), jnp.ones((1, 2, 2)) / 2, horizon=0)
