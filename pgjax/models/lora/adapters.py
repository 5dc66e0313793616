"""Adapters as a tree of their own, attached to frozen parameters or merged into them."""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from pgjax import _checks, _paths
from pgjax.models import linear, matrices

SCALINGS = ("standard", "rank_stabilized")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """The update `scaling · a·b` of one stack of matrices `[*lead, *in, *out]`.

    Attributes:
      a: from the inputs to r features.
      b: from there to the outputs.
      alpha: static; `scaling` is alpha / r, or alpha / sqrt(r) where rank-stabilised.
      rule: static, "standard" or "rank_stabilized".
    """

    a: Float[Array, "*lead_in r"]
    b: Float[Array, "*lead_r_out"]
    alpha: float = dataclasses.field(metadata={"static": True})
    rule: str = dataclasses.field(default="standard", metadata={"static": True})

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[-1]

    @property
    def scaling(self) -> float:
        """What the product is multiplied by."""
        return self.alpha / (self.rank if self.rule == "standard" else math.sqrt(self.rank))


def is_adapter(value: Any) -> bool:
    """True for an `Adapter`; for `is_leaf` arguments."""
    return isinstance(value, Adapter)


def init(
    params: Mapping[str, Any],
    key: PRNGKeyArray,
    *,
    rank: int | Mapping[str, int],
    alpha: float | Mapping[str, float],
    targets: Sequence[str] = ("*",),
    scaling: str = "standard",
    dtype: Any = jnp.float32,
) -> dict[str, Any]:
    """Fresh adapters, with which the model is the one it was.

        W + scaling · a·b,   a ~ U(-1/sqrt(inputs), 1/sqrt(inputs)),   b = 0
        scaling: alpha / r ("standard") or alpha / sqrt(r) ("rank_stabilized")

    The tree holds nothing else, so it is what is differentiated, optimised and saved; see
    `train.combine` for how it meets the frozen parameters. An adapter's values depend on `key`,
    its path and its shape alone, not on the other targets.

    Args:
      params: the decoder's, or a tree that holds them; arrays, `jax.ShapeDtypeStruct`s or
        quantised matrices.
      key: randomness of a.
      rank: r, or r by pattern, the first that matches a path counting.
      alpha: likewise.
      targets: globs of "/"-joined paths such as "layers/attention/*" or "*/query" among the
        layers' matrices (`*` also stands for slashes).
      scaling: "standard" or "rank_stabilized".
      dtype: of the adapters; the product is computed in the activations' dtype.

    Returns:
      `{"layers": {"attention": {"query": Adapter, ...}, ...}}`.

    Raises:
      ValueError: a pattern that matches no matrix (of `rank` and `alpha`: no target), a target
        without a rank or alpha, a rank below 1, an unknown scaling, a dtype that is not floating.

    Source: Hu et al., "LoRA", 2021, arXiv:2106.09685, with the initialisation of its PEFT
    implementation; Kalajdzievski, "A Rank Stabilization Scaling Factor", 2023, arXiv:2312.03732.
    """
    _checks.one_of("scaling", scaling, SCALINGS)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype: expected a floating dtype, got {jnp.dtype(dtype)}")
    targets = _paths.sequence_of_patterns("targets", targets)
    layouts = matrices.of(params)
    _paths.check_patterns("targets", targets, layouts, "matrices")
    chosen = [name for name in layouts if any(_paths.matches(p, name) for p in targets)]
    ranks = _by_path("rank", rank, chosen)
    alphas = _by_path("alpha", alpha, chosen)
    leaves = _paths.named_leaves(params, is_leaf=matrices.is_leaf)
    adapters: dict[str, Any] = {}
    for name in chosen:
        r = ranks[name]
        if isinstance(r, bool) or not isinstance(r, int) or r < 1:
            raise ValueError(f"rank: expected a positive int for {name}, got {r!r}")
        _checks.in_range(f"alpha of {name}", alphas[name], 0.0, math.inf, low_open=True)
        layout, shape = layouts[name], tuple(leaves[name].shape)
        split = layout.lead + layout.ins
        bound = math.prod(shape[layout.lead : split]) ** -0.5
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        a = jax.random.uniform(own, (*shape[:split], r), jnp.float32, -bound, bound)
        b = jnp.zeros((*shape[: layout.lead], r, *shape[split:]), dtype)
        adapter = Adapter(a=a.astype(dtype), b=b, alpha=float(alphas[name]), rule=scaling)
        _insert(adapters, name.split("/"), adapter)
    return adapters


