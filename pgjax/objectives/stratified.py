"""Recipes that compare within parts of a group, or weigh what the group says.

All ratios are taken against `rollout.behavior_logprobs`. Each recipe differs from GRPO or Dr. GRPO
in its rewards or its advantage alone, so its other parts can be swapped like theirs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pgjax import _checks, aggregate, segments
from pgjax.advantages import conditional, group_normalize, novelty, reweight, stratified
from pgjax.objectives._parts import by_group, clipped
from pgjax.objectives.facts import (
    length_bucket,
    mean_entropy,
    number_of_turns,
    one_row_each,
    response_length,
    trajectory_total,
)
from pgjax.objectives.group_relative import grpo
from pgjax.objectives.objective import Objective
from pgjax.types import Rollout


def stratified_grpo(
    *,
    alpha: float,
    strata: Callable[[Rollout], Int[Array, " B"]] | None = None,
    bucket_width: int | None = None,
    low: float = 0.2,
    high: float = 0.2,
    epsilon: float = 1e-8,
    ddof: int = 0,
    kl_coefficient: float = 0.0,
) -> Objective:
    """Stratified GRPO (SAN): rewards normalised among samples of like structure, then blended.

    `A_i = α (R_i - mean_{g,k}) / (std_{g,k} + ε) + (1 - α) (R_i - mean_g) / (std_g + ε)`, k the
    stratum; otherwise `grpo`.

    Args:
      alpha: α in [0, 1]. The paper's value is not known. 1 leaves the choice between strata
        unlearnt.
      strata: any integers, from the whole rollout; default: `number_of_turns`, which in the
        paper's search agents is the number of search calls plus one.
      bucket_width: instead of `strata`, strata of so many tokens of response length.
      low, high: clip widths.
      epsilon, ddof: of both normalisations.
      kl_coefficient: as in `grpo`.

    Expected gradient: biased as `grpo`'s; the first term has no component along the probabilities
    of the strata.

    Raises:
      ValueError: both `strata` and `bucket_width`, numbers out of range; when the rollout is seen,
        no `turn_ids` where turns are to be counted.

    Source: 2025, arXiv 2510.06214.
    """
    _checks.in_range("alpha", alpha, 0.0, 1.0)
    if strata is not None and bucket_width is not None:
        raise ValueError(
            "strata and bucket_width: expected at most one of them, got both, "
            f"bucket_width={bucket_width}"
        )
    if bucket_width is not None:
        _checks.in_range("bucket_width", bucket_width, 1)
        strata = functools.partial(length_bucket, width=bucket_width)
    structure = number_of_turns if strata is None else strata

    def advantage(rollout: Rollout) -> Array:
        blended = functools.partial(
            stratified.stratified_advantage, strata=structure(rollout), alpha=alpha
        )
        return by_group(blended, epsilon=epsilon, ddof=ddof)(rollout)

    base = grpo(low=low, high=high, kl_coefficient=kl_coefficient)
    return dataclasses.replace(base, advantage=advantage)


def canon(
    *,
    length: int,
    metric: Callable[[Rollout], Array] | None = None,
    metric_needs: frozenset[str] = frozenset(),
    mix: float | Callable[[Rollout], Float[Array, ""]] = 1.0,
    high_discount: float = 1.0,
    low_discount: float = 1.0,
    offset: float = 0.0,
    low: float = 0.2,
    high: float = 0.28,
) -> Objective:
    """CANON: the halves of a group above and below a metric's median, compared with each other.

    `A_i = μ (R_i - mean of the other half) + (1 - μ) (R_i - mean of the own half)`; tokens are
    summed and divided by the constant `length`. μ = 1/2 is `dr_grpo` for groups of even size.

    Args:
      length: the generation budget in tokens, fixed over training.
      metric: one number a sample, from the whole rollout; default: `response_length`. For
        `mean_entropy`, see `canon_entropy`.
      metric_needs: what the metric reads of `rollout.old`.
      mix: μ in [0, 1], or a function of the rollout: `curriculum.accuracy_mix` of its rewards, or a
        schedule of `rollout.memory` in an objective whose memory is `objectives.step_count()`.
      high_discount, low_discount, offset: tilt the comparison, see
        `advantages.conditional_advantage`; `high_discount` < 1 favours short responses.
      low, high: clip widths.

    Expected gradient: that of `dr_grpo` plus `(μ - 1/2)` times a term along the metric, of the size
    of the difference between the halves' mean rewards.

    Source: 2025, arXiv 2509.23962.
    """
    _checks.in_range("length", length, 1)
    measured = response_length if metric is None else metric
    if not callable(mix):
        _checks.in_range("mix", mix, 0.0, 1.0)

    def advantage(rollout: Rollout) -> Array:
        values = measured(rollout)
        coefficient = mix(rollout) if callable(mix) else mix

        def between_halves(
            rewards: Array, group_ids: Array, *, num_groups: int, where: Array | None
        ) -> Array:
            finite = jnp.isfinite(rewards)
            counted = finite if where is None else finite & where
            return conditional.conditional_advantage(
                rewards,
                group_ids,
                conditional.median_split(values, group_ids, num_groups=num_groups, where=counted),
                num_groups=num_groups,
                mix=coefficient,
                high_discount=high_discount,
                low_discount=low_discount,
                offset=offset,
                where=where,
            )

        return by_group(between_halves)(rollout)

    return Objective(
        advantage=advantage,
        surrogate=clipped(low, high),
        aggregate=functools.partial(aggregate.constant_length, length=length),
        old_needs=metric_needs,
    )


def canon_entropy(
    *,
    length: int,
    mix: float | Callable[[Rollout], Float[Array, ""]] = 1.0,
    high_discount: float = 1.0,
    low_discount: float = 1.0,
    offset: float = 0.0,
    low: float = 0.2,
    high: float = 0.28,
) -> Objective:
    """`canon` with the mean entropy of a response's tokens under the old policy as its metric.

    Args: as in `canon`; `low_discount` < 1 favours uncertain responses.

    Expected gradient: as `canon`'s.

    Source: 2025, arXiv 2509.23962.
    """
    return canon(
        length=length,
        metric=mean_entropy,
        metric_needs=frozenset({"entropy"}),
        mix=mix,
        high_discount=high_discount,
        low_discount=low_discount,
        offset=offset,
        low=low,
        high=high,
    )


def adora(
    *,
    max_length: float,
    success_threshold: float = 0.5,
    advantageous: Callable[[reweight.RolloutUtility], Bool[Array, " S"]] | None = None,
    lengths: Callable[[Rollout], Array] | None = None,
    rate: float = 0.5,
    low_weight: float = 1.0,
    high_weight: float = 2.0,
    low: float = 0.2,
    high: float = 0.2,
    epsilon: float = 1e-6,
    ddof: int = 1,
    kl_coefficient: float = 0.0,
) -> Objective:
    """ADORA: GRPO whose advantages are multiplied by a weight of their group.

    `A_i = w_g (R_i - mean_g) / (std_g + ε)`, with w the higher weight where the longest success is
    longer than the mean failure and at most a share `rate` of the samples succeeds.

    Args:
      max_length: a failure of so many tokens was cut off and enters no mean.
      success_threshold: a sample succeeds if its reward is above.
      advantageous: groups with the higher weight; default: those named above. How the paper joins
        the two criteria for text is not known; both must hold here.
      lengths: of the samples; default: `response_length`.
      rate: in [0, 1]; 1 leaves the criterion of length alone, as for vision models.
      low_weight, high_weight: 1 and 2 amplify, as for text; 0.1 and 1 attenuate, as for vision.
      low, high, epsilon, ddof, kl_coefficient: as in `grpo`.

    Expected gradient: as `grpo`'s, prompts weighted by w.

    Source: 2026, arXiv 2602.10019.
    """
    base = grpo(low=low, high=high, epsilon=epsilon, ddof=ddof, kl_coefficient=kl_coefficient)
    _checks.in_range("rate", rate, 0.0, 1.0)
    return with_utility_weights(
        base,
        max_length=max_length,
        success_threshold=success_threshold,
        advantageous=functools.partial(rare_and_longer, rate=rate)
        if advantageous is None
        else advantageous,
        lengths=lengths,
        low_weight=low_weight,
        high_weight=high_weight,
    )


def with_utility_weights(
    objective: Objective,
    *,
    max_length: float,
    advantageous: Callable[[reweight.RolloutUtility], Bool[Array, " S"]],
    success_threshold: float = 0.5,
    lengths: Callable[[Rollout], Array] | None = None,
    low_weight: float = 1.0,
    high_weight: float = 2.0,
) -> Objective:
    """Multiplies an objective's advantages by ADORA's weight of their group.

    Args, source: as in `adora`.

    Returns:
      an objective that differs in its advantage alone.
    """
    _checks.in_range("max_length", max_length, 0.0, low_open=True)
    _checks.in_range("low_weight", low_weight, 0.0, high_open=True)
    _checks.in_range("high_weight", high_weight, 0.0, high_open=True)
    length_of = response_length if lengths is None else lengths

    def advantage(rollout: Rollout) -> Array:
        utility = reweight.rollout_utility(
            rollout.rewards,
            length_of(rollout),
            rollout.group_ids,
            num_groups=rollout.rewards.shape[0],
            max_length=max_length,
            success_threshold=success_threshold,
            where=one_row_each(rollout),
        )
        weights = reweight.utility_weights(advantageous(utility), low=low_weight, high=high_weight)
        of_rows = segments.per_row(weights, rollout.group_ids)
        plain = objective.advantage(rollout)
        return plain * (of_rows if plain.ndim == 1 else of_rows[:, None])

    return dataclasses.replace(objective, advantage=advantage)


def rare_and_longer(utility: reweight.RolloutUtility, *, rate: float = 0.5) -> Bool[Array, " S"]:
    """Groups that succeed at most at `rate`, and longer than they fail: both ADORA's criteria."""
    rare = reweight.success_is_rare(utility, rate=rate)
    return rare & reweight.success_is_longer(utility, without_failure=True)


