"""Joint policies along graphs: probabilities, gradients by enumeration, graphs that are learnt."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from pgjax import agents, envs, policies
from pgjax.envs import aloha, coordination
from pgjax.models import dag
from pgjax.policies import bayes_net

KEY = jax.random.key(0)
FULL = jnp.triu(jnp.ones((3, 3)), 1)
LINE = jnp.eye(3, k=1)
EMPTY = jnp.zeros((3, 3))


def table_logits(weights):
    """Logits linear in the parents' actions: weights `[n, n A + 1, A]`."""

    def logits(agent, parents):
        return jnp.concatenate([parents.reshape(-1), jnp.ones(1)]) @ weights[agent]

    return logits


def random_logits(seed=0, size=3, actions=2):
    shape = (size, size * actions + 1, actions)
    return table_logits(jax.random.normal(jax.random.key(seed), shape))


def random_dag(key, size=5, match=dag.best_matching):
    one, two, key = jax.random.split(key, 3)
    edges = jax.random.normal(one, (size, size, 2))
    return dag.sample_dag(key, edges, jax.random.normal(two, (size, size)), match=match)


@pytest.mark.parametrize("match", [dag.best_matching, dag.ranked_matching])
def test_sampled_graphs_have_no_cycles(match):
    found = jax.jit(jax.vmap(lambda k: random_dag(k, match=match)))(jax.random.split(KEY, 200))
    graphs = np.asarray(found.graph)
    assert set(np.unique(graphs.round(6))) == {0.0, 1.0}
    assert not np.linalg.matrix_power(graphs, 5).any()
    assert not graphs[:, np.arange(5), np.arange(5)].any()
    # Parents stand before their children.
    place = np.argsort(found.order, axis=1)
    sample, parent, child = np.nonzero(graphs)
    assert (place[sample, parent] < place[sample, child]).all()
    # Edges by a coin, kept where the order allows: half of the ten.
    assert abs(graphs.sum((1, 2)).mean() - 5) < 0.8
    assert len({tuple(x) for x in np.asarray(found.order).tolist()}) > 50


def test_sinkhorn_and_matchings():
    scores = jax.random.normal(KEY, (6, 6))
    soft = dag.sinkhorn(scores)
    np.testing.assert_allclose(soft.sum(0), 1, atol=1e-3)
    np.testing.assert_allclose(soft.sum(1), 1, atol=1e-3)
    _, wanted = linear_sum_assignment(-np.asarray(scores))
    np.testing.assert_array_equal(dag.best_matching(scores), wanted)
    # The colder, the nearer to the best, where that is clearly better than the next.
    clear = scores + 3 * jax.nn.one_hot(jnp.array([3, 1, 5, 0, 2, 4]), 6)
    _, wanted = linear_sum_assignment(-np.asarray(clear))
    cold = dag.sinkhorn(clear, temperature=0.05, num_iterations=200)
    np.testing.assert_allclose(cold, np.eye(6)[wanted], atol=1e-3)
    np.testing.assert_array_equal(dag.best_matching(clear), wanted)
    np.testing.assert_array_equal(dag.ranked_matching(cold), wanted)
    # Without noise a graph is what its logits say.
    order = jnp.array([2, 0, 1])
    edges = jnp.zeros((3, 3, 2)).at[..., 0].set(1.0).at[0, 1, 0].set(-1.0)
    found = dag.mode_dag(edges, 5 * jax.nn.one_hot(order, 3))
    np.testing.assert_array_equal(found.order, order)
    np.testing.assert_allclose(found.graph, [[0, 0, 0], [0, 0, 0], [1, 1, 0]], atol=1e-6)


