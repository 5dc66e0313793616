"""Names of a tree's leaves, and patterns that choose among them."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from typing import Any

import jax


def joined(path: Sequence[Any]) -> str:
    """A path of `jax.tree_util` as "layers/attention/query"."""
    names = []
    for entry in path:
        found = [getattr(entry, a) for a in ("key", "name", "idx") if hasattr(entry, a)]
        names.append(str(found[0] if found else entry))
    return "/".join(names)


def named_leaves(tree: Any, is_leaf: Any = None) -> dict[str, Any]:
    """Each leaf by its joined path."""
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {joined(path): leaf for path, leaf in flat}


def matches(pattern: str, path: str) -> bool:
    """Whether a path fits a glob; `*` also stands for slashes, case counts."""
    return fnmatch.fnmatchcase(path, pattern)


def check_patterns(name: str, patterns: Iterable[str], paths: Iterable[str], what: str) -> None:
    """Raises ValueError for a pattern that fits no path, listing the paths."""
    paths = list(paths)
    for pattern in patterns:
        if not any(matches(pattern, path) for path in paths):
            raise ValueError(
                f"{name}: {pattern!r} matches none of the {what}: {', '.join(paths) or 'none'}"
            )


def sequence_of_patterns(name: str, patterns: Any) -> tuple[str, ...]:
    """The patterns as a tuple; ValueError for a lone string or for none."""
    if isinstance(patterns, str) or not all(isinstance(p, str) for p in patterns):
        raise ValueError(f"{name}: expected a sequence of patterns, got {patterns!r}")
    if not patterns:
        raise ValueError(f"{name}: expected at least one pattern, got none")
    return tuple(patterns)
