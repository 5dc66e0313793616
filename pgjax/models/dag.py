"""Random directed acyclic graphs that can be learnt: any edges, kept where a random order allows.

A graph is f32 `[n, n]` of 0 and 1; entry (j, i) is 1 where i sees j. Gradients are those of the
relaxed samples, taken straight through.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pgjax import _checks
from pgjax._arrays import widened

MAX_EXACT = 8  # 40320 permutations

Match = Callable[[Float[Array, "n n"]], Int[Array, " n"]]


class Dag(NamedTuple):
    """A graph and an order that it agrees with.

    Attributes:
      graph: f32 `[n, n]`, 0 or 1, differentiable in the logits.
      order: who acts first, second, ..., int32 `[n]`; parents stand before their children.
    """

    graph: Float[Array, "n n"]
    order: Int[Array, " n"]


def sinkhorn(
    log_alpha: Float[Array, "n n"], *, temperature: float = 1.0, num_iterations: int = 20
) -> Float[Array, "n n"]:
    """exp(log_alpha / τ), made doubly stochastic by normalising rows and columns by turns.

    Args:
      log_alpha: logits of a matching, `[n, n]`.
      temperature: τ > 0; towards 0 the result goes to the best matching, if it is the only one.
      num_iterations: ≥ 1.

    Returns:
      f32 `[n, n]`; columns sum to 1, rows nearly.

    Raises:
      ValueError: not a square matrix, a number out of range.

    Source: Sinkhorn 1964; as a relaxed matching Mena et al. 2018, arXiv 1802.08665.
    """
    _checks.in_range("temperature", temperature, 0.0, low_open=True)
    _checks.in_range("num_iterations", num_iterations, 1)
    _square("log_alpha", log_alpha)

    def step(x: Array, _: None) -> tuple[Array, None]:
        x = x - jax.nn.logsumexp(x, axis=1, keepdims=True)
        return x - jax.nn.logsumexp(x, axis=0, keepdims=True), None

    start = widened(log_alpha) / temperature
    return jnp.exp(jax.lax.scan(step, start, None, length=num_iterations)[0])


def best_matching(scores: Float[Array, "n n"]) -> Int[Array, " n"]:
    """The permutation p that maximises Σ_k scores[k, p_k], by looking at all n! of them.

    Raises:
      ValueError: not a square matrix, n above 8.
    """
    size = _square("scores", scores)
    if size > MAX_EXACT:
        raise ValueError(
            f"scores: expected at most {MAX_EXACT} rows for exact matching, got {size}; "
            "see ranked_matching"
        )
    every = np.array(list(itertools.permutations(range(size))), np.int32)
    totals = scores[jnp.arange(size), every].sum(-1)
    return jnp.asarray(every)[jnp.argmax(totals)]


def ranked_matching(scores: Float[Array, "n n"]) -> Int[Array, " n"]:
    """Columns by their mean row: a permutation in n log n, not always the best one.

    Of a doubly stochastic matrix, column i has position Σ_k k scores[k, i] on average; of a
    permutation matrix the result is the permutation.

    Raises:
      ValueError: not a square matrix.
    """
    size = _square("scores", scores)
    weights = scores / jnp.maximum(scores.sum(axis=0), 1e-30)
    return jnp.argsort(jnp.arange(size) @ weights).astype(jnp.int32)


def sample_dag(
    key: PRNGKeyArray,
    edge_logits: Float[Array, "n n 2"],
    order_logits: Float[Array, "n n"],
    *,
    temperature: float = 1.0,
    num_iterations: int = 20,
    match: Match = best_matching,
) -> Dag:
    """G = U ∘ (Pᵀ M P): U edges, P a random order as a matrix, M ones above the diagonal.

    U is a Gumbel-softmax over two classes, P a Gumbel-Sinkhorn matching of positions (rows) to
    nodes; both are 0 or 1 in value and relaxed in their gradients.

    Args:
      key: of the noise.
      edge_logits: `[n, n, 2]`; class 0 is an edge from the first index to the second.
      order_logits: `[n, n]`, node i at position k; taken as log sigmoid(·).
      temperature: of both relaxations, > 0.
      num_iterations: of `sinkhorn`.
      match: `[n, n] -> [n]`, the hard order; `best_matching` up to 8 nodes, `ranked_matching` for
        more.

    Raises:
      ValueError: wrong shapes, a number out of range, too many nodes for `match`.

    Source: Charpentier et al. 2022, arXiv 2203.08509; for policies Chen and Zhang 2023 (BN-MAPPO),
    arXiv 2306.01920.
    """
    edge_key, order_key = jax.random.split(key)
    return _dag(
        edge_logits,
        order_logits,
        jax.random.gumbel(edge_key, np.shape(edge_logits)),
        jax.random.gumbel(order_key, np.shape(order_logits)),
        temperature,
        num_iterations,
        match,
    )


def mode_dag(
    edge_logits: Float[Array, "n n 2"],
    order_logits: Float[Array, "n n"],
    *,
    temperature: float = 1.0,
    num_iterations: int = 20,
    match: Match = best_matching,
) -> Dag:
    """`sample_dag` without noise, for evaluation."""
    zeros = jnp.zeros(np.shape(edge_logits)), jnp.zeros(np.shape(order_logits))
    return _dag(edge_logits, order_logits, *zeros, temperature, num_iterations, match)


def density(graph: Float[Array, "*B n n"]) -> Float[Array, "*B"]:
    """Edges out of all that a graph without cycles can have, 2 Σ G / (n (n - 1)).

    Raises:
      ValueError: fewer than two nodes.
    """
    size = np.shape(graph)[-1]
    _checks.in_range("number of nodes of graph", size, 2)
    return 2.0 * jnp.sum(graph, axis=(-2, -1)) / (size * (size - 1))


def density_penalty(
    graphs: Float[Array, "*B n n"], target: Float[Array, ""] | float, *, coefficient: float
) -> Float[Array, ""]:
    """α |mean density - η|, which draws the graphs of a batch towards a density.

    Args:
      graphs: `[..., n, n]`, differentiable.
      target: η in [0, 1]; let it fall from 1 to 0 to end with independent policies.
      coefficient: α ≥ 0.

    Raises:
      ValueError: a number out of range.

    Source: BN-MAPPO, Chen and Zhang 2023, arXiv 2306.01920.
    """
    _checks.in_range("coefficient", coefficient, 0.0)
    _checks.in_range("target", target, 0.0, 1.0)
    return coefficient * jnp.abs(density(graphs).mean() - target)


def _dag(
    edge_logits: Array,
    order_logits: Array,
    edge_noise: Array,
    order_noise: Array,
    temperature: float,
    num_iterations: int,
    match: Match,
) -> Dag:
    _checks.in_range("temperature", temperature, 0.0, low_open=True)
    size = _square("order_logits", order_logits)
    if np.shape(edge_logits) != (size, size, 2):
        raise ValueError(
            f"edge_logits: expected shape {(size, size, 2)}, got {np.shape(edge_logits)}"
        )
    relaxed = jax.nn.softmax((widened(edge_logits) + edge_noise) / temperature)[..., 0]
    edges = _through((relaxed >= 0.5).astype(relaxed.dtype), relaxed)
    log_alpha = jax.nn.log_sigmoid(widened(order_logits)) + order_noise
    soft = sinkhorn(log_alpha, temperature=temperature, num_iterations=num_iterations)
    order = match(jax.lax.stop_gradient(soft))
    placed = _through(jax.nn.one_hot(order, size, dtype=soft.dtype), soft)
    above = jnp.triu(jnp.ones((size, size), soft.dtype), 1)
    return Dag(edges * (placed.T @ above @ placed), order)


def _through(hard: Array, soft: Array) -> Array:
    """The value of one and the gradient of the other."""
    return jax.lax.stop_gradient(hard) + (soft - jax.lax.stop_gradient(soft))


def _square(name: str, matrix: Array) -> int:
    shape = np.shape(matrix)
    if len(shape) != 2 or shape[0] != shape[1] or not shape[0]:
        raise ValueError(f"{name}: expected shape [n, n], got {shape}")
    return shape[0]
