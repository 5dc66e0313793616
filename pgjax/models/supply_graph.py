"""A graph network as an ordering policy: messages follow the edges of supply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from pgjax import _checks
from pgjax.models import mlp
from pgjax.models.inventory import FIRST_GAIN, OrderPolicy, proportional_allocation

if TYPE_CHECKING:
    from pgjax.envs.supply_network import SupplyNetwork


def graph_policy(
    network: SupplyNetwork,
    *,
    features: Float[Array, "N F"] | None = None,
    steps: int = 1,
    hidden: Sequence[int] = (32, 32),
    width: int = 32,
    first_order: float = 5.0,
) -> OrderPolicy:
    """Orders by message passing over the supply graph; the same weights at every node and edge.

    node = f_n([stock, features]), edge = f_e([supplier, receiver, lead time]); `steps` times
    node += g_n([node, Σ edges in / √degree, Σ edges out / √degree]), then
    edge += g_e([edge, supplier, receiver]); the order is softplus(out(edge)), cut by
    `proportional_allocation`. Besides the network's edges there are one from each store to its
    customers, and one from each supplying node to itself, whose output counts as what the node
    requests for itself; centres have none. Outside and customers are nodes of zeros.

    Relabelling stores relabels the orders, and the number of parameters does not grow with the
    network.

    Args:
      network: who supplies whom. Parameters also serve another one, with as many features and the
        same pipeline.
      features: of each node, constant; None: its holding cost and penalty.
      steps: messages go so far; 1 for warehouse and stores, N - 1 for a chain.
      hidden: sizes of the hidden layers of the five perceptrons.
      width: of the embeddings.
      first_order: bias of the output, about the order at the beginning where it is well above 0.

    Raises:
      ValueError: `features` that are not one row a node, `steps` below 1.

    Source: Alvo et al. 2023, arXiv 2306.11246, and its reference code; initial weights are
      orthogonal here, the output's last ones small.
    """
    if features is None:
        features = jnp.stack([network.holding, network.penalty], axis=-1)
    _checks.rank("features", features, 2)
    if np.shape(features)[0] != network.num_nodes:
        raise ValueError(
            f"features: expected a row for each of {network.num_nodes} nodes, "
            f"got shape {np.shape(features)}"
        )
    _checks.in_range("steps", steps, 1)
    known = jnp.asarray(features)
    count = known.shape[-1] + network.pipeline
    edges, nodes = network.num_edges, np.eye(network.num_nodes, dtype=np.float32)
    supplying = [
        n for n in range(network.num_nodes) if n in network.suppliers and n not in network.centres
    ]
    nobody = np.zeros((len(network.stores), network.num_nodes), np.float32)
    leaving = np.concatenate([network.leaving, nodes[list(network.stores)], nodes[supplying]])
    entering = np.concatenate([network.entering, nobody, nodes[supplying]])
    lead = np.zeros((len(leaving), 1), np.float32)
    lead[:edges, 0] = network.lead_times
    first_loop = edges + len(network.stores)
    mean_in, mean_out = (
        (x / np.sqrt(np.maximum(x.sum(0), 1.0))).T.astype(np.float32) for x in (entering, leaving)
    )
    sizes = {
        "node": (count, *hidden, width),
        "edge": (2 * width + 1, *hidden, width),
        "node_step": (3 * width, *hidden, width),
        "edge_step": (3 * width, *hidden, width),
        "out": (width, *hidden, 1),
    }

    def init(key: PRNGKeyArray) -> dict[str, Any]:
        keys = jax.random.split(key, len(sizes))
        gains = {"out": FIRST_GAIN}
        params = {
            name: mlp.init(own, size, last_gain=gains.get(name, 1.0))
            for own, (name, size) in zip(keys, sizes.items(), strict=True)
        }
        params["out"][-1]["bias"] = jnp.full(1, first_order)
        return params

    def perceptron(params: Any, *parts: Any) -> Array:
        return mlp.apply(params, jnp.concatenate(parts, axis=-1), activation=jax.nn.elu)

    def apply(params: Any, stock: Array) -> Array:
        front = stock.shape[:-2]
        statics = jnp.broadcast_to(known, (*front, *known.shape))
        node = jax.nn.elu(perceptron(params["node"], stock, statics))
        far = jnp.broadcast_to(lead, (*front, *lead.shape))
        edge = jax.nn.elu(perceptron(params["edge"], leaving @ node, entering @ node, far))
        for _ in range(steps):
            found = perceptron(params["node_step"], node, mean_in @ edge, mean_out @ edge)
            node = node + jax.nn.elu(found)
            found = perceptron(params["edge_step"], edge, leaving @ node, entering @ node)
            edge = edge + jax.nn.elu(found)
        asked = jnp.concatenate([edge[..., :edges, :], edge[..., first_loop:, :]], axis=-2)
        out = jax.nn.softplus(perceptron(params["out"], asked)[..., 0])
        kept = out[..., edges:] @ nodes[supplying]
        return proportional_allocation(network, out[..., :edges], stock, keep=kept)

    return OrderPolicy(init, apply)
