"""DisCO: right answers against wrong ones of the same question, by score and without clipping.

With the score `s(o)` of a sample, its tokens' mean log-prob or mean ratio, and `O+`, `O-` the right
and wrong samples of a question, the objectives per question are

    J1 = mean_{O+} s - mean_{O-} s
    J2 = mean_{O+} s - τ log mean_{O-} exp(s / τ)

Their gradients are weighted sums of `∇s`: `+1/n+` on a right sample, and on a wrong one `-1/n-` or
`-softmax_{O-}(s / τ)`. So both are `score_function` (or `importance_weighted`) losses under the
advantage `class_balanced / length`; J2 multiplies wrong samples by `hard_negative_weights`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pgjax import _checks, aggregate, logprobs, segments

KLEstimator = Callable[[Float[Array, "B T"], Float[Array, "B T"]], Float[Array, "B T"]]


def log_likelihood(
    logprobs: Float[Array, "B T"], behavior_logprobs: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """DisCO's score log-L of each token, its log-prob; the behaviour does not matter.

    The other published score, L-ratio, is `importance_ratio`.

    Args:
      logprobs: under the current policy, differentiable.
      behavior_logprobs: of the same shape; not used.

    Returns:
      f32 `[B, T]`.

    Raises:
      ValueError: unequal shapes or a non-floating dtype.

    Source: Li et al. 2025 (DisCO), arXiv 2505.12366.
    """
    _checks.floating(logprobs=logprobs, behavior_logprobs=behavior_logprobs)
    _checks.same_shape(logprobs=logprobs, behavior_logprobs=behavior_logprobs)
    logprobs = jnp.asarray(logprobs)
    return logprobs.astype(jnp.promote_types(logprobs.dtype, jnp.float32))


def sequence_scores(
    token_scores: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    trajectory_ids: Int[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """Mean score over the tokens of each sample, `s_i = Σ_t m x / Σ_t m`.

    Args:
      token_scores: of `log_likelihood` or `importance_ratio`, differentiable.
      mask: tokens that the policy chose.
      trajectory_ids: rows with one id are one sample, each gets its score; None: a row is a sample.

    Returns:
      f32 `[B]`; 0 for a sample without tokens.

    Raises:
      ValueError: wrong ranks, dtypes or shapes.
    """
    if trajectory_ids is None:
        return logprobs.sequence_mean(token_scores, mask)
    total = logprobs.sequence(token_scores, mask)
    ids = segments.dense_ids(trajectory_ids)
    sums = segments.total(total, ids, num_segments=ids.shape[0])
    counts = segments.total(mask.sum(-1), ids, num_segments=ids.shape[0])
    return segments.per_row(sums / jnp.maximum(counts, 1), ids)


def class_balanced(
    rewards: Float[Array, " B"],
    group_ids: Int[Array, " B"],
    *,
    num_groups: int,
    where: Bool[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """`+1/n+` for right samples and `-1/n-` for wrong ones, of the n+ and n- of their question.

    Each side of a question weighs 1 whatever its success rate. GRPO's advantages over G samples
    (population standard deviation, ε = 0) are `G sqrt(p (1 - p))` times these, Dr. GRPO's
    `G p (1 - p)` times.

    Args:
      rewards: 1 for right, 0 for wrong; not finite where the verifier failed.
      group_ids: int32 in `[0, num_groups)`; any order, groups of any size.
      num_groups: static.
      where: rows that count, such as the first row of each trajectory; None for all. The others get
        what a counted row of their reward gets.

    Returns:
      f32 `[B]`; 0 in a question without right or without wrong samples and for non-finite rewards.

    Raises:
      ValueError: wrong rank, dtype or unequal lengths; concrete ids out of range or rewards other
        than 0 and 1. Traced ones give NaN, and under `jax.experimental.checkify` are an error.

    Source: DisCO-b, Li et al. 2025, arXiv 2505.12366.
    """
    _checks.rank("rewards", rewards, 1)
    _checks.floating(rewards=rewards)
    _checks.same_shape(rewards=rewards, group_ids=group_ids, where=where)
    rewards = jnp.asarray(rewards)
    finite = jnp.isfinite(rewards)
    binary = ~finite | (rewards == 0) | (rewards == 1)
    _check_binary(rewards, binary)
    counted = finite if where is None else finite & where
    options: dict[str, Any] = {"num_segments": num_groups}

    def number(side: Array) -> Array:
        n = segments.count(group_ids, where=counted & side, **options)
        return segments.per_row(n.astype(jnp.float32), group_ids)

    right, wrong = number(rewards == 1), number(rewards == 0)
    both = (right > 0) & (wrong > 0)
    share = jnp.where(rewards == 1, 1 / jnp.maximum(right, 1), -1 / jnp.maximum(wrong, 1))
    # An id out of range has a count of NaN, which must stay visible.
    share = jnp.where(both | jnp.isnan(right), share, 0.0)
    return jnp.where(binary, jnp.where(finite, share, 0.0), jnp.nan)


def hard_negative_weights(
    scores: Float[Array, " B"],
    negative: Bool[Array, " B"],
    group_ids: Int[Array, " B"],
    *,
    num_groups: int,
    temperature: float,
    where: Bool[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """`n- softmax_{O-}(s / τ)` for the wrong samples of a question, mean 1; 1 for all others.

    The factor between the gradient of J2 and that of J1 on a wrong sample: the more likely the
    policy finds it, the more it is pushed down.

    Args:
      scores: of each sample, detached here.
      negative: the wrong samples.
      group_ids: int32 in `[0, num_groups)`; groups must be whole.
      num_groups: static.
      temperature: τ > 0; infinity gives 1 throughout, towards 0 only the highest-scored wrong
        sample of each question is left, with weight n-.
      where: rows that count, as in `class_balanced`.

    Returns:
      f32 `[B]`, detached.

    Raises:
      ValueError: `temperature` not above 0; wrong dtypes, unequal lengths; concrete ids out of
        range.

    Source: DisCO, Li et al. 2025, arXiv 2505.12366.
    """
    _checks.in_range("temperature", temperature, 0.0, low_open=True)
    _checks.rank("scores", scores, 1)
    _checks.floating(scores=scores)
    _checks.boolean(negative=negative)
    _checks.same_shape(scores=scores, negative=negative, group_ids=group_ids, where=where)
    scaled = jax.lax.stop_gradient(scores) / temperature
    options: dict[str, Any] = {
        "num_segments": num_groups,
        "where": negative if where is None else negative & where,
    }
    highest = segments.per_row(segments.maximum(scaled, group_ids, **options), group_ids)
    # Rows that are not negative may lie above: they must not overflow.
    raised = jnp.exp(jnp.minimum(scaled - highest, 0.0))
    mean = segments.per_row(segments.mean(raised, group_ids, **options), group_ids)
    weight = raised / jnp.where(mean == 0, 1.0, mean)
    return jax.lax.stop_gradient(jnp.where(negative, weight, 1.0))


def kl_hinge(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    delta: float,
    estimator: KLEstimator = logprobs.kl_k1,
) -> Float[Array, "B T"]:
    """Penalty on leaving a trust region, `[KL(π_old ‖ π) - δ]_+` times each token's part of the KL.

    Its token mean has the gradient `[KL - δ]_+ ∇KL`, exactly 0 inside the region. KL is the token
    mean of the estimator.

    Args:
      logprobs: under the current policy, differentiable.
      old_logprobs: under the policy that sampled; detached here.
      mask: tokens that count.
      delta: δ ≥ 0, in nats a token.
      estimator: of `KL(first ‖ second)` from tokens of the first: `logprobs.kl_k1` as published, or
        `kl_k3`, which is never negative.

    Returns:
      f32 `[B, T]`, to be averaged over tokens; 0 off the mask.

    Raises:
      ValueError: `delta` < 0, unequal shapes, wrong dtypes.

    Source: Li et al. 2025 (DisCO), arXiv 2505.12366. The paper writes `β [KL - δ]_+²`, whose
    gradient is twice this one times β; its code has this one.
    """
    _checks.in_range("delta", delta, 0.0)
    _checks.boolean(mask=mask)
    _checks.same_shape(logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    old = jax.lax.stop_gradient(jnp.where(mask, old_logprobs, 0.0))
    parts = jnp.where(mask, estimator(old, jnp.where(mask, logprobs, 0.0)), 0.0)
    divergence = jax.lax.stop_gradient(aggregate.masked_mean(parts, mask))
    return jnp.maximum(divergence - delta, 0.0) * parts


def _check_binary(rewards: Array, binary: Array) -> None:
    message = "rewards: expected 0 or 1"
    if not _checks.is_concrete(rewards):
        _checks.traced(jnp.all(binary), message)
    elif getattr(rewards, "is_fully_addressable", True) and not bool(jnp.all(binary)):
        raise ValueError(f"{message}, got {rewards[~binary][:4].tolist()}")
