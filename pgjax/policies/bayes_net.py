"""Joint policies that factorise along a graph: agents see what their parents have just chosen.

π(a|s) = Π_i π_i(a_i | s, a_{P(i)}), with P(i) the agents j for which `graph[j, i]` is 1. Without
edges the agents are independent, with all edges of an order every joint policy can be had. What an
agent is given of the others is `graph[j, i] * onehot(a_j)`, zeros where it has no edge, so that a
graph with gradients gets them through these products alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pgjax import _checks
from pgjax._arrays import widened

Logits = Callable[[Any, Float[Array, "n A"]], Float[Array, " A"]]
"""`(agent i, int32 scalar; parents' actions [n, A]) -> logits [A]`; knows the state by itself."""


def topological_order(graph: Array) -> Int[Array, " n"]:
    """An order in which parents stand before their children, the smallest index first.

    Args:
      graph: `[n, n]`, non-zero at (j, i) where i sees j; numbers or bool.

    Returns:
      int32 `[n]`; under `jit`, of a graph with a cycle, the nodes on and behind it in any order.

    Raises:
      ValueError: not square; a cycle, where the graph can be looked at.
    """
    shape = np.shape(graph)
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"graph: expected shape [n, n], got {shape}")
    size = shape[0]
    edges = jax.lax.stop_gradient(jnp.asarray(graph)) != 0
    if _checks.is_concrete(edges) and np.any(
        np.linalg.matrix_power(np.asarray(edges, float), size)
    ):
        raise ValueError(f"graph: expected no cycle, got {np.argwhere(np.asarray(edges)).tolist()}")

    def step(waiting: Array, _: None) -> tuple[Array, Array]:
        held = jnp.any(edges & waiting[:, None], axis=0)
        # Those that wait for nobody, then those that wait, then those that are through.
        node = jnp.argmin(jnp.where(waiting, held.astype(jnp.int32), 2)).astype(jnp.int32)
        return waiting.at[node].set(False), node

    return jax.lax.scan(step, jnp.ones(size, bool), None, length=size)[1]


def bn_sample(
    key: PRNGKeyArray,
    logits: Logits,
    graph: Float[Array, "n n"],
    order: Int[Array, " n"],
    *,
    num_actions: int,
) -> tuple[Int[Array, " n"], Float[Array, " n"]]:
    """Actions of all agents in one state, one after the other.

    Args:
      key: of the actions.
      logits: of one agent, see `Logits`.
      graph: `[n, n]` without cycles.
      order: one that the graph agrees with, int32 `[n]`: `topological_order`, or `Dag.order`.
      num_actions: A of each agent.

    Returns:
      actions int32 `[n]`; the log-prob of each given its parents, f32 `[n]`. Their sum is that of
      the joint action.

    Raises:
      ValueError: wrong shapes, logits of another length, a `num_actions` below 1.

    Source: BN-MAPPO, Chen and Zhang 2023, arXiv 2306.01920.
    """
    keys = jax.random.split(key, _size(graph, num_actions))

    def choose(step: Array, every: Array) -> Array:
        return jax.random.categorical(keys[step], every)

    return _in_order(choose, logits, graph, order, num_actions)


def bn_mode(
    logits: Logits,
    graph: Float[Array, "n n"],
    order: Int[Array, " n"],
    *,
    num_actions: int,
) -> Int[Array, " n"]:
    """Each agent's most likely action given those of its parents, int32 `[n]`.

    Not always the most likely joint action. Args, raises: as `bn_sample`.
    """

    def choose(step: Array, every: Array) -> Array:
        del step
        return jnp.argmax(every)

    return _in_order(choose, logits, graph, order, num_actions)[0]


def bn_log_probs(
    logits: Logits,
    actions: Int[Array, " n"],
    graph: Float[Array, "n n"],
    *,
    num_actions: int,
) -> Float[Array, "n A"]:
    """log π_i(· | s, a_{P(i)}) of all actions of each agent, its parents having done as given.

    Args:
      logits: of one agent, see `Logits`; differentiable in what it closes over.
      actions: of all, integers `[n]`.
      graph: `[n, n]` without cycles, differentiable.
      num_actions: A of each agent.

    Returns:
      f32 `[n, A]`, rows are normalised.

    Raises:
      ValueError: wrong shapes, actions that are not integers, logits of another length.
    """
    size = _size(graph, num_actions)
    _checks.integer(actions=actions)
    if np.shape(actions) != (size,):
        raise ValueError(f"actions: expected shape {(size,)}, got {np.shape(actions)}")
    chosen = jax.nn.one_hot(actions, num_actions, dtype=jnp.result_type(graph, jnp.float32))

    def one(agent: Array) -> Array:
        return _log_softmax(logits, agent, graph[:, agent][:, None] * chosen, num_actions)

    return jax.vmap(one)(jnp.arange(size))


def bn_log_prob(
    logits: Logits,
    actions: Int[Array, " n"],
    graph: Float[Array, "n n"],
    *,
    num_actions: int,
) -> Float[Array, " n"]:
    """log π_i(a_i | s, a_{P(i)}) of each agent, `[n]`; their sum is that of the joint action.

    Args, raises: as `bn_log_probs`.
    """
    every = bn_log_probs(logits, actions, graph, num_actions=num_actions)
    return jnp.take_along_axis(every, jnp.asarray(actions)[:, None], axis=1)[:, 0]


def bn_joint(logits: Logits, graph: Float[Array, "n n"], *, num_actions: int) -> Float[Array, " J"]:
    """Probability of every joint action in one state, `[A^n]`, the last agent's action fastest.

    Args:
      logits, graph, num_actions: of `bn_log_prob`.

    Raises:
      ValueError: as `bn_log_prob`; more than 2¹⁶ joint actions.
    """
    size = _size(graph, num_actions)
    if num_actions**size > 2**16:
        raise ValueError(
            f"num_actions: expected at most 2^16 joint actions, got {num_actions}^{size}"
        )
    every = joint_actions(size, num_actions)
    return jnp.exp(
        jax.vmap(lambda a: bn_log_prob(logits, a, graph, num_actions=num_actions).sum())(every)
    )


def _in_order(
    choose: Callable[[Array, Array], Array],
    logits: Logits,
    graph: Array,
    order: Array,
    num_actions: int,
) -> tuple[Int[Array, " n"], Float[Array, " n"]]:
    """Actions by `choose` of the step and the log-probs, and their log-probs."""
    size = _size(graph, num_actions)
    if np.shape(order) != (size,):
        raise ValueError(f"order: expected shape {(size,)}, got {np.shape(order)}")

    def step(chosen: Array, now: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        index, agent = now
        every = _log_softmax(logits, agent, graph[:, agent][:, None] * chosen, num_actions)
        action = choose(index, every).astype(jnp.int32)
        chosen = chosen.at[agent].set(jax.nn.one_hot(action, num_actions, dtype=chosen.dtype))
        return chosen, (action, every[action])

    nobody = jnp.zeros((size, num_actions), jnp.result_type(graph, jnp.float32))
    _, (actions, log_probs) = jax.lax.scan(step, nobody, (jnp.arange(size), order))
    place = jnp.argsort(order)
    return actions[place], log_probs[place]


def joint_actions(num_agents: int, num_actions: int) -> Int[Array, "J n"]:
    """All of them, int32 `[A^n, n]`, the last agent's action fastest."""
    return jnp.asarray(list(itertools.product(range(num_actions), repeat=num_agents)), jnp.int32)


def _log_softmax(logits: Logits, agent: Any, parents: Array, num_actions: int) -> Array:
    found = widened(logits(agent, parents))
    if np.shape(found) != (num_actions,):
        raise ValueError(f"logits: expected shape {(num_actions,)}, got {np.shape(found)}")
    return jax.nn.log_softmax(found)


def _size(graph: Array, num_actions: int) -> int:
    _checks.in_range("num_actions", num_actions, 1)
    shape = np.shape(graph)
    if len(shape) != 2 or shape[0] != shape[1] or not shape[0]:
        raise ValueError(f"graph: expected shape [n, n], got {shape}")
    return shape[0]
