"""The gradient that an estimator takes on one batch, and quantities whose mean is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

from pgjax import segments
from pgjax.diagnostics import problems
from pgjax.objectives import Objective
from pgjax.types import Rollout


class Policies(NamedTuple):
    """Parameters of the policies that a batch has to do with.

    Attributes:
      current: the gradient is taken in these.
      behavior: drew the samples.
      old: the learner's before its first update on the batch.
      reference: of the frozen reference.
    """

    current: Any
    behavior: Any
    old: Any
    reference: Any


def filled_rollout(
    objective: Objective,
    problem: problems.TokenProblem,
    policies: Policies,
    tokens: Int[Array, "B T"],
) -> Rollout:
    """The rollout of these sequences with all that a trainer fills in before `prepare`.

    `old` and `proximal_logprobs` are the old policy's, `values` are 0.
    """
    rollout = problems.rollout_of(
        problem, tokens, policies.behavior, reference_params=policies.reference
    )
    old = problems.outputs(problem, policies.old, rollout, objective.old_needs)
    return rollout.replace(old=old, proximal_logprobs=old.logprobs)


def ascent(
    objective: Objective,
    problem: problems.TokenProblem,
    params: Any,
    rollout: Rollout,
) -> Float[Array, " D"]:
    """`-∇ loss` on one batch that `filled_rollout` made, flattened."""
    prepared = objective.prepare(rollout)

    def loss(params: Any) -> Array:
        return objective.value(
            problems.outputs(problem, params, prepared, objective.needs), prepared
        )

    return -ravel_pytree(jax.grad(loss)(params))[0]


def controls(
    problem: problems.TokenProblem, behavior_params: Any, mean_of_second: Float[Array, " D"]
) -> Callable[[Rollout], Float[Array, " E"]]:
    """Functions of a batch that are near most estimators and whose expectation is exactly 0.

    With the behaviour's scores `s_i = ∇ log μ(y_i)`: `mean_i s_i`, `mean_i R_i s_i` less its
    expectation, and `mean_i R̄_{-i} s_i` with the mean of the group's other rewards. What an
    estimator has in common with these is noise that need not be averaged away.

    Args:
      problem: that is sampled from.
      behavior_params: of the policy that samples.
      mean_of_second: `∇J` of that policy.
    """

    def of(rollout: Rollout) -> Array:
        rewards = rollout.rewards
        if rewards.ndim == 2:
            rewards = jnp.where(rollout.mask, rewards, 0.0).sum(-1)
        others = segments.leave_one_out_mean(
            rewards, rollout.group_ids, num_segments=problem.num_prompts
        )

        def weighted(params: Any) -> Array:
            log_probability = problems.log_probability(problem, params, rollout.tokens)
            weights = jnp.stack([jnp.ones_like(rewards), rewards, others])
            return weights @ log_probability / rewards.shape[0]

        _, pull = jax.vjp(weighted, behavior_params)
        rows = jax.vmap(lambda row: ravel_pytree(pull(row)[0])[0])(jnp.eye(3, dtype=rewards.dtype))
        return rows.at[1].add(-mean_of_second).ravel()

    return of