def test_gradients_reach_edges_through_the_masks_alone():
    size = 4
    edges, order = jax.random.normal(KEY, (size, size, 2)), jax.random.normal(KEY, (size, size))
    weights = jax.random.normal(jax.random.key(3), (size, size * 2 + 1, 2))
    actions = jnp.array([0, 1, 1, 0])

    def score(edges, order, weights):
        graph = dag.sample_dag(KEY, edges, order).graph
        found = bayes_net.bn_log_prob(table_logits(weights), actions, graph, num_actions=2)
        return found.sum()

    allowed = dag.sample_dag(KEY, edges.at[..., 0].add(100.0), order).graph
    slope = np.asarray(jax.grad(score)(edges, order, weights))
    np.testing.assert_array_equal(slope[np.asarray(allowed) == 0], 0)
    assert (np.abs(slope[np.asarray(allowed) == 1]) > 0).all()
    np.testing.assert_allclose(slope[..., 0], -slope[..., 1], atol=1e-6)
    assert np.abs(jax.grad(score, argnums=1)(edges, order, weights)).max() > 0
    # Agents that do not listen to their parents give no gradient to either.
    deaf = weights.at[:, :-1].set(0.0)
    for x in jax.grad(score, argnums=(0, 1))(edges, order, deaf):
        np.testing.assert_array_equal(x, 0)


def test_density():
    assert dag.density(FULL) == 1 and dag.density(EMPTY) == 0
    np.testing.assert_allclose(dag.density(jnp.stack([FULL, LINE])), [1, 2 / 3], rtol=1e-6)
    both = jnp.stack([FULL, EMPTY])
    assert dag.density_penalty(both, 0.5, coefficient=3.0) == 0
    np.testing.assert_allclose(dag.density_penalty(both, 0.1, coefficient=3.0), 1.2, rtol=1e-6)


@pytest.mark.parametrize("graph", [FULL, LINE, EMPTY, FULL.T])
def test_joint_probabilities(graph):
    logits = random_logits()
    joint = bayes_net.bn_joint(logits, graph, num_actions=2)
    np.testing.assert_allclose(joint.sum(), 1, rtol=1e-6)
    every = bayes_net.joint_actions(3, 2)
    np.testing.assert_array_equal(every, list(itertools.product((0, 1), repeat=3)))
    # The product of each agent's own softmax, by hand.
    for actions, chance in zip(np.asarray(every), np.asarray(joint), strict=True):
        wanted = 1.0
        for agent in range(3):
            parents = np.asarray(graph)[:, agent, None] * np.eye(2)[actions]
            p = jax.nn.softmax(logits(agent, jnp.asarray(parents, jnp.float32)))
            wanted *= float(p[actions[agent]])
        np.testing.assert_allclose(chance, wanted, rtol=1e-5)
    order = bayes_net.topological_order(graph)
    actions, log_prob = jax.jit(
        jax.vmap(lambda k: bayes_net.bn_sample(k, logits, graph, order, num_actions=2))
    )(jax.random.split(KEY, 20_000))
    again = jax.vmap(lambda a: bayes_net.bn_log_prob(logits, a, graph, num_actions=2))(actions)
    np.testing.assert_allclose(log_prob, again, atol=1e-5)
    counts = np.bincount(np.asarray(actions) @ [4, 2, 1], minlength=8) / 20_000
    np.testing.assert_allclose(counts, joint, atol=0.015)


def test_without_edges_agents_are_independent():
    logits = random_logits()
    alone = [jax.nn.softmax(logits(i, jnp.zeros((3, 2)))) for i in range(3)]
    wanted = jnp.einsum("a,b,c->abc", *alone).reshape(-1)
    np.testing.assert_allclose(bayes_net.bn_joint(logits, EMPTY, num_actions=2), wanted, rtol=1e-5)


def test_topological_orders():
    assert bayes_net.topological_order(EMPTY).tolist() == [0, 1, 2]
    assert bayes_net.topological_order(FULL.T).tolist() == [2, 1, 0]
    graph = jnp.zeros((4, 4)).at[3, 0].set(1).at[0, 2].set(1)
    assert jax.jit(bayes_net.topological_order)(graph).tolist() == [1, 3, 0, 2]
    many = jax.vmap(random_dag)(jax.random.split(KEY, 50)).graph
    place = np.argsort(jax.vmap(bayes_net.topological_order)(many), axis=1)
    sample, parent, child = np.nonzero(np.asarray(many))
    assert (place[sample, parent] < place[sample, child]).all()


