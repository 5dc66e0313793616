"""Where matrices lie on a mesh, and how whole ones are dealt out to its devices and back.

A polar iteration on a matrix split over devices would communicate in every product. Here a stack
of equal matrices is resharded once, so that each device holds whole ones; the iteration then runs
without any communication; and a second resharding brings the results back. For N devices a device
sends `2 m n (N - 1) / N²` numbers a matrix, the least of the schemes that keep whole matrices.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from pgjax import _paths

Entry = str | tuple[str, ...] | None
"""Mesh axes of one axis of an array."""

UNKNOWN = ("?",)
"""In place of an entry: lies in no way that an entry could say."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, and by the path of each leaf the mesh axes of its axes."""

    mesh: Mesh
    entries: Mapping[str, tuple[Entry, ...]]

    def of(self, path: str, rank: int) -> tuple[Entry, ...]:
        """The entries of a leaf's axes; None for whole ones, and for a leaf that is not named."""
        given = self.entries.get(path, ())
        return (*given, *(None,) * (rank - len(given)))


def layout_of(params: Any) -> Layout | None:
    """The layout of concrete parameters, or of a tree of `NamedSharding`s; None for one device.

    Raises:
      ValueError: leaves on different meshes, a leaf that is being traced.
    """
    found: dict[str, tuple[Entry, ...]] = {}
    mesh: Any = None
    leaves = _paths.named_leaves(params, is_leaf=lambda x: isinstance(x, NamedSharding))
    for path, leaf in leaves.items():
        if isinstance(leaf, jax.core.Tracer):
            raise ValueError(f"{path}: a traced leaf lies nowhere; call layout_of outside jit")
        sharding = leaf if isinstance(leaf, NamedSharding) else getattr(leaf, "sharding", None)
        if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
            continue
        if mesh is None:
            mesh = sharding.mesh
        elif mesh != sharding.mesh:
            raise ValueError(f"{path}: lies on {sharding.mesh}, but other leaves on {mesh}")
        found[path] = tuple(sharding.spec)
    return None if mesh is None else Layout(mesh, found)


def _axes(entry: Entry) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def merged(entries: Sequence[Entry], sizes: Sequence[int]) -> Entry:
    """The entry of several axes flattened into one: the first's, if no later one is split.

    `UNKNOWN` otherwise: then no entry describes how the flattened axis lies.
    """
    kept = [entry for entry, size in zip(entries, sizes, strict=True) if size > 1]
    if any(entry is not None for entry in kept[1:]):
        return UNKNOWN
    return kept[0] if kept else None


def distribute(
    function: Callable[[Array], Any],
    stack: Float[Array, "b m n"],
    mesh: Mesh,
    entries: tuple[Entry, Entry, Entry],
) -> Any:
    """`function(stack)`, one whole matrix on one device, with a resharding before and after.

    Args:
      function: of `[b, m, n]`, matrix by matrix; gives arrays whose first axis is b. Zero matrices
        are appended until the devices share them evenly.
      entries: how the stack lies, and how results of its shape shall lie.
    """
    used = [axis for entry in entries for axis in _axes(entry)]
    rest = [a for a, size in mesh.shape.items() if size > 1 and a not in used]
    # Matrices that are already dealt out stay where they are.
    target = (*_axes(entries[0]), *(a for a in used if a not in _axes(entries[0])), *rest)
    if not target:
        return function(stack)
    devices = math.prod(mesh.shape[axis] for axis in target)
    count = stack.shape[0]
    # One of a stack that is split already may not be padded: that would move matrices about.
    if entries[0] is None:
        stack = jnp.pad(stack, ((0, -count % devices), (0, 0), (0, 0)))
    elif count % devices:
        target = _axes(entries[0])

    def lying(x: Array, *spec: Entry) -> Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))

    whole = lying(lying(stack, *entries), target, None, None)
    results = function(whole)

    def back(x: Array) -> Array:
        x = lying(x, target, *[None] * (x.ndim - 1))
        entry = entries if x.ndim == 3 else (entries[0], *[None] * (x.ndim - 1))
        return lying(x, *entry)[:count]

    return jax.tree.map(back, results)
