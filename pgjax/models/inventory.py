"""Ordering policies for supply networks: stock levels, feasible allocations, perceptrons.

Stock is `[*B, N, L]` as in `envs.inventory`, orders are `[*B, E]`, one for each edge. What a policy
orders from another node never exceeds what that has on hand.

Source: Alvo et al. 2023, arXiv 2306.11246, and its reference code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from pgjax import _checks
from pgjax.models import mlp

if TYPE_CHECKING:
    from pgjax.envs.supply_network import SupplyNetwork


FIRST_GAIN = 0.01
"""Of the last layer's first weights: at the beginning orders hardly depend on the stock."""

_TINY = 1e-10


class OrderPolicy(NamedTuple):
    """A learned policy.

    Attributes:
      init: `key -> params`.
      apply: `(params, stock [*B, N, L]) -> orders [*B, E]`.
    """

    init: Callable[[PRNGKeyArray], Any]
    apply: Callable[[Any, Float[Array, "*B N L"]], Float[Array, "*B E"]]


def proportional_allocation(
    network: SupplyNetwork,
    requests: Float[Array, "*B E"],
    stock: Float[Array, "*B N L"],
    *,
    keep: Float[Array, "*B N"] | float = 0.0,
) -> Float[Array, "*B E"]:
    """Requests as they are while there is enough, else cut in proportion.

    x_e = o_e min(1, W / (keep + Σ o)), W on hand at the edge's supplier, the sum over its edges; a
    centre, which keeps nothing, forwards o_e W / Σ o. Edges from outside are not cut.

    Args:
      network: who supplies whom.
      requests: o ≥ 0, of each edge.
      stock: of the nodes.
      keep: requests of the suppliers themselves, ≥ 0, counted like an edge's; not at centres.

    Returns:
      `[*B, E]`; a centre all of whose requests are 0 forwards equal parts, which is where this
      departs from the formula with 1e-10 in its denominator, that would keep what must not stay.

    Raises:
      ValueError: requests or stock of another shape.
    """
    leaving, centre = network.leaving, _centres(network)
    _fits("requests", requests, stock, network)
    on_hand = jnp.maximum(stock[..., 0], 0.0)
    wanted = requests @ leaving
    # Without requests a centre's edges count alike.
    idle = centre & (wanted <= _TINY)
    requests = jnp.where(idle @ leaving.T > 0, 1.0, requests)
    wanted = jnp.where(idle, leaving.sum(0), wanted) + jnp.where(centre, 0.0, keep)
    # A smaller denominator would have an infinite slope, which times 0 is not a number.
    share = on_hand / jnp.maximum(wanted, _TINY)
    share = jnp.where(centre, share, jnp.minimum(share, 1.0))
    return requests * jnp.where(leaving.any(-1), share @ leaving.T, 1.0)


def softmax_allocation(
    network: SupplyNetwork, scores: Float[Array, "*B E"], stock: Float[Array, "*B N L"]
) -> Float[Array, "*B E"]:
    """A supplier's stock shared out by a softmax: x = W softmax([o, 1]), without the last part.

    The constant score of 1 is that of staying where it is; centres have none and forward all. Edges
    from outside get 0.

    Raises:
      ValueError: scores or stock of another shape.
    """
    leaving, centre = network.leaving, _centres(network)
    _fits("scores", scores, stock, network)
    stay = jnp.where(centre, -jnp.inf, 1.0)
    highest = jnp.where(leaving > 0, scores[..., None], -jnp.inf).max(-2)
    # Shifts each softmax; nodes that supply nobody would have none.
    shift = jnp.maximum(highest, jnp.where(leaving.any(0), stay, 0.0))
    shift = jax.lax.stop_gradient(shift)
    inside = leaving.any(-1)
    raised = jnp.where(inside, jnp.exp(jnp.where(inside, scores - shift @ leaving.T, 0.0)), 0.0)
    total = raised @ leaving + jnp.exp(stay - shift)
    share = jnp.maximum(stock[..., 0], 0.0) / jnp.where(leaving.any(0), total, 1.0)
    return raised * (share @ leaving.T)


def base_stock(
    network: SupplyNetwork, levels: Float[Array, " E"], stock: Float[Array, "*B N L"]
) -> Float[Array, "*B E"]:
    """Orders what a node lacks of a level: q = max(S - on hand - on its way, 0), then allocates.

    Args:
      network: who supplies whom; one edge alone for the classical policy.
      levels: S of each edge.
      stock: of the nodes.

    Raises:
      ValueError: levels that are not one an edge, stock of another shape.
    """
    return proportional_allocation(network, _lack(network, levels, stock), stock)


def capped_base_stock(
    network: SupplyNetwork,
    levels: Float[Array, " E"],
    caps: Float[Array, " E"],
    stock: Float[Array, "*B N L"],
) -> Float[Array, "*B E"]:
    """A base-stock policy that never orders more than a cap: q = clip(S - position, 0, cap).

    Args:
      network, levels, stock: as of `base_stock`.
      caps: of each edge; negative ones count as 0.

    Raises:
      ValueError: as `base_stock`.
    """
    _checks.same_shape(levels=levels, caps=caps)
    wanted = jnp.minimum(_lack(network, levels, stock), jnp.maximum(caps, 0.0))
    return proportional_allocation(network, wanted, stock)


