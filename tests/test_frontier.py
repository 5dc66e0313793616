"""The frontier against a heap, the hash set against a dict."""

import heapq

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax.search import frontier as fr
from pgjax.search import hashset


def drained(waiting, count):
    found = []
    pop = jax.jit(fr.pop_many, static_argnames="count")
    while True:
        popped, waiting = pop(waiting, count=count)
        found += np.asarray(popped.items)[np.asarray(popped.valid)].tolist()
        if not popped.valid.any():
            return found


@pytest.mark.parametrize("capacity", [40, 300])
@pytest.mark.parametrize("count", [1, 3])
def test_a_frontier_is_a_heap_of_equals_in_order_of_arrival(capacity, count):
    rng = np.random.default_rng(0)
    waiting = fr.empty(jnp.int32(0), capacity=capacity)
    push, pop = jax.jit(fr.push_many), jax.jit(fr.pop_many, static_argnames="count")
    heap, number = [], 0
    for _ in range(40):  # far more items than the capacity, few at a time: gaps must close
        keys = rng.integers(0, 4, 5).astype(np.float32)
        where = rng.random(5) < 0.7
        if len(heap) + where.sum() <= capacity:
            waiting = push(waiting, keys, jnp.arange(number, number + 5), where=where)
            for i in np.flatnonzero(where):
                heapq.heappush(heap, (float(keys[i]), number + int(i)))
        number += 5
        popped, waiting = pop(waiting, count=count)
        want = [heapq.heappop(heap) for _ in range(min(count, len(heap)))]
        assert np.asarray(popped.valid).tolist() == [i < len(want) for i in range(count)]
        assert np.asarray(popped.items)[: len(want)].tolist() == [item for _, item in want]
        assert np.asarray(popped.keys)[: len(want)].tolist() == [key for key, _ in want]
        assert int(fr.waiting(waiting)) == len(heap)
    assert not waiting.overflowed
    assert drained(waiting, count) == [heapq.heappop(heap)[1] for _ in range(len(heap))]


def test_a_full_frontier_keeps_what_came_first():
    waiting = fr.empty(jnp.int32(0), capacity=4)
    waiting = fr.push_many(waiting, jnp.array([3.0, 2.0, 1.0]), jnp.array([0, 1, 2]))
    assert not waiting.overflowed
    waiting = fr.push_many(waiting, jnp.array([9.0, 0.0]), jnp.array([3, 4]))
    assert waiting.overflowed and int(waiting.end) == 4
    _, waiting = fr.pop_many(waiting, count=1)
    waiting = fr.push_many(waiting, jnp.array([0.5]), jnp.array([5]))
    assert waiting.overflowed  # for good
    assert drained(waiting, 2) == [5, 1, 0, 3]


def test_keys_that_are_no_numbers_do_not_come_in():
    waiting = fr.empty({"a": jnp.zeros(2), "b": jnp.int32(0)}, capacity=6)
    keys = jnp.array([jnp.inf, 1.0, jnp.nan, -jnp.inf, -2.0])
    items = {"a": jnp.arange(10.0).reshape(5, 2), "b": jnp.arange(5)}
    waiting = fr.push_many(waiting, keys, items)
    popped, waiting = fr.pop_many(waiting, count=3)
    assert np.asarray(popped.valid).tolist() == [True, True, False]
    assert np.asarray(popped.items["b"])[:2].tolist() == [4, 1]
    np.testing.assert_array_equal(popped.items["a"][0], [8.0, 9.0])
    assert int(fr.waiting(waiting)) == 0


def test_many_frontiers_at_once():
    waiting = fr.empty(jnp.int32(0), capacity=3)
    keys = jnp.array([[2.0, 1.0], [0.0, 5.0]])

    def use(keys):
        popped, left = fr.pop_many(fr.push_many(waiting, keys, jnp.arange(2)), count=1)
        return popped.items[0], fr.waiting(left)

    first, left = jax.vmap(use)(keys)
    assert first.tolist() == [1, 0] and left.tolist() == [1, 1]


