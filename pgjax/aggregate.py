"""Reductions of per-token losses to one number, and of anything masked to a diagnostic.

The four reductions of `values[B, T]` are linear in `values`; they differ in what a token weighs:

| reduction | weight of a token of a sequence with n tokens |
|---|---|
| `token_mean` | 1 / (tokens in the batch) |
| `sequence_mean_token_mean` | 1 / n / (sequences that have tokens) |
| `sequence_mean_token_sum` | 1 / (sequences that have tokens) |
| `constant_length` | 1 / length / (rows of the batch) |

Values where the mask is false (NaN included) reach neither the result nor the gradient; with an
all-false mask both are exactly 0.

**One batch in parts.** The denominators belong to the whole batch, so a mean of microbatch means is
a different loss. `weights(aggregate, mask)` of the whole batch gives each token's weight; then
`weighted_sum` over any part of the batch is that part's share, and shares (and their gradients) add
up to the whole.

**Many devices.** Under `jit` with arrays sharded over devices nothing is needed. Inside `shard_map`
or `pmap`, where the function sees only its device's rows, pass `axis_name`: denominators are then
summed over that axis and the result is *this device's share* of the global value (local numerator
over global denominator). Shares add up: `psum` of the results is the global loss. Of gradients
taken inside the mapped function with respect to replicated parameters, the sum over devices is the
global gradient: under `pmap`, and under `shard_map(check_vma=False)`, take `psum` of them; under
`shard_map` with its default `check_vma=True` JAX has already summed them, since a parameter that is
the same on all devices gets the gradient of all devices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pgjax import _checks

AxisName = str | tuple[str, ...]


def token_mean(
    values: Float[Array, "B T"], mask: Bool[Array, "B T"], *, axis_name: AxisName | None = None
) -> Float[Array, ""]:
    """Mean over all tokens of the batch, `Σ_{i,t} m x / Σ_{i,t} m`: long sequences weigh more.

    Args:
      values: per-token numbers.
      mask: tokens that count.
      axis_name: device axis (or axes) of a surrounding `shard_map` or `pmap`; the result is then
        this device's share of the global value, see the module's text.

    Returns:
      f32 scalar; 0 with gradient 0 if no token counts.

    Raises:
      ValueError: wrong rank, dtype or unequal shapes.

    Source: the loss of DAPO, Yu et al. 2025, arXiv 2503.14476.
    """
    x = _masked(values, mask)
    return _sum(x) / _at_least_one(jnp.sum(mask), x, axis_name)


def sequence_mean_token_mean(
    values: Float[Array, "B T"], mask: Bool[Array, "B T"], *, axis_name: AxisName | None = None
) -> Float[Array, ""]:
    """Mean over sequences of each sequence's token mean: all sequences weigh the same.

    `mean_{i: n_i > 0} (Σ_t m x / n_i)`, over the sequences that have at least one token.

    Args, returns, raises: as in `token_mean`.

    Source: the loss of GRPO, Shao et al. 2024, arXiv 2402.03300.
    """
    x = _masked(values, mask)
    lengths = jnp.sum(mask, axis=-1)
    means = jnp.sum(x, axis=-1) / jnp.maximum(lengths, 1)
    return jnp.sum(means) / _at_least_one(jnp.sum(lengths > 0), x, axis_name)


def sequence_mean_token_sum(
    values: Float[Array, "B T"], mask: Bool[Array, "B T"], *, axis_name: AxisName | None = None
) -> Float[Array, ""]:
    """Mean over sequences of each sequence's token sum: all tokens weigh the same.

    `mean_{i: n_i > 0} Σ_t m x`, over the sequences that have at least one token: with per-token
    log-prob losses, the sequence-level policy gradient.

    Args, returns, raises: as in `token_mean`.

    Source: REINFORCE, Williams 1992; for language models RLOO, Ahmadian et al. 2024,
    arXiv 2402.14740.
    """
    x = _masked(values, mask)
    return _sum(x) / _at_least_one(jnp.sum(jnp.any(mask, axis=-1)), x, axis_name)


def constant_length(
    values: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    length: float,
    axis_name: AxisName | None = None,
) -> Float[Array, ""]:
    """Token sums over a constant, `(1/B) Σ_i Σ_t m x / length`; B counts every row.

    Args:
      values, mask, axis_name: as in `token_mean`.
      length: > 0, the same throughout training, usually the generation budget in tokens.

    Returns, raises: as in `token_mean`.

    Source: Dr. GRPO, Liu et al. 2025, arXiv 2503.20783.
    """
    _checks.in_range("length", length, 0.0, low_open=True, high_open=True)
    x = _masked(values, mask)
    return _sum(x) / (_at_least_one(x.shape[0], x, axis_name) * length)


def weights(
    aggregate: Callable[[Float[Array, "B T"], Bool[Array, "B T"]], Float[Array, ""]],
    mask: Bool[Array, "B T"],
) -> Float[Array, "B T"]:
    """Each token's weight in a linear reduction, `∂ aggregate(x, mask) / ∂x`.

    Args:
      aggregate: `(values, mask) -> scalar`, linear in the values: one of this module's, with its
        options bound by `functools.partial`, or a user's own.
      mask: of the whole batch.

    Returns:
      f32 `[B, T]`, 0 off the mask; `weighted_sum(x, weights)` equals `aggregate(x, mask)`.

    Raises:
      ValueError: wrong rank or dtype.
    """
    _checks.rank("mask", mask, 2)
    _checks.boolean(mask=mask)
    # Zeros made from the mask are sharded, and under shard_map vary over devices, as the mask does.
    zeros = jnp.where(mask, jnp.float32(0), jnp.float32(0))
    return jax.grad(lambda x: aggregate(x, mask))(zeros)


def weighted_sum(values: Float[Array, "B T"], weights: Float[Array, "B T"]) -> Float[Array, ""]:
    """`Σ w x` over the entries with w ≠ 0; what the others hold does not matter.

    Args:
      values: per-token numbers.
      weights: from `weights`, of these rows.

    Returns:
      f32 scalar.

    Raises:
      ValueError: wrong dtype or unequal shapes.
    """
    _checks.floating(values=values, weights=weights)
    _checks.same_shape(values=values, weights=weights)
    x = _at_least_float32(values)
    return _sum(jnp.where(weights != 0, x, 0.0) * weights)


def masked_mean(values: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, ""]:
    """Mean over the true entries of the mask, any shape; 0 if there are none."""
    x = _masked(values, mask, any_rank=True)
    return _sum(x) / jnp.maximum(jnp.sum(mask), 1)


def masked_min(values: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, ""]:
    """Smallest of the true entries of the mask, any shape; 0 if there are none."""
    x = _masked(values, mask, any_rank=True, fill=jnp.inf)
    return jnp.where(jnp.any(mask), jnp.min(x, initial=jnp.inf), 0.0)


def masked_max(values: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, ""]:
    """Largest of the true entries of the mask, any shape; 0 if there are none."""
    x = _masked(values, mask, any_rank=True, fill=-jnp.inf)
    return jnp.where(jnp.any(mask), jnp.max(x, initial=-jnp.inf), 0.0)


def _at_least_float32(x: Any) -> Array:
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _masked(values: Any, mask: Any, *, any_rank: bool = False, fill: float = 0.0) -> Array:
    """Checked values in at least float32, `fill` off the mask."""
    if not any_rank:
        _checks.rank("values", values, 2)
        _checks.floating(values=values)
    _checks.boolean(mask=mask)
    _checks.same_shape(values=values, mask=mask)
    return jnp.where(mask, _at_least_float32(values), fill)


def _sum(x: Array) -> Array:
    # Axis by axis: short partial sums keep float32 precise over millions of tokens.
    while x.ndim:
        x = jnp.sum(x, axis=-1)
    return x


def _at_least_one(count: Any, x: Array, axis_name: AxisName | None) -> Array:
    """The global count (an integer until here, so exact) as a denominator."""
    if axis_name is not None:
        count = jax.lax.psum(count, axis_name)
    return jnp.maximum(count, 1).astype(x.dtype)
