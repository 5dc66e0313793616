"""Q* search: best-first over actions, whose children are not generated before they are chosen."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pgjax.search import best_first as bf
from pgjax.search import frontier as fr
from pgjax.search.best_first import SearchResult


def q_star(
    root: bf.State,
    *,
    transition: bf.Transition,
    is_goal: bf.IsGoal,
    action_costs: Callable[[Int[Array, "K S"]], Float[Array, "K A"]],
    num_actions: int,
    capacity: int,
    max_states: int | None = None,
    batch: int = 1,
    weight: float = 1.0,
    tolerance: float = 0.0,
    max_iterations: int = 100_000,
    max_path: int = 64,
) -> SearchResult:
    """Takes the actions of smallest λ g(s) + q(s, a), with q(s, a) ≈ c(s, a) + h(s').

    One state is generated and judged for each action taken, where A* generates and judges A: one
    call of q puts all A actions of a state on the frontier. It ends where no key is below
    λ g(goal): with λ = 1 and q nowhere above the true cost, the path is a shortest one, and for
    λ < 1 it costs at most 1/λ times that.

    Args:
      root: int32 `[S]`.
      transition: `(state [S], action) -> (state [S], cost)`; costs are at least 0, and infinite
        where the action cannot be taken.
      is_goal: `state [S] -> bool`.
      action_costs: `states [K, S] -> f32 [K, A]`, q; a whole batch, so that it may be a network.
        Infinite or not a number: that action is never taken.
      num_actions: A.
      capacity: how many actions can wait at once, at least B A.
      max_states: how many can be known; None: `capacity`. Best at twice what is needed.
      batch: B, actions taken at once.
      weight: λ > 0 of the cost so far; a small one is greedy.
      tolerance: ≥ 0: ends where no key is below λ g(goal) - tolerance. Infinite: at the first goal,
        which is a best one only if q(s, a) is also nowhere below c(s, a).
      max_iterations: after which it ends, solved or not.
      max_path: L, of the path that is returned.

    Returns:
      a `SearchResult`; `generated` counts the actions taken.

    Raises:
      ValueError: a root that is not a vector of integers, numbers out of range, a `capacity` below
        B A, and, where the root is concrete, an action of negative cost at it. Elsewhere such an
        action is not taken, and is an error under `jax.experimental.checkify`.

    Source: A* Search Without Expansions, Agostinelli et al. 2021, arXiv 2102.04518. Actions of a
    state that was reached more cheaply since wait a second time at the lower cost; the older ones
    are dropped when their turn comes, without the child that the paper's code generates first.
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
    zero = jnp.int32(0)
    at, reached = bf.start(
        root,
        is_goal,
        (zero, zero, jnp.float32(0)),
        rows=batch,
        capacity=capacity,
        max_states=max_states,
    )
    actions = jnp.tile(jnp.arange(num_actions, dtype=jnp.int32), batch)

    def judge(at: bf.Progress, reached: bf.Reached) -> bf.Progress:
        slot, cost, fresh = (jnp.repeat(x, num_actions) for x in reached)
        keys = weight * cost + action_costs(at.known.states.keys[reached.slot]).reshape(-1)
        comes = fresh & (keys < bf.limit(at, weight=weight, tolerance=tolerance))
        return at._replace(
            waiting=fr.push_many(at.waiting, keys, (slot, actions, cost), where=comes),
            evaluated=at.evaluated + reached.fresh.sum(dtype=jnp.int32),
        )

    def take_actions(state: tuple[bf.Progress, bf.Reached]) -> tuple[bf.Progress, bf.Reached]:
        (parent, action, cost), useful, at = bf.next_items(
            judge(*state), batch=batch, weight=weight, tolerance=tolerance
        )
        states, step = bf.take(transition, at.known.states.keys[parent], action)
        return bf.reach(
            at,
            is_goal,
            states,
            cost=cost + step,
            parent=parent,
            action=action,
            step=step,
            where=useful,
        )

    at, _ = jax.lax.while_loop(
        lambda state: ~state[0].done & (state[0].iterations < max_iterations),
        take_actions,
        (at, reached),
    )
    return bf.result(at, max_path=max_path)
