"""The stability masks hidden in clipped surrogates: where the policy gradient survives."""

from __future__ import annotations

from jaxtyping import Array, Bool, Float

from pgjax import _checks


def ppo_clip(
    ratio: Float[Array, ...], advantages: Float[Array, ...], *, low: float, high: float
) -> Bool[Array, ...]:
    """True where PPO's clipped surrogate keeps its gradient.

    `(A >= 0 and r <= 1 + high) or (A < 0 and r >= 1 - low)`.

    Args:
      ratio: π/π_old, any shape.
      advantages: broadcastable against `ratio`.
      low: lower clip width, in [0, 1].
      high: upper clip width, ≥ 0.

    Returns:
      bool, of the broadcast shape. Where A = 0 there is no gradient to keep; the mask is true up
      to 1 + high.

    Raises:
      ValueError: `low` or `high` out of range.

    Source: Schulman et al. 2017, arXiv 1707.06347; separate widths as in DAPO, arXiv 2503.14476.
    """
    _checks.in_range("low", low, 0.0, 1.0)
    _checks.in_range("high", high, 0.0)
    positive = advantages >= 0
    return (positive & (ratio <= 1.0 + high)) | (~positive & (ratio >= 1.0 - low))


def dual_clip(
    ratio: Float[Array, ...],
    advantages: Float[Array, ...],
    *,
    low: float,
    high: float,
    bound: float = 3.0,
) -> Bool[Array, ...]:
    """True where the dual-clipped surrogate keeps its gradient.

    `ppo_clip(r, A) and not (A < 0 and r > bound)`.

    Args:
      ratio: π/π_old, any shape.
      advantages: broadcastable against `ratio`.
      low: lower clip width, in [0, 1].
      high: upper clip width, ≥ 0.
      bound: largest ratio that still pushes a bad action down, > 1.

    Returns:
      bool, of the broadcast shape.

    Raises:
      ValueError: a width out of range, or `bound` ≤ 1.

    Source: Ye et al. 2020 (dual-clip PPO), arXiv 1912.09729.
    """
    _checks.in_range("bound", bound, 1.0, low_open=True)
    runaway = (advantages < 0) & (ratio > bound)
    return ppo_clip(ratio, advantages, low=low, high=high) & ~runaway
