"""Baselines that minimise the variance of the gradient: rewards weighted by squared score norms.

With `s = ∇ log π(y)` and `w = ‖s‖²`, the variance of `(R - b) s` is smallest at
`b* = E[R w] / E[w]`, not at the mean reward: a sample that moves the parameters a lot deserves the
more exact baseline. The functions take any weights; `score_norm_proxy` estimates them from what the
forward pass knows already.

A group's own estimate of b* is noisy. With few samples and weights that differ much it can be worse
than the plain mean; `history_init`, `history_update` and `history_baseline` keep the two sums of
each prompt over earlier batches instead.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pgjax import _checks, segments
from pgjax.advantages import _common

SQUARE_SUM_SLACK = 1e-4  # rounding of a sum of squared float32 probabilities


def token_score_norms(
    logprobs: Float[Array, "B T"],
    square_sum: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    importance_weights: Float[Array, "B T"] | None = None,
) -> Float[Array, "B T"]:
    """Squared norm of each token's score in its logits, `‖e(y_t) - p_t‖² = 1 - 2 p(y_t) + Σ_v p²`.

    Args:
      logprobs: log p of the tokens under the policy whose gradient is taken.
      square_sum: `Σ_v p(v)²` of the distributions they were drawn from, in [0, 1].
      mask: tokens the policy chose.
      importance_weights: factors of the tokens' gradients off-policy, such as truncated ratios;
        the norms are multiplied by their squares. None: 1.

    Returns:
      f32 `[B, T]` in [0, 2] (times the squared weights), 0 off the mask.

    Raises:
      ValueError: wrong rank, dtype or unequal shapes; a concrete `square_sum` outside [0, 1].

    Source: OBLR-PO, 2025, arXiv 2511.23310.
    """
    _checks.rank("logprobs", logprobs, 2)
    _checks.floating(
        logprobs=logprobs, square_sum=square_sum, importance_weights=importance_weights
    )
    _checks.boolean(mask=mask)
    _checks.same_shape(
        logprobs=logprobs, square_sum=square_sum, mask=mask, importance_weights=importance_weights
    )
    if _readable(square_sum, mask):
        _check_square_sum(np.asarray(square_sum)[np.asarray(mask)])
    wide = jnp.promote_types(jnp.result_type(logprobs, square_sum), jnp.float32)
    chosen = jnp.exp(jnp.asarray(logprobs, wide))
    norms = jnp.maximum(1.0 - 2.0 * chosen + jnp.asarray(square_sum, wide), 0.0)
    if importance_weights is not None:
        norms = norms * jnp.square(jnp.asarray(importance_weights, wide))
    return jnp.where(mask, norms, 0.0)


def score_norm_proxy(
    logprobs: Float[Array, "B T"],
    square_sum: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    importance_weights: Float[Array, "B T"] | None = None,
) -> Float[Array, " B"]:
    """Squared score norm of each sequence without its backward pass, `Σ_t (1 - 2 p(y_t) + Σ_v p²)`.

    Exact in the logits of one token; over several tokens the products between tokens are dropped,
    and how logits depend on parameters is taken to be alike for all. It depends on the sample
    alone, so baselines built on it stay unbiased.

    Args, raises: as in `token_score_norms`.

    Returns:
      f32 `[B]`, at least 0.

    Source: as `token_score_norms`.
    """
    norms = token_score_norms(logprobs, square_sum, mask, importance_weights=importance_weights)
    return jnp.sum(norms, axis=-1)


def weighted_centered(
    rewards: Float[Array, " B"],
    weights: Float[Array, " B"],
    group_ids: Int[Array, " B"],
    *,
    num_groups: int,
    where: Bool[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """Reward minus the weighted mean of the group, `A_i = R_i - Σ_g w R / Σ_g w`.

    The mean contains the sample itself, which biases the gradient; see `weighted_leave_one_out`.

    Args:
      rewards: one per sample; not finite where the verifier failed.
      weights: squared score norms, at least 0; a row whose weight is not finite does not count.
      group_ids: int32 in `[0, num_groups)`; any order, groups of any size.
      num_groups: static.
      where: rows that count; None for all. The others still get an advantage.

    Returns:
      f32 `[B]`; 0 in a group of one, for equal rewards (exactly) and for non-finite rewards. Where
      all weights of a group are 0 the mean is the plain one.

    Raises:
      ValueError: wrong rank, dtype or unequal lengths; concrete ids out of range or weights below
        0 (those that cannot be seen count as 0).

    Source: OBLR-PO, 2025, arXiv 2511.23310; the optimal constant baseline of Greensmith et al.
    2004. No ε stands in the denominator: it would pull the baselines of confident policies, whose
    score norms are all small, towards 0.
    """
    x, finite, counted, w = _prepared(rewards, weights, group_ids, where)
    options: dict[str, Any] = {"num_segments": num_groups, "where": counted}
    shifted, w = _relative(x, w, group_ids, options)
    columns = jnp.stack([w, w * shifted, jnp.ones_like(x), shifted], axis=1)
    mean = _mean_of(segments.per_row(segments.total(columns, group_ids, **options), group_ids))
    return jnp.where(finite, shifted - mean, 0.0)


def weighted_leave_one_out(
    rewards: Float[Array, " B"],
    weights: Float[Array, " B"],
    group_ids: Int[Array, " B"],
    *,
    num_groups: int,
    where: Bool[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """Reward minus the weighted mean of the others, `A_i = R_i - Σ_{j≠i} w_j R_j / Σ_{j≠i} w_j`.

    The baseline does not depend on the sample as long as each weight depends on its own sample
    alone, so with one on-policy step the expected gradient is the true one.

    Args, raises: as in `weighted_centered`. A row that does not count is in no sum, so its baseline
      is that of all which do.

    Returns:
      f32 `[B]`; the raw reward where no other row counts; 0 for equal rewards (exactly) and for
      non-finite rewards. Where all other weights are 0 the mean is the plain one.

    Source: as `weighted_centered`.
    """
    x, finite, counted, w = _prepared(rewards, weights, group_ids, where)
    options: dict[str, Any] = {"num_segments": num_groups, "where": counted}
    shifted, w = _relative(x, w, group_ids, options)
    columns = jnp.stack([w, w * shifted, jnp.ones_like(x), shifted], axis=1)
    others = _totals_of_others(jnp.where(counted[:, None], columns, 0.0), jnp.asarray(group_ids))
    count = segments.per_row(segments.count(group_ids, **options), group_ids)
    # A row whose id is out of range has count NaN: it is not alone, and its advantage stays NaN.
    alone = count - counted == 0
    return jnp.where(finite, jnp.where(alone, x, shifted - _mean_of(others)), 0.0)


def token_weighted_leave_one_out(
    rewards: Float[Array, "B T"],
    weights: Float[Array, "B T"],
    group_ids: Int[Array, " B"],
    *,
    num_groups: int,
    mask: Bool[Array, "B T"],
) -> Float[Array, "B T"]:
    """`weighted_leave_one_out` at each index of the row, over the rows whose mask holds there.

    With `rewards` what is still to come after each token and `weights` the running sum of
    `token_score_norms`, it is the per-token baseline of widely used code, less the sample itself.

    Args:
      rewards: per token, such as returns to go.
      weights: per token, at least 0.
      group_ids, num_groups: as in `weighted_centered`.
      mask: tokens that count and are returned.

    Returns:
      f32 `[B, T]`, 0 off the mask; the raw reward where no other row of the group has a token.

    Raises:
      ValueError: as `weighted_centered`.

    Source: as `weighted_centered`; per token in verl's optimal token baseline.
    """
    _checks.rank("rewards", rewards, 2)
    _checks.boolean(mask=mask)
    _checks.same_shape(rewards=rewards, weights=weights, mask=mask)
    _check_weights(weights)

    def column(rewards: Array, weights: Array, where: Array) -> Array:
        return weighted_leave_one_out(
            rewards, weights, group_ids, num_groups=num_groups, where=where
        )

    found = jax.vmap(column, in_axes=1, out_axes=1)(
        jnp.asarray(rewards), jnp.asarray(weights), jnp.asarray(mask)
    )
    return jnp.where(mask, found, 0.0)


class BaselineHistory(NamedTuple):
    """Of each prompt, the fading sums over its earlier samples of `w R` and of `w`, f32 `[P]`."""

    weighted_reward: Float[Array, " P"]
    weight: Float[Array, " P"]


def history_init(num_prompts: int) -> BaselineHistory:
    """No history of any prompt.

    Args:
      num_prompts: P, at least 1.

    Returns:
      two f32 `[P]` of zeros.

    Raises:
      ValueError: P below 1.
    """
    _checks.in_range("num_prompts", num_prompts, 1)
    return BaselineHistory(jnp.zeros(num_prompts), jnp.zeros(num_prompts))


def history_update(
    history: BaselineHistory,
    prompt_ids: Int[Array, " B"],
    rewards: Float[Array, " B"],
    weights: Float[Array, " B"],
    *,
    decay: float = 0.9,
    where: Bool[Array, " B"] | None = None,
) -> BaselineHistory:
    """Fades the sums of the prompts in the batch by `decay` and adds the batch's.

    Prompts that are not in the batch keep their sums.

    Args:
      history: of P prompts.
      prompt_ids: in [0, P), the same for a prompt throughout training.
      rewards, weights, where: as in `weighted_centered`.
      decay: in [0, 1); 0 keeps the last batch alone.

    Raises:
      ValueError: `decay` out of range; as `weighted_centered`.
    """
    _checks.in_range("decay", decay, 0.0, 1.0, high_open=True)
    x, _, counted, w = _prepared(rewards, weights, prompt_ids, where)
    options: dict[str, Any] = {"num_segments": history.weight.shape[0], "where": counted}
    kept = jnp.where(segments.count(prompt_ids, **options) > 0, decay, 1.0)
    return BaselineHistory(
        kept * history.weighted_reward + segments.total(w * x, prompt_ids, **options),
        kept * history.weight + segments.total(w, prompt_ids, **options),
    )


def history_baseline(
    history: BaselineHistory, prompt_ids: Int[Array, " B"], *, otherwise: Float[Array, " B"]
) -> Float[Array, " B"]:
    """Each sample's baseline `Σ w R / Σ w` from its prompt's earlier samples, f32 `[B]`.

    Args:
      history: of P prompts, from earlier batches: with the batch's own samples in it the baseline
        would be biased.
      prompt_ids: in [0, P).
      otherwise: baselines for prompts without a history.

    Raises:
      ValueError: wrong rank, dtype or unequal lengths; concrete ids out of range.
    """
    _checks.same_shape(prompt_ids=prompt_ids, otherwise=otherwise)
    weight = segments.per_row(history.weight, prompt_ids)
    total = segments.per_row(history.weighted_reward, prompt_ids)
    none = weight == 0
    return jnp.where(none, otherwise, total / jnp.where(none, 1.0, weight))


def _prepared(
    rewards: Any, weights: Any, ids: Any, where: Any
) -> tuple[Array, Array, Array, Array]:
    _checks.rank("rewards", rewards, 1)
    _checks.floating(rewards=rewards, weights=weights)
    _checks.same_shape(rewards=rewards, weights=weights, group_ids=ids)
    _check_weights(weights)
    x, finite, counted = _common.finite_part(rewards, where)
    known = jnp.isfinite(weights)
    w = jnp.where(known, jnp.maximum(jnp.asarray(weights, x.dtype), 0.0), 0.0)
    return x, finite, counted & known, w


def _relative(x: Array, w: Array, ids: Any, options: dict[str, Any]) -> tuple[Array, Array]:
    """Values above the group's smallest and weights below its largest: neither sign nor scale."""
    shifted = x - segments.per_row(segments.minimum(x, ids, **options), ids)
    largest = segments.per_row(segments.maximum(w, ids, **options), ids)
    return shifted, w / jnp.where(largest == 0, 1.0, largest)


