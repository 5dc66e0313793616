"""Finding the slowly learnt half of each class, against numbers by hand and plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax.curriculum import useful

KMEANS = jax.jit(useful.kmeans2, static_argnames="iters")
MASK = jax.jit(useful.slow_cluster_mask, static_argnames=("n_classes", "iters", "restarts"))


def two_by_two(seed=0, count=60):
    """Two classes of two far clusters each: outputs, labels, cluster, losses."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    cluster = rng.integers(0, 2, count)
    outputs = np.stack([20.0 * cluster + labels, -15.0 * cluster], axis=1)
    outputs = (outputs + rng.normal(size=outputs.shape)).astype(np.float32)
    # Cluster 1 is the slow one of class 0, cluster 0 of class 1.
    slow = cluster != labels
    losses = (0.1 * rng.normal(size=count) ** 2 + slow).astype(np.float32)
    return outputs, labels, losses, slow


def test_separating_epoch():
    assert useful.separating_epoch([1.0, 0.7, 0.4, 0.35, 0.1]) == 3
    assert useful.separating_epoch([1.0, 0.7, 0.4, 0.35, 0.1], ratio=0.1) == 4
    assert useful.separating_epoch([1.0, 0.7, 0.5]) == 2  # never flattens: the last
    assert useful.separating_epoch([1.0, 1.0, 1.1, 0.5, 0.5]) == 4  # not before it has fallen
    assert useful.separating_epoch([0.3]) == 0


def test_two_clusters():
    x = jnp.array([[0.0], [0.1], [10.0], [10.1]])
    for seed in range(5):
        cluster, centers = KMEANS(jax.random.key(seed), x)
        assert cluster[0] == cluster[1] != cluster[2] == cluster[3]
        np.testing.assert_allclose(np.sort(centers, axis=0), [[0.05], [10.05]], atol=1e-5)


def test_lloyd_is_at_rest():
    """Each centre is the mean of its points, each point is with its nearest centre."""
    x = np.random.default_rng(0).normal(size=(80, 3)).astype(np.float32)
    where = np.arange(80) % 3 > 0
    cluster, centers = KMEANS(jax.random.key(0), jnp.asarray(x), iters=60, where=jnp.asarray(where))
    for c in (0, 1):
        np.testing.assert_allclose(centers[c], x[where & (cluster == c)].mean(0), atol=1e-5)
    distances = ((x[:, None] - np.asarray(centers)) ** 2).sum(-1)
    np.testing.assert_array_equal(cluster, distances.argmin(1))


def test_degenerate_clusters():
    cluster, centers = KMEANS(jax.random.key(0), jnp.ones((4, 2)))
    assert not cluster.any() and np.isfinite(centers).all()
    cluster, centers = KMEANS(jax.random.key(0), jnp.array([[2.0, 3.0]]))
    assert cluster.tolist() == [0]
    np.testing.assert_allclose(centers, [[2.0, 3.0]] * 2)
    cluster, centers = KMEANS(jax.random.key(0), jnp.ones((3, 1)), where=jnp.zeros(3, bool))
    assert np.isfinite(centers).all()


def test_slow_clusters_of_each_class():
    outputs, labels, losses, slow = two_by_two()
    for seed in range(3):
        found = MASK(jax.random.key(seed), outputs, labels, losses, n_classes=2)
        np.testing.assert_array_equal(found, slow)
    # Another key, labels renamed, losses moved: all the same.
    found = MASK(jax.random.key(9), outputs, 1 - labels, losses, n_classes=2)
    np.testing.assert_array_equal(found, slow)
    found = MASK(jax.random.key(0), outputs, labels, losses + 50, n_classes=2)
    np.testing.assert_array_equal(found, slow)
    # A class without examples changes nothing.
    found = MASK(jax.random.key(0), outputs, 2 * labels, losses, n_classes=3)
    np.testing.assert_array_equal(found, slow)


def test_class_of_one_example_is_slow():
    outputs, labels, losses, slow = two_by_two()
    outputs = np.concatenate([outputs, [[7.0, 7.0]]]).astype(np.float32)
    found = MASK(
        jax.random.key(0), outputs, np.append(labels, 2), np.append(losses, 0.0), n_classes=3
    )
    np.testing.assert_array_equal(found, np.append(slow, True))


def test_upsampling():
    mask = np.array([False, True, False, True])
    found = useful.upsample_indices(mask)
    assert found.tolist() == [0, 1, 2, 3, 1, 3]
    found = useful.upsample_indices(jnp.asarray(mask), factor=3)
    assert len(found) == 4 + 2 * 2 and np.bincount(found).tolist() == [1, 3, 1, 3]
    for same in (useful.upsample_indices(mask, factor=1), useful.upsample_indices(mask & False)):
        assert sorted(same.tolist()) == [0, 1, 2, 3]


def test_bad_input():
    outputs, labels, losses, _ = two_by_two()
    key = jax.random.key(0)
    for factor in (0, -1, 1.5):
        with pytest.raises(ValueError, match="factor: expected a whole number"):
            useful.upsample_indices(np.ones(3, bool), factor=factor)
    with pytest.raises(ValueError, match="mask"):
        useful.upsample_indices(np.ones(3, np.int32))
    with pytest.raises(ValueError, match="labels: expected ids in"):
        useful.slow_cluster_mask(key, outputs, labels + 1, losses, n_classes=2)
    with pytest.raises(ValueError, match="labels: expected one for each of 60 outputs"):
        useful.slow_cluster_mask(key, outputs, labels[1:], losses, n_classes=2)
    with pytest.raises(ValueError, match="losses: expected one for each of 60 outputs"):
        useful.slow_cluster_mask(key, outputs, labels, losses[1:], n_classes=2)
    with pytest.raises(ValueError, match="outputs: expected rank 2"):
        useful.slow_cluster_mask(key, losses, labels, losses, n_classes=2)
    with pytest.raises(ValueError, match="restarts"):
        useful.slow_cluster_mask(key, outputs, labels, losses, n_classes=2, restarts=0)
    with pytest.raises(ValueError, match="x: expected at least one point"):
        useful.kmeans2(key, jnp.ones((0, 2)))
    with pytest.raises(ValueError, match="iters"):
        useful.kmeans2(key, jnp.ones((3, 2)), iters=0)
    with pytest.raises(ValueError, match="where"):
        useful.kmeans2(key, jnp.ones((3, 2)), where=jnp.ones(2, bool))
    for errors in ([], [0.5, np.nan]):
        with pytest.raises(ValueError, match="train_errors"):
            useful.separating_epoch(errors)
    with pytest.raises(ValueError, match="ratio"):
        useful.separating_epoch([1.0, 0.5], ratio=0.0)
