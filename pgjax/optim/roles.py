"""What each leaf of a model is for, told by its name: which optimizer suits it, which matrix it is.

Known are the names of this library's decoder, its heads and adapters, and those of Flax's own
layers. Roles:

    embedding, embedding/position, head
    attention/query, attention/key, attention/value, attention/output
    mlp/gate, mlp/up, mlp/down           also those of an MLP that every token shares
    experts/gate, experts/up, experts/down
    router, dense, conv, lora/a, lora/b
    norm, bias, vector                   vectors are whatever else has no matrix in it
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from pgjax import _paths
from pgjax.optim.matrix import DENSE, MatrixSpec, Specs, check_matrix


class Role(NamedTuple):
    """A leaf's role, and its matrix where it is one."""

    name: str
    spec: MatrixSpec | None = None


Roles = Callable[[Any], Mapping[str, Role]]
"""From a tree to each leaf's role by joined path."""

_ROWS = MatrixSpec(out_axes=(0,), in_axes=(1,))  # a row is a word
_SHARED = {"shared_gate_proj": "gate", "shared_up": "up", "shared_down": "down"}
_PARTS = ("gate", "up", "down")


def default_roles(tree: Any) -> dict[str, Role]:
    """The role of every leaf by its path, from its names and its rank.

    Raises:
      ValueError: a leaf that fits no role; it is named, with the shape it has.
    """
    return {
        path: _role(path, path.split("/"), jnp.ndim(leaf), jnp.shape(leaf))
        for path, leaf in _paths.named_leaves(tree).items()
    }


def default_specs(tree: Any) -> dict[str, MatrixSpec]:
    """The matrix of every leaf, by its role; other leaves of rank 2 are `DENSE`.

    Raises:
      ValueError: a leaf of rank 3 or more whose name does not say which of its axes make a matrix.
    """
    found = {}
    for path, leaf in _paths.named_leaves(tree).items():
        role = _known(path.split("/"), jnp.ndim(leaf))
        if role is not None and role.spec is not None:
            found[path] = role.spec
        elif jnp.ndim(leaf) == 2:
            found[path] = DENSE
        else:
            raise ValueError(
                f"{path}: which axes of its shape {jnp.shape(leaf)} make a matrix does not follow "
                "from its name; pass specs"
            )
    return found


def specs_by_path(specs: Specs | None, tree: Any) -> dict[str, MatrixSpec]:
    """The spec of every leaf of `tree` by its path; None stands for `default_specs`.

    Raises:
      ValueError: a leaf without a spec, a leaf that is no floating array of rank 2 or more, axes
        that a leaf lacks or that overlap, blocks that do not divide; each names the leaf.
    """
    for path, leaf in _paths.named_leaves(tree).items():
        check_matrix(path, leaf)
    specs = default_specs if specs is None else specs
    found = specs(tree) if callable(specs) else specs
    if not isinstance(found, Mapping) or not all(
        isinstance(spec, MatrixSpec) for spec in found.values()
    ):
        found = _paths.named_leaves(found, is_leaf=lambda x: isinstance(x, MatrixSpec))
    chosen = {}
    for path, leaf in _paths.named_leaves(tree).items():
        spec = found.get(path)
        if not isinstance(spec, MatrixSpec):
            raise ValueError(f"{path}: no MatrixSpec for this leaf; specs name {_some(found)}")
        spec.resolved(jnp.shape(leaf), path)
        chosen[path] = spec
    return chosen


def _some(names: Mapping[str, Any]) -> str:
    shown = list(names)[:8]
    return ", ".join(shown) + (", ..." if len(names) > len(shown) else "") if shown else "no leaf"


def per_head_specs(tree: Any) -> dict[str, MatrixSpec]:
    """As `default_specs`, with each head of an attention projection a matrix of its own.

    Where a side is (heads, head size), heads become a batch axis.
    """
    roles = default_roles(tree)
    return {
        path: MatrixSpec(spec.out_axes[-1:], spec.in_axes[-1:])
        if roles[path].name.startswith("attention/")
        else spec
        for path, spec in default_specs(tree).items()
    }


def _role(path: str, names: list[str], rank: int, shape: tuple[int, ...]) -> Role:
    role = _known(names, rank)
    if role is not None:
        return role
    if rank < 2:
        return Role("vector")
    raise ValueError(
        f"{path}: no role fits a leaf of this name and shape {shape}; pass roles of your own"
    )


def _of_stack(out: tuple[int, ...], into: tuple[int, ...]) -> MatrixSpec:
    """Axes of a leaf of rank 4 counted from its end: other ranks may stand in front."""
    return MatrixSpec(tuple(a - 4 for a in out), tuple(a - 4 for a in into))


def _known(names: list[str], rank: int) -> Role | None:
    last = names[-1]
    if last.endswith("bias"):
        return Role("bias")
    if last.endswith("norm") or last == "scale":
        return Role("norm")
    if last in ("embedding", "embeddings") and rank == 2:
        return Role("embedding", _ROWS)
    if last == "position_embedding" and rank == 2:
        return Role("embedding/position", _ROWS)
    if last == "unembedding" and rank == 2:
        return Role("head", DENSE)
    if last in ("router", "shared_router"):
        return Role("router", DENSE) if last == "router" and rank >= 2 else Role("vector")
    if last in ("a", "b") and len(names) > 1 and rank >= 2:
        return _adapter(names, rank)
    if "attention" in names and rank == 4 and last in ("query", "key", "value", "output"):
        spec = _of_stack((3,), (1, 2)) if last == "output" else _of_stack((2, 3), (1,))
        return Role(f"attention/{last}", spec)
    if rank >= 3 and "layers" in names:
        part = _SHARED.get(last, last)
        if part in _PARTS:
            own = "moe" in names and last not in _SHARED
            return Role(f"{'experts' if own else 'mlp'}/{part}", DENSE)
    if last == "kernel":
        return _flax(names, rank)
    return None


def _adapter(names: list[str], rank: int) -> Role:
    """Factors of an attention projection keep its heads apart; r is a's last axis, b's others."""
    role = Role(f"lora/{names[-1]}")
    if "attention" not in names:
        return Role(role.name, DENSE)
    output = names[-2] == "output"
    if names[-1] == "a":
        spec = MatrixSpec((-1,), (-3, -2)) if output and rank == 4 else DENSE
    else:
        spec = DENSE if output or rank < 4 else MatrixSpec((-2, -1), (-3,))
    return Role(role.name, spec)


def _flax(names: list[str], rank: int) -> Role | None:
    """Kernels of Dense, attention and convolutions."""
    module = names[-2] if len(names) > 1 else ""
    if rank < 2:
        return Role("vector")
    if rank == 2:
        return Role("dense", DENSE)
    if rank == 3 and module in ("query", "key", "value"):
        return Role(f"attention/{module}", MatrixSpec((1, 2), (0,)))
    if rank == 3 and module == "out":
        return Role("attention/output", MatrixSpec((2,), (0, 1)))
    if "conv" in module.lower():  # window, inputs, outputs: all but the outputs are one side
        return Role("conv", MatrixSpec((-1,), tuple(range(rank - 1))))
    return None
