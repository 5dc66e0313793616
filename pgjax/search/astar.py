"""A* search, a batch of states at a time."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pgjax.search import best_first as bf
from pgjax.search import frontier as fr
from pgjax.search.best_first import SearchResult


def a_star(
    root: bf.State,
    *,
    transition: bf.Transition,
    is_goal: bf.IsGoal,
    heuristic: Callable[[Int[Array, "K S"]], Float[Array, " K"]],
    num_actions: int,
    capacity: int,
    max_states: int | None = None,
    batch: int = 1,
    weight: float = 1.0,
    tolerance: float = 0.0,
    max_iterations: int = 100_000,
    max_path: int = 64,
) -> SearchResult:
    """Opens the states of smallest λ g(s) + h(s), all of whose A children are generated and judged.

    States that are reached more cheaply than before are opened again. It ends where no key is below
    λ g(goal): with λ = 1 and h nowhere above the true cost to go, the path is a shortest one, and
    for λ < 1 it costs at most 1/λ times that.

    Args:
      root: int32 `[S]`.
      transition: `(state [S], action) -> (state [S], cost)`; costs are at least 0, and infinite
        where the action cannot be taken.
      is_goal: `state [S] -> bool`.
      heuristic: `states [K, S] -> f32 [K]`, h; a whole batch, so that it may be a network. Infinite
        or not a number: that state is never opened.
      num_actions: A.
      capacity: how many states can wait at once, at least B A.
      max_states: how many can be known; None: `capacity`. Best at twice what is needed.
      batch: B, states opened at once. The more, the fewer and larger calls of h, and the more of
        them in vain.
      weight: λ > 0 of the cost so far; a small one is greedy.
      tolerance: ≥ 0: ends where no key is below λ g(goal) - tolerance. Infinite: at the first goal.
      max_iterations: after which it ends, solved or not.
      max_path: L, of the path that is returned.

    Returns:
      a `SearchResult`; `generated` counts A for each opened state (less what cannot be taken).

    Raises:
      ValueError: a root that is not a vector of integers, numbers out of range, a `capacity` below
        B A, and, where the root is concrete, an action of negative cost at it. Elsewhere such an
        action is not taken, and is an error under `jax.experimental.checkify`.

    Source: Hart, Nilsson and Raphael 1968; weight and batch as in DeepCubeA, Agostinelli et al.
    2019. In place of its stop at the first goal that is opened, this one ends once a goal is proven
    best, which may be before it is opened.
    """
    bf.check_options(
        root,
        transition,
        num_actions=num_actions,
        capacity=capacity,
        batch=batch,
        weight=weight,
        tolerance=tolerance,
    )
    at, reached = bf.start(
        root,
        is_goal,
        (jnp.int32(0), jnp.float32(0)),
        rows=batch * num_actions,
        capacity=capacity,
        max_states=max_states,
    )
    actions = jnp.tile(jnp.arange(num_actions, dtype=jnp.int32), batch)

    def judge(at: bf.Progress, reached: bf.Reached) -> bf.Progress:
        slot, cost, fresh = reached
        keys = weight * cost + heuristic(at.known.states.keys[slot])
        comes = fresh & (keys < bf.limit(at, weight=weight, tolerance=tolerance))
        return at._replace(
            waiting=fr.push_many(at.waiting, keys, (slot, cost), where=comes),
            evaluated=at.evaluated + fresh.sum(dtype=jnp.int32),
        )

    def open_states(state: tuple[bf.Progress, bf.Reached]) -> tuple[bf.Progress, bf.Reached]:
        (slot, cost), useful, at = bf.next_items(
            judge(*state), batch=batch, weight=weight, tolerance=tolerance
        )
        parent, cost, useful = (jnp.repeat(x, num_actions) for x in (slot, cost, useful))
        states, step = bf.take(transition, at.known.states.keys[parent], actions)
        return bf.reach(
            at,
            is_goal,
            states,
            cost=cost + step,
            parent=parent,
            action=actions,
            step=step,
            where=useful,
        )

    at, _ = jax.lax.while_loop(
        lambda state: ~state[0].done & (state[0].iterations < max_iterations),
        open_states,
        (at, reached),
    )
    return bf.result(at, max_path=max_path)
