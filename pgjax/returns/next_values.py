"""The value of the state that follows, in rows of tokens."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pgjax.returns import recurrence
from pgjax.returns._common import after, checked, initial_value, only, skipping


def next_values_within(
    values: Float[Array, "*B T"],
    mask: Bool[Array, "*B T"],
    *,
    final: Float[Array, "*B"] | float = 0.0,
) -> Float[Array, "*B T"]:
    """The value at the next unmasked position: `next_values` of a row of tokens.

    out_t = values_{t'} with t' = min{s > t : mask_s}, and `final` where there is no such t'.

    Args:
      values: `[..., T]`, the value of the state in which position t is chosen.
      mask: bool `[..., T]`, true where the policy chose.
      final: value after the last true position, a scalar or `[...]`: 0 when the sequence ended by
        itself, a bootstrap value when it ran out of budget.

    Returns:
      `[..., T]`; 0 where `mask` is false.

    Raises:
      ValueError: on unequal shapes, an empty time axis or wrong dtypes.
    """
    if mask is None:
        raise ValueError(f"mask: expected a bool array of shape {np.shape(values)}, got None")
    (values,) = checked(values=values, mask=mask)
    end = initial_value("final", final, values)
    carried = recurrence.backward(skipping(mask, jnp.zeros_like(values)), values, end)
    return only(mask, after(carried, end))
