"""Objective in, objective out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
from jaxtyping import Array, Float

from pgjax import surrogates
from pgjax.objectives.objective import Objective
from pgjax.types import PolicyOutputs, Rollout

WeightFunction = Callable[[Float[Array, "B T"], Float[Array, "B T"]], Float[Array, "B T"]]


def with_mismatch_weights(
    objective: Objective, *, weights: WeightFunction = surrogates.truncated_weights
) -> Objective:
    """Corrects an objective for a sampler that is not quite the learner's old policy.

    The surrogate's ratio is taken against `proximal_logprobs` (the learner's own, recomputed
    before the first update), and its loss is multiplied by `weights(proximal, behavior)`.

    Args:
      objective: any whose surrogate reads `rollout.behavior_logprobs` as the old policy.
      weights: `surrogates.truncated_weights` (TIS), `masked_weights` (MIS), or one's own.

    Returns:
      an objective that also needs `proximal_logprobs`.

    Source: decoupled PPO (Hilton et al. 2021, arXiv 2110.00641) and truncated importance sampling
    for engine mismatch (Yao et al. 2025).
    """

    def surrogate(outputs: PolicyOutputs, rollout: Rollout) -> Float[Array, "B T"]:
        proximal = rollout.proximal_logprobs
        assert proximal is not None
        correction = jax.lax.stop_gradient(weights(proximal, rollout.behavior_logprobs))
        anchored = rollout.replace(behavior_logprobs=proximal)
        return correction * objective.surrogate(outputs, anchored)

    return dataclasses.replace(
        objective,
        surrogate=surrogate,
        own_needs=objective.own_needs | {"proximal_logprobs"},
    )
