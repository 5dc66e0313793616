"""Mixtures of experts: dropless top-k routing, and the losses that keep it balanced."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from pgjax import _checks
from pgjax.models import linear
from pgjax.parallel.sharding import BATCH_AXES
from pgjax.types import pytree_dataclass


@pytree_dataclass
class Routing:
    """Which experts each layer sent each token to.

    Attributes:
      logits: the router's, float32.
      experts: the chosen ones, most probable first.
    """

    logits: Float[Array, "L B T E"]
    experts: Int[Array, "L B T k"]


def choose(
    logits: Float[Array, "*batch E"], k: int, *, mesh: Mesh | None = None
) -> Int[Array, "*batch k"]:
    """The k experts with the largest logits, largest first; of equals the lower index first.

    With a mesh over which the first axis is spread, as `parallel.batch_sharding` has it, each
    device chooses for its own rows; the compiler would gather the logits.
    """
    if mesh is None:
        return jax.lax.top_k(logits, k)[1]
    rows = PartitionSpec(BATCH_AXES)
    own = functools.partial(choose, k=k)
    return jax.shard_map(own, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)(logits)


def routing_weights(
    logits: Float[Array, "*batch E"], experts: Int[Array, "*batch k"], *, normalize: bool
) -> Float[Array, "*batch k"]:
    """The chosen experts' weights: of the softmax over all experts, or over the chosen alone.

    The experts may be others than the logits' largest: under routing replay the sampler's or the
    old policy's choice is kept, and the weights, through which the router learns, are today's.

    Args:
      logits: the router's, float32.
      experts: distinct ids in [0, E).
      normalize: divide by the sum of the chosen experts' weights.

    Source of the replay: Zheng et al., "Stabilizing Reinforcement Learning with LLMs", 2025,
    arXiv:2512.01374.
    """
    chosen = jnp.take_along_axis(logits, experts, axis=-1)
    if normalize:
        return jax.nn.softmax(chosen, axis=-1)
    return jnp.exp(chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True))


def sort_by_expert(
    experts: Int[Array, "N k"], num_experts: int
) -> tuple[Int[Array, " Nk"], Int[Array, " Nk"], Int[Array, " E"]]:
    """An order of all N·k choices in which each expert's lie together.

    Returns:
      the order (choice j of token i counts as `i·k + j`), its inverse, and how many each expert
      has. No choice is dropped, whatever the imbalance; those of no expert (`num_experts`) come
      last.
    """
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    inverse = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype))
    sizes = jnp.zeros(num_experts, jnp.int32).at[flat].add(1, mode="drop")
    return order, inverse, sizes


def mixture(
    x: Float[Array, "N H"],
    experts: Int[Array, "N k"],
    weights: Float[Array, "N k"],
    *,
    gate: linear.Weight,
    up: linear.Weight,
    down: linear.Weight,
    combine: Callable[[Array, Array], Array],
    biases: tuple[Array, Array, Array] | None = None,
) -> Float[Array, "N H"]:
    """`Σ_j weights[n, j] · expert_{experts[n, j]}(x[n])` by one grouped product per projection.

    Args:
      x: tokens.
      experts, weights: from `choose` and `routing_weights`; `E` for no expert.
      gate, up: `[E, H, F]`.
      down: `[E, F, H]`.
      combine: `(gate, up) -> inner`, elementwise.
      biases: of gate, up `[E, F]` and down `[E, H]`; None: none.
    """
    num_experts, k = up.shape[0], experts.shape[1]
    order, inverse, sizes = sort_by_expert(experts, num_experts)
    rows = x[order // k]
    chosen = jnp.minimum(experts.reshape(-1)[order], num_experts - 1)

    def project(rows: Array, weight: linear.Weight, index: int) -> Array:
        out = linear.ragged_project(rows, weight, sizes)
        return out if biases is None else out + biases[index].astype(out.dtype)[chosen]

    inner = combine(project(rows, gate, 0), project(rows, up, 1))
    out = project(inner, down, 2)[inverse].reshape(*experts.shape, -1)
    return jnp.sum(out * weights[..., None].astype(out.dtype), axis=1)


def spread_mixture(
    x: Float[Array, "N H"],
    experts: Int[Array, "N k"],
    weights: Float[Array, "N k"],
    *,
    gate: linear.Weight,
    up: linear.Weight,
    down: linear.Weight,
    combine: Callable[[Array, Array], Array],
    mesh: Mesh,
    spread_rows: bool = True,
    biases: tuple[Array, Array, Array] | None = None,
) -> Float[Array, "N H"]:
    """`mixture` of rows that are spread over `mesh`, each expert on its own devices.

    The devices of an `expert` group gather one another's rows, compute what their experts add to
    them, and each gets the sum of its own rows back: one all-gather and one reduce-scatter of the
    rows, whatever the routing, and no limit to how many choose one expert. Inside an expert
    `tensor` splits F, and the parts are added up; low-rank and quantised weights it leaves whole.

    Args:
      x, experts, weights: as for `mixture`.
      gate, up, down: as for `mixture`, such that `spreads`.
      combine, biases: as for `mixture`.
      mesh: from `parallel.make_mesh`.
      spread_rows: False: each device has all rows instead, as few as a step of decoding has.
    """
    rows = PartitionSpec(BATCH_AXES) if spread_rows else PartitionSpec()
    visiting = spread_rows and mesh.shape["expert"] > 1
    split = mesh.shape["tensor"] > 1 and all(isinstance(w, jax.Array) for w in (gate, up, down))
    inner = "tensor" if split else None
    # Whose sums are still to come.
    parts = ("tensor",) * split + ("expert",) * (not spread_rows)
    into, out = PartitionSpec("expert", None, inner), PartitionSpec("expert", inner)
    if not split:
        into = out = PartitionSpec("expert")  # of every array of what stands for a matrix
    inner_bias, outer_bias = PartitionSpec("expert", inner), PartitionSpec("expert")

    def local(x: Array, experts: Array, weights: Array, matrices: Any, biases: Any) -> Array:
        if visiting:
            x, experts, weights = (
                jax.lax.all_gather(part, "expert", tiled=True) for part in (x, experts, weights)
            )
        gate, up, down = matrices
        if biases is not None and split:  # the last one once, not once a part
            first = jax.lax.axis_index("tensor") == 0
            biases = (*biases[:2], jnp.where(first, biases[2], 0))
        own = experts - jax.lax.axis_index("expert") * up.shape[0]
        here = (own >= 0) & (own < up.shape[0])
        added = mixture(
            x,
            jnp.where(here, own, up.shape[0]),
            jnp.where(here, weights, 0),
            gate=gate,
            up=up,
            down=down,
            combine=combine,
            biases=biases,
        )
        if visiting:
            added = jax.lax.psum_scatter(added, "expert", tiled=True)
        return jax.lax.psum(added, parts)

    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(
            rows,
            rows,
            rows,
            (into, into, out),
            None if biases is None else (inner_bias, inner_bias, outer_bias),
        ),
        out_specs=rows,
        check_vma=False,
    )
    return mapped(x, experts, weights, (gate, up, down), biases)


def spreads(mesh: Mesh, matrices: Sequence[linear.Weight]) -> bool:
    """Whether `spread_mixture` takes these gates, ups and downs: the axes divide E and F."""
    experts, _, inner = matrices[0].shape
    whole = all(x.shape[0] == experts for x in jax.tree.leaves(list(matrices)))
    arrays = all(isinstance(matrix, jax.Array) for matrix in matrices)
    divided = not arrays or inner % mesh.shape["tensor"] == 0
    return whole and divided and experts % mesh.shape["expert"] == 0


def load_balancing_loss(
    logits: Float[Array, "L B T E"],
    experts: Int[Array, "L B T k"],
    mask: Bool[Array, "B T"],
) -> Float[Array, ""]:
    """`E · Σ_e f_e · P_e`, mean over layers: 1·k when experts are used evenly.

    f_e is the number of times expert e was chosen per token, P_e its mean probability, both over
    the tokens in `mask`. Only P has a gradient.

    Raises:
      ValueError: shapes that do not belong together.

    Source: Fedus et al., "Switch Transformers", 2021, arXiv:2101.03961, for k choices as in
    transformers.
    """
    _check_routing(logits, experts, mask)
    weight = mask.astype(jnp.float32)
    count = jnp.maximum(weight.sum(), 1.0)
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    mean = jnp.einsum("lbte,bt->le", probabilities, weight) / count
    chosen = jax.nn.one_hot(experts, logits.shape[-1], dtype=jnp.float32).sum(-2)
    share = jnp.einsum("lbte,bt->le", chosen, weight) / count
    return logits.shape[-1] * jnp.mean(jnp.sum(share * mean, axis=-1))


def router_z_loss(logits: Float[Array, "L B T E"], mask: Bool[Array, "B T"]) -> Float[Array, ""]:
    """`mean (log Σ_e exp(logit_e))²` over layers and the tokens in `mask`.

    Source: Zoph et al., "ST-MoE", 2022, arXiv:2202.08906.
    """
    _checks.rank("logits", logits, 4)
    weight = mask.astype(jnp.float32)
    squares = jnp.square(jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1))
    return jnp.mean(jnp.sum(squares * weight, axis=(1, 2))) / jnp.maximum(weight.sum(), 1.0)


def _check_routing(logits: Array, experts: Array, mask: Array) -> None:
    _checks.rank("logits", logits, 4)
    _checks.rank("experts", experts, 4)
    _checks.integer(experts=experts)
    if experts.shape[:3] != logits.shape[:3]:
        raise ValueError(f"experts: expected shape {logits.shape[:3]} + (k,), got {experts.shape}")
    if mask.shape != logits.shape[1:3]:
        raise ValueError(f"mask: expected shape {logits.shape[1:3]}, got {mask.shape}")
