"""GAE and V-trace against RLax, both jitted, on the same arrays.

`python -m experiments.benchmarks.returns` prints the rows.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.harness import Row, main, milliseconds, paired
from pgjax import returns

SIZES = ((256, 1024), (4096, 128))
LAMBDA = 0.95


def rows(sizes: Sequence[tuple[int, int]] = SIZES, *, runs: int = 15) -> list[Row]:
    """Time and largest difference of `gae` and `v_trace` for each size (sequences, steps).

    The peer is RLax, vmapped over sequences; where it is not installed, a plain `lax.scan` over
    the definition.
    """
    try:
        import rlax
    except ImportError:
        rlax = None
    peer = "rlax, vmapped" if rlax else "sequential definition (rlax is not installed)"

    out = []
    for batch, steps in sizes:
        data = _data(batch, steps)
        pairs: list[tuple[str, Callable[..., Any], Callable[..., Any]]] = [
            ("gae", _gae, _rlax_gae(rlax) if rlax else _plain_gae),
            ("v_trace", _v_trace, _rlax_v_trace(rlax) if rlax else _plain_v_trace),
        ]
        for name, ours, theirs in pairs:
            a, b = jax.jit(ours), jax.jit(theirs)
            error = max(
                float(jnp.max(jnp.abs(x - y)))
                for x, y in zip(jax.tree.leaves(a(*data)), jax.tree.leaves(b(*data)), strict=True)
            )
            out.append(
                paired(
                    f"returns.{name} [{batch}, {steps}], time",
                    peer,
                    functools.partial(a, *data),
                    functools.partial(b, *data),
                    runs=runs,
                    shown=milliseconds,
                    max_abs_error=error,
                )
            )
    return out


def _data(batch: int, steps: int) -> tuple[jax.Array, ...]:
    """Rewards, values at 0..T, discounts and importance ratios, with one end in a hundred steps."""
    rng = np.random.default_rng(0)
    shape = (batch, steps)
    arrays = (
        rng.normal(size=shape),
        rng.normal(size=(batch, steps + 1)),
        0.99 * (rng.uniform(size=shape) > 0.01),
        np.exp(0.3 * rng.normal(size=shape)),
    )
    return tuple(jnp.asarray(x, jnp.float32) for x in arrays)


def _gae(r: jax.Array, v: jax.Array, g: jax.Array, w: jax.Array) -> jax.Array:
    return returns.gae(r, v[:, :-1], v[:, 1:], g, lambda_=LAMBDA)


def _v_trace(r: jax.Array, v: jax.Array, g: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    out = returns.v_trace(r, v[:, :-1], v[:, 1:], g, w)
    return out.targets, out.advantages


def _rlax_gae(rlax: ModuleType) -> Callable[..., Any]:
    def one(r: jax.Array, v: jax.Array, g: jax.Array, w: jax.Array) -> jax.Array:
        return rlax.truncated_generalized_advantage_estimation(r, g, LAMBDA, v)

    return jax.vmap(one)


def _rlax_v_trace(rlax: ModuleType) -> Callable[..., Any]:
    def one(r: jax.Array, v: jax.Array, g: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = rlax.vtrace_td_error_and_advantage(v[:-1], v[1:], r, g, w)
        return v[:-1] + out.errors, out.pg_advantage

    return jax.vmap(one)


def _scan(a: jax.Array, b: jax.Array) -> jax.Array:
    def step(x: jax.Array, ab: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x = ab[0] * x + ab[1]
        return x, x

    return jax.lax.scan(step, jnp.zeros_like(a[:, 0]), (a.T, b.T), reverse=True)[1].T


def _plain_gae(r: jax.Array, v: jax.Array, g: jax.Array, w: jax.Array) -> jax.Array:
    return _scan(g * LAMBDA, r + g * v[:, 1:] - v[:, :-1])


def _plain_v_trace(
    r: jax.Array, v: jax.Array, g: jax.Array, w: jax.Array
) -> tuple[jax.Array, jax.Array]:
    rho = jnp.minimum(1.0, w)
    errors = _scan(g * rho, rho * (r + g * v[:, 1:] - v[:, :-1]))
    targets = v[:, :-1] + errors
    following = jnp.concatenate([targets[:, 1:], v[:, -1:]], 1)
    return targets, rho * (r + g * following - v[:, :-1])


if __name__ == "__main__":
    sys.exit(main("returns", __doc__, rows, None))
