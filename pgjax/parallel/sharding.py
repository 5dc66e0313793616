"""From logical axis names to shardings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

Rules = Mapping[str, str | tuple[str, ...] | None]

DEFAULT_RULES: Rules = MappingProxyType(
    {
        "layers": None,  # the axis a scan runs over
        "embed": "fsdp",
        "heads": "tensor",
        "kv_heads": "tensor",
        "head_dim": None,
        "mlp": "tensor",
        "vocab": "tensor",
        "expert": "expert",
        "batch": ("data", "fsdp", "expert"),
    }
)
"""Mesh axes of each logical axis; None leaves it whole."""

BATCH_AXES = ("data", "fsdp", "expert")
"""Mesh axes that split the rows of a batch."""


def _mesh_axes(rule: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if rule is None else (rule,) if isinstance(rule, str) else tuple(rule)


def _entry(axes: Sequence[str]) -> str | tuple[str, ...] | None:
    return None if not axes else axes[0] if len(axes) == 1 else tuple(axes)


def _spec(
    logical_axes: Sequence[str | None],
    rules: Rules,
    where: str,
    mesh: Mesh | None = None,
    shape: Sequence[int] | None = None,
) -> PartitionSpec:
    used: set[str] = set()
    entries = []
    for dimension, name in enumerate(logical_axes):
        if name is not None and name not in rules:
            raise ValueError(
                f"{where}: unknown logical axis {name!r} in {tuple(logical_axes)}, "
                f"expected one of {', '.join(rules)}"
            )
        kept: list[str] = []
        for axis in _mesh_axes(None if name is None else rules[name]):
            if mesh is not None and axis not in mesh.shape:
                raise ValueError(
                    f"{where}: logical axis {name!r} maps to mesh axis {axis!r}, "
                    f"but the mesh has {', '.join(mesh.axis_names)}"
                )
            if axis in used:
                continue
            if mesh is not None and shape is not None:
                ways = math.prod(mesh.shape[k] for k in kept) * mesh.shape[axis]
                if shape[dimension] % ways:
                    continue
            kept.append(axis)
            used.add(axis)
        entries.append(_entry(kept))
    return PartitionSpec(*entries)


def spec_for(logical_axes: Sequence[str | None], rules: Rules = DEFAULT_RULES) -> PartitionSpec:
    """The partition of one array: each logical axis to its mesh axes.

    A mesh axis is used for the first dimension that asks for it and not again, since an array
    cannot be split twice along the same devices.

    Args:
      logical_axes: a name, or None for a dimension left whole, per dimension.
      rules: mesh axis, several of them, or None by logical axis.

    Raises:
      ValueError: a logical axis that `rules` does not know.
    """
    return _spec(logical_axes, rules, "logical_axes")


def _is_axes(value: Any) -> bool:
    # `type is tuple`: a NamedTuple without fields is a container, not the axes of a scalar.
    return value is None or (
        type(value) is tuple and all(name is None or isinstance(name, str) for name in value)
    )


def _is_shape(value: Any) -> bool:
    return type(value) is tuple and all(isinstance(n, int | np.integer) for n in value)


def _path(path: Any) -> str:
    return jax.tree_util.keystr(path) or "the only leaf"


def _same_structure(a: Any, b: Any) -> bool:
    return [p for p, _ in jax.tree_util.tree_leaves_with_path(a)] == [
        p for p, _ in jax.tree_util.tree_leaves_with_path(b)
    ]


def shardings(
    logical_axes: Any, mesh: Mesh, *, rules: Rules = DEFAULT_RULES, shapes: Any = None
) -> Any:
    """Shardings of a tree of parameters from the logical names of its axes.

    Args:
      logical_axes: tree whose leaves are tuples of logical axis names (or None per dimension);
        None for a leaf that is replicated.
      mesh: from `make_mesh`.
      rules: mesh axes by logical axis.
      shapes: tree of the same structure with arrays, `jax.ShapeDtypeStruct`s or shapes. With it, a
        mesh axis that does not divide a dimension is dropped, for that leaf only; without it, such
        a leaf fails when it is put on the mesh.

    Returns:
      a tree of `NamedSharding`.

    Raises:
      ValueError: an unknown logical axis, a rule for a mesh axis that does not exist, a number of
        names that is not the array's rank, or trees that differ; naming the leaf.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(logical_axes, is_leaf=_is_axes)
    if shapes is None:
        leaf_shapes: list[Any] = [None] * len(leaves)
    else:
        flat, shapes_treedef = jax.tree_util.tree_flatten_with_path(
            shapes, is_leaf=lambda x: x is None or _is_shape(x)
        )
        if [p for p, _ in flat] != [p for p, _ in leaves]:
            ours, theirs = {_path(p) for p, _ in leaves}, {_path(p) for p, _ in flat}
            differing = sorted(ours ^ theirs)[:5] or [f"{treedef} and {shapes_treedef}"]
            raise ValueError(
                f"shapes: expected the structure of logical_axes; differing: {', '.join(differing)}"
            )
        leaf_shapes = [
            tuple(x) if _is_shape(x) else None if x is None else np.shape(x) for _, x in flat
        ]
    result = []
    for (path, axes), shape in zip(leaves, leaf_shapes, strict=True):
        where = _path(path)
        if not _is_axes(axes):
            raise ValueError(f"{where}: expected a tuple of logical axis names, got {axes!r}")
        names = () if axes is None else axes
        if axes is not None and shape is not None and len(names) != len(shape):
            raise ValueError(
                f"{where}: {len(names)} logical axes {names} for an array of shape {shape}"
            )
        result.append(NamedSharding(mesh, _spec(names, rules, where, mesh, shape)))
    return jax.tree_util.tree_unflatten(treedef, result)


