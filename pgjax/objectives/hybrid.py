"""Recipes on data that the learner's policy did not draw: demonstrations, another engine's samples.

A batch with demonstrations holds them as further rows of their prompt's group, marked in
`rollout.extras["demonstrated"]` (bool `[B]`). Their `behavior_logprobs` are not read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pgjax import _checks, advantages, aggregate, masks, segments, surrogates
from pgjax.advantages import hybrid
from pgjax.objectives._parts import advantages_of, by_group
from pgjax.objectives.facts import extra, one_row_each
from pgjax.objectives.objective import Objective
from pgjax.surrogates import offline
from pgjax.surrogates.minirl import minirl as minirl_loss
from pgjax.types import PolicyOutputs, Rollout

Coefficients = Callable[[Float[Array, " S"]], tuple[Float[Array, " S"], Float[Array, " S"]]]


def demonstrated(rollout: Rollout) -> Bool[Array, " B"]:
    """`rollout.extras["demonstrated"]`: the rows that are demonstrations."""
    rows = extra("demonstrated")(rollout)
    _checks.boolean(**{'extras["demonstrated"]': rows})
    return rows


def mixed(
    *, length: int, coefficients: Coefficients, imitation_coefficient: float = 1.0
) -> Objective:
    """For each prompt `α L_RL + β L_imitation`, by the success rate of its own samples.

    `L_RL`: the mean over the prompt's samples of `-Σ_t r_t A / length`, `A = R - mean R`, r the
    token ratio, without clipping. `L_imitation`: the mean of `-log π` over the tokens of the
    prompt's demonstrations. The loss is the mean over prompts.

    Args:
      length: the generation budget in tokens, fixed over training.
      coefficients: success rates `[S]` to (α, β), `[S]` each: `advantages.switch_coefficients`,
        `advantages.soft_coefficients`, or one's own; α = β = 1 is a constant mix.
      imitation_coefficient: multiplies β, ≥ 0.

    Needs `rollout.extras["demonstrated"]`, and a demonstration for each prompt with β > 0. A prompt
    without one is an error outside `jit` (and under `jax.experimental.checkify`); within, it gets
    no imitation. Rewards lie in [0, 1], their mean being the success rate; those of demonstrations
    are not read. An entropy bonus is one more regularizer.

    Expected gradient: for α = 1, β = 0 throughout, `(1 - 1/G) / length` times the policy gradient;
    for α = 0, β = 1 that of the demonstrations' log-likelihood.

    Source: Lv et al. 2025, arXiv 2509.04419, whose code sums over sequences in the one loss and
    averages over all demonstrations' tokens in the other; here a prompt's two losses are means.
    """
    _checks.in_range("length", length, 1)
    _checks.in_range("imitation_coefficient", imitation_coefficient, 0.0, high_open=True)

    def advantage(rollout: Rollout) -> Array:
        given = demonstrated(rollout)
        own = advantages.centered(
            rollout.rewards,
            rollout.group_ids,
            num_groups=rollout.rewards.shape[0],
            where=one_row_each(rollout) & ~given,
        )
        return jnp.where(given, 1.0, own)

    def surrogate(outputs: PolicyOutputs, rollout: Rollout) -> Array:
        given = demonstrated(rollout)[:, None]
        denominator = jnp.where(given, outputs.logprobs, rollout.behavior_logprobs)
        everywhere = jnp.ones(denominator.shape, bool)
        return surrogates.unified(outputs.logprobs, denominator, advantages_of(rollout), everywhere)

    def multiplier(rollout: Rollout) -> Array:
        given, ids = demonstrated(rollout), rollout.group_ids
        rows = ids.shape[0]
        finite = masks.finite_rewards(rollout.rewards)
        own = one_row_each(rollout) & ~given & finite
        options: dict[str, Any] = {"num_segments": rows}
        rate = segments.mean(rollout.rewards, ids, where=own, **options)
        alpha, beta = coefficients(rate)
        samples = segments.count(ids, where=own, **options)
        tokens = segments.total(rollout.mask.sum(-1), ids, where=given & finite, **options)
        _check_demonstrated((beta > 0) & (samples > 0), tokens > 0)
        prompts = jnp.maximum(jnp.sum(segments.count(ids, **options) > 0), 1)
        reinforce = alpha / jnp.maximum(samples, 1)
        imitate = imitation_coefficient * length * beta / jnp.maximum(tokens, 1)
        return rows / prompts * jnp.where(given, imitate[ids], reinforce[ids])

    return Objective(
        advantage=advantage,
        surrogate=surrogate,
        aggregate=functools.partial(aggregate.constant_length, length=length),
        multiplier=multiplier,
    )


def hpt(*, length: int, gate: float = 0.0, imitation_coefficient: float = 1.0) -> Objective:
    """HPT: each prompt learns from its own samples if enough are right, else from a demonstration.

    `mixed` with `advantages.switch_coefficients`.

    Args:
      length: the generation budget in tokens.
      gate: success rate, in [0, 1], above which a prompt is reinforced; 0, or 2/8 for models that
        start weak.
      imitation_coefficient: of the demonstrations' loss; the paper's is 1, or 0.3 for its smallest
        model.

    Expected gradient: see `mixed`.

    Source: Lv et al. 2025, arXiv 2509.04419.
    """
    _checks.in_range("gate", gate, 0.0, 1.0)
    return mixed(
        length=length,
        coefficients=functools.partial(hybrid.switch_coefficients, gate=gate),
        imitation_coefficient=imitation_coefficient,
    )


def luffy(
    *, shape: float = 0.1, low: float = 0.2, high: float = 0.2, epsilon: float = 1e-6, ddof: int = 1
) -> Objective:
    """LUFFY: demonstrations as further members of the group, their ratio shaped by `π / (π + γ)`.

    Own samples: GRPO's advantage and clip. Demonstrations: `-A γ π / (π + γ)² ∇ log π`, no clip.
    Advantages are normalised over both; token mean over both.

    Args:
      shape: γ > 0.
      low, high: clip widths for own samples.
      epsilon, ddof: as in `grpo`.

    Needs `rollout.extras["demonstrated"]`, and rewards of demonstrations.

    Expected gradient: without demonstrations, as `grpo`'s under a token mean.

    Source: Yan et al. 2025, arXiv 2504.14945, with the demonstrator's probability taken as 1, as
    there.
    """

    def on_demonstrations(logprobs: Array, advantage: Array, mask: Array) -> Array:
        return offline.shaped(logprobs, advantage, mask, shape=shape)

    _checks.in_range("shape", shape, 0.0, low_open=True, high_open=True)
    return _with_demonstrations(on_demonstrations, low=low, high=high, epsilon=epsilon, ddof=ddof)


def srft(*, low: float = 0.2, high: float = 0.2, epsilon: float = 1e-6, ddof: int = 1) -> Objective:
    """SRFT's off-policy term beside GRPO: on demonstrations `-A π ∇ log π`, no clip.

    `luffy` without its shaping.

    Args:
      low, high, epsilon, ddof: as in `luffy`.

    Needs `rollout.extras["demonstrated"]`, and rewards of demonstrations.

    Expected gradient: without demonstrations, as `grpo`'s under a token mean.

    Source: Fu et al. 2025, arXiv 2506.19767, as a row of Lv et al. 2025, arXiv 2509.04419. The
    paper's further supervised loss and its weights by entropy are not part of this.
    """
    return _with_demonstrations(
        offline.unit_denominator, low=low, high=high, epsilon=epsilon, ddof=ddof
    )


def minirl(*, low: float = 0.2, high: float = 0.27, cap: float = 5.0) -> Objective:
    """MiniRL: REINFORCE with the group's mean, weighted by π/μ, clipped by π/π_old.

    `-M min(π/μ, cap) (R - mean_g R) log π`, mean over sequences of sums over tokens: no division
    by length or by the standard deviation.

    Args:
      low, high: clip widths of π/π_old.
      cap: of the weight π/μ, ≥ 1, μ being the engine that sampled.

    Needs `proximal_logprobs` (π_old) beside the engine's `behavior_logprobs` (μ). With a mixture of
    experts, replay what was recorded: `train.record_experts` (the learner's routes, R2), or the
    sampler's own (R3).

    Expected gradient: `1 - 1/G` times the policy gradient where engine and learner agree; otherwise
    its first-order part in their difference.

    Source: Zheng et al. 2025, "Stabilizing Reinforcement Learning with LLMs", arXiv 2512.01374;
    `low`, `high` and `cap` could not be confirmed.
    """
    _checks.in_range("low", low, 0.0, 1.0)
    _checks.in_range("high", high, 0.0)
    _checks.in_range("cap", cap, 1.0)

    def surrogate(outputs: PolicyOutputs, rollout: Rollout) -> Array:
        assert rollout.proximal_logprobs is not None
        return minirl_loss(
            outputs.logprobs,
            rollout.proximal_logprobs,
            rollout.behavior_logprobs,
            advantages_of(rollout),
            low=low,
            high=high,
            cap=cap,
        )

    return Objective(
        advantage=by_group(advantages.centered),
        surrogate=surrogate,
        aggregate=aggregate.sequence_mean_token_sum,
        own_needs=frozenset({"proximal_logprobs"}),
    )


def _with_demonstrations(
    loss: Callable[[Array, Array, Array], Array],
    *,
    low: float,
    high: float,
    epsilon: float,
    ddof: int,
) -> Objective:
    _checks.in_range("low", low, 0.0, 1.0)
    _checks.in_range("high", high, 0.0)

    def surrogate(outputs: PolicyOutputs, rollout: Rollout) -> Array:
        given = demonstrated(rollout)[:, None]
        advantage = advantages_of(rollout)
        # Whatever a demonstration's behavior_logprobs hold must not reach a ratio.
        behavior = jnp.where(given, 0.0, rollout.behavior_logprobs)
        ratio = surrogates.importance_ratio(jnp.where(given, 0.0, outputs.logprobs), behavior)
        own = surrogates.clipped(ratio, advantage, low=low, high=high)
        shown = loss(outputs.logprobs, advantage, jnp.broadcast_to(given, rollout.mask.shape))
        return jnp.where(given, shown, own)

    return Objective(
        advantage=by_group(advantages.group_normalize, epsilon=epsilon, ddof=ddof),
        surrogate=surrogate,
        aggregate=aggregate.token_mean,
    )


def _check_demonstrated(wanted: Array, given: Array) -> None:
    message = (
        "rollout.extras['demonstrated']: expected a demonstration for each prompt that imitates"
    )
    missing = wanted & ~given
    if not _checks.is_concrete(missing):
        _checks.traced(~jnp.any(missing), message)
    elif getattr(missing, "is_fully_addressable", True) and bool(jnp.any(missing)):
        raise ValueError(f"{message}, got {int(jnp.sum(missing))} prompts without")
