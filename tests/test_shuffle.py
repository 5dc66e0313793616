"""Random orders: bijections, and no more regular than chance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from pgjax.sampling import random_order


@pytest.mark.parametrize("size", [1, 2, 5, 127, 128, 129, 511, 512, 513, 6000])
def test_every_index_occurs_once(size):
    for seed in range(3):
        order = random_order(jax.random.key(seed), size)
        assert order.dtype == jnp.int32
        np.testing.assert_array_equal(np.sort(order), np.arange(size))
    if size > 8:
        assert np.any(order != random_order(jax.random.key(0), size))
        np.testing.assert_array_equal(order, random_order(jax.random.key(seed), size))


@pytest.mark.parametrize("size", [128, 150])
def test_places_pairs_and_neighbours_are_equally_likely(size):
    keys = jax.random.split(jax.random.key(1), 200_000)
    some = jax.jit(lambda keys: jax.lax.map(lambda k: random_order(k, size)[:4], keys))
    found = np.asarray(some(keys))
    places = [np.bincount(column, minlength=size) for column in found.T]
    pairs = [np.bincount(found[:, i] * size + found[:, 3], minlength=size**2) for i in range(3)]
    gaps = [np.bincount((found[:, i + 1] - found[:, i]) % size, minlength=size) for i in range(3)]
    off_diagonal = ~np.eye(size, dtype=bool).ravel()  # an index is not in two places
    cells = [*places, *(x[off_diagonal] for x in pairs), *(x[1:] for x in gaps)]
    for counts in cells:
        assert scipy.stats.chisquare(counts).pvalue > 1e-4


def test_long_orders_look_like_permutations_of_jax():
    """Cycles, fixed points and the correlation of neighbours, over a hundred orders."""
    size = 4096
    keys = jax.random.split(jax.random.key(2), 100)
    found = np.asarray(jax.vmap(lambda key: random_order(key, size))(keys))
    fixed = (found == np.arange(size)).sum(1)
    assert abs(fixed.mean() - 1.0) < 0.4  # Poisson(1)
    neighbours = [np.corrcoef(row[1:], row[:-1])[0, 1] for row in found]
    assert abs(np.mean(neighbours)) < 4 / (100 * size) ** 0.5
    assert np.std(neighbours) < 1.3 / size**0.5
    near = [np.corrcoef(row, np.arange(size))[0, 1] for row in found]
    assert abs(np.mean(near)) < 4 / (100 * size) ** 0.5


def test_bad_sizes():
    with pytest.raises(ValueError, match="size: expected a number in"):
        random_order(jax.random.key(0), 0)
