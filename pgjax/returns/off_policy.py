"""Targets and advantages from the data of another policy, by clipped importance weights."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pgjax import _checks
from pgjax.returns import recurrence
from pgjax.returns._common import after, checked, only, skipping, trace_weight, unless


class VTrace(NamedTuple):
    """What `v_trace` returns, all `[..., T]` and 0 at masked positions.

    Attributes:
      targets: v_t, what the value function should predict.
      advantages: weights of ∇ log π, the clipped importance weight included.
      rhos: the clipped importance weights min(ρ̄, π/μ).
    """

    targets: Float[Array, "*B T"]
    advantages: Float[Array, "*B T"]
    rhos: Float[Array, "*B T"]


def v_trace(
    rewards: Float[Array, "*B T"],
    values: Float[Array, "*B T"],
    next_values: Float[Array, "*B T"],
    discounts: Float[Array, "*B T"],
    ratios: Float[Array, "*B T"],
    *,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
    lambda_: Float[Array, "*B T"] | float = 1.0,
    truncated: Bool[Array, "*B T"] | None = None,
    mask: Bool[Array, "*B T"] | None = None,
) -> VTrace:
    """V-trace value targets and policy-gradient advantages.

    ρ_t = min(ρ̄, w_t), c_t = λ_t min(c̄, w_t), δ_t = ρ_t (r_t + γ_t V(s_{t+1}) - V(s_t));
    v_t - V(s_t) = δ_t + γ_t c_t (v_{t+1} - V(s_{t+1}));
    advantage_t = ρ_t (r_t + γ_t v_{t+1} - V(s_t)),
    where v_{t+1} is V(s_{t+1}) after truncated steps and the last one. On-policy with both bars at
    least 1, the targets are the λ-returns. The targets' fixed point is the value of the policy
    proportional to min(ρ̄ μ, π): ρ̄ sets where one converges, c̄ how fast.

    Args:
      rewards: `[..., T]`.
      values: V(s_t), `[..., T]`.
      next_values: V(s_{t+1}), `[..., T]`.
      discounts: γ(1 - terminated), `[..., T]`.
      ratios: w_t = π(a_t|s_t) / μ(a_t|s_t) >= 0, `[..., T]`.
      rho_bar: > 0, at least `c_bar`; may be infinite.
      c_bar: >= 0.
      lambda_: in [0, 1], a scalar or `[..., T]`.
      truncated: bool `[..., T]`.
      mask: bool `[..., T]`, false at steps to skip.

    Returns:
      A `VTrace` of targets, advantages and clipped weights.

    Raises:
      ValueError: on `rho_bar` < `c_bar` or either out of range (when concrete), unequal shapes, an
        empty time axis, wrong dtypes or a scalar `lambda_` outside [0, 1].

    Source: Espeholt et al. 2018 (IMPALA), arXiv 1802.01561; λ as in its remark 2. For λ < 1 the
    advantage keeps the paper's v_{t+1}; RLax mixes it with V(s_{t+1}) by λ.
    """
    _checks.in_range("rho_bar", rho_bar, 0.0, low_open=True)
    _checks.in_range("c_bar", c_bar, 0.0)
    if _checks.is_concrete(rho_bar, c_bar) and float(rho_bar) < float(c_bar):
        raise ValueError(f"rho_bar: expected at least c_bar = {c_bar}, got {rho_bar}")
    r, v, v_next, g, w = checked(
        rewards=rewards,
        values=values,
        next_values=next_values,
        discounts=discounts,
        ratios=ratios,
        truncated=truncated,
        mask=mask,
    )
    rho = jnp.minimum(w, jnp.asarray(rho_bar, w.dtype))
    c = trace_weight(lambda_, mask, r) * jnp.minimum(w, jnp.asarray(c_bar, w.dtype))
    delta = rho * (r + g * v_next - v)
    carried = unless(truncated, g)
    errors = recurrence.backward(skipping(mask, carried * c), delta)
    # At masked steps `errors` holds the carry, so one step on is always the next counted one.
    advantages = delta + rho * carried * after(errors)
    return VTrace(only(mask, v + errors), only(mask, advantages), rho)


def retrace(
    rewards: Float[Array, "*B T"],
    action_values: Float[Array, "*B T"],
    next_values: Float[Array, "*B T"],
    discounts: Float[Array, "*B T"],
    ratios: Float[Array, "*B T"],
    *,
    lambda_: Float[Array, "*B T"] | float = 1.0,
    truncated: Bool[Array, "*B T"] | None = None,
    mask: Bool[Array, "*B T"] | None = None,
) -> Float[Array, "*B T"]:
    """Retrace(λ) targets of action values.

    c_t = λ_t min(1, w_t), δ_t = r_t + γ_t E_π Q(s_{t+1}, ·) - Q(s_t, a_t);
    G_t - Q(s_t, a_t) = δ_t + γ_t c_{t+1} (G_{t+1} - Q(s_{t+1}, a_{t+1})), and only δ_t at truncated
    steps and at the last one. The first action's own ratio does not enter its target.

    Args:
      rewards: `[..., T]`.
      action_values: Q(s_t, a_t) of the actions taken, `[..., T]`.
      next_values: E_{a~π} Q(s_{t+1}, a), `[..., T]`.
      discounts: γ(1 - terminated), `[..., T]`.
      ratios: w_t = π(a_t|s_t) / μ(a_t|s_t) >= 0, `[..., T]`.
      lambda_: in [0, 1], a scalar or `[..., T]`.
      truncated: bool `[..., T]`.
      mask: bool `[..., T]`, false at steps to skip.

    Returns:
      G, `[..., T]`.

    Raises:
      ValueError: on unequal shapes, an empty time axis, wrong dtypes or a scalar `lambda_` outside
        [0, 1].

    Source: Munos et al. 2016, arXiv 1606.02647.
    """
    r, q, v_next, g, w = checked(
        rewards=rewards,
        action_values=action_values,
        next_values=next_values,
        discounts=discounts,
        ratios=ratios,
        truncated=truncated,
        mask=mask,
    )
    c = trace_weight(lambda_, mask, r) * jnp.minimum(w, 1)
    delta = r + g * v_next - q
    carried = unless(truncated, g)
    # y_t = c_t (G_t - Q_t) has coefficients of its own step only, masked steps skipped or not.
    y = recurrence.backward(skipping(mask, carried * c), c * delta)
    return only(mask, q + delta + carried * after(y))
