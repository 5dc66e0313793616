"""What the adapters of other libraries share: finding an environment, its spaces, its numbers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pgjax import _checks
from pgjax.envs.core import Box, Discrete, Step


def imported(module: str, remedy: str) -> Any:
    """The module, or an ImportError that says how to install its package."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ImportError(f"from_{package} needs {package}: {remedy}") from error


def resolved(env_or_name: Any, kind: type, names: Iterable[str], make: Callable[[str], Any]) -> Any:
    """The environment, made if it is a name; ValueError for an unknown name or another object."""
    if isinstance(env_or_name, str):
        _checks.one_of("env_or_name", env_or_name, sorted(names))
        return make(env_or_name)
    if not isinstance(env_or_name, kind):
        wanted, got = (f"{t.__module__}.{t.__qualname__}" for t in (kind, type(env_or_name)))
        raise ValueError(f"env_or_name: expected a name or a {wanted}, got a {got}")
    return env_or_name


def unwrapped(env: Any, inside: str, forbidden: tuple[type, ...]) -> None:
    """Raises ValueError where a wrapper does what is done here, or hides what is needed here."""
    layer = env
    while layer is not None:
        if isinstance(layer, forbidden):
            raise ValueError(
                "env_or_name: expected an environment that does not reset, batch or cut off by "
                f"itself, got one within {type(layer).__name__}"
            )
        layer = vars(layer).get(inside)


def label(env_or_name: Any, otherwise: str) -> str:
    return env_or_name if isinstance(env_or_name, str) else otherwise


def wrong_space(of: str, got: Any) -> ValueError:
    numbers = "numbers" if of == "observations" else "floating-point numbers"
    return ValueError(
        f"env_or_name: expected {of} that are one integer or one array of {numbers}, got {got}"
    )


def box(of: str, shape: Any, dtype: Any, low: Any, high: Any) -> Box:
    """A Box with concrete bounds as NumPy's; ValueError for actions that are integers."""
    if of == "actions" and not jnp.issubdtype(dtype, jnp.floating):
        raise wrong_space(of, f"{jnp.dtype(dtype).name} of shape {tuple(shape)}")

    def bound(value: Any) -> Any:
        # Traced where a family of environments is mapped over its parameters.
        if not _checks.is_concrete(value):
            return value
        array = np.asarray(value, np.float32)
        return array if array.ndim else float(array)

    return Box(tuple(shape), bound(low), bound(high))


def real(x: Any) -> Array:
    """Floating dtypes as they are, all others as f32."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)


def reader(kind: Discrete | Box) -> Callable[[Any], Array]:
    """What makes a library's observation one of this kind."""
    if isinstance(kind, Discrete):
        return lambda observation: jnp.asarray(observation, jnp.int32)
    return real


def step(state: Any, observation: Any, reward: Any, terminated: Any, truncated: Any) -> Step:
    """A Step of what a library returned; an episode that terminates is not truncated as well."""
    terminated = jnp.asarray(terminated, bool)
    return Step(
        state, observation, real(reward), terminated, jnp.asarray(truncated, bool) & ~terminated
    )