def gather(x: jax.Array, logical_axes: Sequence[str | None], mesh: Mesh) -> jax.Array:
    """The same array, no longer spread over `data` and `fsdp`; for use in `jit`.

    Split over other axes of the mesh it stays as `DEFAULT_RULES` say.
    """
    rules = {
        name: tuple(axis for axis in _mesh_axes(rule) if axis not in ("data", "fsdp"))
        for name, rule in DEFAULT_RULES.items()
    }
    spec = _spec(logical_axes, rules, "logical_axes", mesh, x.shape)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def row_ways(mesh: Mesh) -> int:
    """Into how many parts `batch_sharding` cuts a batch."""
    return math.prod(mesh.shape[name] for name in BATCH_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array every device holds in full."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, *, axis: int = 0) -> NamedSharding:
    """The sharding of a batch: dimension `axis` over `BATCH_AXES`, the others whole.

    Args:
      mesh: from `make_mesh`.
      axis: the batch dimension, at least 0: 0 for `[B, ...]`, 1 for time-major `[T, N, ...]`.
    """
    if axis < 0:
        raise ValueError(f"axis: expected at least 0, got {axis}")
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH_AXES))


def token_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of activations `[B, T, ...]`: rows over `BATCH_AXES`, tokens over `sequence`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES, "sequence"))


def shard(tree: Any, shardings: Any) -> Any:
    """The tree's arrays, put where `shardings` says.

    Args:
      tree: arrays of JAX or NumPy, PRNG keys included. Where a sharding spans several processes,
        each process gives the whole array, with the same values.
      shardings: one sharding for all leaves, or a tree of them like `tree`.
    """
    if isinstance(shardings, Sharding):
        return jax.tree_util.tree_map(lambda leaf: _put(leaf, shardings), tree)
    return jax.tree_util.tree_map(_put, tree, shardings)


