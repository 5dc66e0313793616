"""The arrays of a state: their names in storage, what is stored, and the way back."""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from pgjax.parallel.sharding import shard

Name = tuple[str, ...]


class Leaf(NamedTuple):
    """How a leaf is stored; `data_shape` and `implementation` differ from None for typed keys."""

    where: str
    dtype: str
    shape: tuple[int, ...]
    data_shape: tuple[int, ...] | None
    implementation: str | None

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


def stored(state: Any) -> tuple[dict[str, Any], dict[Name, Leaf]]:
    """What Orbax is given of a state, and how each leaf is stored.

    Raises ValueError, naming the leaf, for what cannot be saved.
    """
    named = _named_leaves(state, "state")
    arrays = {name: _storable(where, leaf) for name, (where, leaf) in named.items()}
    # Orbax refuses arrays without elements; their shapes are among the descriptions.
    arrays = {name: array for name, array in arrays.items() if array.size}
    if not arrays:
        raise ValueError("state: expected at least one array with elements, got none")
    return _nested(arrays), {name: _describe(*leaf) for name, leaf in named.items()}


def restored(like: Any, saved: Mapping[Name, Leaf], step: int, read: Callable[[Any], Any]) -> Any:
    """The state of step `step` in the form of `like`; ValueError where `like` does not match.

    `read` is given what Orbax restores into, and returns that tree with the saved values.
    """
    wanted = _match(like, saved, step)
    targets = {name: _target(leaf, saved[name]) for name, leaf in wanted.items()}
    tree = read(_nested({name: target for name, target in targets.items() if target.size}))

    def value(name: Name) -> Any:
        if not targets[name].size:
            return np.zeros(targets[name].shape, targets[name].dtype)
        return functools.reduce(operator.getitem, name, tree)

    values = [_as_like(value(name), leaf, saved[name]) for name, leaf in wanted.items()]
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(like), values)


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _name(entry: Any) -> str:
    """One step of a path as a name without the separators of Orbax's storage."""
    found = [getattr(entry, a) for a in ("key", "name", "idx") if hasattr(entry, a)]
    text = str(found[0] if found else entry)
    return re.sub(r"[%./]", lambda m: f"%{ord(m.group()):02x}", text) or "%"


def _named_leaves(tree: Any, argument: str) -> dict[Name, tuple[str, Any]]:
    """Each leaf with its readable path, by its name in storage."""
    named: dict[Name, tuple[str, Any]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = tuple(_name(entry) for entry in path) or ("leaf",)
        where = jax.tree_util.keystr(path) or "the only leaf"
        if name in named:
            raise ValueError(f"{argument}: {named[name][0]} and {where} have the same name")
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")) and not isinstance(
            leaf, bool | int | float | complex
        ):
            raise ValueError(
                f"{argument}: {where} is a {type(leaf).__name__}, expected an array or a number"
            )
        named[name] = (where, leaf)
    if not named:
        raise ValueError(f"{argument}: expected at least one array, got none")
    return named


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype


def _describe(where: str, leaf: Any) -> Leaf:
    if not _is_key(leaf):
        return Leaf(where, str(np.dtype(_dtype(leaf))), tuple(np.shape(leaf)), None, None)
    data = jax.eval_shape(jax.random.key_data, leaf)
    abstract = isinstance(leaf, jax.ShapeDtypeStruct)
    implementation = None if abstract else str(jax.random.key_impl(leaf))
    return Leaf(where, str(leaf.dtype), tuple(leaf.shape), tuple(data.shape), implementation)


def _nested(flat: Mapping[Name, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in flat.items():
        inner = result
        for part in name[:-1]:
            inner = inner.setdefault(part, {})
        inner[name[-1]] = value
    return result


def _storable(where: str, leaf: Any) -> Any:
    """What Orbax is given: a JAX array, or a copy of host data that later changes cannot reach."""
    if isinstance(leaf, jax.core.Tracer):
        raise ValueError(f"state: {where} is traced; save outside of jit")
    if isinstance(leaf, jax.Array):
        if leaf.is_deleted():
            raise ValueError(f"state: {where} was donated or deleted and cannot be saved")
        return jax.random.key_data(leaf) if _is_key(leaf) else leaf
    array = np.array(leaf)
    if array.dtype.hasobject or array.dtype.kind in "USMm":
        raise ValueError(f"state: {where} has dtype {array.dtype}, which cannot be saved")
    return array


def _match(like: Any, saved: Mapping[Name, Leaf], step: int) -> dict[Name, Any]:
    """`like`'s leaves by name, or ValueError naming a leaf that is not as saved."""
    wanted = _named_leaves(like, "like")
    problems = [
        f"{where} is not in the checkpoint"
        for name, (where, _) in wanted.items()
        if name not in saved
    ]
    problems += [
        f"the checkpoint's {leaf.where} ({leaf}) is not in like"
        for name, leaf in saved.items()
        if name not in wanted
    ]
    for name, (where, leaf) in wanted.items():
        if name not in saved:
            continue
        here, there = _describe(where, leaf), saved[name]
        differs = here.implementation and here.implementation != there.implementation
        if here[1:4] != there[1:4] or differs:
            problems.append(f"{where} is {there} in the checkpoint, but {here} in like")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"like: does not match step {step}: {'; '.join(problems[:5])}{more}")
    return {name: leaf for name, (_, leaf) in wanted.items()}


def _committed(leaf: Any) -> bool:
    """Whether a restored leaf must stay on `leaf`'s devices, rather than go wherever it is used."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.sharding is not None
    return bool(getattr(leaf, "committed", getattr(leaf, "_committed", True)))


def _target(like: Any, saved: Leaf) -> Any:
    """What Orbax restores into."""
    if _is_key(like):
        assert saved.data_shape is not None
        return np.empty(saved.data_shape, np.uint32)
    if isinstance(like, jax.Array | jax.ShapeDtypeStruct) and _committed(like):
        return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=like.sharding)
    return np.empty(np.shape(like), _dtype(like))


def _as_like(restored: Any, like: Any, saved: Leaf) -> Any:
    """The restored value in the form and place of `like`."""
    if _is_key(like):
        key = jax.random.wrap_key_data(jax.numpy.array(restored), impl=saved.implementation)
        return shard(key, like.sharding) if _committed(like) else key
    if isinstance(like, jax.Array | jax.ShapeDtypeStruct):
        # `array` copies: a buffer shared with NumPy could not be donated.
        if not _committed(like):
            return jax.numpy.array(restored, dtype=like.dtype)
        return shard(restored, like.sharding)  # it is there already, unless it is empty
    if isinstance(like, np.ndarray):
        return np.asarray(restored)
    if isinstance(like, np.generic):
        return like.dtype.type(np.asarray(restored)[()])
    return type(like)(np.asarray(restored).item())
