"""Who supplies whom: the graph of an inventory problem, its lead times and costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pgjax import _checks

OUTSIDE = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupplyNetwork:
    """Nodes that hold goods, and edges along which they order them; a pytree of the costs.

    Made by `by_edges` or one of the named networks below, which check it.

    Attributes:
      holding: cost of a unit left over for a period, at each node, `[N]`.
      penalty: cost of a unit that was asked for and not there, at each node, `[N]`.
      ordering: cost of a unit ordered, along each edge, `[E]`.
      suppliers: node each edge comes from, or `OUTSIDE`, which never runs out.
      receivers: node each edge goes to.
      lead_times: periods until an order of each edge arrives, ≥ 1.
      stores: nodes with demand of their own.
      centres: nodes that forward all they have and keep nothing (transshipment).
      pipeline: L: periods ahead for which stock is recorded.
    """

    holding: Float[Array, " N"]
    penalty: Float[Array, " N"]
    ordering: Float[Array, " E"]
    suppliers: tuple[int, ...]
    receivers: tuple[int, ...]
    lead_times: tuple[int, ...]
    stores: tuple[int, ...]
    centres: tuple[int, ...]
    pipeline: int

    @property
    def num_nodes(self) -> int:
        """N."""
        return len(self.holding)

    @property
    def num_edges(self) -> int:
        """E."""
        return len(self.suppliers)

    @property
    def leaving(self) -> Float[np.ndarray, "E N"]:
        """1 where an edge leaves a node; a row of zeros for edges from outside."""
        return _one_hot(self.suppliers, self.num_nodes)

    @property
    def entering(self) -> Float[np.ndarray, "E N"]:
        """1 where an edge enters a node."""
        return _one_hot(self.receivers, self.num_nodes)

    @property
    def placing(self) -> Float[np.ndarray, "E NL"]:
        """1 where an edge's order joins the stock `[N, L]`, made flat: L - 1 places from the front.

        A product with it takes less time than a scatter.
        """
        length = self.pipeline
        nodes = zip(self.receivers, self.lead_times, strict=True)
        places = [node * length + lead - 1 for node, lead in nodes]
        return _one_hot(places, self.num_nodes * length)


jax.tree_util.register_dataclass(
    SupplyNetwork,
    data_fields=["holding", "penalty", "ordering"],
    meta_fields=["suppliers", "receivers", "lead_times", "stores", "centres", "pipeline"],
)


def by_edges(
    suppliers: Sequence[int],
    receivers: Sequence[int],
    lead_times: Sequence[int],
    *,
    stores: Sequence[int],
    holding: Any,
    penalty: Any,
    ordering: Any = 0.0,
    centres: Sequence[int] = (),
    pipeline: int | None = None,
) -> SupplyNetwork:
    """Any network, by its edges.

    Args:
      suppliers, receivers, lead_times: of each edge; -1 supplies from outside.
      stores: nodes with demand.
      holding, penalty: of each node `[N]`, which says how many there are.
      ordering: of each edge `[E]`, or one number.
      centres: nodes that forward everything.
      pipeline: periods ahead; None: the longest lead time.

    Raises:
      ValueError: unequal numbers of suppliers, receivers and lead times; a node out of range or
        ordering from itself; a lead time below 1 or beyond the pipeline; a node that nobody
        supplies; one that neither supplies anyone nor has demand; no store; a centre with demand;
        costs that are not of the nodes, or negative holding costs or penalties.
    """
    edges = tuple(tuple(int(x) for x in part) for part in (suppliers, receivers, lead_times))
    sources, targets, leads = edges
    if not len(sources) == len(targets) == len(leads) > 0:
        raise ValueError(
            "suppliers, receivers, lead_times: expected as many of each, and at least one, got "
            f"{len(sources)}, {len(targets)} and {len(leads)}"
        )
    _checks.rank("holding", holding, 1)
    _checks.same_shape(holding=holding, penalty=penalty)
    nodes = np.shape(holding)[0]
    length = max(leads) if pipeline is None else pipeline
    if min(leads) < 1 or max(leads) > length:
        raise ValueError(f"lead_times: expected 1 to {length} periods (pipeline), got {leads}")
    _nodes("suppliers", sources, OUTSIDE, nodes)
    _nodes("receivers", targets, 0, nodes)
    _nodes("stores", stores, 0, nodes)
    _nodes("centres", centres, 0, nodes)
    loops = [s for s, t in zip(sources, targets, strict=True) if s == t]
    if loops:
        raise ValueError(
            f"suppliers: expected other nodes than the receivers, got {loops[0]} twice"
        )
    if len(stores) < 1 or len(set(stores)) != len(stores):
        raise ValueError(f"stores: expected at least one node, each once, got {tuple(stores)}")
    if set(stores) & set(centres):
        raise ValueError(f"centres: expected nodes without demand, got {tuple(centres)}")
    for node in range(nodes):
        if node not in targets:
            raise ValueError(f"receivers: expected an edge to every node, got none to node {node}")
        if node not in sources and node not in stores:
            raise ValueError(
                f"suppliers: expected an edge from every node without demand, got none from {node}"
            )
    for name, cost in {"holding": holding, "penalty": penalty}.items():
        if _checks.is_concrete(cost) and np.asarray(cost).min() < 0:
            raise ValueError(
                f"{name}: expected costs of at least 0, got {np.asarray(cost).min():g}"
            )
    if np.shape(ordering) not in ((), (len(sources),)):
        raise ValueError(
            f"ordering: expected a number or shape ({len(sources)},), got {np.shape(ordering)}"
        )
    return SupplyNetwork(
        holding=_float(holding),
        penalty=_float(penalty),
        ordering=jnp.broadcast_to(_float(ordering), (len(sources),)),
        suppliers=sources,
        receivers=targets,
        lead_times=leads,
        stores=tuple(int(s) for s in stores),
        centres=tuple(int(c) for c in centres),
        pipeline=length,
    )


def single_store(lead_time: int, *, holding: float = 1.0, penalty: float) -> SupplyNetwork:
    """One store that orders from outside: the newsvendor's problem with a lead time.

    Raises:
      ValueError: as `by_edges`.
    """
    return by_edges(
        (OUTSIDE,),
        (0,),
        (lead_time,),
        stores=(0,),
        holding=jnp.stack([holding]),
        penalty=jnp.stack([penalty]),
    )


def warehouse_and_stores(
    lead_times: Sequence[int],
    *,
    holding: Any,
    penalty: Any,
    warehouse_lead_time: int = 3,
    warehouse_holding: float = 0.3,
) -> SupplyNetwork:
    """Node 0, a warehouse, supplies stores 1 to K; edge 0 supplies it, edge k store k.

    Args:
      lead_times: of each store `[K]`.
      holding, penalty: of each store `[K]`.
      warehouse_lead_time: of its own orders from outside.
      warehouse_holding: its cost of a unit left.

    Raises:
      ValueError: as `by_edges`.
    """
    return _star(lead_times, holding, penalty, warehouse_lead_time, warehouse_holding, ())


def transshipment(
    lead_times: Sequence[int], *, holding: Any, penalty: Any, centre_lead_time: int = 3
) -> SupplyNetwork:
    """As `warehouse_and_stores`, but node 0 forwards all that arrives and keeps nothing.

    Raises:
      ValueError: as `by_edges`.
    """
    return _star(lead_times, holding, penalty, centre_lead_time, 0.0, (0,))


def serial(lead_times: Sequence[int], *, holding: Any, penalty: float) -> SupplyNetwork:
    """A chain: outside supplies node 0, node j - 1 node j, and the last has the demand.

    Args:
      lead_times: of the edge into each node `[N]`.
      holding: of each node `[N]`.
      penalty: of the last one.

    Raises:
      ValueError: as `by_edges`.
    """
    nodes = len(lead_times)
    penalties = jnp.zeros(nodes).at[-1].set(penalty)
    return by_edges(
        range(OUTSIDE, nodes - 1),
        range(nodes),
        lead_times,
        stores=(nodes - 1,),
        holding=jnp.asarray(holding, jnp.float32),
        penalty=penalties,
    )


def _star(
    lead_times: Sequence[int],
    holding: Any,
    penalty: Any,
    lead_time: int,
    own_holding: float,
    centres: tuple[int, ...],
) -> SupplyNetwork:
    stores = len(lead_times)
    for name, cost in {"holding": holding, "penalty": penalty}.items():
        if np.shape(cost) != (stores,):
            raise ValueError(
                f"{name}: expected one number a store, shape ({stores},), got {np.shape(cost)}"
            )
    return by_edges(
        (OUTSIDE, *(0,) * stores),
        range(stores + 1),
        (lead_time, *lead_times),
        stores=range(1, stores + 1),
        holding=jnp.concatenate([jnp.stack([own_holding]), _float(holding)]),
        penalty=jnp.concatenate([jnp.zeros(1), _float(penalty)]),
        centres=centres,
    )


def _nodes(name: str, values: Sequence[int], low: int, nodes: int) -> None:
    if any(not low <= value < nodes for value in values):
        raise ValueError(f"{name}: expected nodes {low} to {nodes - 1}, got {tuple(values)}")


def _one_hot(places: Sequence[int], size: int) -> Float[np.ndarray, "E N"]:
    return (np.array(places)[:, None] == np.arange(size)).astype(np.float32)


def _float(x: Any) -> Array:
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
