"""USEFUL: find what is learnt slowly after a short training, show it twice, and start afresh.

1. Train until the training error stops to fall fast (`separating_epoch`).
2. In each class, split the examples in two by the network's outputs (`kmeans2`), and take the
   cluster of higher mean loss (`slow_cluster_mask`).
3. Repeat those examples (`upsample_indices`), and train a new network on all.

For prompts, outputs may be sequences' log-probabilities or pass rates, classes kinds of prompts.

Source: Make the Most of Your Data (USEFUL), 2024, arXiv 2404.17768.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from pgjax import _checks, segments


def separating_epoch(
    train_errors: Sequence[float] | Float[np.ndarray, " E"], *, ratio: float = 0.2
) -> int:
    """The first epoch in which the error falls by less than `ratio` of its largest fall so far.

    Args:
      train_errors: after each epoch (or other interval), at least one, finite.
      ratio: in (0, 1].

    Returns:
      an index into `train_errors`, at least 1; the last one if there is no such epoch. Before
      the error has fallen at all, no epoch counts.

    Raises:
      ValueError: no errors or some that are not finite, a ratio out of range.

    The paper picks the epoch by eye, where the decrease starts to flatten (8 for CIFAR-10); the
    rule is a choice made here.
    """
    errors = np.asarray(train_errors, np.float64)
    _checks.rank("train_errors", errors, 1)
    _checks.in_range("ratio", ratio, 0, 1, low_open=True)
    if not errors.size or not np.isfinite(errors).all():
        raise ValueError(f"train_errors: expected finite errors, at least one, got {errors}")
    largest = 0.0
    for epoch, fall in enumerate(-np.diff(errors), start=1):
        if largest > 0 and fall < ratio * largest:
            return epoch
        largest = max(largest, float(fall))
    return errors.size - 1


def kmeans2(
    key: PRNGKeyArray,
    x: Float[Array, "n D"],
    *,
    iters: int = 20,
    where: Bool[Array, " n"] | None = None,
) -> tuple[Int[Array, " n"], Float[Array, "2 D"]]:
    """Two clusters by Lloyd's iteration, from a random point and one drawn far from it.

    Args:
      key: of the first centres: the second is drawn in proportion to the squared distance.
      x: points.
      iters: of assignment and averaging, at least 1, static.
      where: points that count; the others are assigned, but move no centre. None for all.

    Returns:
      cluster of each point, 0 or 1 (0 at equal distances), and the centres, float32. A cluster
      that empties keeps its centre; where all points are equal, all are in cluster 0.

    Raises:
      ValueError: wrong ranks or lengths, no points, fewer than one iteration.
    """
    _checks.rank("x", x, 2)
    _checks.floating(x=x)
    _checks.in_range("iters", iters, 1)
    count = jnp.shape(x)[0]
    if not count:
        raise ValueError(f"x: expected at least one point, got shape {jnp.shape(x)}")
    counted = jnp.ones(count, bool) if where is None else jnp.asarray(where)
    _checks.boolean(where=counted)
    if counted.shape != (count,):
        raise ValueError(f"where: expected one for each of {count} points, got {counted.shape}")
    points = jnp.asarray(x, jnp.float32)
    first_key, second_key = jax.random.split(key)
    weights = counted.astype(jnp.float32)
    first = points[jax.random.categorical(first_key, _log(weights))]
    distance = weights * jnp.sum(jnp.square(points - first), axis=1)
    spread = jnp.any(distance > 0)
    second = points[jax.random.categorical(second_key, _log(jnp.where(spread, distance, weights)))]

    def assigned(centers: Array) -> Array:
        squares = jnp.sum(jnp.square(points[:, None] - centers), axis=-1)
        return (squares[:, 1] < squares[:, 0]).astype(jnp.int32)

    def lloyd(centers: Array, _: None) -> tuple[Array, None]:
        member = weights[:, None] * jax.nn.one_hot(assigned(centers), 2)
        sizes = member.sum(0)[:, None]
        means = jnp.matmul(member.T, points, precision="highest") / jnp.maximum(sizes, 1.0)
        return jnp.where(sizes > 0, means, centers), None

    centers, _ = jax.lax.scan(lloyd, jnp.stack([first, second]), length=iters)
    return assigned(centers), centers


def slow_cluster_mask(
    key: PRNGKeyArray,
    outputs: Float[Array, "n D"],
    labels: Int[Array, " n"],
    losses: Float[Array, " n"],
    *,
    n_classes: int,
    iters: int = 20,
    restarts: int = 4,
) -> Bool[Array, " n"]:
    """Of each class, the examples in whichever of two output clusters has the higher mean loss.

    Args:
      key: of the clustering.
      outputs: the network's, such as logits.
      labels: classes, in [0, n_classes).
      losses: one per example; NaN counts as the highest.
      n_classes: at least 1, static.
      iters: of `kmeans2`, static.
      restarts: clusterings of each class, of which the one with the smallest squared distances to
        its centres is taken; at least 1, static.

    Returns:
      bool. A class of one cluster (one example, or equal outputs) is in the mask as a whole.

    Raises:
      ValueError: wrong ranks, dtypes or lengths, labels out of range.
    """
    _checks.rank("outputs", outputs, 2)
    _checks.rank("losses", losses, 1)
    _checks.floating(losses=losses)
    _checks.segment_ids("labels", labels, n_classes)
    _checks.in_range("restarts", restarts, 1)
    for name, other in (("labels", labels), ("losses", losses)):
        if jnp.shape(other) != jnp.shape(outputs)[:1]:
            raise ValueError(
                f"{name}: expected one for each of {jnp.shape(outputs)[0]} outputs, "
                f"got shape {jnp.shape(other)}"
            )
    points = jnp.asarray(outputs, jnp.float32)

    def of_class(key: PRNGKeyArray, label: Array) -> Array:
        inside = labels == label

        def once(key: PRNGKeyArray) -> tuple[Array, Array]:
            cluster, centers = kmeans2(key, points, iters=iters, where=inside)
            squares = jnp.sum(jnp.square(points - centers[cluster]), axis=1)
            return cluster, jnp.sum(jnp.where(inside, squares, 0.0))

        clusters, spreads = jax.vmap(once)(jax.random.split(key, restarts))
        cluster = clusters[jnp.argmin(spreads)]
        means = segments.mean(
            jnp.asarray(losses, jnp.float32), cluster, num_segments=2, where=inside
        )
        used = jnp.stack([jnp.any(inside & (cluster == c)) for c in (0, 1)])
        return inside & (cluster == jnp.argmax(jnp.where(used, means, -jnp.inf)))

    keys = jax.random.split(key, n_classes)
    return jnp.any(jax.vmap(of_class)(keys, jnp.arange(n_classes)), axis=0)


def upsample_indices(mask: Bool[np.ndarray, " n"], *, factor: int = 2) -> Int[np.ndarray, " m"]:
    """Indices of the examples with those in the mask `factor` times: first all, then the copies.

    Runs on the host: the length depends on the mask.

    Args:
      mask: concrete.
      factor: whole, at least 1; 1 changes nothing.

    Returns:
      int, `n + (factor - 1) · (number in the mask)` of them.

    Raises:
      ValueError: a factor below 1 or not whole, a mask that is not bool or has another rank.
    """
    if int(factor) != factor or factor < 1:
        raise ValueError(f"factor: expected a whole number of at least 1, got {factor}")
    chosen = np.asarray(mask)
    _checks.rank("mask", chosen, 1)
    _checks.boolean(mask=chosen)
    return np.concatenate(
        [np.arange(chosen.size), np.tile(np.flatnonzero(chosen), int(factor) - 1)]
    )


def _log(weights: Array) -> Array:
    return jnp.where(weights > 0, jnp.log(jnp.where(weights > 0, weights, 1.0)), -jnp.inf)