def game_policy(weights, graph, game):
    """π(a|s), `[S, S]`, of tables `[n, S, n A + 1, A]`."""
    states = jnp.arange(len(game.rewards))
    return jax.vmap(
        lambda s: bayes_net.bn_joint(table_logits(weights[:, s]), graph, num_actions=2)
    )(states)


@pytest.mark.parametrize("graph", [FULL, LINE, EMPTY])
def test_the_policy_gradient_with_q_and_with_its_mean_given_the_parents(graph):
    """Both equal the derivative of the exact return, in float64."""
    with jax.enable_x64(True):
        graph, gamma = jnp.asarray(graph, jnp.float64), 0.9
        game = coordination.tables(3)
        game = game._replace(
            transitions=jnp.asarray(game.transitions, jnp.float64),
            rewards=jnp.asarray(game.rewards, jnp.float64),
        )
        weights = jax.random.normal(KEY, (3, 8, 7, 2), jnp.float64)

        def exact(weights):
            policy = game_policy(weights, graph, game)
            return coordination.expected_return(game, policy, discount=gamma)

        pi = np.asarray(game_policy(weights, graph, game))
        move = pi @ np.asarray(game.transitions)
        v = np.linalg.solve(np.eye(8) - gamma * move, game.rewards)
        visits = np.linalg.solve(np.eye(8) - gamma * move.T, np.full(8, 1 / 8))
        q = np.asarray(game.rewards)[:, None] + gamma * np.asarray(game.transitions) @ v
        bits = np.asarray(game.bits)

        def q_of(agent):
            """E[Q | what the agent and its parents do], for every joint action."""
            known = [j for j in range(3) if graph[j, agent] or j == agent]
            same = (bits[:, None, known] == bits[None][:, :, known]).all(-1)
            weight = pi[:, None, :] * same
            return (weight * q[:, None, :]).sum(-1) / weight.sum(-1)

        def surrogate(weights, judged):
            def one(s, a):
                logits = table_logits(weights[:, s])
                found = bayes_net.bn_log_prob(logits, a, graph, num_actions=2)
                return found

            score = jax.vmap(lambda s: jax.vmap(lambda a: one(s, a))(game.bits))(jnp.arange(8))
            return jnp.sum(visits[:, None, None] * pi[..., None] * judged * score)

        wanted = jax.grad(exact)(weights)
        full = np.broadcast_to(q[..., None], (8, 8, 3))
        parts = np.stack([q_of(i) for i in range(3)], axis=-1)
        for judged in (full, parts):
            found = jax.grad(surrogate)(weights, judged)
            np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-11)
        assert graph.sum() == 3 or np.abs(full - parts).max() > 0.01


