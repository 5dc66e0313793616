"""Recipes that choose which rows and tokens of a batch are learnt from: D3S and GTPO.

What they choose by is what the policy said before the first update on the batch, `rollout.old`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pgjax import _checks, advantages, aggregate, masks, segments, surrogates
from pgjax.masks import conflict, downsample, entropy_filter
from pgjax.objectives._parts import advantages_of, by_group, memory_of
from pgjax.objectives.facts import row_mean
from pgjax.objectives.group_relative import grpo
from pgjax.objectives.objective import Memory, Objective, step_count
from pgjax.types import PolicyOutputs, Rollout

Subset = Callable[[Rollout, Float[Array, ""]], Bool[Array, " B"]]


class Beside(NamedTuple):
    """Two memories in one: of the objective that was extended, and of its extension."""

    own: Any
    added: Any


# --- D3S ------------------------------------------------------------------------------------------


def most_varied_rows(rollout: Rollout, share: Float[Array, ""]) -> Bool[Array, " B"]:
    """The share of the batch's rows whose advantages have the largest variance."""
    values, valid = _row_advantages(rollout), _one_row_a_trajectory(rollout)
    size = downsample.rows_to_keep(share, jnp.sum(valid))
    return _all_rows(rollout, downsample.max_variance_subset(values, size, where=valid))


def most_varied_rows_of_groups(rollout: Rollout, share: Float[Array, ""]) -> Bool[Array, " B"]:
    """The share of each group's rows whose advantages have the largest variance."""
    values, valid = _row_advantages(rollout), _one_row_a_trajectory(rollout)
    ids, number = segments.dense_ids(rollout.group_ids), values.shape[0]
    count = segments.count(ids, num_segments=number, where=valid)
    chosen = downsample.max_variance_subset_by_group(
        values, ids, downsample.rows_to_keep(share, count), num_groups=number, where=valid
    )
    return _all_rows(rollout, chosen)


def with_down_sampling(
    objective: Objective,
    *,
    steps: int,
    rows: tuple[float, float] = (0.25, 1.0),
    tokens: tuple[float, float] = (0.2, 1.0),
    subset: Subset = most_varied_rows,
) -> Objective:
    """Keeps the rows that differ most, then their tokens with the largest |A| H, ever more of both.

    After `p = step / steps` of training a share `(1 - p) first + p last` of the rows is kept, and
    of these rows' tokens; afterwards the last share. Advantages stay those of the whole batch.

    Args:
      objective: any; what its own mask drops is not chosen from, and its memory is kept.
      steps: batches until the last shares hold, > 0.
      rows: first and last share of the batch's rows, in (0, 1]; at least 2 rows are kept.
      tokens: first and last share of the kept rows' tokens, in (0, 1].
      subset: `(rollout, share) -> bool[B]`, which rows; `most_varied_rows_of_groups` compares
        within each prompt's group instead of across the batch.

    Returns:
      an objective that also needs the old policy's `entropy`, and keeps count of its batches.

    Raises:
      ValueError: steps below 1, a share outside (0, 1].

    Rows of one trajectory are chosen together and count once; a row with an advantage per token is
    judged by their mean.

    Source: D3S, 2025, arXiv 2509.22115, whose shares are not stated; those here are a choice.
    """
    _checks.in_range("steps", steps, 1)
    for name, shares in (("rows", rows), ("tokens", tokens)):
        for share in shares:
            _checks.in_range(name, share, 0.0, 1.0, low_open=True)

    def mask(rollout: Rollout) -> Bool[Array, "B T"]:
        own, step = memory_of(rollout)
        assert rollout.old is not None and rollout.old.entropy is not None
        keep = rollout.mask & masks.finite_rewards(rollout.rewards)[:, None]
        if objective.mask is not None:
            given = objective.mask(rollout.replace(memory=own))
            keep = keep & (given[:, None] if given.ndim == 1 else given)
        progress = jnp.minimum(step / steps, 1.0)
        share_of_rows, share_of_tokens = (
            first + progress * (last - first) for first, last in (rows, tokens)
        )
        keep = keep & subset(rollout.replace(mask=keep), share_of_rows)[:, None]
        score = downsample.token_uncertainty(advantages_of(rollout), rollout.old.entropy)
        return downsample.topk_token_mask(score, keep, share_of_tokens)

    counting = _with_memory(objective, step_count())
    return dataclasses.replace(counting, mask=mask, old_needs=objective.old_needs | {"entropy"})


