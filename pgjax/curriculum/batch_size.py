"""Batch sizes from tests of whether sample gradients agree well enough on the batch's gradient.

Each test gives the batch size from which the gradient could be trusted, a float32 that is not
rounded; `next_batch_size` turns it into one that the devices can take. In reinforcement learning
the sample is a prompt's group, since the rewards within one are compared with each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from pgjax import _checks
from pgjax.optim.per_sample import PerSampleMoments, merge_moments, num_rows


def norm_test(moments: PerSampleMoments, *, eta: float) -> Float[Array, ""]:
    """Samples for `E‖ḡ - ∇F‖² ≤ η² ‖∇F‖²`: `Σ_j Var(g_i)_j / (η² ‖ḡ‖²)`.

    Args:
      moments: of sample gradients.
      eta: above 0; 0.1 to 0.5 are usual.

    Returns:
      f32 scalar; 0 for equal gradients, infinity where only their mean is 0.

    Raises:
      ValueError: η not above 0.

    Source: Byrd et al., Sample size selection, 2012; AdAdaGrad, 2024, arXiv 2402.11215.
    """
    _checks.in_range("eta", eta, 0, math.inf, low_open=True, high_open=True)
    return _ratio(moments.trace / eta**2, moments.square_norm)


def inner_product_test(gradients: Any, *, theta: float, per_leaf: bool = False) -> Float[Array, ""]:
    """Samples for a sure descent along the gradient: `Var_i <g_i, ḡ> / (θ² ‖ḡ‖⁴)`.

    Args:
      gradients: sample gradients, leaves `[n, ...]`, n at least 2.
      theta: above 0; 0.5 is usual.
      per_leaf: static; sums the variances of each leaf's own inner product, as AdAdaGrad's
        released code does, which leaves out how leaves vary together.

    Returns:
      f32 scalar; 0 for equal gradients, infinity where only their mean is 0.

    Raises:
      ValueError: θ not above 0, fewer than two samples, leaves of different n.

    Source: Bollapragada et al., Adaptive sampling, 2018, arXiv 1710.11258; AdAdaGrad, 2024,
    arXiv 2402.11215.
    """
    _checks.in_range("theta", theta, 0, math.inf, low_open=True, high_open=True)
    spread, mean, square_norm = _deviations(gradients)
    # Of g_i - ḡ, not of g_i: it varies the same, but does not drown in the mean's own product.
    products = jax.tree.map(lambda s, m: s @ m, spread, mean)
    if per_leaf:
        variance = optax.tree.sum(jax.tree.map(lambda p: jnp.var(p, ddof=1), products))
    else:
        variance = jnp.var(sum(jax.tree.leaves(products)), ddof=1)
    apart = jnp.asarray(optax.tree.norm(spread, squared=True)) > 0
    needed = _ratio(_ratio(jnp.asarray(variance), square_norm) / theta**2, square_norm)
    return jnp.where((square_norm == 0) & apart, jnp.inf, needed)


def orthogonality_test(gradients: Any, *, nu: float) -> Float[Array, ""]:
    """Samples for little noise across the gradient: `Σ_j Var(o_i)_j / (ν² ‖ḡ‖²)`.

        o_i = g_i - (<g_i, ḡ> / ‖ḡ‖²) ḡ

    The larger of this and `inner_product_test` is the augmented inner-product test. Both together
    make up `norm_test`: variance splits into that along ḡ and that across it.

    Args:
      gradients: sample gradients, leaves `[n, ...]`, n at least 2.
      nu: above 0; 1 is usual.

    Returns:
      f32 scalar; 0 for parallel gradients, infinity where their mean is 0 and they are not.

    Raises:
      ValueError: ν not above 0, fewer than two samples, leaves of different n.

    Source: Bollapragada et al., Adaptive sampling, 2018, arXiv 1710.11258; AdAdaGrad, 2024,
    arXiv 2402.11215.
    """
    _checks.in_range("nu", nu, 0, math.inf, low_open=True, high_open=True)
    spread, mean, square_norm = _deviations(gradients)
    products = sum(jax.tree.leaves(jax.tree.map(lambda s, m: s @ m, spread, mean)))
    share = products / jnp.where(square_norm > 0, square_norm, 1.0)
    # The o_i have mean 0, and g_i - ḡ has the same part across ḡ as g_i.
    across = jax.tree.map(lambda s, m: s - jnp.outer(share, m), spread, mean)
    total = jnp.asarray(optax.tree.norm(across, squared=True))
    return _ratio(total / (share.shape[0] - 1) / nu**2, square_norm)


def coordinate_test(
    moments: PerSampleMoments, *, eta: float, quantile: float = 1.0, floor: float = 1e-12
) -> Float[Array, ""]:
    """Samples for trust in each coordinate, as AdaGrad needs: `max_j Var(g_i)_j / (η² ḡ_j²)`.

    Args:
      moments: of sample gradients.
      eta: above 0.
      quantile: static, in [0, 1]: of the coordinates, in place of the largest, which one
        coordinate with ḡ_j near 0 can make arbitrarily large; the next larger coordinate's value.
      floor: at least 0: ḡ_j² counts as no less than this share of the coordinates' mean ḡ².

    Returns:
      f32 scalar; 0 for equal gradients, infinity where only their mean is 0.

    Raises:
      ValueError: a number out of range, moments without a coordinate.

    Source: AdAdaGrad, 2024, arXiv 2402.11215, reconstructed; quantile and floor are added.
    """
    _checks.in_range("eta", eta, 0, math.inf, low_open=True, high_open=True)
    _checks.in_range("quantile", quantile, 0, 1)
    _checks.in_range("floor", floor, 0)
    variance = jnp.concatenate([jnp.ravel(v) for v in jax.tree.leaves(moments.variance)])
    square = jnp.concatenate([jnp.square(jnp.ravel(m)) for m in jax.tree.leaves(moments.mean)])
    if not variance.size:
        raise ValueError("moments: expected at least one coordinate, got none")
    needed = _ratio(variance / eta**2, jnp.maximum(square, floor * jnp.mean(square)))
    return jnp.sort(needed)[math.ceil(quantile * (needed.size - 1))]


def next_batch_size(batch_size: int, required: Any, *, maximum: int, multiple: int = 1) -> int:
    """The next batch size: `max(b, ⌈required⌉)`, up to the next multiple, at most `maximum`.

    A Python int, for use outside of `jit`.

    Args:
      batch_size: b, the present one, at least 2, and a multiple of `multiple`.
      required: of one of the tests; concrete. Infinity asks for the maximum; NaN says nothing, and
        the batch stays.
      maximum: at least b. If it is no multiple, the multiple below it is the largest batch.
      multiple: of devices times micro-batch, at least 1.

    Returns:
      int, never below b.

    Raises:
      ValueError: a number out of range, `required` below 0.
    """
    _checks.in_range("batch_size", batch_size, 2)
    _checks.in_range("maximum", maximum, batch_size)
    _checks.in_range("multiple", multiple, 1)
    if batch_size % multiple:
        raise ValueError(f"batch_size: expected a multiple of {multiple}, got {batch_size}")
    wanted = float(np.asarray(required))
    if math.isnan(wanted):
        return int(batch_size)
    _checks.in_range("required", wanted, 0)
    size = max(batch_size, math.ceil(min(wanted, maximum)))
    whole = -(-size // multiple) * multiple
    return int(min(whole, maximum // multiple * multiple))


def accumulate_moments(
    microbatch_moments: Callable[[Array], PerSampleMoments], num_microbatches: int | Int[Array, ""]
) -> PerSampleMoments:
    """Moments over so many microbatches, one after the other; the number may be traced.

    A batch that grows needs no new compilation this way, nor memory for more than one microbatch's
    gradients. Exactly the moments of all samples at once.

    Args:
      microbatch_moments: index of the microbatch (int32 scalar) to its moments; static shapes.
      num_microbatches: at least 1; less counts as 1 where it is traced.

    Raises:
      ValueError: `num_microbatches` below 1.
    """
    _checks.in_range("num_microbatches", num_microbatches, 1)

    def more(carry: tuple[Array, PerSampleMoments]) -> Array:
        return carry[0] < num_microbatches

    def add(carry: tuple[Array, PerSampleMoments]) -> tuple[Array, PerSampleMoments]:
        index, moments = carry
        return index + 1, merge_moments(moments, microbatch_moments(index))

    first = microbatch_moments(jnp.zeros((), jnp.int32))
    return jax.lax.while_loop(more, add, (jnp.ones((), jnp.int32), first))[1]


def _deviations(gradients: Any) -> tuple[Any, Any, Array]:
    """`g_i - ḡ` as `[n, size]`, ḡ as `[size]`, in float32 or wider, and `‖ḡ‖²`."""
    count = num_rows("gradients", gradients, least=2)

    def flat(g: Any) -> Array:
        wide = jnp.asarray(g, jnp.promote_types(jnp.result_type(g), jnp.float32))
        return wide.reshape(count, -1)

    rows = jax.tree.map(flat, gradients)
    mean = jax.tree.map(lambda g: jnp.mean(g, axis=0), rows)
    spread = jax.tree.map(lambda g, m: g - m, rows, mean)
    return spread, mean, jnp.asarray(optax.tree.norm(mean, squared=True))


def _ratio(noise: Array, signal: Array) -> Array:
    """noise / signal; 0 without noise, infinity with noise and no signal, NaN stays NaN."""
    safe = jnp.where(signal == 0, 1.0, signal)
    return jnp.where((signal == 0) & (noise > 0), jnp.inf, noise / safe)
