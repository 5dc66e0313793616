"""Returns and advantages of the policy that collected the data."""

from __future__ import annotations

import operator

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pgjax.returns import recurrence
from pgjax.returns._common import checked, ends, initial_value, only, skipping, trace_weight, unless


def discounted(
    rewards: Float[Array, "*B T"],
    discounts: Float[Array, "*B T"],
    *,
    bootstrap: Float[Array, "*B"] | float | None = None,
    truncated: Bool[Array, "*B T"] | None = None,
    next_values: Float[Array, "*B T"] | None = None,
    mask: Bool[Array, "*B T"] | None = None,
) -> Float[Array, "*B T"]:
    """Discounted return to go.

    G_t = r_t + γ_t G_{t+1}, and G_t = r_t + γ_t V(s_{t+1}) at truncated steps.

    Args:
      rewards: `[..., T]`.
      discounts: γ(1 - terminated), `[..., T]`.
      bootstrap: G_T, what follows the last step, a scalar or `[...]`. When None, the last step
        bootstraps from its own `next_values` if those are given, else from 0.
      truncated: bool `[..., T]`; needs `next_values`.
      next_values: V(s_{t+1}), `[..., T]`; read only at the steps that bootstrap.
      mask: bool `[..., T]`, false at steps to skip.

    Returns:
      G, `[..., T]`.

    Raises:
      ValueError: on unequal shapes, an empty time axis, wrong dtypes, or `truncated` without
        `next_values`.
    """
    if truncated is not None and next_values is None:
        raise ValueError("next_values: expected an array where `truncated` is given, got None")
    if next_values is None:
        r, g = checked(rewards=rewards, discounts=discounts, mask=mask)
        start = initial_value("bootstrap", bootstrap, r)
        return only(mask, recurrence.backward(skipping(mask, g), r, start))
    r, g, v = checked(
        rewards=rewards,
        discounts=discounts,
        next_values=next_values,
        truncated=truncated,
        mask=mask,
    )
    start = initial_value("bootstrap", bootstrap, r)
    cut = ends(truncated, mask, r.shape) if bootstrap is None else truncated
    reward = r if cut is None else r + g * only(cut, v)
    return only(mask, recurrence.backward(skipping(mask, unless(cut, g)), reward, start))


def n_step(
    rewards: Float[Array, "*B T"],
    next_values: Float[Array, "*B T"],
    discounts: Float[Array, "*B T"],
    *,
    n: int,
    truncated: Bool[Array, "*B T"] | None = None,
    mask: Bool[Array, "*B T"] | None = None,
) -> Float[Array, "*B T"]:
    """n-step bootstrapped return.

    G_t = Σ_{k<m} (Π_{j<k} γ_{t+j}) r_{t+k} + (Π_{j<m} γ_{t+j}) V(s_{t+m}), where m is n or the
    number of steps up to and including the next end of the record, whichever is smaller.

    Computed in O(log n) passes over the arrays, by doubling the span of composed steps.

    Args:
      rewards: `[..., T]`.
      next_values: V(s_{t+1}), `[..., T]`.
      discounts: γ(1 - terminated), `[..., T]`.
      n: number of rewards before bootstrapping, an int >= 1; n >= T gives `discounted` with
        `next_values` at the ends.
      truncated: bool `[..., T]`.
      mask: bool `[..., T]`, false at steps to skip; skipped steps do not count towards n.

    Returns:
      G, `[..., T]`.

    Raises:
      ValueError: on n < 1, unequal shapes, an empty time axis or wrong dtypes.
      TypeError: when n is not an integer.

    Source: Sutton and Barto 2018, "Reinforcement Learning: An Introduction", section 7.1.
    """
    n = operator.index(n)
    if n < 1:
        raise ValueError(f"n: expected an integer of at least 1, got {n}")
    r, v, g = checked(
        rewards=rewards,
        next_values=next_values,
        discounts=discounts,
        truncated=truncated,
        mask=mask,
    )
    cut = ends(truncated, mask, r.shape)
    if mask is not None:
        # A window of n counted steps has no fixed length in t, so cut the masked columns out.
        order = jnp.argsort(~mask, axis=-1, stable=True)
        r, v, g, cut = (jnp.take_along_axis(x, order, -1) for x in (r, v, g, cut))
    span = min(n, r.shape[-1])

    def later(f: tuple[Array, Array], by: int) -> tuple[Array, Array]:
        return tuple(_shift(x, by) for x in f)  # type: ignore[return-value]

    # Maps of the value that follows a window to the return at its start; an end ignores it.
    power = (unless(cut, g), r + g * only(cut, v))
    total, covered, size = (jnp.ones_like(g), jnp.zeros_like(g)), 0, 1
    while True:
        if span & size:
            total = recurrence.affine(later(power, covered), total)
            covered += size
        if covered == span:
            break
        power = recurrence.affine(later(power, size), power)
        size *= 2
    out = total[0] * _shift(v, span - 1) + total[1]
    if mask is None:
        return out
    rank = jnp.maximum(jnp.cumsum(mask, -1) - 1, 0)
    return only(mask, jnp.take_along_axis(out, rank, -1))