def test_bad_frontiers():
    with pytest.raises(ValueError, match="^capacity"):
        fr.empty(jnp.int32(0), capacity=0)
    waiting = fr.empty(jnp.int32(0), capacity=4)
    with pytest.raises(ValueError, match="^count"):
        fr.pop_many(waiting, count=5)
    with pytest.raises(ValueError, match="^keys.*rank"):
        fr.push_many(waiting, jnp.float32(1.0), jnp.int32(0))
    with pytest.raises(ValueError, match="^keys.*floating"):
        fr.push_many(waiting, jnp.array([1]), jnp.array([1]))
    with pytest.raises(ValueError, match="^items.*shape"):
        fr.push_many(waiting, jnp.ones(2), jnp.arange(3))
    with pytest.raises(ValueError, match="^items.*pytree"):
        fr.push_many(waiting, jnp.ones(2), (jnp.arange(2), jnp.arange(2)))
    with pytest.raises(ValueError, match="^where"):
        fr.push_many(waiting, jnp.ones(2), jnp.arange(2), where=jnp.ones(2))


@pytest.mark.parametrize("capacity", [64, 500])
def test_a_set_gives_each_vector_one_slot(capacity):
    rng = np.random.default_rng(1)
    table = hashset.empty(3, capacity=capacity)
    insert = jax.jit(hashset.insert_many)
    slots = {}
    for _ in range(24):  # 4³ = 64 vectors: the smaller set ends up full
        keys = rng.integers(-2, 2, (40, 3))
        where = rng.random(40) < 0.8
        table, slot, new = insert(table, jnp.asarray(keys), where=jnp.asarray(where))
        fresh = {}
        for key, at, is_new, wanted in zip(
            map(tuple, keys.tolist()), np.asarray(slot), np.asarray(new), where, strict=True
        ):
            if not wanted:
                assert at == capacity and not is_new
                continue
            assert slots.setdefault(key, at) == at < capacity
            fresh[key] = fresh.get(key, 0) + int(is_new)
        known = set(slots) - {key for key, times in fresh.items() if times}
        assert all(times == (key not in known) for key, times in fresh.items())
    assert len(slots) == len(set(slots.values())) == int(table.used.sum()) == 64
    assert not table.overflowed
    every = np.array([*slots, (7, 7, 7)])
    slot, there = jax.jit(hashset.find)(table, jnp.asarray(every))
    assert np.asarray(there).tolist() == [True] * 64 + [False]
    assert np.asarray(slot).tolist() == [*slots.values(), capacity]


def test_a_full_set_says_so_and_keeps_what_it_has():
    table = hashset.empty(1, capacity=4)
    table, slot, new = hashset.insert_many(table, jnp.arange(6)[:, None])
    assert table.overflowed and int(new.sum()) == 4 and int((slot == 4).sum()) == 2
    kept = np.flatnonzero(np.asarray(new))
    found, there = hashset.find(table, jnp.asarray(kept)[:, None])
    assert there.all()
    np.testing.assert_array_equal(found, np.asarray(slot)[kept])
    again, _, new = hashset.insert_many(table, jnp.asarray(kept)[:, None])
    np.testing.assert_array_equal(again.keys, table.keys)
    assert not new.any()


def test_hashes_of_neighbours_are_spread():
    grid = np.stack(np.meshgrid(*[np.arange(16)] * 3), -1).reshape(-1, 3)
    code = np.asarray(hashset.hashed(jnp.asarray(grid)))
    assert (code >= 0).all()
    assert len(np.unique(code)) == len(grid)
    # Thrown into as many bins at random, 1 - 1/e of them would not stay empty.
    for bins in (4096, 1000):
        full = len(np.unique(code % bins)) / bins
        assert abs(full - (1 - (1 - 1 / bins) ** 4096)) < 0.03


def test_bad_sets():
    with pytest.raises(ValueError, match="^size"):
        hashset.empty(0, capacity=4)
    with pytest.raises(ValueError, match="^capacity"):
        hashset.empty(2, capacity=0)
    table = hashset.empty(2, capacity=4)
    with pytest.raises(ValueError, match="^keys.*integer"):
        hashset.insert_many(table, jnp.ones((1, 2)))
    with pytest.raises(ValueError, match="^keys.*2 integers"):
        hashset.find(table, jnp.ones((1, 3), int))
    with pytest.raises(ValueError, match="^keys.*rank"):
        hashset.find(table, jnp.ones(2, int))
    with pytest.raises(ValueError, match="^where"):
        hashset.insert_many(table, jnp.ones((1, 2), int), where=jnp.ones(2, bool))
