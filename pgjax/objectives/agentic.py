"""Recipes for agents: episodes of several turns, whose steps get advantages of their own.

Turns come from `rollout.turn_ids`; a trajectory may be spread over several rows (`trajectory_ids`).
Expected gradients are stated for one on-policy step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pgjax import _checks, advantages, aggregate, masks, surrogates
from pgjax.advantages import entropy_modulated as empg_parts
from pgjax.advantages.turn_level import turn_level
from pgjax.masks.trajectory_mismatch import trajectory_geometric_mismatch
from pgjax.objectives._parts import advantages_of
from pgjax.objectives.facts import trajectory_of, trajectory_total
from pgjax.objectives.group_relative import grpo
from pgjax.objectives.objective import Objective
from pgjax.returns import turns
from pgjax.types import PolicyOutputs, Rollout

StepIds = Callable[[Rollout], Int[Array, "B T"]]


def own_turns(rollout: Rollout) -> Int[Array, "B T"]:
    """The rollout's `turn_ids`.

    Raises:
      ValueError: it has none.
    """
    if rollout.turn_ids is None:
        raise ValueError("rollout.turn_ids: this objective needs it, got None")
    return rollout.turn_ids


def by_turn(
    function: Callable[..., Array],
    *,
    gamma: float = 1.0,
    num_turns: int | None = None,
    turn_ids: StepIds = own_turns,
    **options: Any,
) -> Callable[[Rollout], Float[Array, "B T"]]:
    """A group advantage, turn by turn on returns to go, as a function of the rollout.

    Args:
      function: `advantages.leave_one_out`, `centered`, `group_normalize` or one's own, see
        `advantages.turn_level`.
      gamma: discount per turn, in [0, 1].
      num_turns: more than the largest turn id; None: the length of the rows.
      turn_ids: turn of each token of the policy, -1 outside; must not depend on the mask.
      **options: of the function.

    Returns:
      a function to `[B, T]`. Per-token rewards belong to the turn at whose tokens they stand; one
      reward a trajectory is that of its last turn. A turn takes place where it has tokens and is
      compared where `mask` keeps any of them: what a rejected turn earned still counts in the
      returns of those before it. A reward that is not finite takes its own turn and all before it
      out of every statistic.
    """
    _checks.in_range("gamma", gamma, 0.0, 1.0)

    def advantage(rollout: Rollout) -> Array:
        ids, size = turn_ids(rollout), num_turns or rollout.tokens.shape[1]
        rewards, exists = _turn_rewards(rollout, ids, size)
        to_go = turns.turn_returns(rewards, exists, gamma=gamma, allow_holes=True)
        kept = turns.turn_sizes(
            ids, num_turns=size, trajectory_ids=rollout.trajectory_ids, mask=rollout.mask
        )
        found = turn_level(
            function,
            to_go,
            _of_trajectories(rollout, rollout.group_ids),
            kept > 0,
            num_groups=rollout.group_ids.shape[0],
            **options,
        )
        return turns.at_turns(found, ids, trajectory_ids=rollout.trajectory_ids)

    return advantage


def trloo(
    *,
    gamma: float = 1.0,
    num_turns: int | None = None,
    turn_ids: StepIds = own_turns,
    low: float = 0.2,
    high: float = 0.28,
    bound: float = 3.0,
) -> Objective:
    """TRLOO: leave-one-out baselines per turn, dual-clipped, mean over sequences of token sums.

    `A_{i,m} = G_{i,m} - mean_{j≠i} G_{j,m}`, with `G_m = r_m + γ G_{m+1}` the return from turn m
    on, over the group's samples that have a turn m.

    Args:
      gamma: discount per turn, in [0, 1].
      num_turns: more than the largest turn id; None: the length of the rows, which costs memory.
      turn_ids: turn of each token, -1 outside; default: the rollout's own, which it then needs.
      low, high, bound: of `surrogates.dual_clipped`.

    What Dr. Kernel rejects goes on top: `with_mismatch_rejection`, and `with_rejection` with draws
    from `masks.coverage_keep_probability`.

    Expected gradient: the policy gradient, unbiased, with γ = 1 and one row a trajectory, however
    few samples reach a turn. Rejection that depends on what was sampled changes it.

    Source: Dr. Kernel, 2026, arXiv 2602.05885.
    """
    _checks.in_range("low", low, 0.0, 1.0)
    _checks.in_range("high", high, 0.0)
    _checks.in_range("bound", bound, 1.0, low_open=True)

    def surrogate(outputs: PolicyOutputs, rollout: Rollout) -> Array:
        ratio = surrogates.importance_ratio(outputs.logprobs, rollout.behavior_logprobs)
        return surrogates.dual_clipped(
            ratio, advantages_of(rollout), low=low, high=high, bound=bound
        )

    return Objective(
        advantage=by_turn(
            advantages.leave_one_out, gamma=gamma, num_turns=num_turns, turn_ids=turn_ids
        ),
        surrogate=surrogate,
        aggregate=aggregate.sequence_mean_token_sum,
    )


def with_rejection(
    objective: Objective,
    keep: Callable[[Rollout], Bool[Array, " B"] | Bool[Array, "B T"]],
    *,
    needs: frozenset[str] = frozenset(),
) -> Objective:
    """Leaves out samples or tokens, before advantages that look at the mask are computed.

    A mask of the objective acts after them, which is another thing: correct solutions that are
    rejected as trivial leave a high baseline behind if they stay in it, and that counts against
    every harder attempt.

    Args:
      objective: any; its own mask still applies. Baselines by turn are taken over what is kept;
        `advantages` of whole samples do not look at the mask.
      keep: which rows or tokens are kept; random draws come with the rollout, in its `extras`.
      needs: optional fields that `keep` reads, see `Objective.needs`.

    Source: as in Dr. Kernel, 2026, arXiv 2602.05885.
    """

    def kept(rollout: Rollout) -> Bool[Array, "B T"]:
        found = keep(rollout)
        found = found[:, None] if found.ndim == 1 else found
        return jnp.broadcast_to(found, rollout.mask.shape)

    def advantage(rollout: Rollout) -> Array:
        return objective.advantage(rollout.replace(mask=rollout.mask & kept(rollout)))

    def mask(rollout: Rollout) -> Bool[Array, "B T"]:
        if objective.mask is None:
            return kept(rollout)
        own = objective.mask(rollout)
        return kept(rollout) & (own[:, None] if own.ndim == 1 else own)

    return dataclasses.replace(
        objective, advantage=advantage, mask=mask, own_needs=objective.own_needs | needs
    )


def with_mismatch_rejection(
    objective: Objective,
    *,
    low: float = 0.999,
    high: float = 1.001,
    veto_threshold: float | None = 1e-4,
) -> Objective:
    """Leaves out trajectories on which sampler and learner disagree, and rows with broken tokens.

    Args:
      objective: any, see `with_rejection`.
      low, high: accepted range of the geometric mean of π_old/μ over all tokens of a trajectory.
      veto_threshold: rows with a token of a lower ratio are left out; None: no veto.

    Returns:
      an objective that also needs `proximal_logprobs` (π_old). The ratio of its surrogate is as
      before; `with_mismatch_weights` on top takes it against π_old. Where other rejections are
      combined with this one, put this one on top of them: it judges the tokens that are left.

    Source: mismatch rejection in Dr. Kernel, 2026, arXiv 2602.05885.
    """
    _checks.in_range("low", low, 0.0, low_open=True)
    _checks.in_range("high", high, low, low_open=True)
    if veto_threshold is not None:
        _checks.in_range("veto_threshold", veto_threshold, 0.0, low_open=True)

    def keep(rollout: Rollout) -> Bool[Array, "B T"]:
        proximal = rollout.proximal_logprobs
        assert proximal is not None
        rows = rollout.trajectory_ids
        ids = jnp.arange(rollout.mask.shape[0]) if rows is None else rows
        sides = (proximal, rollout.behavior_logprobs, rollout.mask)
        kept = trajectory_geometric_mismatch(*sides, ids, low=low, high=high)
        if veto_threshold is not None:
            kept = kept & masks.veto(*sides, threshold=veto_threshold)
        return kept

    return with_rejection(objective, keep, needs=frozenset({"proximal_logprobs"}))


def with_entropy_modulation(
    objective: Objective,
    *,
    k: float = 1.0,
    k_future: float = 1.0,
    zeta: float = 0.1,
    steps: StepIds = own_turns,
    num_steps: int | None = None,
    centered: bool = True,
    weigh_tokens: bool = False,
) -> Objective:
    """Scales an objective's advantages by the entropy of the steps they belong to.

    `A g_s + ζ f_{s+1}`, less its mean, see `advantages.modulate_by_entropy`.

    Args:
      objective: any; advantages that differ within a step are averaged over its tokens.
      k, k_future, zeta: ≥ 0.
      steps: step of each token, -1 outside; default: the turns.
      num_steps: more than the largest step id; None: the length of the rows.
      centered: subtract the mean over all steps.
      weigh_tokens: in that mean each step weighs as much as it has tokens.

    Returns:
      an objective that also needs the old policy's entropy.

    Source: EMPG, Wang et al. 2025, arXiv 2509.09265.
    """
    for name, value in {"k": k, "k_future": k_future, "zeta": zeta}.items():
        _checks.in_range(name, value, 0.0, high_open=True)

    def advantage(rollout: Rollout) -> Array:
        base, ids = objective.advantage(rollout), steps(rollout)
        size = num_steps or rollout.tokens.shape[1]
        assert rollout.old is not None and rollout.old.entropy is not None
        mask = rollout.mask & masks.finite_rewards(rollout.rewards)[:, None]
        entropy, valid = empg_parts.step_entropy(
            rollout.old.entropy, ids, mask, num_steps=size, trajectory_ids=rollout.trajectory_ids
        )
        options: dict[str, Any] = {
            "num_turns": size, "trajectory_ids": rollout.trajectory_ids, "mask": mask
        }  # fmt: skip
        count = turns.turn_sizes(ids, **options)
        per_token = jnp.broadcast_to(base[:, None] if base.ndim == 1 else base, mask.shape)
        mean = turns.turn_totals(per_token, ids, **options) / jnp.maximum(count, 1)
        found = empg_parts.modulate_by_entropy(
            mean, entropy, valid, k=k, k_future=k_future, zeta=zeta
        )
        if centered:
            weights = count if weigh_tokens else None
            found = empg_parts.centered_steps(found, valid, weights=weights)
        return turns.at_turns(found, ids, trajectory_ids=rollout.trajectory_ids)

    return dataclasses.replace(
        objective, advantage=advantage, old_needs=objective.old_needs | {"entropy"}
    )


def empg(
    *,
    k: float = 1.0,
    k_future: float = 1.0,
    zeta: float = 0.1,
    steps: StepIds = own_turns,
    num_steps: int | None = None,
    weigh_tokens: bool = False,
    low: float = 0.2,
    high: float = 0.2,
    epsilon: float = 1e-6,
    ddof: int = 1,
) -> Objective:
    """EMPG on GRPO: each step's advantage scaled by how sure the policy was, and where it led.

    Args:
      k, k_future, zeta, steps, num_steps, weigh_tokens: of `with_entropy_modulation`.
      low, high, epsilon, ddof: of `grpo`.

    Needs the old policy's entropy, and `turn_ids` unless `steps` is given.

    Expected gradient: biased as `grpo`'s; steps weigh by their entropy, and the bonus prefers
    steps that lead to sure ones, whatever the reward.

    Source: EMPG, Wang et al. 2025, arXiv 2509.09265.
    """
    return with_entropy_modulation(
        grpo(low=low, high=high, epsilon=epsilon, ddof=ddof),
        k=k,
        k_future=k_future,
        zeta=zeta,
        steps=steps,
        num_steps=num_steps,
        weigh_tokens=weigh_tokens,
    )


def with_total_rewards(objective: Objective) -> Objective:
    """Sums per-token rewards over each trajectory, for objectives that compare whole ones.

    With one reward a row nothing changes. A trajectory with a reward that is not finite has none.

    Args:
      objective: any whose advantages read `rollout.rewards` as `f32[B]`.

    Returns:
      an objective that differs in its rewards alone.
    """

    def rewards(rollout: Rollout) -> Float[Array, " B"]:
        total = rollout.rewards
        if total.ndim == 2:
            by_row = jnp.where(rollout.mask | ~jnp.isfinite(total), total, 0.0).sum(-1)
            total = trajectory_total(rollout, by_row)
        if objective.rewards is None:
            return total
        return objective.rewards(rollout.replace(rewards=total))

    return dataclasses.replace(objective, rewards=rewards)


def _of_trajectories(rollout: Rollout, values: Array) -> Array:
    """A fact that all rows of a trajectory share, once for each grid row."""
    ids = trajectory_of(rollout)
    return jnp.zeros(ids.shape, values.dtype).at[ids].set(values)


def _turn_rewards(rollout: Rollout, turn_ids: Array, num_turns: int) -> tuple[Array, Array]:
    """Reward of each turn and which turns took place, `[B, M]`; NaN where it is not known."""
    options: dict[str, Any] = {
        "num_turns": num_turns, "trajectory_ids": rollout.trajectory_ids
    }  # fmt: skip
    valid = turns.turn_sizes(turn_ids, **options) > 0
    rewards = rollout.rewards
    if rewards.ndim == 2:
        known = masks.finite_rewards(rewards)[:, None]
        return turns.turn_totals(jnp.where(known, rewards, jnp.nan), turn_ids, **options), valid
    later = jnp.cumsum(valid[:, ::-1], axis=-1)[:, ::-1]
    last = valid & (later == 1)
    return jnp.where(last, _of_trajectories(rollout, rewards)[:, None], 0.0), valid
