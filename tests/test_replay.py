"""The replay buffer against a queue, and exploration against counted frequencies."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from pgjax import sampling
from pgjax.sampling import replay


def batch(first, size):
    number = jnp.arange(first, first + size)
    return {"x": number.astype(jnp.float32)[:, None] * jnp.ones(3), "done": number % 2 == 0}


def test_it_is_a_queue_of_bounded_length():
    example = jax.tree.map(lambda x: x[0], batch(0, 1))
    buffer = replay.init(example, capacity=7)
    assert buffer.items["x"].shape == (7, 3) and buffer.items["done"].dtype == jnp.bool_
    queue, first = collections.deque(maxlen=7), 0
    add = jax.jit(replay.add)
    for size in (3, 3, 3, 7, 1, 5):
        buffer = add(buffer, batch(first, size))
        queue.extend(range(first, first + size))
        first += size
        held = np.asarray(buffer.items["x"])[: int(buffer.filled)]
        assert sorted(held[:, 0]) == sorted(queue) and (held == held[:, :1]).all()
        np.testing.assert_array_equal(
            np.asarray(buffer.items["done"])[: len(held)], held[:, 0] % 2 == 0
        )
        # The next row to be written over is the oldest.
        if int(buffer.filled) == 7:
            assert float(buffer.items["x"][buffer.position, 0]) == queue[0]


def test_samples_are_uniform_over_what_is_there():
    example = {"x": jax.ShapeDtypeStruct((), jnp.int32)}
    buffer = replay.init(example, capacity=100)
    assert replay.sample(buffer, jax.random.key(0), batch_size=2)["x"].tolist() == [0, 0]
    buffer = replay.add(buffer, {"x": 1 + jnp.arange(20)})
    found = replay.sample(buffer, jax.random.key(0), batch_size=20_000)["x"]
    counts = np.bincount(np.asarray(found), minlength=21)
    assert counts[0] == 0 and stats.chisquare(counts[1:]).pvalue > 1e-3
    many = jax.vmap(lambda key: replay.sample(buffer, key, batch_size=3)["x"])(
        jax.random.split(jax.random.key(1), 5)
    )
    assert many.shape == (5, 3)


def test_a_donated_ring_is_written_in_place():
    buffer = replay.init({"x": jnp.zeros(64)}, capacity=10_000)
    rows = {"x": jnp.ones((4, 64))}
    compiled = jax.jit(replay.add, donate_argnums=0).lower(buffer, rows).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 64 * 4 * 10_000
    assert memory.temp_size_in_bytes < 10_000


def test_bad_buffers():
    with pytest.raises(ValueError, match="capacity"):
        replay.init({"x": 0.0}, capacity=0)
    with pytest.raises(ValueError, match="example"):
        replay.init({}, capacity=3)
    buffer = replay.init({"x": jnp.zeros(2)}, capacity=3)
    with pytest.raises(ValueError, match="1 to 3 rows"):
        replay.add(buffer, {"x": jnp.zeros((4, 2))})
    with pytest.raises(ValueError, match="1 to 3 rows"):
        replay.add(buffer, {"x": jnp.zeros((0, 2))})
    with pytest.raises(ValueError, match="rows of shape"):
        replay.add(buffer, {"x": jnp.zeros((2, 3))})
    with pytest.raises(ValueError, match="structure"):
        replay.add(buffer, {"y": jnp.zeros((2, 2))})
    with pytest.raises(ValueError, match="scalar"):
        replay.add(buffer, {"x": jnp.float32(0)})
    with pytest.raises(ValueError, match="batch_size"):
        replay.sample(buffer, jax.random.key(0), batch_size=0)


def test_epsilon_greedy():
    action_values = jnp.broadcast_to(jnp.array([0.0, 2.0, 1.0, 2.0]), (40_000, 4))
    act = jax.jit(
        lambda epsilon: sampling.epsilon_greedy(jax.random.key(0), action_values, epsilon=epsilon)
    )
    assert (act(0.0) == 1).all() and act(0.0).dtype == jnp.int32
    assert stats.chisquare(np.bincount(act(1.0), minlength=4)).pvalue > 1e-3
    wanted = np.array([0.1, 0.7, 0.1, 0.1]) * 40_000
    assert stats.chisquare(np.bincount(act(0.4), minlength=4), wanted).pvalue > 1e-3
    with pytest.raises(ValueError, match="epsilon"):
        sampling.epsilon_greedy(jax.random.key(0), action_values, epsilon=1.5)
    with pytest.raises(ValueError, match="action_values"):
        sampling.epsilon_greedy(jax.random.key(0), jnp.float32(0), epsilon=0.5)
