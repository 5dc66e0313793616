"""What optimal orders of a single store cost: closed forms, published tables, simulation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from pgjax.envs import inventory, supply_network
from pgjax.models import inventory as policies
from pgjax.values import inventory as closed_forms


def test_the_closed_forms_are_the_known_numbers():
    level = closed_forms.base_stock_level(5.0, 1.6, np.array([4, 1]), penalty=9.0)
    np.testing.assert_allclose(level, [29.585, 12.900], atol=1e-3)
    cost = closed_forms.base_stock_cost(level, 5.0, 1.6, np.array([4, 1]), penalty=9.0)
    np.testing.assert_allclose(cost, [6.2788, 3.971], atol=1e-3)
    # The cost of any level, and that the level is its minimum.
    need = stats.norm(25.0, 1.6 * 5**0.5)
    for level in (27.0, 29.585, 31.0):
        expected, _ = integrate.quad(
            lambda d, s=level: (max(s - d, 0) + 9 * max(d - s, 0)) * need.pdf(d),
            0,
            60,
            points=[level],
        )
        found = closed_forms.base_stock_cost(level, 5.0, 1.6, 4, penalty=9.0)
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    best = closed_forms.base_stock_level(5.0, 1.6, 4, penalty=9.0)
    slope = jax.grad(lambda s: closed_forms.base_stock_cost(s, 5.0, 1.6, 4, penalty=9.0))(best)
    assert abs(slope) < 1e-3


def test_simulated_costs_are_the_closed_form():
    store = supply_network.single_store(4, penalty=9.0)
    mean, deviation = jnp.array([5.0]), jnp.array([1.6])
    demand = inventory.normal_demand(jax.random.key(0), (220, 5000), mean, deviation)
    stock = jnp.full((5000, 1, 4), 5.0)

    @jax.jit
    def cost(level):
        def order(stock, period):
            return policies.base_stock(store, level[None], stock)

        return inventory.hindsight_cost(store, order, stock, demand, ignore=20)

    for level in (28.585, 29.585, 30.585):
        expected = closed_forms.base_stock_cost(level, 5.0, 1.6, 4, penalty=9.0)
        # About three standard errors; a unit more or less of the level makes 4%.
        np.testing.assert_allclose(cost(jnp.float32(level)), expected, rtol=8e-3)


POISSON = {  # Zipkin 2008 to two digits; the first two columns to four by an independent program
    4.0: (4.0407, 4.3953, 4.60),
    9.0: (5.4382, 6.0936, 6.53),
    19.0: (6.68, 7.66, 8.36),
    39.0: (7.84, 9.11, 10.04),
}


@pytest.mark.parametrize("penalty", POISSON)
def test_lost_sales_cost_what_the_published_table_says(penalty):
    chances = stats.poisson.pmf(np.arange(31), 5.0)
    chances = jnp.asarray(chances / chances.sum(), jnp.float32)
    for lead_time, wanted in enumerate(POISSON[penalty], 1):
        found = closed_forms.lost_sales_optimum(chances, lead_time=lead_time, penalty=penalty)
        assert found.span <= 5e-4 and found.orders.max() < 15
        digits = 5e-4 if wanted != round(wanted, 2) else 6e-3
        assert abs(found.cost - wanted) < digits


def test_the_best_orders_cost_it_in_simulation():
    chances = stats.poisson.pmf(np.arange(31), 5.0)
    found = closed_forms.lost_sales_optimum(
        jnp.asarray(chances / chances.sum(), jnp.float32), lead_time=2, penalty=9.0
    )
    store = supply_network.single_store(2, penalty=9.0)

    def look_up(stock, period):
        place = jnp.round(stock[:, 0]).astype(jnp.int32)
        on_hand, coming = jnp.minimum(place[:, 0], 40), place[:, 1]
        return found.orders[on_hand, coming][:, None].astype(jnp.float32)

    demand = jax.random.poisson(jax.random.key(0), 5.0, (300, 2000, 1)).astype(jnp.float32)
    cost = jax.jit(
        lambda stock: inventory.hindsight_cost(
            store, look_up, stock, demand, rule=inventory.lost_sales_step, ignore=50
        )
    )(jnp.full((2000, 1, 2), 5.0))
    np.testing.assert_allclose(cost, 6.0936, rtol=4e-3)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="lead_time"):
        closed_forms.base_stock_level(5.0, 1.0, 0, penalty=9.0)
    with pytest.raises(ValueError, match="penalty"):
        closed_forms.base_stock_cost(5.0, 5.0, 1.0, 1, penalty=0.0)
    with pytest.raises(ValueError, match="sum 1"):
        closed_forms.lost_sales_optimum(jnp.array([0.5, 0.6]), lead_time=1, penalty=9.0)
    with pytest.raises(ValueError, match="max_order"):
        closed_forms.lost_sales_optimum(
            jnp.array([0.5, 0.5]), lead_time=1, penalty=9.0, max_order=0
        )