def echelon_stock(
    network: SupplyNetwork, raw: Float[Array, " N"], stock: Float[Array, "*B N L"]
) -> Float[Array, "*B E"]:
    """Echelon base-stock policy of a chain.

    q_j = min(max(S_j - Σ_{i ≥ j} position_i, 0), on hand upstream),
    S_j = Σ_{i ≥ j} softplus(raw_i), so that levels never fall towards the source.

    Args:
      network: a chain, `supply_network.serial`: edge j enters node j from node j - 1.
      raw: of each node.
      stock: of the nodes.

    Raises:
      ValueError: a network that is no such chain, `raw` or stock of another shape.

    Source: Clark and Scarf 1960 for the policy; the sums as in the HDPO reference code, which adds
      10 to `raw`: left to the starting point here.
    """
    nodes = network.num_nodes
    chain = tuple(range(nodes))
    if network.receivers != chain or network.suppliers != tuple(x - 1 for x in chain):
        raise ValueError(
            "network: expected a chain whose edge j enters node j from node j - 1, got edges "
            f"{list(zip(network.suppliers, network.receivers, strict=True))}"
        )
    _checks.rank("raw", raw, 1)
    _fits("raw", jnp.broadcast_to(raw, (*stock.shape[:-2], *jnp.shape(raw))), stock, network)
    levels = jnp.cumsum(jax.nn.softplus(raw)[::-1])[::-1]
    position = jnp.cumsum(stock.sum(-1)[..., ::-1], axis=-1)[..., ::-1]
    wanted = jnp.maximum(levels - position, 0.0)
    return proportional_allocation(network, wanted, stock)


def store_mlp(
    network: SupplyNetwork,
    *,
    hidden: Sequence[int] = (32, 32, 32),
    activation: Callable[[Any], Any] = jax.nn.elu,
) -> OrderPolicy:
    """Stores that order from outside, by one perceptron of all stock: q = softplus(mlp(stock) + 1).

    Args:
      network: whose edges all come from outside.
      hidden: sizes of the hidden layers.
      activation: behind each of them.

    Raises:
      ValueError: an edge from another node.
    """
    if any(network.leaving.ravel()):
        raise ValueError(
            f"network: expected edges from outside only, got suppliers {network.suppliers}; "
            "see network_mlp"
        )
    sizes = (network.num_nodes * network.pipeline, *hidden, network.num_edges)

    def apply(params: Any, stock: Array) -> Array:
        flat = stock.reshape(*stock.shape[:-2], -1)
        return jax.nn.softplus(mlp.apply(params, flat, activation=activation) + 1.0)

    return OrderPolicy(lambda key: mlp.init(key, sizes, last_gain=FIRST_GAIN), apply)


def network_mlp(
    network: SupplyNetwork,
    *,
    largest_order: float,
    hidden: Sequence[int] = (512, 512, 512),
    activation: Callable[[Any], Any] = jax.nn.elu,
) -> OrderPolicy:
    """One perceptron of all stock for a whole network, blind to its graph.

    Edges between nodes share out stock by `softmax_allocation`, edges from outside order
    sigmoid(o) · largest_order.

    Args:
      network: who supplies whom.
      largest_order: > 0; usual is 4 times the mean demand of all stores.
      hidden: sizes of the hidden layers.
      activation: behind each of them.

    Raises:
      ValueError: a `largest_order` that is not positive.
    """
    _checks.in_range("largest_order", largest_order, 0.0, low_open=True)
    sizes = (network.num_nodes * network.pipeline, *hidden, network.num_edges)
    inside = network.leaving.any(-1)

    def apply(params: Any, stock: Array) -> Array:
        flat = stock.reshape(*stock.shape[:-2], -1)
        out = mlp.apply(params, flat, activation=activation)
        ordered = jax.nn.sigmoid(out) * largest_order
        return jnp.where(inside, softmax_allocation(network, out, stock), ordered)

    return OrderPolicy(lambda key: mlp.init(key, sizes, last_gain=FIRST_GAIN), apply)


def _lack(network: SupplyNetwork, levels: Array, stock: Array) -> Array:
    _checks.rank("levels", levels, 1)
    position = stock.sum(-1) @ network.entering.T
    _fits("levels", jnp.broadcast_to(levels, (*position.shape[:-1], *levels.shape)), stock, network)
    return jnp.maximum(levels - position, 0.0)


def _centres(network: SupplyNetwork) -> Any:
    return np.isin(np.arange(network.num_nodes), network.centres)


def _fits(name: str, orders: Any, stock: Any, network: SupplyNetwork) -> None:
    _checks.floating(**{name: orders, "stock": stock})
    front = np.shape(stock)[:-2]
    for what, value, shape in (
        ("stock", stock, (*front, network.num_nodes, network.pipeline)),
        (name, orders, (*front, network.num_edges)),
    ):
        if np.shape(value) != shape:
            raise ValueError(
                f"{what}: expected shape {shape} by the network, got {np.shape(value)}"
            )
