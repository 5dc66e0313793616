"""Gradients of single samples, and their mean and variance over a batch, shards or time.

`optim.gradient_moments` is for a few microbatch gradients, and measures the noise of their mean.
Here the samples themselves are the unit: the variance is that of one sample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from pgjax._arrays import widened
from pgjax.optim import points


class PerSampleMoments(NamedTuple):
    """What a batch of n sample gradients says about the gradient, in float32 or wider.

    Attributes:
      mean: pytree of the parameters' shapes, `ḡ = Σ_i g_i / n`.
      variance: the same shapes, `Σ_i (g_i - ḡ)² / (n - 1)` of each coordinate.
      trace: the sum of all variances.
      square_norm: `‖ḡ‖²`.
      size: n.
    """

    mean: Any
    variance: Any
    trace: Float[Array, ""]
    square_norm: Float[Array, ""]
    size: Int[Array, ""]


def per_sample_grads(loss_fn: Callable[[Any, Any], Array], params: Any, batch: Any) -> Any:
    """Every sample's own gradient, `∇_θ loss_fn(θ, x_i)`, by `vmap` of `grad`.

    Args:
      loss_fn: (params, one sample without batch axis) to a scalar.
      params: pytree.
      batch: pytree whose leaves are `[n, ...]`.

    Returns:
      A pytree like `params` with leaves `[n, ...]`: n times the parameters' memory.

    Raises:
      ValueError: no leaves, leaves of different n.
    """
    num_rows("batch", batch)
    return jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))(params, batch)


def per_sample_moments(gradients: Any) -> PerSampleMoments:
    """Mean and variance of sample gradients; variances divide by n - 1.

    Args:
      gradients: pytree whose leaves are `[n, ...]`, n at least 2.

    Raises:
      ValueError: no leaves, leaves of different n, fewer than two samples.
    """
    count = num_rows("gradients", gradients, least=2)
    wide = jax.tree.map(widened, gradients)
    mean = jax.tree.map(lambda g: jnp.mean(g, axis=0), wide)
    variance = jax.tree.map(lambda g: jnp.var(g, axis=0, ddof=1), wide)
    return _moments(mean, variance, jnp.asarray(count, jnp.int32))


def merge_moments(first: PerSampleMoments, second: PerSampleMoments) -> PerSampleMoments:
    """Moments of two disjoint sets of samples together, exactly: the law of total variance.

        n = n₁ + n₂,   ḡ = (n₁ ḡ₁ + n₂ ḡ₂) / n
        (n - 1) V = (n₁ - 1) V₁ + (n₂ - 1) V₂ + (n₁ n₂ / n) (ḡ₁ - ḡ₂)²

    For microbatches one after the other, when not all gradients fit into memory.

    Raises:
      ValueError: means of different structure or shapes.
    """
    points.same_tree("second.mean", second.mean, "first.mean", first.mean)
    count = first.size + second.size

    def mean(a: Array, b: Array) -> Array:
        return a + second.size.astype(a.dtype) / count * (b - a)

    def variance(a: Array, b: Array, mean_a: Array, mean_b: Array) -> Array:
        n1, n2 = first.size.astype(a.dtype), second.size.astype(a.dtype)
        between = n1 / (n1 + n2) * n2 * jnp.square(mean_a - mean_b)
        return ((n1 - 1) * a + (n2 - 1) * b + between) / (n1 + n2 - 1)

    return _moments(
        jax.tree.map(mean, first.mean, second.mean),
        jax.tree.map(variance, first.variance, second.variance, first.mean, second.mean),
        count,
    )


def combine_moments(local: PerSampleMoments, axis_name: Any) -> PerSampleMoments:
    """Moments over all shards of a mapped axis, the same on each; exactly those of one host.

        (n - 1) V = Σ_k (n_k - 1) V_k + Σ_k n_k (ḡ_k - ḡ)²

    Shards may hold different numbers of samples.

    Args:
      local: this shard's moments.
      axis_name: of `vmap`, `pmap` or `shard_map`; several as a tuple.

    Source: AdAdaGrad, 2024, arXiv 2402.11215, whose released form, mean(V_k) + mean(ḡ_k²) -
    mean(ḡ_k)², ignores that local variances divide by n_k - 1.
    """

    def total(x: Array) -> Array:
        return jax.lax.psum(x, axis_name)

    count = total(local.size)
    share = local.size / count
    mean = jax.tree.map(lambda m: total(share * m), local.mean)

    def variance(v: Array, local_mean: Array, m: Array) -> Array:
        within = ((local.size - 1) / (count - 1)) * v
        between = (local.size / (count - 1)) * jnp.square(local_mean - m)
        return total(within + between)

    spread = jax.tree.map(variance, local.variance, local.mean, mean)
    return _moments(mean, spread, count)


def num_rows(name: str, tree: Any, *, least: int = 1) -> int:
    """The leading axis that all leaves share; ValueError unless there is one of `least` or more."""
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(tree)}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            f"{name}: expected leaves with the same number of rows, got {sorted(sizes)}"
        )
    ((count,),) = sizes
    if count < least:
        raise ValueError(f"{name}: expected at least {least} samples, got {count}")
    return count


def _moments(mean: Any, variance: Any, count: Array) -> PerSampleMoments:
    trace = jnp.asarray(optax.tree.sum(variance))
    square_norm = jnp.asarray(optax.tree.norm(mean, squared=True))
    return PerSampleMoments(mean, variance, trace, square_norm, count)
