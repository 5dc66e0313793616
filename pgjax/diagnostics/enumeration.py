"""Expected gradients of any objective on a tabular bandit, by summing over every possible batch.

A bandit has `P` prompts and `A` actions: a softmax policy with logits `[P, A]`, rewards `[P, A]`.
A batch draws `G` actions for each prompt independently; there are `A^(P G)` of them.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pgjax import _checks
from pgjax.objectives import Objective
from pgjax.types import PolicyOutputs, Rollout

MAX_DRAWS = 200_000


def all_draws(num_prompts: int, num_actions: int, group_size: int) -> Int[np.ndarray, "K P*G"]:
    """Every batch of actions, prompt-major: int32 `[A^(P G), P G]`.

    Raises:
      ValueError: more than 200,000 batches.
    """
    size = num_prompts * group_size
    count = num_actions**size
    if count > MAX_DRAWS:
        raise ValueError(
            f"num_actions^(num_prompts * group_size): expected at most {MAX_DRAWS}, got {count}"
        )
    return np.array(list(itertools.product(range(num_actions), repeat=size)), np.int32)


def policy_gradient(
    logits: Float[Array, "P A"], rewards: Float[Array, "P A"]
) -> Float[Array, "P A"]:
    """The true gradient of `J = mean_p Σ_a π(a|p) R(p, a)` with respect to the logits."""
    _checks.same_shape(logits=logits, rewards=rewards)

    def expected_reward(logits: Array) -> Array:
        return jnp.mean(jnp.sum(jax.nn.softmax(logits) * rewards, axis=-1))

    return jax.grad(expected_reward)(logits)


def bandit_rollout(
    actions: Int[Array, " B"],
    behavior_logits: Float[Array, "P A"],
    rewards: Float[Array, "P A"],
    *,
    group_size: int,
) -> Rollout:
    """A batch of one-token completions `[B, 2]`: the prompt's index, then the action."""
    num_prompts = behavior_logits.shape[0]
    prompts = jnp.repeat(jnp.arange(num_prompts), group_size)
    logprobs = jax.nn.log_softmax(behavior_logits)[prompts, actions]
    zeros = jnp.zeros_like(logprobs)
    columns = jnp.broadcast_to(jnp.array([False, True]), (actions.shape[0], 2))
    return Rollout(
        tokens=jnp.stack([prompts, actions], axis=1).astype(jnp.int32),
        mask=columns,
        behavior_logprobs=jnp.stack([zeros, logprobs], axis=1),
        rewards=rewards[prompts, actions],
        group_ids=prompts,
        truncated=jnp.zeros(actions.shape, bool),
        reference_logprobs=jnp.stack([zeros, logprobs], axis=1),
        values=jnp.zeros_like(columns, logprobs.dtype),
    )


def expected_gradient(
    objective: Objective,
    logits: Float[Array, "P A"],
    rewards: Float[Array, "P A"],
    *,
    group_size: int,
    behavior_logits: Float[Array, "P A"] | None = None,
) -> Float[Array, "P A"]:
    """The exact expected *ascent* direction `E[-∇ loss]` of an objective on a bandit.

    Args:
      objective: any `Objective`; values, where it needs them, are 0.
      logits: of the current policy, with respect to which the gradient is taken.
      rewards: of every action.
      group_size: G, samples per prompt.
      behavior_logits: of the policy that samples; default: the current one (on-policy).

    Returns:
      `[P, A]`, in the dtype of `logits` (float64 under x64).

    Raises:
      ValueError: too many batches to enumerate, unequal shapes.
    """
    _checks.rank("logits", logits, 2)
    _checks.same_shape(logits=logits, rewards=rewards, behavior_logits=behavior_logits)
    behavior = logits if behavior_logits is None else behavior_logits
    num_prompts, num_actions = logits.shape
    draws = jnp.asarray(all_draws(num_prompts, num_actions, group_size))
    prompts = jnp.repeat(jnp.arange(logits.shape[0]), group_size)

    def gradient(actions: Array) -> Array:
        rollout = bandit_rollout(actions, behavior, rewards, group_size=group_size)
        prepared = objective.prepare(rollout)

        def loss(logits: Array) -> Array:
            logprobs = jax.nn.log_softmax(logits)
            chosen = logprobs[prompts, actions]
            entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)[prompts]
            columns = [jnp.zeros_like(chosen), chosen]
            outputs = PolicyOutputs(
                logprobs=jnp.stack(columns, axis=1),
                entropy=jnp.stack([jnp.zeros_like(entropy), entropy], axis=1),
                values=jnp.zeros((actions.shape[0], 2), logits.dtype),
            )
            return objective.value(outputs, prepared)

        return -jax.grad(loss)(logits)

    def weighted(actions: Array) -> Array:
        probability = jnp.exp(jax.nn.log_softmax(behavior)[prompts, actions].sum())
        return probability * gradient(actions)

    return jnp.sum(jax.lax.map(weighted, draws, batch_size=4096), axis=0)