def _put(leaf: Any, sharding: Sharding) -> jax.Array:
    if sharding.is_fully_addressable or not getattr(leaf, "is_fully_addressable", True):
        return jax.device_put(leaf, sharding)
    if jax.dtypes.issubdtype(jax.dtypes.result_type(leaf), jax.dtypes.prng_key):
        # The data's own dimension comes last, so the key's partition fits it too.
        data = _put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def shardings_like(tree: Any, params: Any, shardings: Any = None) -> Any:
    """Shardings of a tree that holds copies of the parameters' shape, such as optimizer state.

    A leaf whose path ends with a parameter's whole path and which has that parameter's shape gets
    its sharding (first and second moments, averaged weights); of several such parameters, the one
    with the longest path. Every other leaf (step counts, factored moments) is replicated.

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`s, e.g. `jax.eval_shape(optimizer.init, params)`.
      params: the parameters, arrays or `jax.ShapeDtypeStruct`s.
      shardings: the parameters' shardings, a tree like `params`; default: those `params` have.

    Returns:
      a tree like `tree` of shardings.

    Raises:
      ValueError: parameters without shardings, or not of `params`' structure.
    """
    flat_params = jax.tree_util.tree_leaves_with_path(params)
    if shardings is None:
        found = [getattr(leaf, "sharding", None) for _, leaf in flat_params]
    else:
        if not _same_structure(shardings, params):
            raise ValueError("shardings: expected one for each leaf of params, in its structure")
        found = jax.tree_util.tree_leaves(shardings)
    known: dict[tuple[Any, ...], tuple[tuple[int, ...], Sharding]] = {}
    for (path, leaf), sharding in zip(flat_params, found, strict=True):
        if not isinstance(sharding, Sharding):
            raise ValueError(f"params: {_path(path)} has no sharding; put params on a mesh first")
        known[tuple(path)] = (np.shape(leaf), sharding)
    if not known:
        raise ValueError("params: expected at least one array, got none")
    meshes = [s.mesh for _, s in known.values() if isinstance(s, NamedSharding)]
    # Without a mesh everything is on one device, and its sharding is also the replicated one.
    elsewhere: Sharding = (
        NamedSharding(meshes[0], PartitionSpec()) if meshes else next(iter(known.values()))[1]
    )

    def of(path: tuple[Any, ...], leaf: Any) -> Sharding:
        for start in range(len(path) + 1):
            shape, sharding = known.get(tuple(path[start:]), (None, None))
            if sharding is not None and shape == np.shape(leaf):
                return sharding
        return elsewhere

    return jax.tree_util.tree_map_with_path(of, tree)


def shard_like(tree: Any, params: Any, shardings: Any = None) -> Any:
    """The arrays of `tree` (optimizer state, say), put where `shardings_like` says."""
    return shard(tree, shardings_like(tree, params, shardings))


def constrain_batch(tree: Any, mesh: Mesh, *, axis: int = 0) -> Any:
    """Tells the compiler that every array is split over `BATCH_AXES`; for use in `jit`.

    Args:
      tree: arrays with the batch along dimension `axis`; arrays of lower rank are replicated.
      mesh: from `make_mesh`.
      axis: the batch dimension, at least 0.

    Returns:
      the same values.

    Raises:
      ValueError: a batch dimension that their sizes do not divide, naming the leaf.
    """
    ways = row_ways(mesh)
    along, whole = batch_sharding(mesh, axis=axis), replicated(mesh)

    def constrain(path: Any, leaf: Any) -> Any:
        shape = np.shape(leaf)
        if len(shape) <= axis:
            return jax.lax.with_sharding_constraint(leaf, whole)
        if shape[axis] % ways:
            raise ValueError(
                f"tree: {_path(path)} of shape {shape} has {shape[axis]} along dimension {axis}, "
                f"expected a multiple of {' x '.join(BATCH_AXES)} = {ways}"
            )
        return jax.lax.with_sharding_constraint(leaf, along)

    return jax.tree_util.tree_map_with_path(constrain, tree)
