"""The reproductions on supply networks run from end to end, in their tiny versions."""

import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.mark.parametrize("name", ["hdpo_base_stock", "hdpo_lost", "hdpo_gnn"])
def test_a_quick_run_writes_its_files(name, tmp_path):
    experiment = importlib.import_module(f"experiments.{name}")
    assert experiment.main(["--quick", "--out", str(tmp_path / "run")]) in (0, 1)
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["claims"] and found["table"] and (tmp_path / "run" / "curves.png").is_file()


def test_both_gradients_are_of_one_cost():
    """A policy of one number: both gradients' means against a difference of simulated costs."""
    from experiments.shared import inventory_runs
    from pgjax.envs import inventory, supply_network
    from pgjax.models.inventory import OrderPolicy

    store = supply_network.single_store(1, penalty=9.0)
    policy = OrderPolicy(
        init=lambda key: jnp.float32(1.0),
        apply=lambda level, stock: jnp.maximum(level - stock.sum(-1), 0.5),
    )
    batch, periods = 4000, 4
    keys = jax.random.split(jax.random.key(0), 2)
    stock = jnp.full((batch, 1, 1), 5.0)
    demand = inventory.normal_demand(keys[0], (periods, batch), jnp.array([5.0]), jnp.array([1.6]))
    noise = jax.random.normal(keys[1], demand.shape)

    def cost(level):
        order = inventory_runs.noisy(policy, level, noise)
        return inventory.hindsight_cost(store, order, stock, demand)

    def by_score(level):
        return inventory_runs.score_function_loss(store, policy, level, stock, demand, noise)

    level = jnp.float32(9.0)
    pathwise, score = jax.grad(cost)(level), jax.grad(by_score)(level)
    slope = (cost(level + 0.05) - cost(level - 0.05)) / 0.1
    np.testing.assert_allclose(pathwise, slope, rtol=0.02)
    np.testing.assert_allclose(score, slope, rtol=0.15)


def test_a_store_starts_with_what_its_lead_time_has_room_for():
    from experiments.shared import inventory_runs
    from pgjax.envs import supply_network

    network = supply_network.warehouse_and_stores((1, 2), holding=jnp.ones(2), penalty=jnp.ones(2))
    stock = inventory_runs.first_stock(jax.random.key(0), network, jnp.array([2.0, 4.0]), 500)
    assert stock.shape == (500, 3, 3) and (stock[:, 0] == 0).all()
    assert (stock[:, 1, 1:] == 0).all() and (stock[:, 2, 2:] == 0).all()
    np.testing.assert_allclose(stock[:, 1, 0].mean(), 1.0, atol=0.1)
    np.testing.assert_allclose(stock[:, 2, :2].mean(), 2.0, atol=0.1)
