"""Losses of a policy that is a mixture of experts, of which the best action of each is known.

Source: PMOE, Ren et al. 2021, arXiv 2104.09122, and its co-author's implementation.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pgjax import _checks


def frequency_loss(
    weights: Float[Array, "B K"], values: Float[Array, "B K"]
) -> Float[Array, "B K"]:
    """Squared distance of the routing weights to who is best: (w_k - 1[k = argmax_j Q_j])².

    Its mean's minimiser are the frequencies w_k = P(k is best), so that routing is learnt without
    a derivative through the choice. Of equals the first is best.

    Args:
      weights: w, f32 `[B, K]`, rows sum to 1; differentiable.
      values: Q(s, a_k) of an action of each expert, `[B, K]`; detached here.

    Returns:
      f32 `[B, K]`, to be averaged over both axes.

    Raises:
      ValueError: shapes that differ or are not `[B, K]`, K of 0; where values can be looked at,
        weights that do not sum to 1.
    """
    _checks.floating(weights=weights, values=values)
    _checks.rank("values", values, 2)
    _checks.same_shape(values=values, weights=weights)
    _checks.in_range("number of experts", jnp.shape(values)[1], 1)
    if _checks.is_concrete(weights) and jnp.size(weights):
        away = float(jnp.max(jnp.abs(jnp.sum(weights, axis=-1) - 1.0)))
        if not away < 1e-3:  # NaN also lands here
            raise ValueError(f"weights: expected rows that sum to 1, got sums off by up to {away}")
    best = jax.lax.stop_gradient(jnp.argmax(values, axis=-1))
    wanted = jax.nn.one_hot(best, values.shape[-1], dtype=jnp.result_type(weights, jnp.float32))
    return jnp.square(weights - wanted)


def best_expert_loss(
    logprobs: Float[Array, "B K"], values: Float[Array, "B K"], temperature: Float[Array, ""]
) -> Float[Array, " B"]:
    """SAC's loss of the best expert alone, α log p_k*(a_k*) - Q(s, a_k*), k* = argmax_k Q(s, a_k).

    Experts that are not the best have no gradient, and log p is without the weight. Of equals the
    first is best.

    Args:
      logprobs: of each expert's own action under it alone, `[B, K]`, differentiable.
      values: Q(s, a_k), `[B, K]`, differentiable through a_k.
      temperature: α ≥ 0.

    Returns:
      f32 `[B]`.

    Raises:
      ValueError: shapes that differ or are not `[B, K]`.
    """
    _checks.rank("values", values, 2)
    _checks.same_shape(values=values, logprobs=logprobs)
    each = temperature * logprobs - values
    best = jnp.argmax(values, axis=-1)
    return jnp.take_along_axis(each, best[:, None], axis=-1)[:, 0]
