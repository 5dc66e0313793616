"""An agent whose environments are split over devices takes the step that the mean gradient asks."""

import functools

import devices
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pgjax import agents, optim
from pgjax.envs import control

DEVICES = 4


def a2c(optimizer, num_envs=2):
    return agents.a2c(
        control.cart_pole(),
        agents.actor_critic(control.cart_pole(), hidden=(8,)),
        num_envs=num_envs,
        num_steps=6,
        optimizer=optimizer,
    )


def test_a_step_is_the_mean_of_the_devices_own_steps():
    alone = a2c(optax.sgd(1.0))
    together = a2c(optax.chain(optim.average_over("d"), optax.sgd(1.0)))
    states = agents.init_on_devices(alone, jax.random.key(0), DEVICES)
    own, _ = jax.vmap(alone.update)(states)
    # The averaged state's shape differs by an empty entry of the chain.
    states = agents.init_on_devices(together, jax.random.key(0), DEVICES)
    found, _ = jax.vmap(together.update, axis_name="d")(states)

    def compare(each, averaged):
        assert np.abs(each - each[:1]).max() > 0 or each.size == DEVICES
        want = np.broadcast_to(np.mean(each, axis=0), averaged.shape)
        np.testing.assert_allclose(averaged, want, rtol=1e-5, atol=1e-6)

    jax.tree.map(compare, own.params, found.params)


def test_parameters_stay_alike_and_environments_do_not():
    agent = a2c(optax.chain(optim.average_over("d"), optax.adam(1e-2)))
    states = agents.init_on_devices(agent, jax.random.key(1), DEVICES)
    one = agent.init(jax.random.key(1))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[2], y), states.params, one.params)
    train = functools.partial(agents.train, agent, num_updates=3)
    found, metrics = jax.vmap(train, axis_name="d")(states)
    assert metrics["loss"].shape == (DEVICES, 3)
    for x in jax.tree.leaves((found.params, found.opt_state)):
        np.testing.assert_array_equal(x, jnp.broadcast_to(x[:1], x.shape))
    seen = found.running.observation.reshape(DEVICES, -1)
    assert len(np.unique(seen, axis=0)) == DEVICES


ON_EIGHT = """
    import functools, json
    import jax, numpy as np, optax
    from jax.sharding import PartitionSpec as P
    import test_agents_on_devices as t
    from pgjax import agents, optim
    agent = t.a2c(optax.chain(optim.average_over("d"), optax.adam(1e-2)))
    train = functools.partial(agents.train, agent, num_updates=3)
    states = agents.init_on_devices(agent, jax.random.key(0), 8)
    want, _ = jax.vmap(train, axis_name="d")(states)
    def part(state):
        state = jax.tree.map(lambda x: x[0], state)
        return jax.tree.map(lambda x: x[None], train(state)[0])
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.shard_map(part, mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=False)
    found = {"pmap": jax.pmap(train, axis_name="d")(states)[0], "shard_map": jax.jit(split)(states)}
    def off(x, y):
        return float(np.abs(np.asarray(x) - np.asarray(y)).max())
    print(json.dumps({
        name: max(jax.tree.leaves(jax.tree.map(off, got.params, want.params)))
        for name, got in found.items()
    } | {"moved": max(jax.tree.leaves(jax.tree.map(off, want.params, states.params)))}))
"""


def test_pmap_and_shard_map_on_eight_devices():
    off = devices.run(ON_EIGHT)
    assert off["moved"] > 1e-2
    assert off["pmap"] < 1e-5 and off["shard_map"] < 1e-5


def test_bad_input():
    agent = a2c(optax.sgd(1.0))
    with pytest.raises(ValueError, match="num_devices"):
        agents.init_on_devices(agent, jax.random.key(0), 0)
    with pytest.raises(TypeError, match="fresh batches"):
        agents.init_on_devices(
            agents.dqn(control.cart_pole(), capacity=64, start_steps=8), jax.random.key(0), 2
        )
