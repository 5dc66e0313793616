"""What best-first searches share: known states, what was reached how cheaply, and when to stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pgjax import _checks
from pgjax.search import frontier as fr
from pgjax.search import hashset

State = Int[Array, " S"]
Transition = Callable[[State, Int[Array, ""]], tuple[State, Float[Array, ""]]]
IsGoal = Callable[[State], Bool[Array, ""]]


class SearchResult(NamedTuple):
    """What a search has found.

    Attributes:
      solved: a goal was reached.
      cost: of the path; infinite where not solved.
      path: actions from root to goal, int32 `[L]`; -1 behind the last.
      length: actions of the path; where there are more than L, the first L are in `path`.
      bound: the largest that the smallest waiting key was. With a weight of at most 1, estimates
        that are nowhere too high and no overflow, no path costs less; infinite where all that can
        be reached was looked at and no goal among it.
      generated: states that actions were taken to.
      evaluated: states of which the estimate was asked for.
      iterations: of the loop, each with one call of the estimate.
      overflowed: an item or a state did not fit; the path is right, but perhaps not the best.
    """

    solved: Bool[Array, ""]
    cost: Float[Array, ""]
    path: Int[Array, " L"]
    length: Int[Array, ""]
    bound: Float[Array, ""]
    generated: Int[Array, ""]
    evaluated: Int[Array, ""]
    iterations: Int[Array, ""]
    overflowed: Bool[Array, ""]


class Known(NamedTuple):
    """States that were reached, by the slot of the set: cheapest cost so far, and from where.

    Attributes:
      states: the set, of N slots.
      cost: f32 `[N]`, infinite where no state is.
      parent: slot, int32 `[N]`, -1 at the root.
      action: that led here from the parent, int32 `[N]`.
      step: what it cost, f32 `[N]`.
    """

    states: hashset.HashSet
    cost: Float[Array, " N"]
    parent: Int[Array, " N"]
    action: Int[Array, " N"]
    step: Float[Array, " N"]


class Progress(NamedTuple):
    """Of a search; `goal` is the slot of the cheapest goal so far, -1 without one."""

    known: Known
    waiting: fr.Frontier
    goal: Int[Array, ""]
    bound: Float[Array, ""]
    generated: Int[Array, ""]
    evaluated: Int[Array, ""]
    iterations: Int[Array, ""]
    done: Bool[Array, ""]


class Reached(NamedTuple):
    """States that are to be judged, `[K]`; those where `fresh` is false are of no use.

    Attributes:
      slot: of the set.
      cost: at which they were reached, f32.
      fresh: new or cheaper than before, the first and cheapest of equal states, and no goal.
    """

    slot: Int[Array, " K"]
    cost: Float[Array, " K"]
    fresh: Bool[Array, " K"]


def start(
    root: State, is_goal: IsGoal, item: Any, *, rows: int, capacity: int, max_states: int | None
) -> tuple[Progress, Reached]:
    """Only the root is known, and nothing waits.

    Returns:
      the progress; the root in the first of `rows` rows.
    """
    _checks.rank("root", root, 1)
    _checks.integer(root=root)
    count = capacity if max_states is None else max_states
    _checks.in_range("max_states", count, 1)
    root = jnp.asarray(root, jnp.int32)
    states, slot = hashset.singleton(root, capacity=count)
    known = Known(
        states,
        jnp.full(count, jnp.inf, jnp.float32).at[slot].set(0.0),
        jnp.full(count, -1, jnp.int32),
        jnp.full(count, -1, jnp.int32),
        jnp.zeros(count, jnp.float32),
    )
    solved = is_goal(root)
    goal = jnp.where(solved, slot, -1)
    zero = jnp.int32(0)
    waiting = fr.empty(item, capacity=capacity)
    at = Progress(known, waiting, goal, jnp.float32(0.0), zero, zero, zero, solved)
    slots = jnp.full(rows, slot, jnp.int32)
    return at, Reached(slots, jnp.zeros(rows, jnp.float32), jnp.arange(rows) == 0)


def goal_cost(at: Progress) -> Float[Array, ""]:
    """Of the cheapest goal so far; infinite without one."""
    return jnp.where(at.goal >= 0, at.known.cost[at.goal], jnp.float32(jnp.inf))


def limit(at: Progress, *, weight: float, tolerance: float) -> Float[Array, ""]:
    """Only keys below it are of use: λ g(goal) - tolerance, infinite without a goal."""
    cost = goal_cost(at)
    return jnp.where(jnp.isfinite(cost), weight * cost - tolerance, cost)


def next_items(
    at: Progress, *, batch: int, weight: float, tolerance: float
) -> tuple[Any, Bool[Array, " B"], Progress]:
    """Takes the items with the smallest keys; the search is done where none is of use.

    An item is `(slot, ..., cost)`; one whose state was reached more cheaply since waits again with
    that cost, and so is of no use either.
    """
    popped, waiting = fr.pop_many(at.waiting, count=batch)
    below = limit(at, weight=weight, tolerance=tolerance)
    useful = popped.valid & (popped.keys < below)
    at = at._replace(
        waiting=waiting,
        bound=jnp.maximum(at.bound, jnp.minimum(popped.keys[0], below)),
        iterations=at.iterations + useful.any(),
        done=~useful.any(),
    )
    slot, *_, cost = popped.items
    return popped.items, useful & (cost <= at.known.cost[slot]), at


def reach(
    at: Progress,
    is_goal: IsGoal,
    states: Int[Array, "K S"],
    *,
    cost: Float[Array, " K"],
    parent: Int[Array, " K"],
    action: Int[Array, " K"],
    step: Float[Array, " K"],
    where: Bool[Array, " K"],
) -> tuple[Progress, Reached]:
    """Notes the states that are new or reached more cheaply than before."""
    where &= jnp.isfinite(cost)
    known, count = at.known, at.known.cost.shape[0]
    table, slot, _ = hashset.insert_many(known.states, states, where=where)
    fits = slot < count
    before = jnp.where(fits, known.cost[slot], -jnp.inf)
    least = known.cost.at[slot].min(cost, mode="drop")
    better = fits & (cost < before) & (cost == least[slot])
    better = hashset.first_of(slot, better, num=count + 1)
    to = jnp.where(better, slot, count)
    known = Known(
        table,
        least,
        *(
            old.at[to].set(new, mode="drop")
            for old, new in (
                (known.parent, parent),
                (known.action, action),
                (known.step, step),
            )
        ),
    )
    goals = better & jax.vmap(is_goal)(states)
    best = jnp.argmin(jnp.where(goals, cost, jnp.inf))
    found = goals.any() & (cost[best] < goal_cost(at))
    at = at._replace(
        known=known,
        goal=jnp.where(found, slot[best], at.goal),
        generated=at.generated + where.sum(dtype=jnp.int32),
    )
    return at, Reached(slot, cost, better & ~goals)


def take(
    transition: Transition, states: Int[Array, "K S"], actions: Int[Array, " K"]
) -> tuple[Int[Array, "K S"], Float[Array, " K"]]:
    """Where actions lead and what they cost; infinite where that is no cost."""
    states, cost = jax.vmap(transition)(states, actions)
    cost = jnp.asarray(cost, jnp.float32)
    valid = cost >= 0
    _checks.traced(valid.all(), "transition: expected costs of at least 0")
    return jnp.asarray(states, jnp.int32), jnp.where(valid, cost, jnp.inf)


def result(at: Progress, *, max_path: int) -> SearchResult:
    """The path to the cheapest goal, by the parents, and the counts."""
    _checks.in_range("max_path", max_path, 1)
    known = at.known

    def back(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        slot, length, cost = state
        return known.parent[slot], length + 1, cost + known.step[slot]

    def more(state: tuple[Array, ...]) -> Array:
        slot = state[0]
        return (slot >= 0) & (known.parent[slot] >= 0)

    # What led to a state may have become cheaper after it was reached, so the steps are added up.
    _, length, cost = jax.lax.while_loop(more, back, (at.goal, jnp.int32(0), jnp.float32(0.0)))

    def write(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        slot, place, path = state
        path = path.at[place].set(known.action[slot], mode="drop")
        return known.parent[slot], place - 1, path

    path = jnp.full(max_path, -1, jnp.int32)
    _, _, path = jax.lax.while_loop(more, write, (at.goal, length - 1, path))
    solved = at.goal >= 0
    return SearchResult(
        solved=solved,
        cost=jnp.where(solved, cost, jnp.inf),
        path=path,
        length=length,
        bound=at.bound,
        generated=at.generated,
        evaluated=at.evaluated,
        iterations=at.iterations,
        overflowed=at.waiting.overflowed | known.states.overflowed,
    )


def check_options(
    root: State,
    transition: Transition,
    *,
    num_actions: int,
    capacity: int,
    batch: int,
    weight: float,
    tolerance: float,
) -> None:
    """What all searches want of their arguments."""
    _checks.rank("root", root, 1)
    _checks.integer(root=root)
    _checks.in_range("num_actions", num_actions, 1)
    _checks.in_range("batch", batch, 1)
    _checks.in_range("weight", weight, 0.0, low_open=True)
    _checks.in_range("tolerance", tolerance, 0.0)
    if capacity < batch * num_actions:
        raise ValueError(
            f"capacity: expected at least batch x num_actions = {batch * num_actions}, "
            f"got {capacity}"
        )
    if not _checks.is_concrete(root):
        return
    # Costs are known for sure only here; within the loop they are seen by checkify alone.
    every = jnp.broadcast_to(jnp.asarray(root, jnp.int32), (num_actions, np.shape(root)[0]))
    _, cost = jax.vmap(transition)(every, jnp.arange(num_actions))
    if _checks.is_concrete(cost) and not np.all(np.asarray(cost) >= 0):
        raise ValueError(f"transition: expected costs of at least 0, got {np.asarray(cost).min()}")