def d3s(
    *,
    steps: int,
    rows: tuple[float, float] = (0.25, 1.0),
    tokens: tuple[float, float] = (0.2, 1.0),
    low: float = 0.2,
    high: float = 0.2,
    epsilon: float = 1e-6,
    ddof: int = 1,
) -> Objective:
    """D3S: GRPO's advantages, on the rows of largest variance and their most uncertain tokens.

    Args:
      steps, rows, tokens: the schedule, see `with_down_sampling`.
      low, high, epsilon, ddof: as in `grpo`.

    The mean over kept tokens is a choice; the paper's normaliser is not stated.

    Expected gradient: biased, as `grpo`'s under a token mean, and by the selection, which prefers
    tokens of large |A|.

    Source: "Learning More with Less: A Dynamic Dual-Level Down-Sampling Framework", 2025,
    arXiv 2509.22115.
    """
    base = dataclasses.replace(
        grpo(low=low, high=high, epsilon=epsilon, ddof=ddof), aggregate=aggregate.token_mean
    )
    return with_down_sampling(base, steps=steps, rows=rows, tokens=tokens)


# --- GTPO -----------------------------------------------------------------------------------------


def gtpo(
    *,
    entropy_coefficient: float = 0.1,
    boost: float = 2.0,
    suppress: float = 0.0,
    threshold: float = entropy_filter.MAJORITY_ENTROPY,
    initial_entropy: float | None = None,
    entropy_on_inactive: bool = True,
    divide_by_conflicts: bool = False,
) -> Objective:
    """GTPO: shared tokens of good and bad completions spared, completions of high entropy dropped.

    `-(1/B) Σ_i δ_i (A_i - γ H_i) (1/n_i) Σ_t λ_it log π_it` with `A_i = R_i - mean_g R`, H_i the
    mean entropy of the completion's tokens, λ the factors of `masks.conflict_weights` and δ the
    completions that pass `masks.entropy_gate`. For one update on each batch: there is neither a
    ratio nor a clip, nor a reference policy.

    Args:
      entropy_coefficient: γ ≥ 0.
      boost, suppress: factors of conflict tokens in completions with A > 0 and A < 0; 1 and 1 for
        none.
      threshold: of the gate, in nats; `inf` keeps all completions.
      initial_entropy: mean entropy of the policy before training; None measures it on the first
        batch. 0 applies the gate always, as the authors' code does.
      entropy_on_inactive: keep the entropy term on completions with A = 0. By the formula it acts
        on them too: a prompt whose rewards all agree is then trained for low entropy alone.
      divide_by_conflicts: divide each completion's loss by the number of its conflict tokens, as
        the authors' code does and the formula does not.

    Replace `advantage` freely: signs of conflicts are those of what it gives.

    Expected gradient: biased, by the weights of shared tokens and by the entropy term. With
    `boost=suppress=1`, `entropy_coefficient=0`, `threshold=inf` and completions of one length n it
    is `(1 - 1/G) / n` times the policy gradient for groups of G.

    Source: "GTPO: Trajectory-Based Policy Optimization in Large Language Models", 2025,
    arXiv 2508.03772.
    """
    _checks.in_range("entropy_coefficient", entropy_coefficient, 0.0, high_open=True)
    _checks.in_range("boost", boost, 0.0, high_open=True)
    _checks.in_range("suppress", suppress, 0.0, high_open=True)
    _checks.in_range("threshold", threshold, 0.0, low_open=True)
    if initial_entropy is not None:
        _checks.in_range("initial_entropy", initial_entropy, 0.0)

    def extras(rollout: Rollout) -> dict[str, Array]:
        strength = entropy_coefficient * _mean_entropy(rollout)
        if not entropy_on_inactive:
            strength = jnp.where(_row_advantages(rollout) == 0, 0.0, strength)
        return {"entropy_penalty": strength}

    def multiplier(rollout: Rollout) -> Float[Array, "B T"]:
        signs = jnp.sign(_row_advantages(rollout)).astype(jnp.int32)
        found = conflict.conflict_tokens(rollout.tokens, rollout.mask, signs, rollout.group_ids)
        weights = conflict.conflict_weights(found, signs, boost=boost, suppress=suppress)
        if divide_by_conflicts:
            number = jnp.sum(found.forward | found.backward, axis=1, keepdims=True)
            weights = weights / jnp.maximum(number, 1)
        start = _initial_entropy(rollout) if initial_entropy is None else initial_entropy
        gate = entropy_filter.entropy_gate(_mean_entropy(rollout), start, threshold=threshold)
        return jnp.where(gate[:, None], weights, 0.0)

    def surrogate(outputs: PolicyOutputs, rollout: Rollout) -> Float[Array, "B T"]:
        given = advantages_of(rollout)
        given = given[:, None] if given.ndim == 1 else given
        assert rollout.extras is not None
        shaped = given - rollout.extras["entropy_penalty"][:, None]
        return surrogates.score_function(outputs.logprobs, shaped)

    return Objective(
        advantage=by_group(advantages.centered),
        extras=extras,
        multiplier=multiplier,
        surrogate=surrogate,
        aggregate=aggregate.sequence_mean_token_mean,
        memory=None if initial_entropy is not None else _first_entropy(),
        old_needs=frozenset({"entropy"}),
    )


