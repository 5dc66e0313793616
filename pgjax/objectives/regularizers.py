"""Terms added to a surrogate: KL to a reference, entropy bonus, value loss."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from pgjax import logprobs, surrogates
from pgjax.objectives.objective import Regularizer
from pgjax.types import PolicyOutputs, Rollout

KLEstimator = Callable[[Float[Array, "B T"], Float[Array, "B T"]], Float[Array, "B T"]]


def kl_to_reference(coefficient: float, *, estimator: KLEstimator = logprobs.kl_k3) -> Regularizer:
    """`coefficient * KL(policy ‖ reference)`, estimated on the sampled tokens.

    Args:
      coefficient: β ≥ 0.
      estimator: `logprobs.kl_k1`, `kl_k2`, `kl_k3` or one's own `(logprobs, reference) -> [B, T]`.
        What its gradient estimates is a different question from its value: see their docstrings.

    Returns:
      a regularizer that needs `reference_logprobs`.
    """

    def term(outputs: PolicyOutputs, rollout: Rollout) -> Float[Array, "B T"]:
        reference = outputs.reference_logprobs
        if reference is None:
            reference = rollout.reference_logprobs
        assert reference is not None
        return estimator(outputs.logprobs, reference)

    return Regularizer("kl_to_reference", term, coefficient, frozenset({"reference_logprobs"}))


def entropy_bonus(coefficient: float) -> Regularizer:
    """`-coefficient * H(policy)`: rewards entropy. Needs the exact `entropy` of each token."""

    def term(outputs: PolicyOutputs, rollout: Rollout) -> Float[Array, "B T"]:
        assert outputs.entropy is not None
        return -outputs.entropy

    return Regularizer("negative_entropy", term, coefficient, frozenset({"entropy"}))


def value_loss(coefficient: float, *, clip: float | None) -> Regularizer:
    """`coefficient * (V - return)² / 2`, with PPO's value clipping where `clip` is a width.

    Needs `values`, both the old ones in the rollout and the current ones.
    """

    def term(outputs: PolicyOutputs, rollout: Rollout) -> Float[Array, "B T"]:
        values, old, targets = outputs.values, rollout.values, rollout.returns
        assert values is not None and old is not None
        if targets is None:
            raise ValueError("rollout.returns: value_loss needs targets, got None")
        targets = jnp.where(rollout.mask, targets, 0.0)
        if clip is None:
            return surrogates.value_error(values, targets)
        return surrogates.clipped_value_error(values, targets, old, width=clip)

    return Regularizer("value_loss", term, coefficient, frozenset({"values"}))
