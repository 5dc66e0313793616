"""Supply networks against plain loops, slopes and conservation; demand, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax import envs, sampling
from pgjax.envs import inventory, supply_network
from pgjax.models import inventory as policies

RULES = (inventory.backlog_step, inventory.lost_sales_step, inventory.revenue_step)
STAR = supply_network.warehouse_and_stores(
    (1, 3, 2), holding=(1.0, 0.7, 1.3), penalty=(9.0, 7.0, 11.0), warehouse_lead_time=2
)


def ordering(network, levels=30.0):
    wanted = jnp.full(network.num_edges, levels)
    return lambda stock, period: policies.base_stock(network, wanted, stock)


def drawn(network, periods, scenarios, seed=0, mean=5.0, deviation=1.6):
    stock_key, demand_key = jax.random.split(jax.random.key(seed))
    shape = (scenarios, network.num_nodes, network.pipeline)
    stores = len(network.stores)
    demand = inventory.normal_demand(
        demand_key, (periods, scenarios), jnp.full(stores, mean), jnp.full(stores, deviation)
    )
    return mean * jax.random.uniform(stock_key, shape), demand


def by_hand(network, stock, orders, demand, *, lost):
    """One period of one scenario in plain Python and float64."""
    stock, cost = np.array(stock, float), 0.0
    left = stock[:, 0].copy()
    for edge, (source, amount) in enumerate(zip(network.suppliers, orders, strict=True)):
        if source >= 0:
            left[source] -= amount
        cost += float(network.ordering[edge]) * amount
    for place, node in enumerate(network.stores):
        left[node] -= demand[place]
    for node in range(network.num_nodes):
        cost += float(network.holding[node]) * max(left[node], 0)
        cost += float(network.penalty[node]) * max(-left[node], 0)
        if lost and node in network.stores:
            left[node] = max(left[node], 0)
    after = np.zeros_like(stock)
    after[:, :-1] = stock[:, 1:]
    after[:, 0] += left
    for edge, amount in enumerate(orders):
        after[network.receivers[edge], network.lead_times[edge] - 1] += amount
    return after, cost


@pytest.mark.parametrize("lost", [False, True])
def test_a_period_is_that_of_a_plain_loop(lost):
    diamond = supply_network.by_edges(
        (-1, 0, 0, 1, 2),
        (0, 1, 2, 3, 3),
        (2, 1, 3, 2, 1),
        stores=(1, 3),
        holding=(0.1, 0.4, 0.3, 1.0),
        penalty=(0.0, 5.0, 0.0, 9.0),
        ordering=(0.5, 0.1, 0.2, 0.0, 0.3),
        pipeline=4,
    )
    rule = inventory.lost_sales_step if lost else inventory.backlog_step
    for network in (STAR, diamond):
        stock, demand = drawn(network, 6, 2)
        orders = ordering(network, 25.0)
        _, trace = jax.jit(
            lambda stock, demand, network=network, orders=orders: inventory.unroll(
                network, orders, stock, demand, rule=rule
            )
        )(stock, demand)
        state = np.array(stock[1], float)
        for t in range(6):
            np.testing.assert_allclose(trace.stock[t, 1], state, rtol=1e-4, atol=1e-4)
            orders_now = np.array(trace.orders[t, 1])
            state, cost = by_hand(network, state, orders_now, np.array(demand[t, 1]), lost=lost)
            np.testing.assert_allclose(trace.cost[t, 1], cost, rtol=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_the_gradient_is_the_slope_away_from_kinks(rule):
    """In float64 the cost of one scenario is piecewise linear in the level: slopes are exact."""
    with jax.enable_x64(True):
        store = supply_network.single_store(3, holding=1.0, penalty=9.0)
        stock, demand = drawn(store, 40, 30)
        assert stock.dtype == jnp.float64

        def cost(level):
            return inventory.hindsight_cost(store, ordering(store, level), stock, demand, rule=rule)

        for level in (17.123, 21.377):
            found = jax.grad(cost)(jnp.float64(level))
            slope = (cost(level + 1e-7) - cost(level - 1e-7)) / 2e-7
            np.testing.assert_allclose(found, slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rule", RULES[:2])
def test_what_comes_in_is_served_or_still_there(rule):
    for network in (
        STAR,
        supply_network.transshipment((2, 1), holding=(1.0, 1.0), penalty=(4.0, 9.0)),
        supply_network.serial((2, 1, 3), holding=(0.1, 0.5, 1.0), penalty=9.0),
    ):
        stock, demand = drawn(network, 50, 8)
        after, trace = inventory.unroll(network, ordering(network), stock, demand, rule=rule)
        bought = trace.orders[..., np.array(network.suppliers) < 0].sum((0, -1))
        served = demand
        if rule is inventory.lost_sales_step:
            on_hand = trace.stock[:, :, np.array(network.stores), 0]
            served = jnp.minimum(on_hand, demand)
        change = after.sum((1, 2)) - stock.sum((1, 2))
        np.testing.assert_allclose(bought, served.sum((0, -1)) + change, rtol=1e-5)
        # Whole numbers below 2^24 lose nothing in float32: exactly.
        whole = jax.tree.map(jnp.round, (stock, demand))
        whole_orders = lambda s, t, n=network: jnp.floor(ordering(n)(s, t))  # noqa: E731
        after, trace = inventory.unroll(network, whole_orders, *whole, rule=rule)
        bought = trace.orders[..., np.array(network.suppliers) < 0].sum((0, -1))
        served = whole[1]
        if rule is inventory.lost_sales_step:
            served = jnp.minimum(trace.stock[:, :, np.array(network.stores), 0], served)
        change = after.sum((1, 2)) - whole[0].sum((1, 2))
        np.testing.assert_array_equal(bought, served.sum((0, -1)) + change)


def test_revenue_is_the_same_problem_with_another_zero():
    stock, demand = drawn(STAR, 20, 4)
    orders = ordering(STAR)
    end, lost = inventory.unroll(STAR, orders, stock, demand, rule=inventory.lost_sales_step)
    same, sold = inventory.unroll(STAR, orders, stock, demand, rule=inventory.revenue_step)
    np.testing.assert_array_equal(end, same)
    served = jnp.minimum(lost.stock[:, :, 1:, 0], demand)
    left = lost.stock[..., 0] - lost.orders @ STAR.leaving
    left = left.at[..., 1:].add(-demand)
    held = (STAR.holding * jnp.maximum(left, 0)).sum(-1)
    np.testing.assert_allclose(
        sold.cost, held - (STAR.penalty[1:] * served).sum(-1), rtol=1e-4, atol=1e-3
    )


def test_many_networks_at_once():
    """Costs are data: a network is a pytree, mapped over and differentiated like any other."""
    store = supply_network.single_store(2, penalty=9.0)
    stock, demand = drawn(store, 10, 4)

    def cost(penalty, level):
        network = supply_network.single_store(2, penalty=penalty)
        return inventory.hindsight_cost(network, ordering(network, level), stock, demand)

    penalties, levels = jnp.array([4.0, 9.0, 19.0]), jnp.array([12.0, 15.0, 17.0])
    many = jax.jit(jax.vmap(cost))(penalties, levels)
    alone = [cost(p, level) for p, level in zip(penalties, levels, strict=True)]
    np.testing.assert_allclose(many, alone, rtol=1e-5)
    # At one level the cost is linear in the penalty.
    slope = jax.grad(cost)(4.0, 12.0)
    np.testing.assert_allclose(cost(14.0, 12.0) - cost(4.0, 12.0), 10 * slope, rtol=1e-4)


def test_one_period_or_no_demand_is_finite():
    for network in (STAR, supply_network.single_store(4, penalty=9.0)):
        for periods, factor in ((1, 1.0), (5, 0.0)):
            stock, demand = drawn(network, periods, 3)
            for rule in RULES:
                value, slope = jax.value_and_grad(
                    lambda levels, network=network, s=stock, d=demand * factor, r=rule: (
                        inventory.hindsight_cost(network, ordering(network, levels), s, d, rule=r)
                    )
                )(10.0)
                assert np.isfinite(value) and np.isfinite(slope)
    nothing = jnp.zeros((2, 4, 3))
    for allocate in (policies.proportional_allocation, policies.softmax_allocation):
        slope = jax.grad(lambda o, a=allocate: jnp.square(a(STAR, o, nothing)).sum())(
            jnp.zeros((2, 4))
        )
        assert np.isfinite(slope).all()


def test_an_environment_is_the_same_simulation():
    store = supply_network.single_store(2, penalty=9.0)
    stock, demand = jnp.array([[4.0, 3.0]]), jnp.array([5.0])
    env = inventory.environment(store, lambda key: stock, lambda key: demand)
    running = sampling.start_environments(env, jax.random.key(0), 3)
    assert env.observation == envs.Box((2,)) and env.action.shape == (1,)

    def act(key, observation):
        return sampling.environments.Decision(jnp.maximum(14.0 - observation.sum(-1), 0)[:, None])

    _, seen, _ = sampling.unroll_environments(env, act, running, jax.random.key(1), num_steps=4)
    _, trace = inventory.unroll(
        store, ordering(store, 14.0), stock[None], jnp.broadcast_to(demand, (4, 1, 1))
    )
    np.testing.assert_allclose(-seen.reward[:, 0], trace.cost[:, 0])
    step = env.step(jax.random.key(0), stock, jnp.array([-3.0]))
    np.testing.assert_array_equal(step.state, [[2.0, 0.0]])


def test_demand_has_the_moments_asked_for():
    mean, deviation = jnp.array([5.0, 7.0, 3.0]), jnp.array([1.0, 2.0, 1.5])
    draw = inventory.normal_demand(
        jax.random.key(0), (400, 250), mean, deviation, correlation=0.5, lowest=-np.inf
    ).reshape(-1, 3)
    np.testing.assert_allclose(draw.mean(0), mean, atol=0.03)
    np.testing.assert_allclose(draw.std(0), deviation, atol=0.03)
    np.testing.assert_allclose(
        np.corrcoef(draw.T), 0.5 * np.eye(3) + 0.5 * np.ones((3, 3)), atol=0.02
    )
    cut = inventory.normal_demand(jax.random.key(0), (400, 250), mean, deviation, correlation=0.5)
    np.testing.assert_allclose(cut.reshape(-1, 3), jnp.maximum(draw, 0.0))


def test_bad_input_is_named():
    one = {"stores": (0,), "holding": (1.0,), "penalty": (9.0,)}
    two = {"stores": (1,), "holding": (1.0, 1.0), "penalty": (0.0, 9.0)}
    for match, edges, options in (
        ("lead_times: expected 1 to", ((-1,), (0,), (0,)), one),
        ("lead_times: expected 1 to 2", ((-1,), (0,), (3,)), {**one, "pipeline": 2}),
        ("as many of each", ((-1, 0), (0,), (1,)), one),
        ("as many of each", ((-1,), (0,), (1, 2)), one),
        ("as many of each", ((), (), ()), one),
        ("none to node 1", ((-1,), (0,), (1,)), {**two, "stores": (0, 1)}),
        ("none from 0", ((-1, -1), (0, 1), (1, 1)), two),
        ("suppliers: expected nodes -1 to 1", ((-1, 2), (0, 1), (1, 1)), two),
        ("receivers: expected nodes 0 to 1", ((-1, 0), (0, 2), (1, 1)), two),
        ("other nodes than the receivers", ((-1, 0, 1), (0, 1, 1), (1, 1, 1)), two),
        ("stores: expected at least one", ((-1,), (0,), (1,)), {**one, "stores": ()}),
        ("centres: expected nodes without", ((-1,), (0,), (1,)), {**one, "centres": (0,)}),
        ("holding: expected costs", ((-1,), (0,), (1,)), {**one, "holding": (-1.0,)}),
        ("penalty: expected shape", ((-1,), (0,), (1,)), {**one, "penalty": (1.0, 2.0)}),
        ("ordering: expected a number", ((-1,), (0,), (1,)), {**one, "ordering": (1.0, 2.0)}),
    ):
        with pytest.raises(ValueError, match=match):
            supply_network.by_edges(*edges, **options)
    with pytest.raises(ValueError, match="holding: expected one number a store"):
        supply_network.warehouse_and_stores((1, 2), holding=(1.0,), penalty=(1.0, 1.0))
    store = supply_network.single_store(2, penalty=9.0)
    stock, demand = drawn(store, 3, 2)
    order = ordering(store)
    for match, given in (
        ("stock: expected a floating dtype", (stock.astype(jnp.int32), demand)),
        ("demand: expected a floating dtype", (stock, demand.astype(jnp.int32))),
        ("stock: expected shape", (stock[..., :1], demand)),
        ("demand: expected shape", (stock, jnp.ones((3, 2, 2)))),
        ("demand: expected shape", (stock, jnp.ones((0, 2, 1)))),
    ):
        with pytest.raises(ValueError, match=match):
            inventory.unroll(store, order, *given)
    with pytest.raises(ValueError, match="orders: expected shape"):
        inventory.backlog_step(store, stock, jnp.ones((2, 3)), demand[0])
    for rule in RULES[1:]:
        with pytest.raises(ValueError, match="demand: expected none below 0"):
            inventory.unroll(store, order, stock, demand - 20.0, rule=rule)
        with pytest.raises(ValueError, match="demand: expected none below 0"):
            rule(store, stock, jnp.ones((2, 1)), -demand[0])
    inventory.unroll(store, order, stock, demand - 20.0)
    with pytest.raises(ValueError, match="ignore"):
        inventory.hindsight_cost(store, order, stock, demand, ignore=3)
    with pytest.raises(ValueError, match="correlation"):
        inventory.normal_demand(jax.random.key(0), (2,), demand[0, 0], demand[0, 0], correlation=2)