def _first_entropy() -> Memory:
    """The mean entropy of the first batch, negative until there is one."""
    return Memory(
        init=lambda: jnp.float32(-1.0), update=lambda memory, rollout: _initial_entropy(rollout)
    )


def _initial_entropy(rollout: Rollout) -> Float[Array, ""]:
    now = aggregate.masked_mean(_mean_entropy(rollout), jnp.any(rollout.mask, axis=1))
    memory = memory_of(rollout)
    return jnp.where(memory < 0, now, memory).astype(jnp.float32)


def _mean_entropy(rollout: Rollout) -> Float[Array, " B"]:
    assert rollout.old is not None and rollout.old.entropy is not None
    return row_mean(rollout.old.entropy, rollout.mask)


# --- shared ---------------------------------------------------------------------------------------


def _with_memory(objective: Objective, memory: Memory) -> Objective:
    """The objective with a second memory, `Beside` its own, which its own parts do not see."""
    own = objective.memory

    def seen(part: Callable[[Rollout], Any] | None) -> Callable[[Rollout], Any] | None:
        if part is None or own is None:
            return part
        return lambda rollout: part(rollout.replace(memory=memory_of(rollout).own))

    def init() -> Beside:
        return Beside(None if own is None else own.init(), memory.init())

    def update(both: Beside, rollout: Rollout) -> Beside:
        kept = None if own is None else own.update(both.own, rollout.replace(memory=both.own))
        return Beside(kept, memory.update(both.added, rollout.replace(memory=both.added)))

    parts = ("advantage", "rewards", "extras", "mask", "multiplier", "targets")
    changes: dict[str, Any] = {name: seen(getattr(objective, name)) for name in parts}
    return dataclasses.replace(objective, memory=Memory(init, update), **changes)


def _row_advantages(rollout: Rollout) -> Float[Array, " B"]:
    given = advantages_of(rollout)
    return given if given.ndim == 1 else row_mean(given, rollout.mask)


def _one_row_a_trajectory(rollout: Rollout) -> Bool[Array, " B"]:
    """The first row of each trajectory that has tokens to learn from; it stands for them all."""
    present = jnp.any(rollout.mask, axis=1)
    if rollout.trajectory_ids is None:
        return present
    ids = segments.dense_ids(rollout.trajectory_ids)
    return present & segments.first_rows(jnp.where(present, ids, ids.shape[0] + ids))


def _all_rows(rollout: Rollout, chosen: Bool[Array, " B"]) -> Bool[Array, " B"]:
    """The chosen rows with all other rows of their trajectories."""
    if rollout.trajectory_ids is None:
        return chosen
    ids = segments.dense_ids(rollout.trajectory_ids)
    return segments.count(ids, num_segments=ids.shape[0], where=chosen)[ids] > 0
