"""From sampled text and its rewards to a rollout."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from pgjax import _checks, sampling
from pgjax.types import Rollout


def to_rollout(
    samples: sampling.Samples,
    rewards: Float[Array, " B"] | Float[Array, "B T"],
    *,
    group_ids: Int[Array, " B"] | None = None,
) -> Rollout:
    """A rollout of sampled completions.

    Args:
      samples: from `sampling.generate`.
      rewards: one per completion or per token; NaN where a verifier failed.
      group_ids: default: the index of each completion's prompt in its batch.

    Returns:
      the rollout, its `behavior_logprobs` under the distribution that was sampled from.

    Raises:
      ValueError: a wrong number of rewards.
    """
    _checks.rank("rewards", rewards, 1, 2)
    _checks.floating(rewards=rewards)
    if rewards.shape[0] != samples.tokens.shape[0]:
        raise ValueError(
            f"rewards: expected {samples.tokens.shape[0]} rows, one per completion, "
            f"got {rewards.shape[0]}"
        )
    return Rollout(
        tokens=samples.tokens,
        mask=samples.mask,
        behavior_logprobs=samples.behavior_logprobs,
        rewards=rewards,
        group_ids=samples.prompt_ids if group_ids is None else group_ids,
        truncated=samples.truncated,
        experts=samples.experts,
    )
