"""Advantages per token."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pgjax import _checks, returns
from pgjax.advantages import _common


def to_tokens(advantages: Float[Array, " B"], mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """Every token of a sequence gets the sequence's advantage; 0 off the mask.

    Args:
      advantages: one per sequence.
      mask: tokens the policy chose.

    Returns:
      f32 `[B, T]`; 0 in the row of an advantage that is not finite.

    Raises:
      ValueError: wrong rank, dtype or unequal lengths.
    """
    _check_rows("advantages", advantages, mask)
    x, _, _ = _common.finite_part(advantages)
    return jnp.where(mask, x[:, None], 0.0)


def at_last_token(rewards: Float[Array, " B"], mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """The sequence's reward at its last true token, 0 elsewhere.

    Args:
      rewards: one per sequence.
      mask: tokens the policy chose, with holes or without.

    Returns:
      f32 `[B, T]`; a row without true tokens, or with a reward that is not finite, is 0.

    Raises:
      ValueError: wrong rank, dtype or unequal lengths.
    """
    _check_rows("rewards", rewards, mask)
    x, _, _ = _common.finite_part(rewards)
    later = jnp.cumsum(mask[:, ::-1], axis=-1)[:, ::-1]  # true tokens from t on
    return jnp.where(mask & (later == 1), x[:, None], 0.0)


def kl_shaped_returns(
    rewards: Float[Array, " B"],
    logprobs: Float[Array, "B T"],
    reference_logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    beta: float,
    gamma: float = 1.0,
) -> Float[Array, "B T"]:
    """Discounted sum of what is still to come: the reward, less β times the KL sample per token.

    `r_t = R 1[t last] - β (log π - log π_ref)_t`, `G_t = r_t + γ G_{next token}`; only true tokens
    of the mask are steps, holes neither cost nor discount anything.

    Args:
      rewards: one per sequence.
      logprobs: log π of the tokens, usually under the behaviour policy.
      reference_logprobs: log π_ref of the same tokens.
      mask: tokens the policy chose.
      beta: β ≥ 0.
      gamma: γ in [0, 1], per token.

    Returns:
      f32 `[B, T]`, 0 off the mask and in the row of a reward that is not finite. A log-prob of -inf
      on the mask makes the returns up to its token non-finite; `token_whiten` leaves those out.

    Raises:
      ValueError: wrong rank, dtype or unequal shapes; T = 0; `beta` or `gamma` out of range.

    Source: REINFORCE++, Hu et al. 2025, arXiv 2501.03262.
    """
    _checks.in_range("beta", beta, 0.0, high_open=True)
    _checks.in_range("gamma", gamma, 0.0, 1.0)
    _checks.floating(logprobs=logprobs, reference_logprobs=reference_logprobs)
    _checks.same_shape(mask=mask, logprobs=logprobs, reference_logprobs=reference_logprobs)
    last = at_last_token(rewards, mask)
    steps = mask & jnp.isfinite(rewards)[:, None]
    dtype = jnp.promote_types(jnp.result_type(logprobs, reference_logprobs), last.dtype)
    log_ratio = jnp.asarray(logprobs).astype(dtype) - jnp.asarray(reference_logprobs).astype(dtype)
    shaped = last - beta * jnp.where(steps, log_ratio, 0.0)
    return returns.discounted(shaped, jnp.full(mask.shape, gamma, dtype), mask=steps)


def token_whiten(
    advantages: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    epsilon: float = 1e-8,
    ddof: int = 1,
) -> Float[Array, "B T"]:
    """Normalised over all tokens of the batch, `(x - mean) / sqrt(var + ε)`; 0 off the mask.

    Args:
      advantages: per token.
      mask: tokens that count and are returned.
      epsilon: ε ≥ 0, added to the variance.
      ddof: 1 for the sample variance, 0 for the population's; static.

    Returns:
      f32 `[B, T]`; 0 at tokens whose advantage is not finite (they do not count either), and
      everywhere if fewer than two tokens count or all are equal.

    Raises:
      ValueError: wrong rank, dtype or unequal shapes; `epsilon` < 0, `ddof` neither 0 nor 1.

    Source: REINFORCE++, Hu et al. 2025, arXiv 2501.03262.
    """
    _common.check_scale(epsilon, ddof)
    _checks.rank("advantages", advantages, 2)
    _checks.boolean(mask=mask)
    _checks.same_shape(advantages=advantages, mask=mask)
    x, _, counted = _common.finite_part(advantages, mask)
    deviation, spread = _common.deviations_and_std(x, counted, ddof)
    # hypot, since the square of a large or small standard deviation leaves float32's range.
    scale = jnp.hypot(jnp.where(spread > 0, spread, 1.0), jnp.sqrt(jnp.asarray(epsilon, x.dtype)))
    return jnp.where(counted, _common.divided(deviation, spread, scale), 0.0)


def _check_rows(name: str, per_sequence: Array, mask: Array) -> None:
    _checks.rank(name, per_sequence, 1)
    _checks.rank("mask", mask, 2)
    _checks.boolean(mask=mask)
    if per_sequence.shape[0] != mask.shape[0]:
        raise ValueError(
            f"{name}: expected {mask.shape[0]} rows like mask, got {per_sequence.shape[0]}"
        )
