"""From sampled text and its rewards to a rollout."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pgjax import _checks, sampling
from pgjax.objectives.objective import check_rollout
from pgjax.types import Rollout


def to_rollout(
    samples: sampling.Samples,
    rewards: Float[Array, " B"] | Float[Array, "B T"],
    *,
    group_ids: Int[Array, " B"] | None = None,
    extras: dict[str, Array] | None = None,
) -> Rollout:
    """A rollout of sampled completions.

    Args:
      samples: from `sampling.generate`.
      rewards: one per completion or per token; NaN where a verifier failed.
      group_ids: default: the index of each completion's prompt in its batch.
      extras: further facts about each completion, see `Rollout.extras`.

    Returns:
      the rollout, its `behavior_logprobs` under the distribution that was sampled from.

    Raises:
      ValueError: a wrong number of rewards, a field of a wrong shape or dtype.
    """
    _checks.rank("rewards", rewards, 1, 2)
    _checks.floating(rewards=rewards)
    if rewards.shape[0] != samples.tokens.shape[0]:
        raise ValueError(
            f"rewards: expected {samples.tokens.shape[0]} rows, one per completion, "
            f"got {rewards.shape[0]}"
        )
    rollout = Rollout(
        tokens=samples.tokens,
        mask=samples.mask,
        behavior_logprobs=samples.behavior_logprobs,
        rewards=rewards,
        group_ids=samples.prompt_ids if group_ids is None else group_ids,
        truncated=samples.truncated,
        experts=samples.experts,
        extras=extras,
    )
    check_rollout(rollout)
    return rollout


def demonstrations(tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> Rollout:
    """Given rows as a rollout for `objectives.supervised`: reward 1, each row its own group.

    Args:
      tokens: right-padded.
      mask: true on what is to be learned.

    Raises:
      ValueError: wrong ranks, dtypes or shapes.
    """
    _checks.rank("tokens", tokens, 2)
    _checks.integer(tokens=tokens)
    _checks.boolean(mask=mask)
    _checks.same_shape(tokens=tokens, mask=mask)
    size = tokens.shape[0]
    return Rollout(
        tokens=jnp.asarray(tokens),
        mask=jnp.asarray(mask),
        behavior_logprobs=jnp.zeros(tokens.shape, jnp.float32),
        rewards=jnp.ones(size, jnp.float32),
        group_ids=jnp.arange(size, dtype=jnp.int32),
    )
