"""Argument checks that run at call or trace time and name the offending argument."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify


def rank(name: str, value: Any, *ranks: int) -> None:
    """Raises ValueError unless `value.ndim` is one of `ranks`."""
    shape = _shape(name, value)
    if len(shape) not in ranks:
        wanted = " or ".join(str(r) for r in ranks)
        raise ValueError(f"{name}: expected rank {wanted}, got shape {shape}")


def same_shape(**arrays: Any) -> None:
    """Raises ValueError unless all arrays (None is skipped) have the first one's shape."""
    given = {name: _shape(name, a) for name, a in arrays.items() if a is not None}
    (first, shape), *rest = given.items()
    for name, other in rest:
        if other != shape:
            raise ValueError(f"{name}: expected shape {shape} like {first}, got {other}")


def floating(**arrays: Any) -> None:
    """Raises ValueError unless every array (None is skipped) has a floating dtype."""
    for name, a in arrays.items():
        if a is not None and not jnp.issubdtype(dtype := _dtype(name, a), jnp.floating):
            raise ValueError(f"{name}: expected a floating dtype, got {dtype}")


def integer(**arrays: Any) -> None:
    """Raises ValueError unless every array (None is skipped) has an integer dtype."""
    for name, a in arrays.items():
        if a is not None and not jnp.issubdtype(dtype := _dtype(name, a), jnp.integer):
            raise ValueError(f"{name}: expected an integer dtype, got {dtype}")


def boolean(**arrays: Any) -> None:
    """Raises ValueError unless every array (None is skipped) has dtype bool."""
    for name, a in arrays.items():
        if a is not None and (dtype := _dtype(name, a)) != jnp.bool_:
            raise ValueError(f"{name}: expected dtype bool, got {dtype}")


def _shape(name: str, value: Any) -> tuple[int, ...]:
    try:
        return np.shape(value)
    except ValueError as error:
        raise ValueError(f"{name}: expected an array, got rows of unequal lengths") from error


def _dtype(name: str, value: Any) -> Any:
    """As JAX sees it: int32 for NumPy's int64, where 64 bits are not enabled."""
    try:
        return jnp.result_type(value)
    except (TypeError, ValueError) as error:
        kind = getattr(value, "dtype", type(value).__name__)
        raise ValueError(f"{name}: expected an array of numbers, got {kind}") from error


def in_range(
    name: str,
    value: Any,
    low: float = -np.inf,
    high: float = np.inf,
    *,
    low_open: bool = False,
    high_open: bool = False,
) -> None:
    """Raises ValueError unless a concrete scalar lies in the interval; tracers pass unchecked."""
    if isinstance(value, jax.core.Tracer):
        return
    v = float(value)
    ok = (v > low if low_open else v >= low) and (v < high if high_open else v <= high)
    if not ok:  # NaN also lands here
        left, right = "(" if low_open else "[", ")" if high_open else "]"
        raise ValueError(f"{name}: expected a number in {left}{low}, {high}{right}, got {value}")


def one_of(name: str, value: Any, options: Sequence[Any]) -> None:
    """Raises ValueError unless `value` is one of `options`."""
    if value not in options:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, options))}, got {value!r}")


def is_concrete(*arrays: Any) -> bool:
    """True when no array is a tracer, so that its values may be inspected."""
    return not any(isinstance(a, jax.core.Tracer) for a in arrays if a is not None)


def segment_ids(name: str, ids: Any, num_segments: int) -> None:
    """Raises ValueError on a wrong rank, dtype or count, and on concrete ids out of range."""
    rank(name, ids, 1)
    integer(**{name: ids})
    if num_segments < 1:
        raise ValueError(f"number of segments for {name}: expected at least 1, got {num_segments}")
    # Arrays spread over processes cannot be looked at from one of them.
    if is_concrete(ids) and np.size(ids) and getattr(ids, "is_fully_addressable", True):
        values = np.asarray(ids)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= num_segments:
            raise ValueError(
                f"{name}: expected ids in [0, {num_segments}), got values in [{low}, {high}]"
            )


def traced(holds: Any, message: str) -> None:
    """An error under `jax.experimental.checkify` where a traced bool is false; else nothing.

    Each use of `checkify.debug_check` numbers its error anew, and the number stays in the program,
    where it keeps one that was compiled before, for another run say, from being found again. Here
    a message keeps its number.
    """
    _check_with(message)(holds)


@functools.cache
def _check_with(message: str) -> Callable[[Any], None]:
    @jax.jit
    def check(holds: Any) -> None:
        checkify.debug_check(holds, message)

    return check
