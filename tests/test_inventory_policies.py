"""Ordering policies: feasible whatever they ask for, known rules by hand, symmetry, learning."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgjax.envs import inventory, supply_network
from pgjax.models import inventory as policies
from pgjax.models import supply_graph
from pgjax.values import inventory as closed_forms

STAR = supply_network.warehouse_and_stores(
    (1, 3, 2), holding=(1.0, 0.7, 1.3), penalty=(9.0, 7.0, 11.0), warehouse_lead_time=2
)
CENTRE = supply_network.transshipment((1, 3, 2), holding=jnp.ones(3), penalty=jnp.full(3, 9.0))
CHAIN = supply_network.serial((2, 1, 3), holding=(0.1, 0.5, 1.0), penalty=9.0)


def stock_of(network, seed=0, scale=10.0, batch=(5,)):
    shape = (*batch, network.num_nodes, network.pipeline)
    return scale * jax.random.uniform(jax.random.key(seed), shape)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1e-6, 1.0, 30.0, 1e4]), st.booleans())
def test_allocations_never_exceed_the_stock_and_centres_forward_all(seed, scale, softmax):
    allocate = policies.softmax_allocation if softmax else policies.proportional_allocation
    for network in (STAR, CENTRE):
        stock = stock_of(network, seed)
        asked = scale * jax.random.normal(jax.random.key(seed), (5, 4))
        asked = asked if softmax else jnp.maximum(asked, 0.0)
        sent = allocate(network, asked, stock)
        on_hand = stock[:, 0, 0]
        assert (sent >= 0).all()
        assert (sent[:, 1:].sum(-1) <= on_hand * (1 + 1e-5)).all()
        if network is CENTRE:
            np.testing.assert_allclose(sent[:, 1:].sum(-1), on_hand, rtol=1e-5)


def test_allocations_by_hand():
    stock = jnp.zeros((4, 3)).at[0, 0].set(6.0)
    share = policies.proportional_allocation
    np.testing.assert_allclose(share(STAR, jnp.array([50.0, 1, 2, 1]), stock), [50, 1, 2, 1])
    np.testing.assert_allclose(share(STAR, jnp.array([50.0, 2, 4, 6]), stock), [50, 1, 2, 3])
    keep = jnp.array([6.0, 9.0, 9.0, 9.0])
    kept = share(STAR, jnp.array([50.0, 2, 4, 6]), stock, keep=keep)
    np.testing.assert_allclose(kept, [50, 2 / 3, 4 / 3, 2], rtol=1e-6)
    wide = jnp.zeros((4, 3)).at[0, 0].set(6.0)
    np.testing.assert_allclose(share(CENTRE, jnp.array([5.0, 0, 1, 2]), wide), [5, 0, 2, 4])
    np.testing.assert_allclose(share(CENTRE, jnp.array([5.0, 0, 0, 0]), wide), [5, 2, 2, 2])
    scores = jnp.array([5.0, 0.3, -1.0, 2.0])
    parts = np.exp([0.3, -1.0, 2.0, 1.0])
    found = policies.softmax_allocation(STAR, scores, stock)
    np.testing.assert_allclose(found, [0, *(6 * parts[:3] / parts.sum())], rtol=1e-5)
    found = policies.softmax_allocation(CENTRE, scores, wide)
    np.testing.assert_allclose(found, [0, *(6 * parts[:3] / parts[:3].sum())], rtol=1e-5)
    # A backlog at a supplier is nothing to send.
    assert (share(STAR, jnp.full(4, 2.0), -stock)[1:] == 0).all()


def test_stock_levels_by_hand():
    store = supply_network.single_store(2, penalty=9.0)
    stock = jnp.array([[[3.0, 4.0]], [[9.0, 8.0]]])
    found = policies.base_stock(store, jnp.array([12.0]), stock)
    np.testing.assert_allclose(found, [[5.0], [0.0]])
    for cap, wanted in ((3.0, 3.0), (7.0, 5.0), (-1.0, 0.0)):
        found = policies.capped_base_stock(store, jnp.array([12.0]), jnp.array([cap]), stock)
        np.testing.assert_allclose(found, [[wanted], [0.0]])
    # Levels 12, 8 and 5; echelon positions by node, what the node before has.
    raw = jnp.log(jnp.expm1(jnp.array([4.0, 3.0, 5.0])))
    stock = jnp.array([[1.0, 0, 0], [0.5, 1, 0], [1, 1, 0]])
    found = policies.echelon_stock(CHAIN, raw, stock)
    np.testing.assert_allclose(found, [12 - 4.5, 1.0, 0.5], rtol=1e-5)
    stock = jnp.array([[9.0, 0, 0], [9.0, 1, 0], [1, 1, 0]])
    found = policies.echelon_stock(CHAIN, raw, stock)
    np.testing.assert_allclose(found, [0.0, 0.0, 3.0], rtol=1e-5)


def test_a_chain_with_ample_stock_upstream_is_a_single_store():
    chain = supply_network.serial((1, 2), holding=(0.0, 1.0), penalty=9.0)
    store = supply_network.single_store(2, penalty=9.0)
    demand = inventory.normal_demand(jax.random.key(0), (30, 4), jnp.array([5.0]), jnp.array([1.6]))
    raw = jnp.array([1000.0, 17.0])
    start = jnp.zeros((4, 2, 2)).at[:, 0, 0].set(1000.0)
    _, long = inventory.unroll(
        chain, lambda stock, t: policies.echelon_stock(chain, raw, stock), start, demand
    )
    _, short = inventory.unroll(
        store,
        lambda stock, t: policies.base_stock(store, jnp.array([17.0]), stock),
        jnp.zeros((4, 1, 2)),
        demand,
    )
    np.testing.assert_allclose(long.cost, short.cost, rtol=1e-4, atol=1e-3)


NETWORKS = {"star": STAR, "centre": CENTRE, "chain": CHAIN}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_order_what_is_possible(name):
    network = NETWORKS[name]
    stock = stock_of(network)
    inside = np.array(network.suppliers) >= 0
    for policy in (
        policies.network_mlp(network, largest_order=60.0, hidden=(16,)),
        supply_graph.graph_policy(network, steps=2, hidden=(16,), width=8),
    ):
        params = policy.init(jax.random.key(0))
        orders = policy.apply(params, stock)
        assert orders.shape == (5, network.num_edges) and (orders >= 0).all()
        sent = orders @ network.leaving
        on_hand = stock[..., 0]
        assert (sent <= on_hand * (1 + 1e-5)).all()
        centres = list(network.centres)
        np.testing.assert_allclose(sent[:, centres], on_hand[:, centres], rtol=1e-5)
        # One scenario, a batch, a batch of batches: the same numbers.
        np.testing.assert_allclose(policy.apply(params, stock[0]), orders[0], rtol=1e-5)
        many = policy.apply(params, stock[None])
        np.testing.assert_allclose(many[0], orders, rtol=1e-5)
        grads = jax.grad(lambda p, a=policy.apply: a(p, stock).sum())(params)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
        assert any(np.abs(x).max() > 0 for x in jax.tree.leaves(grads))
    assert inside.any()


def test_relabelled_stores_have_relabelled_orders():
    lead_times, holding, penalty = (1, 3, 2), np.array([1.0, 0.7, 1.3]), np.array([9.0, 7.0, 11.0])
    order = np.array([2, 0, 1])
    other = supply_network.warehouse_and_stores(
        [lead_times[i] for i in order],
        holding=holding[order],
        penalty=penalty[order],
        warehouse_lead_time=2,
    )
    for steps in (1, 3):
        one = supply_graph.graph_policy(STAR, steps=steps, hidden=(16,), width=8)
        two = supply_graph.graph_policy(other, steps=steps, hidden=(16,), width=8)
        params = one.init(jax.random.key(0))
        params = jax.tree.map(
            lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), params
        )
        stock = stock_of(STAR, scale=3.0)
        rows = np.array([0, *(order + 1)])
        found = one.apply(params, stock)
        np.testing.assert_allclose(two.apply(params, stock[:, rows]), found[:, rows], rtol=1e-4)
        assert np.ptp(np.asarray(found[0, 1:])) > 1e-3
    # The perceptron has no such symmetry.
    mlp = policies.network_mlp(STAR, largest_order=60.0, hidden=(16,))
    params = mlp.init(jax.random.key(0))
    found, moved = mlp.apply(params, stock), mlp.apply(params, stock[:, rows])
    assert np.abs(moved - found[:, rows]).max() > 1e-3


def test_the_same_weights_serve_a_larger_network():
    larger = supply_network.warehouse_and_stores(
        (1, 3, 2, 2, 1), holding=jnp.ones(5), penalty=jnp.full(5, 9.0)
    )
    policy = supply_graph.graph_policy(STAR)
    params = policy.init(jax.random.key(0))
    orders = supply_graph.graph_policy(larger).apply(params, stock_of(larger))
    assert orders.shape == (5, 6) and np.isfinite(orders).all()
    # The bias of the output is about the first order.
    np.testing.assert_allclose(orders[:, 0], 5.0, atol=0.5)


def test_hindsight_learns_the_best_level():
    store = supply_network.single_store(4, penalty=9.0)
    mean, deviation = jnp.array([5.0]), jnp.array([1.6])
    optimizer = optax.adam(0.5)

    def loss(level, key):
        demand = inventory.normal_demand(key, (50, 128), mean, deviation)
        return inventory.hindsight_cost(
            store,
            lambda stock, t: policies.base_stock(store, level, stock),
            jnp.full((128, 1, 4), 2.5),
            demand,
        )

    def step(carry, key):
        level, state = carry
        update, state = optimizer.update(jax.grad(loss)(level, key), state)
        return (level + update, state), level

    start = jnp.array([5.0])
    keys = jax.random.split(jax.random.key(0), 250)
    (level, _), _ = jax.jit(lambda: jax.lax.scan(step, (start, optimizer.init(start)), keys))()
    best = closed_forms.base_stock_level(5.0, 1.6, 4, penalty=9.0)
    assert abs(level[0] - best) < 0.2


def test_a_store_policy_starts_alike_in_all_states():
    store = supply_network.single_store(4, penalty=9.0)
    policy = policies.store_mlp(store)
    orders = policy.apply(policy.init(jax.random.key(0)), stock_of(store))
    np.testing.assert_allclose(orders, jnp.log1p(jnp.exp(1.0)), atol=0.5)


def test_bad_input_is_named():
    stock = stock_of(STAR)
    for match, call in (
        (
            "requests: expected shape",
            lambda: policies.proportional_allocation(STAR, jnp.ones((5, 3)), stock),
        ),
        ("scores: expected shape", lambda: policies.softmax_allocation(STAR, jnp.ones(4), stock)),
        (
            "stock: expected shape",
            lambda: policies.softmax_allocation(STAR, jnp.ones((5, 4)), stock[..., :1]),
        ),
        (
            "stock: expected a floating",
            lambda: policies.proportional_allocation(
                STAR, jnp.ones((5, 4)), stock.astype(jnp.int32)
            ),
        ),
        ("levels: expected shape", lambda: policies.base_stock(STAR, jnp.ones(3), stock)),
        ("caps", lambda: policies.capped_base_stock(STAR, jnp.ones(4), jnp.ones(3), stock)),
        ("network: expected a chain", lambda: policies.echelon_stock(STAR, jnp.ones(4), stock)),
        (
            "raw: expected shape",
            lambda: policies.echelon_stock(CHAIN, jnp.ones(4), stock_of(CHAIN)),
        ),
        ("network: expected edges from outside", lambda: policies.store_mlp(STAR)),
        ("largest_order", lambda: policies.network_mlp(STAR, largest_order=0.0)),
        (
            "features: expected a row",
            lambda: supply_graph.graph_policy(STAR, features=jnp.ones((3, 2))),
        ),
        ("steps", lambda: supply_graph.graph_policy(STAR, steps=0)),
    ):
        with pytest.raises(ValueError, match=match):
            call()
