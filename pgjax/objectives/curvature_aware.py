"""CAPO: GRPO without the tokens whose own step would change the policy too much.

Each token's step on the output head is scored by a second-order model, `masks.curvature`, of how
the expected reward and the policy would change; tokens beyond the limits are masked.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pgjax import _checks
from pgjax.masks import curvature
from pgjax.objectives._parts import advantages_of, memory_of
from pgjax.objectives.group_relative import grpo
from pgjax.objectives.objective import Memory, Objective, step_count
from pgjax.types import Rollout, TokenSupport

Schedule = Callable[[Array], Array]


class AdamPlan(NamedTuple):
    """What `capo_adam` remembers: batches so far, and Adam's moments of the output head."""

    steps: Int[Array, ""]
    moments: curvature.ShadowAdam


def capo(
    *,
    learning_rate: float | Schedule,
    gain_limit: float = 0.01,
    shift_limit: float = 1e-4,
    temperature: float = 1.0,
    low: float = 0.2,
    high: float = 0.2,
    epsilon: float = 1e-4,
    ddof: int = 1,
) -> Objective:
    """CAPO for plain gradient steps, scored by `masks.head_curvature_sgd`.

    Needs four numbers a token, two passes over the unembedding and no gradient beyond the loss's.

    Args:
      learning_rate: of the optimizer: a positive number, or a function of the number of batches so
        far such as an Optax schedule.
      gain_limit: largest predicted change of the objective, either way, > 0.
      shift_limit: largest predicted change of the policy (KL), > 0.
      temperature: of the sampler, > 0; its logits are `W h / temperature`.
      low, high, epsilon, ddof: as in `grpo`.

    The paper scores Adam's step, as `capo_adam` does. A plain step is smaller than Adam's by the
    gradients' scale, so limits have to be tuned with the learning rate. A sequence of which nothing
    is left does not count in the mean over sequences.

    Expected gradient: as `grpo`'s, less the rejected tokens.

    Source: "Stabilizing Policy Gradients for Sample-Efficient Reinforcement Learning in LLM
    Reasoning", 2025, arXiv 2510.00819.
    """
    _check(learning_rate, gain_limit, shift_limit, temperature)

    def mask(rollout: Rollout) -> Bool[Array, "B T"]:
        old = rollout.old
        assert old is not None and old.square_sum is not None
        assert old.cube_sum is not None and old.feature_square_norm is not None
        rate = _rate(learning_rate, memory_of(rollout))
        found = curvature.head_curvature_sgd(
            old.logprobs,
            old.square_sum,
            old.cube_sum,
            old.feature_square_norm / temperature**2,
            advantages_of(rollout),
            learning_rate=rate,
        )
        return curvature.curvature_mask(
            found, gain_low=-gain_limit, gain_high=gain_limit, shift_high=shift_limit
        )

    return dataclasses.replace(
        grpo(low=low, high=high, epsilon=epsilon, ddof=ddof),
        mask=mask,
        memory=step_count(),
        old_needs=frozenset({"square_sum", "cube_sum", "feature_square_norm"}),
    )


def capo_adam(
    *,
    learning_rate: float | Schedule,
    vocab_size: int,
    hidden_size: int,
    gain_limit: float = 0.01,
    shift_limit: float = 1e-4,
    temperature: float = 1.0,
    b1: float = 0.9,
    b2: float = 0.999,
    adam_epsilon: float = 1e-8,
    low: float = 0.2,
    high: float = 0.2,
    epsilon: float = 1e-4,
    ddof: int = 1,
) -> Objective:
    """CAPO for Adam's steps on a head of likely tokens, scored by `masks.head_curvature`.

    Adam's moments of the output head are kept as the objective's memory, and brought up to date
    with the mean gradient of the accepted tokens of every batch.

    Args:
      learning_rate, gain_limit, shift_limit, temperature: as in `capo`.
      vocab_size, hidden_size: V and H of the output head. The memory is two f32 `[V, H]`.
      b1, b2, adam_epsilon: of the optimizer.
      low, high, epsilon, ddof: as in `grpo`.

    Needs the old policy's last hidden states and the support of each token's distribution
    (`train.language_model_outputs(..., support_size=K)`): a pass over the unembedding, a selection
    of K among V logits, and O(B T K H) FLOPs for the plans, in O(B K H) memory. Soft-capped heads
    are scored as if they had no cap.

    Raises:
      ValueError: a number out of range; in `prepare`, a head of another size than was said.

    Expected gradient: as `grpo`'s, less the rejected tokens.

    Source: "Stabilizing Policy Gradients for Sample-Efficient Reinforcement Learning in LLM
    Reasoning", 2025, arXiv 2510.00819.
    """
    _check(learning_rate, gain_limit, shift_limit, temperature)

    def head(rollout: Rollout) -> tuple[Array, TokenSupport]:
        """Hidden states that the tokens were drawn from, as the tempered head sees them."""
        old = rollout.old
        assert old is not None and old.features is not None and old.support is not None
        wide = jnp.promote_types(old.features.dtype, jnp.float32)
        features = old.features.astype(wide) / temperature
        return jnp.pad(features[:, :-1], ((0, 0), (1, 0), (0, 0))), old.support

    def mask(rollout: Rollout) -> Bool[Array, "B T"]:
        hidden, support = head(rollout)
        plan: AdamPlan = memory_of(rollout)
        found = curvature.head_curvature(
            functools.partial(
                curvature.adam_direction, plan.moments, b1=b1, b2=b2, epsilon=adam_epsilon
            ),
            hidden,
            support,
            advantages_of(rollout),
            learning_rate=_rate(learning_rate, plan.steps),
        )
        return curvature.curvature_mask(
            found, gain_low=-gain_limit, gain_high=gain_limit, shift_high=shift_limit
        )

    def init() -> AdamPlan:
        return AdamPlan(jnp.int32(0), curvature.shadow_adam_init(vocab_size, hidden_size))

    def update(plan: AdamPlan, rollout: Rollout) -> AdamPlan:
        hidden, support = head(rollout)
        gradient = curvature.head_gradient(
            hidden, support, advantages_of(rollout), rollout.mask, num_rows=vocab_size
        )
        moments = curvature.shadow_adam_update(plan.moments, gradient, rollout.mask, b1=b1, b2=b2)
        return AdamPlan(plan.steps + 1, moments)

    return dataclasses.replace(
        grpo(low=low, high=high, epsilon=epsilon, ddof=ddof),
        mask=mask,
        memory=Memory(init, update),
        old_needs=frozenset({"features", "support"}),
    )


def _check(
    learning_rate: float | Schedule, gain_limit: float, shift_limit: float, temperature: float
) -> None:
    _checks.in_range("gain_limit", gain_limit, 0.0, low_open=True)
    _checks.in_range("shift_limit", shift_limit, 0.0, low_open=True)
    _checks.in_range("temperature", temperature, 0.0, low_open=True, high_open=True)
    if not callable(learning_rate):
        _checks.in_range("learning_rate", learning_rate, 0.0, low_open=True)


def _rate(learning_rate: float | Schedule, steps: Int[Array, ""]) -> float | Float[Array, ""]:
    return learning_rate(steps) if callable(learning_rate) else learning_rate
