"""COPO: how much the answers to a prompt agree, and what prompts earn against each other."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pgjax import _checks, segments
from pgjax.advantages import _common


def answer_entropy(
    answer_ids: Int[Array, " B"],
    group_ids: Int[Array, " B"],
    *,
    num_groups: int,
    base: float = 2.0,
    where: Bool[Array, " B"] | None = None,
) -> Float[Array, " S"]:
    """Entropy of the answers sampled for each prompt, `H = -Σ_z p(z) log p(z)`, p by frequency.

    Args:
      answer_ids: any integers; samples of one prompt with the same answer share one. Samples from
        which no answer could be read are one answer if they share an id, and each its own if they
        do not: that is the caller's choice.
      group_ids: int32 in `[0, num_groups)`.
      num_groups: S, static.
      base: of the logarithm, > 1.
      where: rows that count; None for all.

    Returns:
      f32 `[S]`, from 0 (all agree, exactly) to `log n` (all differ); 0 for empty groups.

    Raises:
      ValueError: wrong rank, dtype or unequal lengths, `base` ≤ 1; concrete ids out of range.

    Source: Han et al. 2025 (COPO), arXiv 2508.04138.
    """
    _checks.in_range("base", base, 1.0, low_open=True, high_open=True)
    _checks.rank("answer_ids", answer_ids, 1)
    _checks.integer(answer_ids=answer_ids, group_ids=group_ids)
    _checks.same_shape(answer_ids=answer_ids, group_ids=group_ids, where=where)
    pairs = _pair_ids(group_ids, answer_ids)
    same = segments.count(pairs, num_segments=pairs.shape[0], where=where)[pairs]
    size = segments.per_row(
        segments.count(group_ids, num_segments=num_groups, where=where), group_ids
    )
    surprise = jnp.log(size / jnp.maximum(same, 1)) / jnp.log(base)
    return segments.mean(surprise, group_ids, num_segments=num_groups, where=where)


def consistency_factor(
    entropy: Float[Array, " S"], group_sizes: Int[Array, " S"], *, base: float = 2.0
) -> Float[Array, " S"]:
    """Factor of a prompt's mean reward, `c = 1 - λ H` with `λ = (1 - 1/n) / log n`.

    Args:
      entropy: of `answer_entropy`, in the same base.
      group_sizes: n ≥ 0, samples of each prompt.
      base: > 1.

    Returns:
      f32 `[S]`, from 1 (all answers agree) to 1/n (all differ); 1 for n < 2, where nothing can
      differ.

    Raises:
      ValueError: unequal lengths, wrong dtypes, `base` ≤ 1.

    Source: Han et al. 2025 (COPO), arXiv 2508.04138.
    """
    _checks.in_range("base", base, 1.0, low_open=True, high_open=True)
    _checks.floating(entropy=entropy)
    _checks.same_shape(entropy=entropy, group_sizes=group_sizes)
    n = jnp.maximum(group_sizes, 2).astype(jnp.float32)
    slope = (1 - 1 / n) / (jnp.log(n) / jnp.log(base))
    return jnp.where(group_sizes < 2, 1.0, 1 - slope * entropy)


def global_prompt_advantage(
    rewards: Float[Array, " B"],
    group_ids: Int[Array, " B"],
    *,
    num_groups: int,
    factors: Float[Array, " S"] | None = None,
    epsilon: float = 1e-6,
    ddof: int = 1,
    where: Bool[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """Each prompt's mean reward, normalised over the prompts of the batch.

    `A(q) = (R(q) - mean_P R) / (std_P R + ε)`, `R(q) = c(q) mean_{i in q} R_i`; every prompt counts
    once, whatever its number of samples, and all its samples get `A(q)`.

    Args:
      rewards: one per sample; not finite where the verifier failed.
      group_ids: int32 in `[0, num_groups)`; any order, groups of any size.
      num_groups: S, static.
      factors: c, such as `consistency_factor`; None: 1.
      epsilon: ε ≥ 0.
      ddof: 1 for the sample standard deviation over prompts, 0 for the population's; static.
      where: rows that count, such as the first row of each trajectory; None for all.

    Returns:
      f32 `[B]`; 0 with a single prompt, for equal means, and for samples with non-finite rewards.

    Raises:
      ValueError: wrong rank, dtype or unequal lengths; `epsilon` < 0, `ddof` neither 0 nor 1;
        concrete ids out of range.

    Source: Han et al. 2025 (COPO), arXiv 2508.04138.
    """
    _common.check_scale(epsilon, ddof)
    _checks.rank("rewards", rewards, 1)
    _checks.same_shape(rewards=rewards, group_ids=group_ids)
    x, finite, counted = _common.finite_part(rewards, where)
    options: dict[str, Any] = {"num_segments": num_groups, "where": counted}
    means = segments.mean(x, group_ids, **options)
    if factors is not None:
        _checks.same_shape(means=means, factors=factors)
        means = means * factors
    present = segments.count(group_ids, **options) > 0
    deviation, spread = _common.deviations_and_std(means, present, ddof)
    advantage = _common.divided(deviation, spread, spread + epsilon)
    return jnp.where(finite, segments.per_row(advantage, group_ids), 0.0)


def consistency_weight(
    entropy: Float[Array, " S"], *, gamma: float = 20.0, rho: float = 1.5
) -> Float[Array, " S"]:
    """Weight of the loss within the group, `w = sigmoid(γ (H - ρ))`; the rest goes across prompts.

    Args:
      entropy: of `answer_entropy`, any shape.
      gamma: γ ≥ 0, how sharp the switch is.
      rho: entropy at which both weigh 1/2; only values below `log n` let groups of n compete
        within themselves.

    Returns:
      f32 in [0, 1], of the same shape, increasing in the entropy.

    Raises:
      ValueError: `gamma` < 0, a non-floating dtype.

    Source: Han et al. 2025 (COPO), arXiv 2508.04138.
    """
    _checks.in_range("gamma", gamma, 0.0, high_open=True)
    _checks.floating(entropy=entropy)
    return jax.nn.sigmoid(gamma * (jnp.asarray(entropy) - rho))


def _pair_ids(first: Array, second: Array) -> Array:
    """One consecutive integer for each pair that occurs."""
    first, second = jnp.asarray(first), jnp.asarray(second)
    order = jnp.lexsort((second, first))
    a, b = first[order], second[order]
    starts = jnp.concatenate([jnp.zeros(a.shape, bool)[:1], (a[1:] != a[:-1]) | (b[1:] != b[:-1])])
    labels = jnp.cumsum(starts.astype(jnp.int32))
    return jnp.zeros(a.shape, jnp.int32).at[order].set(labels)
