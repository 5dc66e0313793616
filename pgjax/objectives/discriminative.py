"""DisCO and COPO: recipes for prompts whose success rate is close to 0 or 1.

Expected gradients are stated for one on-policy step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pgjax import _checks, advantages, aggregate, logprobs, segments, surrogates
from pgjax.advantages import consistency
from pgjax.objectives import facts
from pgjax.objectives._parts import advantages_of, by_group, kl_penalty
from pgjax.objectives.objective import Objective, Regularizer
from pgjax.surrogates import discriminative
from pgjax.types import PolicyOutputs, Rollout

TokenScore = Callable[[Float[Array, "B T"], Float[Array, "B T"]], Float[Array, "B T"]]


def disco_b(
    *,
    score: TokenScore = discriminative.log_likelihood,
    delta: float = 1e-4,
    beta: float = 1e3,
    estimator: discriminative.KLEstimator = logprobs.kl_k1,
) -> Objective:
    """DisCO-b: mean score of right samples minus mean score of wrong ones, in a KL trust region.

    `-(1/Q) Σ_q [mean_{O+} s - mean_{O-} s]`, `s` the mean token score of a sample; Q counts every
    question, also those skipped because all their samples are right or all wrong.

    Args:
      score: of each token, from `(logprobs, behavior_logprobs)`: `surrogates.log_likelihood` or
        `surrogates.importance_ratio` (L-ratio).
      delta: δ, KL of old to new policy, in nats a token, beyond which the penalty sets in.
      beta: of the penalty, see `surrogates.kl_hinge`; 0: none.
      estimator: of that KL, over all tokens that the loss sees at once: a minibatch, or each
        microbatch of it.

    Rewards are 0 or 1; for others set `rewards` of the objective.

    Expected gradient: that of mean log-likelihood of right minus wrong answers (a question with
    both of them weighs 1, whatever its success rate), not of the expected reward.

    Source: Li et al. 2025, arXiv 2505.12366. Under minibatches 1/Q is the group size over the rows
    of the minibatch, the same where groups are of one size.
    """

    def surrogate(outputs: PolicyOutputs, rollout: Rollout) -> Array:
        values = score(outputs.logprobs, rollout.behavior_logprobs)
        return surrogates.importance_weighted(values, advantages_of(rollout))

    return Objective(
        advantage=_balanced_by_length,
        surrogate=surrogate,
        aggregate=functools.partial(aggregate.constant_length, length=1),
        regularizers=_trust_region(delta, beta, estimator),
    )


def disco(
    *,
    temperature: float = 10.0,
    score: TokenScore = discriminative.log_likelihood,
    delta: float = 1e-4,
    beta: float = 1e3,
    estimator: discriminative.KLEstimator = logprobs.kl_k1,
) -> Objective:
    """DisCO: DisCO-b with the weight of wrong samples moved to the likeliest of them.

    `-(1/Q) Σ_q [mean_{O+} s - τ log mean_{O-} exp(s / τ)]`.

    Args:
      temperature: τ > 0; the paper's is 10 for log-likelihoods, 1 for ratios.
      score, delta, beta, estimator: as in `disco_b`.

    Expected gradient: as `disco_b`'s, with wrong answers weighted by softmax(s / τ).

    Source: Li et al. 2025, arXiv 2505.12366.
    """
    _checks.in_range("temperature", temperature, 0.0, low_open=True)

    def surrogate(outputs: PolicyOutputs, rollout: Rollout) -> Array:
        values = score(outputs.logprobs, rollout.behavior_logprobs)
        weights = discriminative.hard_negative_weights(
            discriminative.sequence_scores(
                values, rollout.mask, trajectory_ids=rollout.trajectory_ids
            ),
            advantages_of(rollout) < 0,
            segments.dense_ids(rollout.group_ids),
            num_groups=rollout.group_ids.shape[0],
            temperature=temperature,
            where=_samples(rollout)[0],
        )
        return weights[:, None] * surrogates.importance_weighted(values, advantages_of(rollout))

    return Objective(
        advantage=_balanced_by_length,
        surrogate=surrogate,
        aggregate=functools.partial(aggregate.constant_length, length=1),
        regularizers=_trust_region(delta, beta, estimator),
        whole_groups=True,
    )


def disco_ratio(*, temperature: float = 1.0, delta: float = 1e-4, beta: float = 1e3) -> Objective:
    """`disco` with the score L-ratio, the mean token ratio to the policy that sampled.

    Args:
      temperature, delta, beta: as in `disco`; the paper's temperature for ratios is 1.

    Expected gradient: as `disco`'s.

    Source: 2025, arXiv 2505.12366.
    """
    return disco(temperature=temperature, score=surrogates.importance_ratio, delta=delta, beta=beta)


def given_answers(rollout: Rollout) -> Int[Array, " B"]:
    """`rollout.extras["answer_ids"]`."""
    return facts.extra("answer_ids")(rollout)


def copo(
    *,
    gamma: float = 20.0,
    rho: float = 1.5,
    base: float = 2.0,
    answer_ids: Callable[[Rollout], Int[Array, " B"]] = given_answers,
    factor: Callable[..., Float[Array, " S"]] | None = None,
    low: float = 0.2,
    high: float = 0.2,
    epsilon: float = 1e-6,
    ddof: int = 1,
    kl_coefficient: float = 0.0,
) -> Objective:
    """COPO: where a prompt's samples agree, the prompt as a whole competes with the other prompts.

    `w L(A_i) + (1 - w) L(A_q)`: PPO-clipped losses with GRPO's advantage within the group and with
    the prompt's mean reward normalised over prompts; `w = sigmoid(γ (H - ρ))`, H the entropy of the
    prompt's sampled answers.

    Args:
      gamma, rho: of the weight w. Infinite `rho` leaves the loss across prompts alone, `-inf` is
        GRPO. The paper's 1.5 is for groups of 6, whose entropy is at most 2.58 bits.
      base: of the entropy's logarithm, > 1.
      answer_ids: of each row; same integer, same answer.
      factor: `(entropy, group_sizes, base=...) -> [S]` of each prompt's mean reward, such as
        `advantages.consistency_factor`; None: 1, as in the paper's runs.
      low, high: clip widths.
      epsilon, ddof: of both normalisations.
      kl_coefficient: weight of the k3 penalty to a reference policy; above 0 needs
        `reference_logprobs`.

    Expected gradient: biased as `grpo`'s; across prompts, further by the batch's own prompts.

    Source: Han et al. 2025, arXiv 2508.04138.
    """
    _checks.in_range("gamma", gamma, 0.0, high_open=True)
    _checks.in_range("base", base, 1.0, low_open=True, high_open=True)
    _checks.in_range("low", low, 0.0, 1.0)
    _checks.in_range("high", high, 0.0)
    local = by_group(advantages.group_normalize, epsilon=epsilon, ddof=ddof)

    def parts(rollout: Rollout) -> dict[str, Array]:
        counted, _ = _samples(rollout)
        ids, size = rollout.group_ids, rollout.group_ids.shape[0]
        entropy = consistency.answer_entropy(
            answer_ids(rollout), ids, num_groups=size, base=base, where=counted
        )
        factors = None
        if factor is not None:
            sizes = segments.count(ids, num_segments=size, where=counted)
            factors = factor(entropy, sizes, base=base)
        weight = consistency.consistency_weight(entropy, gamma=gamma, rho=rho)
        return {
            "local_advantages": local(rollout),
            "global_advantages": consistency.global_prompt_advantage(
                rollout.rewards,
                ids,
                num_groups=size,
                factors=factors,
                epsilon=epsilon,
                ddof=ddof,
                where=counted,
            ),
            "local_weights": segments.per_row(weight, ids),
        }

    def advantage(rollout: Rollout) -> Array:
        made = parts(rollout)
        weight = made["local_weights"]
        return weight * made["local_advantages"] + (1 - weight) * made["global_advantages"]

    def surrogate(outputs: PolicyOutputs, rollout: Rollout) -> Array:
        assert rollout.extras is not None
        ratio = surrogates.importance_ratio(outputs.logprobs, rollout.behavior_logprobs)
        weight = rollout.extras["local_weights"][:, None]
        within = surrogates.clipped(ratio, rollout.extras["local_advantages"], low=low, high=high)
        across = surrogates.clipped(ratio, rollout.extras["global_advantages"], low=low, high=high)
        return weight * within + (1 - weight) * across

    return Objective(
        advantage=advantage,
        surrogate=surrogate,
        aggregate=aggregate.sequence_mean_token_mean,
        extras=parts,
        regularizers=kl_penalty(kl_coefficient),
    )


def _samples(rollout: Rollout) -> tuple[Array, Array]:
    """Rows that stand for a sample with tokens, and every row's tokens in its sample."""
    lengths = facts.response_length(rollout)
    return facts.one_row_each(rollout) & (lengths > 0), lengths


def _balanced_by_length(rollout: Rollout) -> Array:
    """`±(B / Q) / (n± length)`: after the mean over B rows, DisCO-b's weights of token scores."""
    counted, lengths = _samples(rollout)
    ids, rows = rollout.group_ids, rollout.group_ids.shape[0]
    share = discriminative.class_balanced(rollout.rewards, ids, num_groups=rows, where=counted)
    questions = jnp.sum(segments.count(ids, num_segments=rows) > 0)
    return share * rows / (questions * jnp.maximum(lengths, 1))


def _trust_region(
    delta: float, beta: float, estimator: discriminative.KLEstimator
) -> tuple[Regularizer, ...]:
    _checks.in_range("delta", delta, 0.0)
    _checks.in_range("beta", beta, 0.0)

    def term(outputs: PolicyOutputs, rollout: Rollout) -> Array:
        mask = rollout.mask
        penalty = discriminative.kl_hinge(
            outputs.logprobs, rollout.behavior_logprobs, mask, delta=delta, estimator=estimator
        )
        # The objective takes the mean over rows of sums over tokens; the KL is a mean over tokens.
        return penalty * mask.shape[0] / jnp.maximum(mask.sum(), 1)

    return (Regularizer("kl_hinge", term, beta),) if beta else ()
