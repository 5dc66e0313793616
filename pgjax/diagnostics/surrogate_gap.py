"""How far the token-level objective is from the sequence-level one it stands for.

With μ the policy that sampled and π the current one, over a sequence's T tokens,

    J_sequence = E_μ[ Π_t (π_t / μ_t) R ]      J_token = E_μ[ Σ_t (π_t / μ_t) R ]

The second is the first-order part of the first: with `π_t / μ_t = 1 + δ_t` they differ by
`E_μ[(T - 1) R] + O(δ²)`, their gradients by `O(δ)`, and not at all where T = 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pgjax import _checks, aggregate, logprobs
from pgjax.diagnostics import problems
from pgjax.types import pytree_dataclass

LogitsFunction = Callable[[Any, Array], Array]


class Gap(NamedTuple):
    """What `exact_gap` finds.

    Attributes:
      value: `J_sequence - J_token + E_μ[(T - 1) R]`.
      gradient: `∇J_sequence - ∇J_token`, a pytree like the parameters.
      gradient_norm: its Euclidean norm.
      cosine: of the angle between the two gradients.
    """

    value: Float[Array, ""]
    gradient: Any
    gradient_norm: Float[Array, ""]
    cosine: Float[Array, ""]


@pytree_dataclass
class Mismatch:
    """What `sampled_mismatch` finds.

    Attributes:
      mean: of `log π/μ` over the mask's tokens.
      largest: of `|log π/μ|`.
      divergence: the estimate k3 of KL(μ ‖ π) a token, in nats, never negative.
      gap: sample mean of `(Π_t π_t/μ_t - Σ_t π_t/μ_t + T - 1) R`; None without rewards.
    """

    mean: Float[Array, ""]
    largest: Float[Array, ""]
    divergence: Float[Array, ""]
    gap: Float[Array, ""] | None = None


def token_objective(
    problem: problems.TokenProblem,
    params: Any,
    behavior_params: Any,
    *,
    engine: LogitsFunction | None = None,
) -> Float[Array, ""]:
    """`J_token = mean over prompts of E_μ[Σ_t (π_t/μ_t) R]`, exactly and differentiably.

    Args:
      problem: small enough to enumerate, with one reward a sequence.
      params: of π.
      behavior_params: of μ.
      engine: `(params, tokens) -> f32[B, T, A]`, the sampler's own way to compute logits; None: the
        problem's.

    Returns:
      scalar, in the dtype of the logits.

    Raises:
      ValueError: too many sequences, or rewards per token.
    """
    tokens = _all_sequences(problem)
    ratio, mask = _ratios(problem, tokens, params, behavior_params, engine)
    rewards = _rewards(problem, tokens)
    weight = _behavior_probability(problem, tokens, behavior_params, engine)
    sums = jnp.where(mask, ratio, 0.0).sum(-1)
    return jnp.sum(weight * sums * rewards) / problem.num_prompts


def exact_gap(
    problem: problems.TokenProblem,
    params: Any,
    behavior_params: Any,
    *,
    engine: LogitsFunction | None = None,
) -> Gap:
    """The gap between the two objectives and between their gradients, by enumeration.

    `J_sequence` is the expected reward itself, since μ reaches every sequence.

    Args, raises: as in `token_objective`.

    Returns:
      value, gradient, its norm, and the cosine between the gradients (0 where one of them is 0).

    Source: Zheng et al. 2025, "Stabilizing Reinforcement Learning with LLMs", arXiv 2512.01374.
    """
    tokens = _all_sequences(problem)
    weight = _behavior_probability(problem, tokens, behavior_params, engine)
    extra = (problems.roles(problem, tokens) == problems.POLICY).sum(-1) - 1
    offset = jnp.sum(weight * extra * _rewards(problem, tokens)) / problem.num_prompts

    def token(params: Any) -> Array:
        return token_objective(problem, params, behavior_params, engine=engine)

    def sequence(params: Any) -> Array:
        probability = jnp.exp(problems.log_probability(problem, params, tokens))
        return jnp.sum(probability * _rewards(problem, tokens)) / problem.num_prompts

    j_token, token_gradient = jax.value_and_grad(token)(params)
    j_sequence, sequence_gradient = jax.value_and_grad(sequence)(params)
    difference = jax.tree.map(jnp.subtract, sequence_gradient, token_gradient)
    norms = _dot(sequence_gradient, sequence_gradient) * _dot(token_gradient, token_gradient)
    some = norms > 0
    cosine = _dot(sequence_gradient, token_gradient) / jnp.sqrt(jnp.where(some, norms, 1.0))
    return Gap(
        value=j_sequence - j_token + offset,
        gradient=difference,
        gradient_norm=jnp.sqrt(_dot(difference, difference)),
        cosine=jnp.where(some, cosine, 0.0),
    )


def sampled_mismatch(
    current_logprobs: Float[Array, "B T"],
    behavior_logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    rewards: Float[Array, " B"] | None = None,
) -> Mismatch:
    """What samples of μ tell of its distance from π, for models too large to enumerate.

    Args:
      current_logprobs: of the sampled tokens under π.
      behavior_logprobs: under μ.
      mask: tokens that count.
      rewards: one a sequence, for `gap`; rows with non-finite ones are left out.

    Returns:
      scalars, all 0 with an all-false mask.

    Raises:
      ValueError: wrong ranks, dtypes or shapes.
    """
    _checks.rank("current_logprobs", current_logprobs, 2)
    _checks.floating(current_logprobs=current_logprobs, behavior_logprobs=behavior_logprobs)
    _checks.same_shape(
        current_logprobs=current_logprobs, behavior_logprobs=behavior_logprobs, mask=mask
    )
    _checks.boolean(mask=mask)
    log_ratio = jnp.where(mask, current_logprobs - behavior_logprobs, 0.0)
    mean = aggregate.masked_mean
    gap = None
    if rewards is not None:
        _checks.rank("rewards", rewards, 1)
        used = mask.any(-1) & jnp.isfinite(rewards)
        product = jnp.exp(log_ratio.sum(-1))
        linear = jnp.where(mask, jnp.expm1(log_ratio), 0.0).sum(-1) + 1
        gap = mean((product - linear) * jnp.where(used, rewards, 0.0), used)
    return Mismatch(
        mean=mean(log_ratio, mask),
        largest=aggregate.masked_max(jnp.abs(log_ratio), mask),
        divergence=mean(logprobs.kl_k3(behavior_logprobs, current_logprobs), mask),
        gap=gap,
    )


def _all_sequences(problem: problems.TokenProblem) -> Array:
    with jax.ensure_compile_time_eval():  # which sequences there are is known under jit, too
        return jnp.asarray(problems.all_sequences(problem))


def _rewards(problem: problems.TokenProblem, tokens: Array) -> Array:
    rewards = problem.reward(tokens)
    _checks.rank("rewards", rewards, 1)
    return rewards


def _behavior(problem: problems.TokenProblem, engine: LogitsFunction | None) -> Any:
    return problem if engine is None else dataclasses.replace(problem, logits=engine)


def _behavior_probability(
    problem: problems.TokenProblem, tokens: Array, params: Any, engine: LogitsFunction | None
) -> Array:
    sampler = _behavior(problem, engine)
    return jax.lax.stop_gradient(jnp.exp(problems.log_probability(sampler, params, tokens)))


def _ratios(
    problem: problems.TokenProblem,
    tokens: Array,
    params: Any,
    behavior_params: Any,
    engine: LogitsFunction | None,
) -> tuple[Array, Array]:
    mask = problems.roles(problem, tokens) == problems.POLICY

    def chosen(logits: Array) -> Array:
        rows = jax.nn.log_softmax(logits)
        found = jnp.take_along_axis(rows, tokens[..., None], axis=-1)[..., 0]
        return jnp.where(mask, found, 0.0)

    behavior = chosen(_behavior(problem, engine).logits(behavior_params, tokens))
    return jnp.exp(chosen(problem.logits(params, tokens)) - jax.lax.stop_gradient(behavior)), mask


def _dot(a: Any, b: Any) -> Array:
    parts = jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)
    return sum(jax.tree.leaves(parts), start=jnp.zeros(()))
