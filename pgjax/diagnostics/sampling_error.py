"""How far recorded actions are from what the policy that they stand for would have done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from pgjax import _checks, aggregate
from pgjax._arrays import widened


def tabular_sampling_error(
    counts: Float[Array, "S A"], policy: Float[Array, "S A"]
) -> Float[Array, ""]:
    """KL(π_D ‖ π) of the empirical policy, states weighed as they were met.

    (1/N) Σ_{s,a} n(s,a) log( n(s,a) / n(s) / π(a|s) ). Of N independent draws in one state it is
    (A - 1) / (2 N) on average, to first order.

    Args:
      counts: n(s, a) ≥ 0, how often each action was recorded in each state; floating or integers.
      policy: π(a|s) in [0, 1], rows that sum to 1.

    Returns:
      f32 scalar in nats, ≥ 0; 0 without any record, inf where an action was recorded that the
      policy never takes.

    Raises:
      ValueError: unequal shapes, a rank that is not 2.

    Source: the sampling error of PROPS, Corrado and Hanna 2023, arXiv 2311.08290.
    """
    _checks.rank("counts", counts, 2)
    _checks.same_shape(counts=counts, policy=policy)
    _checks.floating(policy=policy)
    number, chance = widened(counts), widened(policy)
    met = number > 0
    share = number / jnp.maximum(number.sum(-1, keepdims=True), 1e-30)
    excess = jnp.log(jnp.where(met, share, 1.0)) - jnp.log(jnp.where(met, chance, 1.0))
    return jnp.sum(number * excess) / jnp.maximum(number.sum(), 1e-30)


def fitted_sampling_error(
    log_prob: Callable[[Any, Any], Float[Array, " N"]],
    params: Any,
    batch: Any,
    *,
    num_steps: int = 2000,
    learning_rate: float = 1e-3,
    mask: Bool[Array, " N"] | None = None,
) -> Float[Array, ""]:
    """mean log π_MLE(a|s) - log π_θ(a|s), π_MLE fitted to the record from θ on.

    Args:
      log_prob: `(params, batch) -> f32 [N]`. What it closes over stays as it is: the authors fit
        the last layer alone, and so give `params` of that and a function with the others inside.
      params: θ, or that part of it which is fitted.
      batch: what was recorded, leaves `[N, ...]`.
      num_steps: of Adam on the whole batch, ≥ 1.
      learning_rate: > 0, falls to 0 linearly.
      mask: rows that count, bool `[N]`.

    Returns:
      f32 scalar in nats; an under-estimate where the fit has not come to its end; 0 where no row
      counts.

    Raises:
      ValueError: a number out of range, a mask of another shape.

    Source: PROPS, Corrado and Hanna 2023, arXiv 2311.08290.
    """
    _checks.in_range("num_steps", num_steps, 1)
    _checks.in_range("learning_rate", learning_rate, 0.0, low_open=True)
    _checks.boolean(mask=mask)
    before = log_prob(params, batch)
    kept = jnp.ones(np.shape(before), bool) if mask is None else mask
    _checks.same_shape(log_prob=before, mask=kept)
    adam = optax.adam(optax.linear_schedule(learning_rate, 0.0, num_steps))

    def surprise(theta: Any) -> Float[Array, ""]:
        return -aggregate.masked_mean(log_prob(theta, batch), kept)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        theta, state = carry
        updates, state = adam.update(jax.grad(surprise)(theta), state, theta)
        return (optax.apply_updates(theta, updates), state), None

    (fitted, _), _ = jax.lax.scan(step, (params, adam.init(params)), None, length=num_steps)
    return surprise(params) - surprise(fitted)
