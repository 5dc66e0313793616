"""Which transformation each leaf gets: by role, or by path."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pgjax import _paths
from pgjax.optim.matrix import canonical_shape
from pgjax.optim.roles import Roles, default_roles

MATRICES = ("attention/*", "mlp/*", "experts/*", "dense")
"""Roles that a matrix optimizer takes by default; the others go to AdamW."""


def route(rules: Sequence[tuple[str, str]], params: Any) -> Any:
    """A label for every leaf: that of the first rule whose pattern fits its path.

    Args:
      rules: (pattern, label) pairs; patterns are globs over joined paths, `*` also for slashes.

    Returns:
      a tree of labels like `params`, for `optax.partition`.

    Raises:
      ValueError: a leaf that no pattern fits, a pattern that fits no leaf; both are named.
    """
    paths = list(_paths.named_leaves(params))
    _paths.check_patterns("rules", [pattern for pattern, _ in rules], paths, "leaves")

    def label(path: Any, _: Any) -> str:
        name = _paths.joined(path)
        for pattern, chosen in rules:
            if _paths.matches(pattern, name):
                return chosen
        raise ValueError(
            f"{name}: no rule fits this leaf; rules: {', '.join(pattern for pattern, _ in rules)}"
        )

    return jax.tree_util.tree_map_with_path(label, params)


def by_role(
    transforms: Mapping[str, optax.GradientTransformation], *, roles: Roles = default_roles
) -> optax.GradientTransformationExtraArgs:
    """Each leaf to the transformation whose pattern fits its role first.

    Args:
      transforms: by pattern over roles, in the order they are tried: `{"attention/*": muon, "*":
        adamw}`. A pattern may fit no leaf: a dense model has no experts.
      roles: from the parameters to each leaf's role; see `pgjax.optim.roles`.

    Raises:
      ValueError: at `init`, a leaf whose role no pattern fits; it is named.
    """

    def labels(params: Any) -> Any:
        chosen = _chosen(list(transforms), roles, params)
        return jax.tree_util.tree_map_with_path(lambda path, _: chosen[_paths.joined(path)], params)

    return optax.partition(dict(transforms), labels)


def with_adam(
    matrix: optax.GradientTransformation,
    adam: optax.GradientTransformation,
    *,
    matrices: Sequence[str] = MATRICES,
    roles: Roles = default_roles,
) -> optax.GradientTransformationExtraArgs:
    """The matrix optimizer for these roles, the other for all else; see `MATRICES`."""
    return by_role({**dict.fromkeys(matrices, matrix), "*": adam}, roles=roles)


def _chosen(patterns: Sequence[str], roles: Roles, params: Any) -> dict[str, str]:
    named = roles(params)
    chosen = {}
    for path in _paths.named_leaves(params):
        if path not in named:
            raise ValueError(f"{path}: roles gave none for this leaf")
        role = named[path].name
        fitting = [pattern for pattern in patterns if _paths.matches(pattern, role)]
        if not fitting:
            raise ValueError(
                f"{path}: no transformation for its role {role!r}; there are {', '.join(patterns)}"
            )
        chosen[path] = fitting[0]
    return chosen


def describe(
    params: Any, patterns: Sequence[str] | Mapping[str, Any] = (), *, roles: Roles = default_roles
) -> str:
    """A table of who gets what: path, shape, role, matrices, the pattern that takes it, entries.

    Args:
      patterns: over roles, or the transformations given to `by_role`; none: that column is empty.

    Returns:
      the table as text, a line a leaf; print it.
    """
    named = roles(params)
    chosen = _chosen(list(patterns), roles, params) if patterns else {}
    rows = [("leaf", "shape", "role", "matrices", "gets", "entries")]
    for path, leaf in _paths.named_leaves(params).items():
        role, shape = named[path], jnp.shape(leaf)
        matrices = ""
        if role.spec is not None:
            b, m, n = canonical_shape(path, leaf, role.spec)
            matrices = f"{b} × ({m}, {n})"
        entries = f"{math.prod(shape):,}"
        rows.append((path, str(shape), role.name, matrices, chosen.get(path, ""), entries))
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        *cells, entries = row
        left = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=False))
        return f"{left}  {entries.rjust(widths[-1])}"

    return "\n".join([line(rows[0]), line(["-" * w for w in widths]), *map(line, rows[1:])])
