"""Dion and Dion2: orthogonalised momentum at a fraction of the cost, the rest fed back.

Dion keeps, for each matrix, r directions Q of its inputs, and improves them by one power step a
step; Dion2 orthogonalises only the largest rows. What was not applied stays in the momentum.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

from pgjax import _checks
from pgjax.optim import oracles
from pgjax.optim.matrix import (
    MatrixSpec,
    Specs,
    canonical_shape,
    from_canonical,
    map_named,
    shape_factor,
    to_canonical,
)
from pgjax.optim.oracles import Oracle
from pgjax.optim.roles import specs_by_path


class DionState(NamedTuple):
    """Momenta like the parameters, and of each leaf its matrices' input directions `[b, n, r]`."""

    momentum: Any
    basis: Any


class Dion2State(NamedTuple):
    """Momenta like the parameters."""

    momentum: Any


def scale_by_dion(
    key: PRNGKeyArray,
    *,
    rank: int | None = None,
    mu: Any = 0.95,
    eps: float = 1e-8,
    specs: Specs | None = None,
) -> optax.GradientTransformation:
    """`√(m/n) P Qᵀ` with

        M ← M + G;  P = qr(M Q);  R = Mᵀ P;  M ← M - (1 - μ) P Rᵀ;  Q ← R / ‖columns‖.

    Args:
      key: of the first, Gaussian Q.
      rank: r, static; None: as many as the shorter side, then with a settled Q it is Muon's step.
      mu: in [0, 1); what of the applied part stays in the momentum.
      specs: axes of each leaf's matrix; None: `default_specs`.

    Raises:
      ValueError: a rank below 1, μ outside [0, 1); at `init`, leaves that are no matrices.

    Source: Ahn et al., Dion, 2025, arXiv 2504.05295.
    """
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank: expected an integer of at least 1, got {rank!r}")
    _checks.in_range("mu", mu, 0, 1, high_open=True)

    def init(params: Any) -> DionState:
        chosen = specs_by_path(specs, params)
        keys = iter(jax.random.split(key, max(len(jax.tree.leaves(params)), 1)))

        def basis(path: str, leaf: Array) -> tuple[Array]:
            b, m, n = canonical_shape(path, leaf, chosen[path])
            r = min(m, n) if rank is None else min(rank, m, n)
            dtype = jnp.promote_types(leaf.dtype, jnp.float32)
            return (jax.random.normal(next(keys), (b, n, r), dtype),)

        return DionState(jax.tree.map(jnp.zeros_like, params), *map_named(basis, 1, params))

    def update(updates: Any, state: DionState, params: Any = None) -> tuple[Any, DionState]:
        del params
        chosen = specs_by_path(specs, updates)

        def one(path: str, g: Array, m: Array, q: Array) -> tuple[Array, Array, Array]:
            spec = chosen[path]
            total = to_canonical(m + g, spec, name=path).astype(q.dtype)
            p, _ = jnp.linalg.qr(total @ q)
            r = jnp.swapaxes(total, -1, -2) @ p
            left = total - (1 - mu) * p @ jnp.swapaxes(r, -1, -2)
            length = jnp.linalg.norm(r, axis=-2, keepdims=True)
            q = r / (length + eps)
            step = (
                shape_factor(total.shape[1], total.shape[2], "spectral")
                * p
                @ jnp.swapaxes(q, -1, -2)
            )
            return (
                from_canonical(step, spec, g.shape).astype(g.dtype),
                from_canonical(left, spec, g.shape).astype(m.dtype),
                q,
            )

        steps, momenta, bases = map_named(one, 3, updates, state.momentum, state.basis)
        return steps, DionState(momenta, bases)

    return optax.GradientTransformation(init, update)


def scale_by_dion2(
    *,
    fraction: float = 0.25,
    decay: Any = 0.95,
    oracle: Oracle | None = None,
    specs: Specs | None = None,
) -> optax.GradientTransformation:
    """`√(m/n) polar` of the momentum's largest rows (columns where those are fewer), others rest.

    `M ← M + G`; the rows of the largest norms, a fraction of them, are orthogonalised and applied,
    and exactly they are multiplied by `decay` afterwards.

    Args:
      fraction: in (0, 1], static; rounded up to whole rows.
      decay: in [0, 1].
      oracle: None: `oracles.polar("polar_express", steps=5)`.

    Raises:
      ValueError: a fraction or decay out of range; at `init`, leaves that are no matrices.

    Source: Dion2, released in microsoft/dion.
    """
    _checks.in_range("fraction", fraction, 0, 1, low_open=True)
    _checks.in_range("decay", decay, 0, 1)
    direction = oracles.polar("polar_express", steps=5) if oracle is None else oracle

    def init(params: Any) -> Dion2State:
        specs_by_path(specs, params)
        return Dion2State(jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: Dion2State, params: Any = None) -> tuple[Any, Dion2State]:
        del params
        chosen = specs_by_path(specs, updates)

        def one(path: str, g: Array, m: Array) -> tuple[Array, Array]:
            spec: MatrixSpec = chosen[path]
            total = to_canonical(m + g, spec, name=path)
            rows, columns = total.shape[1:]
            flips = rows > columns
            wide = jnp.swapaxes(total, -1, -2) if flips else total
            count = math.ceil(fraction * wide.shape[-2])
            size = jnp.sum(jnp.square(wide.astype(jnp.float32)), axis=-1)
            index = jax.lax.top_k(size, count)[1][..., None]
            step = direction(jnp.take_along_axis(wide, index, -2))
            each = jax.vmap(lambda w, i, s: jnp.zeros_like(w).at[i].set(s))
            spread = each(wide, index[..., 0], step)
            kept = jax.vmap(lambda w, i: w.at[i].multiply(decay))(wide, index[..., 0])
            if flips:
                spread, kept = jnp.swapaxes(spread, -1, -2), jnp.swapaxes(kept, -1, -2)
            spread = shape_factor(rows, columns, "spectral") * spread
            return (
                from_canonical(spread, spec, g.shape).astype(g.dtype),
                from_canonical(kept, spec, g.shape).astype(m.dtype),
            )

        steps, momenta = map_named(one, 2, updates, state.momentum)
        return steps, Dion2State(momenta)

    return optax.GradientTransformation(init, update)
