"""Episodes of several turns as rows of tokens."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pgjax import _checks
from pgjax.types import Rollout


def flatten_turns(
    observations: Int[Array, "N M O"],
    observation_lengths: Int[Array, "N M"],
    actions: Int[Array, "N M A"],
    action_lengths: Int[Array, "N M"],
    action_logprobs: Float[Array, "N M A"],
    turn_rewards: Float[Array, "N M"],
    group_ids: Int[Array, " N"],
    *,
    eos: int,
    truncated: Bool[Array, " N"] | None = None,
    pad: int = 0,
) -> Rollout:
    """One row an episode: `o_0 a_0 o_1 a_1 ...`, without gaps, right-padded.

    An action is a string of tokens that ends in `eos`, at which the environment steps; the turn's
    reward stands there. Observations (and prompts, templates) have mask false and turn -1, so that
    they are in no loss, baseline or entropy, and `returns` skips them.

    Args:
      observations: what the policy saw before each turn; the first holds the task.
      observation_lengths: tokens of each that count, in `[0, O]`.
      actions: what it said.
      action_lengths: tokens of each that count, in `[0, A]`; 0: the turn did not take place. Turns
        that did come first.
      action_logprobs: under the policy that sampled.
      turn_rewards: 0 for turns that did not take place.
      group_ids: episodes of one task share an id.
      eos: the token that ends an action.
      truncated: episodes that ran out of turns; their last state is worth bootstrapping from.
      pad: the token behind a row's end.

    Returns:
      a rollout with T = M (O + A), per-token rewards and `turn_ids`. The total reward of each
      episode is kept.

    Raises:
      ValueError: wrong ranks, dtypes or shapes; concrete input with lengths out of range, a turn
        that does not end in `eos`, a turn after one that did not take place, or a reward for such
        a turn. Where such input is traced, the row's rewards are NaN, which keeps it out of every
        statistic and loss.

    Source: the token-level formulation of Wang and Ammanabrolu 2025, arXiv 2510.01132.
    """
    _check_shapes(
        observations, observation_lengths, actions, action_lengths, action_logprobs, turn_rewards
    )
    faults = _faults(
        observations, observation_lengths, actions, action_lengths, turn_rewards, eos=eos
    )
    wrong = jnp.zeros(actions.shape[0], bool)
    for text, rows in faults.items():
        if _checks.is_concrete(rows) and np.any(rows):
            raise ValueError(f"{text}, in episode {int(np.argmax(rows))}")
        wrong = wrong | rows

    episodes, turns, _ = actions.shape
    seen = jnp.arange(observations.shape[2]) < jnp.asarray(observation_lengths)[..., None]
    said = jnp.arange(actions.shape[2]) < jnp.asarray(action_lengths)[..., None]
    ends = jnp.arange(actions.shape[2]) == jnp.asarray(action_lengths)[..., None] - 1
    valid = jnp.concatenate([seen, said], axis=-1).reshape(episodes, -1)
    order = jnp.argsort(~valid, axis=-1, stable=True)
    present = jnp.take_along_axis(valid, order, axis=-1)

    def packed(seen_values: Any, said_values: Any, fill: Any) -> Array:
        both = jnp.concatenate(
            [
                jnp.broadcast_to(seen_values, seen.shape),
                jnp.broadcast_to(said_values, said.shape),
            ],
            axis=-1,
        ).reshape(episodes, -1)
        return jnp.where(present, jnp.take_along_axis(both, order, axis=-1), fill)

    rewards = packed(0.0, jnp.where(ends, jnp.asarray(turn_rewards)[..., None], 0.0), 0.0)
    turn = jnp.arange(turns, dtype=jnp.int32)[None, :, None]
    return Rollout(
        tokens=packed(observations, actions, pad).astype(jnp.int32),
        mask=packed(False, True, False),
        behavior_logprobs=packed(0.0, jnp.asarray(action_logprobs, jnp.float32), 0.0),
        rewards=jnp.where(wrong[:, None], jnp.nan, rewards),
        group_ids=jnp.asarray(group_ids),
        truncated=truncated,
        turn_ids=packed(jnp.int32(-1), turn, -1),
    )


def check_turns(rollout: Rollout) -> None:
    """Raises ValueError on a rollout whose turns are not in order or whose rewards are misplaced.

    For rollouts made by hand; looks at concrete arrays only. Turns must not decrease along a row,
    every token of the mask belongs to a turn and none off the mask carries a reward.
    """
    if rollout.turn_ids is None:
        raise ValueError("rollout.turn_ids: expected the turn of each token, got None")
    _checks.same_shape(mask=rollout.mask, turn_ids=rollout.turn_ids)
    _checks.integer(turn_ids=rollout.turn_ids)
    if not _checks.is_concrete(rollout.mask, rollout.turn_ids, rollout.rewards):
        return
    mask, ids = np.asarray(rollout.mask), np.asarray(rollout.turn_ids)
    if np.any(mask & (ids < 0)):
        raise ValueError("rollout.turn_ids: expected a turn for every token of the mask, got -1")
    if np.any((ids >= 0) & (ids < np.maximum.accumulate(ids, axis=1))):
        raise ValueError("rollout.turn_ids: expected ids that do not decrease along a row")
    rewards = np.asarray(rollout.rewards)
    if rewards.ndim == 2 and np.any(rewards[~mask] != 0):
        raise ValueError("rollout.rewards: expected 0 off the mask, got a reward there")


def _check_shapes(
    observations: Any, seen: Any, actions: Any, said: Any, logprobs: Any, rewards: Any
) -> None:
    _checks.rank("observations", observations, 3)
    _checks.rank("actions", actions, 3)
    _checks.integer(
        observations=observations,
        observation_lengths=seen,
        actions=actions,
        action_lengths=said,
    )
    _checks.floating(action_logprobs=logprobs, turn_rewards=rewards)
    _checks.same_shape(actions=actions, action_logprobs=logprobs)
    for name, array in {
        "observation_lengths": seen,
        "action_lengths": said,
        "turn_rewards": rewards,
        "observations": observations[..., 0] if observations.shape[2] else seen,
    }.items():
        if np.shape(array) != actions.shape[:2]:
            raise ValueError(
                f"{name}: expected episodes and turns {actions.shape[:2]} like actions, "
                f"got {np.shape(array)}"
            )


def _faults(
    observations: Any, seen: Any, actions: Any, said: Any, rewards: Any, *, eos: int
) -> dict[str, Array]:
    """What may be wrong with an episode, and with which ones it is."""
    seen, said, rewards = jnp.asarray(seen), jnp.asarray(said), jnp.asarray(rewards)
    last = jnp.clip(said - 1, 0, actions.shape[2] - 1)[..., None]
    final = jnp.take_along_axis(jnp.asarray(actions), last, axis=-1)[..., 0]
    taken = said > 0
    return {
        "observation_lengths: out of range": jnp.any(
            (seen < 0) | (seen > observations.shape[2]), axis=-1
        ),
        "action_lengths: out of range": jnp.any((said < 0) | (said > actions.shape[2]), axis=-1),
        "actions: a turn does not end in eos": jnp.any(taken & (final != eos), axis=-1),
        "action_lengths: a turn after one that did not take place": jnp.any(
            taken[:, 1:] & ~taken[:, :-1], axis=-1
        ),
        "turn_rewards: a reward for a turn that did not take place": jnp.any(
            ~taken & (rewards != 0), axis=-1
        ),
    }