def test_agents_in_the_order_of_a_graph_learn():
    env = coordination.coordination_game(2, max_steps=16)
    options = {"num_envs": 16, "learning_rate": 1e-2, "discount": 0.95}
    fixed = agents.fixed_graph_network(env, jnp.triu(jnp.ones((2, 2)), 1), hidden=(16,))
    agent = agents.bn_mappo(env, fixed, **options)
    run = jax.jit(lambda key: agents.train(agent, agent.init(key), num_updates=60))
    state, metrics = run(KEY)
    # 1.25 at first and 2.45 in each of the 15 later steps is the best on average.
    assert metrics["return"][0] < 27 and metrics["return"][-5:].mean() > 34
    assert np.all(metrics["density"] == 1) and agent.steps == 256
    bits = jnp.array([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    np.testing.assert_array_equal(agent.act(state, KEY, bits)[0], [0, 0])
    learnt = agents.learned_graph_network(env, hidden=(16,))
    penalised = agents.bn_mappo(
        env, learnt, density_target=lambda updates: 0.0, density_coefficient=1.0, **options
    )
    state, metrics = jax.jit(lambda k: agents.train(penalised, penalised.init(k), num_updates=40))(
        KEY
    )
    assert 0.3 < metrics["density"][0] < 0.7 and metrics["density"][-1] < 0.15
    assert penalised.act(state, KEY, bits).shape == (3, 2)
    with pytest.raises(ValueError, match="num_minibatches: expected a divisor of 256, got 3"):
        agents.bn_mappo(env, fixed, num_minibatches=3, num_envs=16)
    with pytest.raises(ValueError, match=r"graph: expected shape \(2, 2\)"):
        agents.fixed_graph_network(env, FULL)
    with pytest.raises(ValueError, match="expected a vector with an entry for each agent"):
        agents.fixed_graph_network(envs.control.cart_pole(), FULL)


def test_the_mode_follows_the_order():
    logits = random_logits(5)
    for graph in (FULL, LINE, FULL.T):
        order = bayes_net.topological_order(graph)
        found = bayes_net.bn_mode(logits, graph, order, num_actions=2)
        every = bayes_net.bn_log_probs(logits, found, graph, num_actions=2)
        np.testing.assert_array_equal(found, np.argmax(every, axis=1))
        np.testing.assert_allclose(np.exp(every).sum(1), 1, rtol=1e-5)


def test_bad_input():
    logits, order = random_logits(), jnp.arange(3)
    cycle = jnp.zeros((3, 3)).at[0, 1].set(1).at[1, 2].set(1).at[2, 0].set(1)
    with pytest.raises(ValueError, match="graph: expected no cycle"):
        bayes_net.topological_order(cycle)
    with pytest.raises(ValueError, match="graph: expected no cycle"):
        bayes_net.topological_order(jnp.eye(3))
    with pytest.raises(ValueError, match=r"logits: expected shape \(3,\), got \(2,\)"):
        bayes_net.bn_sample(KEY, lambda i, parents: jnp.zeros(2), FULL, order, num_actions=3)
    with pytest.raises(ValueError, match="order: expected shape"):
        bayes_net.bn_sample(KEY, logits, FULL, jnp.arange(2), num_actions=2)
    with pytest.raises(ValueError, match="actions: expected shape"):
        bayes_net.bn_log_prob(logits, jnp.zeros(4, int), FULL, num_actions=2)
    with pytest.raises(ValueError, match="actions: expected an integer dtype"):
        bayes_net.bn_log_prob(logits, jnp.zeros(3), FULL, num_actions=2)
    with pytest.raises(ValueError, match="joint actions"):
        bayes_net.bn_joint(logits, jnp.zeros((17, 17)), num_actions=2)
    with pytest.raises(ValueError, match="at most 8 rows for exact matching, got 9"):
        random_dag(KEY, size=9)
    assert random_dag(KEY, size=9, match=dag.ranked_matching).graph.shape == (9, 9)
    with pytest.raises(ValueError, match="coefficient"):
        dag.density_penalty(FULL, 0.5, coefficient=-0.1)
    with pytest.raises(ValueError, match="target"):
        dag.density_penalty(FULL, 1.5, coefficient=0.1)
    with pytest.raises(ValueError, match="edge_logits: expected shape"):
        dag.sample_dag(KEY, jnp.zeros((3, 3)), jnp.zeros((3, 3)))
    with pytest.raises(ValueError, match="temperature"):
        dag.sinkhorn(jnp.zeros((3, 3)), temperature=0.0)
    with pytest.raises(ValueError, match="log_alpha: expected shape"):
        dag.sinkhorn(jnp.zeros((3, 2)))
    with pytest.raises(ValueError, match="slack: expected a number for 4 agents"):
        coordination.tables(4)
    with pytest.raises(ValueError, match="error"):
        coordination.coordination_game(3, error=1.5)
    with pytest.raises(ValueError, match="discount"):
        coordination.expected_return(coordination.tables(2), jnp.full((4, 4), 0.25), discount=1.0)
    with pytest.raises(ValueError, match="neighbours: expected a symmetric matrix"):
        aloha.aloha(np.ones((3, 3), bool))
    with pytest.raises(ValueError, match="arrival"):
        aloha.aloha(arrival=1.5)
    assert policies.bayes_net is bayes_net
