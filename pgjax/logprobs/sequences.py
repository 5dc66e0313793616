"""From per-token numbers to rows: shifting, masking, sums and means."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pgjax import _checks
from pgjax.logprobs._common import at_least_float32


def shift_right(x: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """Moves what position t says of token t + 1 to that token's own index.

        out[b, 0] = 0,   out[b, t] = x[b, t - 1]

    Args:
      x: `[B, T]`, one number per predicting position: a value head's output, an uncertainty.

    Returns:
      `[B, T]` of `x`'s dtype. The last position's number belongs to no token and is left out.

    Raises:
      ValueError: unless `x` is a floating array of rank 2.
    """
    _checks.rank("x", x, 2)
    _checks.floating(x=x)
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0)))[:, : x.shape[1]]


def where_mask(x: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """`x` where `mask` is true, 0 elsewhere; NaN and ±inf off the mask leave no trace.

    Args:
      x: `[B, T]` per-token numbers.
      mask: bool `[B, T]`.

    Returns:
      `[B, T]` of `x`'s dtype; its gradient is zero off the mask.

    Raises:
      ValueError: on unequal shapes or a mask that is not bool.
    """
    _checks.rank("x", x, 2)
    _checks.same_shape(x=x, mask=mask)
    _checks.floating(x=x)
    _checks.boolean(mask=mask)
    return jnp.where(mask, x, jnp.zeros((), jnp.result_type(x)))


def sequence(logprobs: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, " B"]:
    """Log-prob of each row's masked tokens together.

        out[b] = Σ_t mask[b, t] logprobs[b, t]

    Args:
      logprobs: `[B, T]`, at each token's own index.
      mask: bool `[B, T]`, true for tokens the policy chose.

    Returns:
      f32 `[B]`; 0 for a row whose mask is all false.

    Raises:
      ValueError: on unequal shapes, a rank other than 2, or wrong dtypes.
    """
    return where_mask(at_least_float32(logprobs), mask).sum(-1)


def sequence_mean(logprobs: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, " B"]:
    """Mean log-prob of each row's masked tokens: the log of their geometric-mean probability.

        out[b] = Σ_t mask[b, t] logprobs[b, t] / Σ_t mask[b, t]

    Args:
      logprobs: `[B, T]`, at each token's own index.
      mask: bool `[B, T]`, true for tokens the policy chose.

    Returns:
      f32 `[B]`; 0 for a row whose mask is all false.

    Raises:
      ValueError: on unequal shapes, a rank other than 2, or wrong dtypes.
    """
    total = sequence(logprobs, mask)
    return total / jnp.maximum(mask.sum(-1), 1).astype(total.dtype)