def _shift(x: Array, by: int) -> Array:
    """x_{t+by} at t. The zeros beyond the end are never used: every window stops at an end."""
    return x if not by else jnp.concatenate([x[..., by:], jnp.zeros_like(x[..., :by])], -1)


def lambda_returns(
    rewards: Float[Array, "*B T"],
    next_values: Float[Array, "*B T"],
    discounts: Float[Array, "*B T"],
    *,
    lambda_: Float[Array, "*B T"] | float,
    truncated: Bool[Array, "*B T"] | None = None,
    mask: Bool[Array, "*B T"] | None = None,
) -> Float[Array, "*B T"]:
    """TD(λ) targets.

    G_t = r_t + γ_t ((1 - λ_t) V(s_{t+1}) + λ_t G_{t+1}), and G_t = r_t + γ_t V(s_{t+1}) at
    truncated steps and at the last one.

    Args:
      rewards: `[..., T]`.
      next_values: V(s_{t+1}), `[..., T]`; expected or maximal action values give Q(λ) targets.
      discounts: γ(1 - terminated), `[..., T]`.
      lambda_: in [0, 1], a scalar or `[..., T]`; λ_t weighs what follows step t.
      truncated: bool `[..., T]`.
      mask: bool `[..., T]`, false at steps to skip.

    Returns:
      G, `[..., T]`.

    Raises:
      ValueError: on unequal shapes, an empty time axis, wrong dtypes or a scalar `lambda_` outside
        [0, 1].

    Source: Sutton and Barto 2018, "Reinforcement Learning: An Introduction", section 12.1.
    """
    r, v, g = checked(
        rewards=rewards,
        next_values=next_values,
        discounts=discounts,
        truncated=truncated,
        mask=mask,
    )
    weight = unless(ends(truncated, mask, r.shape), trace_weight(lambda_, mask, r))
    return only(mask, recurrence.backward(skipping(mask, g * weight), r + g * (1 - weight) * v))


def gae(
    rewards: Float[Array, "*B T"],
    values: Float[Array, "*B T"],
    next_values: Float[Array, "*B T"],
    discounts: Float[Array, "*B T"],
    *,
    lambda_: Float[Array, "*B T"] | float,
    truncated: Bool[Array, "*B T"] | None = None,
    mask: Bool[Array, "*B T"] | None = None,
) -> Float[Array, "*B T"]:
    """Generalized advantage estimates.

    δ_t = r_t + γ_t V(s_{t+1}) - V(s_t);  A_t = δ_t + γ_t λ_t A_{t+1}, and A_t = δ_t at truncated
    steps and at the last one. A + V are the λ-returns, the usual targets of the value function.

    Args:
      rewards: `[..., T]`.
      values: V(s_t), `[..., T]`.
      next_values: V(s_{t+1}), `[..., T]`.
      discounts: γ(1 - terminated), `[..., T]`.
      lambda_: in [0, 1], a scalar or `[..., T]`; λ_t weighs what follows step t.
      truncated: bool `[..., T]`.
      mask: bool `[..., T]`, false at steps to skip.

    Returns:
      A, `[..., T]`, not normalised.

    Raises:
      ValueError: on unequal shapes, an empty time axis, wrong dtypes or a scalar `lambda_` outside
        [0, 1].

    Source: Schulman et al. 2015, arXiv 1506.02438.
    """
    r, v, v_next, g = checked(
        rewards=rewards,
        values=values,
        next_values=next_values,
        discounts=discounts,
        truncated=truncated,
        mask=mask,
    )
    a = unless(truncated, g * trace_weight(lambda_, mask, r))
    return only(mask, recurrence.backward(skipping(mask, a), r + g * v_next - v))