def attach(params: Mapping[str, Any], adapters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with a `linear.LowRank` wherever there is an adapter; nothing is computed.

    Args:
      params: the decoder's.
      adapters: a part of a tree like it.

    Returns:
      what the decoder's functions take, differentiable in the adapters alone at these places.

    Raises:
      ValueError: an adapter without a matrix, or of another shape, or one that has one already.
    """
    return _applied(params, adapters, attached)


def attached(weight: Any, adapter: Adapter, name: str) -> linear.LowRank:
    """One matrix with its adapter; `name` is for errors."""
    if isinstance(weight, linear.LowRank):
        raise ValueError(f"adapters: {name} has an adapter already; merge it first")
    if not matrices.is_leaf(weight):
        raise ValueError(f"adapters: expected a matrix under {name}, got {type(weight).__name__}")
    shape, a, b = (tuple(x.shape) for x in (weight, adapter.a, adapter.b))
    lead = len(a) + len(b) - 2 - len(shape)
    fits = lead >= 0 and a[:lead] == b[:lead] and (*a[:-1], *b[lead + 1 :]) == shape
    if not fits or a[-1] != b[lead]:
        raise ValueError(
            f"adapters: {name} has a of shape {a} and b of shape {b}, which do not fit the "
            f"matrix of shape {shape}"
        )
    return linear.LowRank(base=weight, a=adapter.a, b=adapter.b, scaling=adapter.scaling)


def merge(
    params: Mapping[str, Any], adapters: Mapping[str, Any], *, dtype: Any = None
) -> dict[str, Any]:
    """The parameters with `W + scaling · a·b` in place of W, added in float32 and then rounded.

    There is no way back from the sum, which is rounded: keep `params` to undo it.

    Args:
      params: the decoder's.
      adapters: a part of a tree like it.
      dtype: of the merged matrices; default: each one's own (float32 for quantised ones).

    Returns:
      plain arrays at these places; all others as they are.

    Raises:
      ValueError: as `attach`.
    """

    def merged(weight: Any, adapter: Adapter, name: str) -> Array:
        low_rank = attached(weight, adapter, name)
        wanted = low_rank.dtype if dtype is None else jnp.dtype(dtype)
        return _dense_by_layer(low_rank, wanted)

    return _applied(params, adapters, merged)


def logical_axes(axes: Mapping[str, Any], adapters: Mapping[str, Any]) -> dict[str, Any]:
    """The logical names of the adapters' axes: those of their matrices, None for the rank.

    Args:
      axes: from `decoder.logical_axes()`.
      adapters: from `init`.

    Returns:
      a tree like `adapters` for `parallel.shardings`.

    Raises:
      ValueError: an adapter whose matrix has no names, or a wrong number of them.
    """

    def named(path: Any, adapter: Adapter) -> Adapter:
        name = _paths.joined(path)
        node: Any = axes
        for part in name.split("/"):
            node = node.get(part) if isinstance(node, Mapping) else None
        lead = adapter.a.ndim + adapter.b.ndim - 2 - (len(node) if type(node) is tuple else 0)
        split = adapter.a.ndim - 1
        if type(node) is not tuple or not 0 <= lead < split:
            raise ValueError(f"axes: expected the axes of a matrix for {name}, got {node!r}")
        return dataclasses.replace(
            adapter,
            a=(*node[:split], None),  # type: ignore[arg-type]
            b=(*node[:lead], None, *node[split:]),  # type: ignore[arg-type]
        )

    return jax.tree_util.tree_map_with_path(named, dict(adapters), is_leaf=is_adapter)


@functools.partial(jax.jit, static_argnames="dtype")
def _dense_by_layer(low_rank: linear.LowRank, dtype: Any) -> Array:
    """One layer at a time, so that no float32 copy of all of them is made."""
    return jax.lax.map(lambda layer: layer.dense(dtype), low_rank)


def _by_path(name: str, value: Any, paths: Sequence[str]) -> dict[str, Any]:
    """One value per path from one for all or from patterns."""
    if not isinstance(value, Mapping):
        return dict.fromkeys(paths, value)
    _paths.check_patterns(name, value, paths, "targets")
    found = {}
    for path in paths:
        fitting = [v for pattern, v in value.items() if _paths.matches(pattern, path)]
        if not fitting:
            raise ValueError(f"{name}: no pattern of {', '.join(value)} matches {path}")
        found[path] = fitting[0]
    return found


def _insert(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value


def _applied(
    params: Mapping[str, Any],
    adapters: Mapping[str, Any],
    function: Callable[[Any, Adapter, str], Any],
    where: tuple[str, ...] = (),
) -> dict[str, Any]:
    """A copy of `params` with `function(weight, adapter, name)` wherever there is an adapter."""
    result = dict(params)
    for key, value in adapters.items():
        name = "/".join((*where, key))
        if key not in params:
            raise ValueError(f"adapters: {name} is not among {', '.join(map(str, params))}")
        if is_adapter(value):
            result[key] = function(params[key], value, name)
        elif isinstance(value, Mapping) and isinstance(params[key], Mapping):
            result[key] = _applied(params[key], value, function, (*where, key))
        else:
            raise ValueError(f"adapters: expected an Adapter at {name}, got {type(value).__name__}")
    return result