def g2rl(
    *,
    strength: float = 0.5,
    bound: float = 3.0,
    success_threshold: float = 0.5,
    shape: Callable[..., Float[Array, " B"]] = novelty.signed_novelty_reward,
    without_spread: float = 0.5,
    features: Callable[[Rollout], Float[Array, "B D"]] | None = None,
    low: float = 0.2,
    high: float = 0.2,
    epsilon: float = 1e-6,
    kl_coefficient: float = 0.0,
) -> Objective:
    """G2RL: GRPO on rewards shaped by how new a response's direction of update is in its group.

    Rewards become ±1, then `shape(R, ν̄)` with ν̄ the relative novelty of the score features, then
    `A_i = (R̃_i - mean_g) / (std_g + ε)` with the population's standard deviation.

    Args:
      strength: λ ≥ 0. The paper does not state it; below 1, right answers stay ahead of wrong ones.
      bound: of the shaped reward, > 0.
      success_threshold: a response is right (+1) if its reward is above, else wrong (-1).
      shape: `(rewards, novelty, *, strength, bound) -> rewards`: `advantages.novelty`'s
        `signed_novelty_reward`, `printed_novelty_reward`, `scaled_novelty_reward`, or one's own.
      without_spread: ν̄ in groups whose novelties agree; 1/2 is neutral for
        `signed_novelty_reward`, 0 for the other two.
      features: one vector a sample, from the whole rollout; default: `score_features` of the old
        policy.
      low, high: clip widths.
      epsilon: added to the standard deviation; the paper has it inside the root.
      kl_coefficient: as in `grpo`; the paper used 0.001.

    Expected gradient: biased as `grpo`'s, and that of a reward which depends on the batch.

    Source: 2025, arXiv 2512.15687.
    """
    _checks.in_range("strength", strength, 0.0, high_open=True)
    _checks.in_range("bound", bound, 0.0, low_open=True)
    vectors = _score_features if features is None else features

    def shaped(rollout: Rollout) -> Array:
        given = rollout.rewards
        signs = jnp.where(given > success_threshold, 1.0, -1.0)
        signs = jnp.where(jnp.isfinite(given), signs, jnp.nan)
        size = given.shape[0]
        counted = jnp.isfinite(given) & one_row_each(rollout)
        found = novelty.feature_novelty(
            vectors(rollout), signs, rollout.group_ids, num_groups=size, where=counted
        )
        relative = novelty.relative_novelty(
            found,
            rollout.group_ids,
            num_groups=size,
            without_spread=without_spread,
            where=counted,
        )
        return shape(signs, relative, strength=strength, bound=bound)

    base = grpo(low=low, high=high, kl_coefficient=kl_coefficient)
    return dataclasses.replace(
        base,
        rewards=shaped,
        advantage=by_group(group_normalize, epsilon=epsilon, ddof=0),
        old_needs=frozenset({"score_features"}) if features is None else frozenset(),
    )


def _score_features(rollout: Rollout) -> Float[Array, "B H"]:
    """Score features of whole trajectories: the mean over rows, weighted by their tokens."""
    assert rollout.old is not None and rollout.old.score_features is not None
    features = rollout.old.score_features
    if rollout.trajectory_ids is None:
        return features
    return trajectory_total(rollout, features * rollout.mask.sum(-1, keepdims=True))
