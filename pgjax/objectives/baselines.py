"""Recipes that choose what a reward is compared with, and the parts of normalisation one by one.

Expected gradients are stated for one on-policy step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pgjax import _checks, advantages, aggregate, segments
from pgjax.advantages import optimal_baseline, sets
from pgjax.objectives._parts import by_group, clipped, score_function
from pgjax.objectives.facts import extra, trajectory_total
from pgjax.objectives.objective import Memory, Objective
from pgjax.rewards import contrastive
from pgjax.types import Rollout

RowFunction = Callable[[Rollout], Array]


prompt_ids_of, used_of = extra("prompt_ids"), extra("used")


def rewards_of(rollout: Rollout) -> Array:
    return rollout.rewards


# Baselines of least variance


def score_norms(rollout: Rollout) -> Float[Array, " B"]:
    """`advantages.score_norm_proxy` of the old policy; trajectories of several rows are summed."""
    old = rollout.old
    assert old is not None and old.square_sum is not None  # the objective has checked it
    norms = optimal_baseline.score_norm_proxy(old.logprobs, old.square_sum, rollout.mask)
    return trajectory_total(rollout, norms)


def oblr(*, weights: RowFunction = score_norms) -> Objective:
    """REINFORCE with the baseline of least variance, leaving out the sample itself.

    `A_i = R_i - Σ_{j≠i} w_j R_j / Σ_{j≠i} w_j` with `w` the squared norm of the sample's score.

    Args:
      weights: `rollout -> f32[B]`, at least 0, each from its own sample; default: the proxy from
        the old policy's probabilities.

    Expected gradient: the policy gradient, unbiased, for groups of any size.

    Source: OBLR-PO, 2025, arXiv 2511.23310; its step size is `optim.scale_by_gradient_snr`. With
    fewer than about 32 samples a group the estimate of the baseline is noisy, and `rloo` or
    `oblr_with_history` may have the smaller variance.
    """

    def advantage(rollout: Rollout) -> Array:
        return _weighted(rollout, weights(rollout))

    return Objective(
        advantage=advantage,
        surrogate=score_function,
        aggregate=aggregate.sequence_mean_token_sum,
        old_needs=frozenset({"square_sum"}),
    )


def oblr_with_history(
    *,
    num_prompts: int,
    decay: float = 0.9,
    prompt_ids: RowFunction = prompt_ids_of,
    weights: RowFunction = score_norms,
) -> Objective:
    """`oblr` with each prompt's baseline from earlier batches, where there are any.

    Args:
      num_prompts: P, of the whole training set; the objective keeps two numbers for each.
      decay: of earlier samples each time the prompt comes, in [0, 1).
      prompt_ids: `rollout -> int32[B]` in [0, P); group ids are of one batch alone.
      weights: as in `oblr`.

    Expected gradient: the policy gradient, unbiased.

    Source: as `oblr`; the history is an addition.
    """
    _checks.in_range("num_prompts", num_prompts, 1)
    _checks.in_range("decay", decay, 0.0, 1.0, high_open=True)

    def advantage(rollout: Rollout) -> Array:
        others = _weighted(rollout, weights(rollout))
        assert rollout.memory is not None  # the objective has made it
        rewards = rollout.rewards
        baseline = optimal_baseline.history_baseline(
            rollout.memory, prompt_ids(rollout), otherwise=rewards - others
        )
        return jnp.where(jnp.isfinite(rewards), rewards - baseline, 0.0)

    def remember(memory: Any, rollout: Rollout) -> Any:
        first = None
        if rollout.trajectory_ids is not None:
            first = segments.first_rows(rollout.trajectory_ids)
        return optimal_baseline.history_update(
            memory,
            prompt_ids(rollout),
            rollout.rewards,
            weights(rollout),
            decay=decay,
            where=first,
        )

    return Objective(
        advantage=advantage,
        surrogate=score_function,
        aggregate=aggregate.sequence_mean_token_sum,
        memory=Memory(lambda: optimal_baseline.history_init(num_prompts), remember),
        old_needs=frozenset({"square_sum"}),
    )


def _weighted(rollout: Rollout, weights: Array) -> Array:
    def function(rewards: Array, group_ids: Array, **options: Any) -> Array:
        return optimal_baseline.weighted_leave_one_out(rewards, weights, group_ids, **options)

    return by_group(function)(rollout)


# Sets of samples


def polychromic(
    *,
    group_size: int,
    set_size: int = 4,
    set_members: Int[Array, "M n"] | None = None,
    signatures: RowFunction | None = None,
    diversity: sets.Diversity = sets.unique_fraction,
    low: float = 0.2,
    high: float = 0.2,
) -> Objective:
    """Samples are rewarded in sets, for mean reward times diversity; normalised, PPO clip.

    `f(set) = mean R · d(set)`, `A_i = mean over the sets with i of (f - mean f)`, then normalised
    over the batch.

    Args:
      group_size: N samples of each prompt, all groups alike. Rewards are to lie in [0, 1].
      set_size: n ≤ N samples of a set.
      set_members: indices of the sets' members, such as `advantages.random_sets(key, N, n, M)`,
        instead of all subsets of `set_size`.
      signatures: `rollout -> int[B]`, equal where samples of a group count as the same; None: the
        tokens of the completion, compared exactly.
      diversity: `signatures[..., n] -> [...]` in [0, 1]; default: the share of different ones.
      low, high: clip widths.

    Expected gradient: before the normalisation and with sums over tokens, over all subsets,
    `1/n - 1/N` times the gradient of the expected score of a set, exactly.

    Source: polychromic objectives, 2025, arXiv 2509.25424. Its sets begin at states all along a
    trajectory (`sampling.vines`), here at the prompt; its penalty on the divergence from the
    behaviour is left to `regularizers`.
    """
    chosen = jnp.asarray(
        sets.all_sets(group_size, set_size) if set_members is None else set_members
    )

    def labels(rollout: Rollout) -> Array:
        if signatures is not None:
            return signatures(rollout)
        order, _ = sets.group_order(rollout.group_ids, group_size=group_size)
        found = sets.duplicate_labels(rollout.tokens[order], rollout.mask[order])
        return jnp.zeros(order.size, found.dtype).at[order.reshape(-1)].set(found.reshape(-1))

    def score(returns: Array, members: Array) -> Array:
        return sets.polychromic(returns, members, diversity=diversity)

    def advantage(rollout: Rollout) -> Array:
        if rollout.trajectory_ids is not None:
            raise ValueError("trajectory_ids: sets are of single rows, expected None")
        valid = jnp.isfinite(rollout.rewards)
        raw = sets.grouped_set_advantage(
            score,
            chosen,
            rollout.group_ids,
            valid,
            rollout.rewards,
            labels(rollout),
            group_size=group_size,
        )
        normal = jnp.where(valid, advantages.batch_normalize(raw, where=valid), 0.0)
        # Groups of another size are NaN and must not become a silent 0.
        return jnp.where(jnp.isnan(raw), raw, normal)

    return Objective(
        advantage=advantage, surrogate=clipped(low, high), aggregate=aggregate.token_mean
    )


# An optional action


def gcpo(
    *,
    length_reference: float,
    used: RowFunction = used_of,
    correct: RowFunction = rewards_of,
    contrast: RowFunction | None = None,
    margin: float = 0.1,
    use_weight: float = 0.5,
    length_weight: float = 0.1,
    low: float = 0.2,
    high: float = 0.2,
    epsilon: float = 1e-6,
) -> Objective:
    """GRPO with a bonus for an optional action where it helps, and a malus where it harms.

    `R_i = r_i + use_weight M_g u_i + length_weight min(length_i / length_reference, 1)`, with
    `M_g ∈ {-1, 0, 1}` from the contrast of samples with and without the action.

    Args:
      length_reference: tokens from which on a longer sample earns no more.
      used: `rollout -> [B]`, bool or 0 and 1: whether the sample took the action.
      correct: `rollout -> f32[B]` of zeros and ones, what is contrasted; default: the rewards.
      contrast: `rollout -> bool[B]`, samples drawn with the action forced or forbidden. They decide
        M and are not learnt from; None: the group itself is contrasted.
      margin: difference in the share of correct samples that must be exceeded.
      use_weight, length_weight: see above.
      low, high: clip widths.
      epsilon: added to the standard deviation.

    Expected gradient: biased as `grpo`'s, of the reshaped reward.

    Source: GCPO in GeometryZero, 2025, arXiv 2506.07160. Weights, margin and the form of the length
    reward are chosen here.
    """
    _checks.in_range("margin", margin, 0.0)

    def shaped(rollout: Rollout) -> Float[Array, " B"]:
        contrasted = None if contrast is None else contrast(rollout)
        use, ids = used(rollout), rollout.group_ids
        signs = contrastive.contrastive_mask(
            correct(rollout),
            use,
            ids,
            num_groups=ids.shape[0],
            margin=margin,
            where=contrasted,
        )
        rewards = contrastive.gcpo_reward(
            rollout.rewards,
            use,
            rollout.mask.sum(-1),
            signs,
            ids,
            use_weight=use_weight,
            length_weight=length_weight,
            length_reference=length_reference,
        )
        # Without a reward a sample is in no statistic and in no loss.
        return rewards if contrasted is None else jnp.where(contrasted, jnp.nan, rewards)

    return Objective(
        advantage=by_group(advantages.group_normalize, epsilon=epsilon),
        surrogate=clipped(low, high),
        aggregate=aggregate.sequence_mean_token_mean,
        rewards=shaped,
    )


# Normalisation in two steps

Center = Callable[..., Float[Array, " B"]]
Scale = Callable[..., Float[Array, " B"]]


def normalized(*, center: Center, scale: Scale) -> Callable[[Rollout], Float[Array, " B"]]:
    """The advantage `scale(center(R))` as a part of an objective.

    With `centered` and `by_group_std` it is GRPO's (but 0 in a group of one), with `by_batch_std`
    Lite PPO's, with `unscaled` Dr. GRPO's; `batch_centered` and `by_batch_std` normalise the batch.

    Args:
      center: `advantages.centered`, `batch_centered`, `uncentered`, or one's own
        `(rewards, group_ids, *, num_groups, where) -> f32[B]`.
      scale: `by_group_std`, `by_batch_std`, `by_centered_batch_std`, `unscaled`, or one's own
        `(deviations, rewards, group_ids, *, num_groups, where) -> f32[B]`.

    Source: the ablation in "Tricks or Traps?", Liu et al. 2025, arXiv 2508.08221.
    """

    def function(rewards: Array, group_ids: Array, **options: Any) -> Array:
        return scale(center(rewards, group_ids, **options), rewards, group_ids, **options)

    return by_group(function)