def _mean_of(totals: Float[Array, "B 4"]) -> Float[Array, " B"]:
    """The weighted mean from sums of w, w x, 1 and x; the plain one where no weight is left."""
    weight, weighted, count, plain = jnp.moveaxis(totals, 1, 0)
    unweighted = weight == 0
    top, bottom = jnp.where(unweighted, plain, weighted), jnp.where(unweighted, count, weight)
    return top / jnp.where(bottom == 0, 1.0, bottom)


@jax.jit
def _totals_of_others(x: Float[Array, "B K"], ids: Int[Array, " B"]) -> Float[Array, "B K"]:
    """For each row the sum over the other rows of its id.

    Summed from both ends, never by taking the row off the total: one weight can exceed all others
    by more than float32's precision.
    """
    order = jnp.argsort(ids, stable=True)
    changes = ids[order][1:] != ids[order][:-1]
    edge = jnp.ones(1, bool)
    before = _totals_before(x[order], jnp.concatenate([edge, changes]))
    after = _totals_before(x[order][::-1], jnp.concatenate([edge, changes[::-1]]))[::-1]
    return jnp.zeros_like(x).at[order].set(before + after)


def _totals_before(rows: Float[Array, "B K"], starts: Bool[Array, " B"]) -> Float[Array, "B K"]:
    """Sum of the earlier rows of each run; `starts` marks where runs begin."""

    def add(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        (started, total), (starts, value) = left, right
        return started | starts, jnp.where(starts, value, total + value)

    flags = starts[:, None]
    shifted = jnp.where(flags, 0.0, jnp.roll(rows, 1, axis=0))
    return jax.lax.associative_scan(add, (jnp.broadcast_to(flags, rows.shape), shifted))[1]


def _readable(*arrays: Any) -> bool:
    return _checks.is_concrete(*arrays) and all(
        getattr(a, "is_fully_addressable", True) for a in arrays
    )


def _check_weights(weights: Any) -> None:
    if _readable(weights) and np.any(np.asarray(weights) < 0):
        raise ValueError(f"weights: expected numbers ≥ 0, got {np.min(np.asarray(weights))}")


def _check_square_sum(values: np.ndarray) -> None:
    if np.any(values < 0) or np.any(values > 1 + SQUARE_SUM_SLACK):
        raise ValueError(
            f"square_sum: expected numbers in [0, 1], got values in "
            f"[{values.min()}, {values.max()}]"
        )
