"""Shampoo, and SOAP: Adam in Shampoo's eigenbasis.

Both collect `L = Σ G Gᵀ` and `R = Σ GᵀG` of each matrix. Without collecting, Shampoo's step
`(GGᵀ)^(-1/4) G (GᵀG)^(-1/4)` is the polar factor, Muon's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from pgjax import _checks
from pgjax.optim.matrix import (
    Specs,
    canonical_shape,
    from_canonical,
    map_named,
    to_canonical,
)
from pgjax.optim.roles import specs_by_path


class ShampooState(NamedTuple):
    """By leaf: `left` `[b, m, m]` and `right` `[b, n, n]`, float32."""

    left: Any
    right: Any


class SoapState(NamedTuple):
    """Steps so far; by leaf the two moments, second ones in the basis, statistics and bases.

    A side longer than the limit has statistics and a basis of zero width: it is not turned.
    """

    step: Int[Array, ""]
    mu: Any
    nu: Any
    left: Any
    right: Any
    left_basis: Any
    right_basis: Any


def _root(a: Array, power: float, eps: float) -> Array:
    values, vectors = jnp.linalg.eigh(a)
    scaled = jnp.maximum(values, 0.0) + eps
    return (vectors * scaled[..., None, :] ** power) @ jnp.swapaxes(vectors, -1, -2)


def scale_by_shampoo(
    *, beta: Any | None = None, eps: float = 1e-6, specs: Specs | None = None
) -> optax.GradientTransformation:
    """`(L + ε)^(-1/4) G (R + ε)^(-1/4)`, with `L += G Gᵀ`, `R += GᵀG` or averages of them.

    Args:
      beta: None: sums, as first published. A number in [0, 1): averages, 0 keeping only the
        present gradient, where the step is the polar factor.
      eps: added to eigenvalues.
      specs: axes of each leaf's matrix; None: `default_specs`.

    Raises:
      ValueError: β outside [0, 1), eps not above 0; at `init`, leaves that are no matrices.

    Source: Gupta, Koren and Singer, Shampoo, 2018, arXiv 1802.09568.
    """
    if beta is not None:
        _checks.in_range("beta", beta, 0, 1, high_open=True)
    _checks.in_range("eps", eps, 0, low_open=True)

    def init(params: Any) -> ShampooState:
        chosen = specs_by_path(specs, params)

        def zeros(path: str, leaf: Array) -> tuple[Array, Array]:
            b, m, n = canonical_shape(path, leaf, chosen[path])
            return jnp.zeros((b, m, m)), jnp.zeros((b, n, n))

        return ShampooState(*map_named(zeros, 2, params))

    def update(updates: Any, state: ShampooState, params: Any = None) -> tuple[Any, ShampooState]:
        del params
        chosen = specs_by_path(specs, updates)
        keep, take = (1.0, 1.0) if beta is None else (beta, 1 - beta)

        def one(path: str, g: Array, left: Array, right: Array) -> tuple[Array, Array, Array]:
            x = to_canonical(g, chosen[path], name=path).astype(left.dtype)
            turned = jnp.swapaxes(x, -1, -2)
            left, right = keep * left + take * x @ turned, keep * right + take * turned @ x
            step = _root(left, -0.25, eps) @ x @ _root(right, -0.25, eps)
            return from_canonical(step, chosen[path], g.shape).astype(g.dtype), left, right

        steps, left, right = map_named(one, 3, updates, state.left, state.right)
        return steps, ShampooState(left, right)

    return optax.GradientTransformation(init, update)


def scale_by_soap(
    *,
    b1: Any = 0.95,
    b2: Any = 0.95,
    eps: float = 1e-8,
    every: int = 10,
    limit: int = 10_000,
    specs: Specs | None = None,
) -> optax.GradientTransformation:
    """Adam on `Q_Lᵀ G Q_R`, turned back; the bases are L's and R's eigenvectors.

    The first step only builds the bases and is zero. They are refreshed by one power step and a QR
    decomposition, columns sorted by their present eigenvalues, second moments with them.

    Args:
      b1, b2: of the moments; b2 also of L and R.
      every: static, steps between refreshes.
      limit: static; longer sides are not turned.
      specs: axes of each leaf's matrix; None: `default_specs`.

    Raises:
      ValueError: decays outside [0, 1), `every` or `limit` below 1; at `init`, leaves that are no
        matrices.

    Source: Vyas et al., SOAP, 2024, arXiv 2409.11321.
    """
    for name, value in {"b1": b1, "b2": b2}.items():
        _checks.in_range(name, value, 0, 1, high_open=True)
    for name, value in {"every": every, "limit": limit}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")

    def init(params: Any) -> SoapState:
        chosen = specs_by_path(specs, params)

        def zeros(path: str, leaf: Array) -> tuple[Array, ...]:
            b, m, n = canonical_shape(path, leaf, chosen[path])
            sides = [jnp.zeros((b, s, s) if s <= limit else (b, 0, 0)) for s in (m, n)]
            return jnp.zeros((b, m, n)), jnp.zeros((b, m, n)), *sides, *sides

        return SoapState(jnp.zeros((), jnp.int32), *map_named(zeros, 6, params))

    def update(updates: Any, state: SoapState, params: Any = None) -> tuple[Any, SoapState]:
        del params
        chosen = specs_by_path(specs, updates)
        count = state.step
        first = count == 0
        t = jnp.maximum(count, 1).astype(jnp.float32)

        def one(path: str, g: Array, mu: Array, nu: Array, *sides: Array) -> tuple[Array, ...]:
            x = to_canonical(g, chosen[path], name=path).astype(mu.dtype)
            bases = sides[2:]
            moved = _turn(x, *bases)
            new_mu = jnp.where(first, mu, b1 * mu + (1 - b1) * x)
            new_nu = jnp.where(first, nu, b2 * nu + (1 - b2) * moved**2)
            here = _turn(new_mu / (1 - b1**t), *bases)
            step = _turn(here / (jnp.sqrt(new_nu / (1 - b2**t)) + eps), *bases, back=True)
            step = jnp.where(first, 0.0, step)
            grams = [x @ jnp.swapaxes(x, -1, -2), jnp.swapaxes(x, -1, -2) @ x]
            which = jnp.where(first, 0, jnp.where(count % every == 0, 1, 2))
            stats, turned = [], []
            for axis, gram in enumerate(grams):
                stat, basis = sides[axis], bases[axis]
                if stat.shape[-1]:
                    stat = b2 * stat + (1 - b2) * gram
                    basis, new_nu = _next_basis(which, stat, basis, new_nu, axis + 1)
                stats.append(stat)
                turned.append(basis)
            out = from_canonical(step, chosen[path], g.shape).astype(g.dtype)
            return out, new_mu, new_nu, *stats, *turned

        steps, *rest = map_named(one, 7, updates, *state[1:])
        return steps, SoapState(optax.safe_increment(count), *rest)

    return optax.GradientTransformation(init, update)


def _turn(x: Array, left: Array, right: Array, *, back: bool = False) -> Array:
    if left.shape[-1]:
        x = (left if back else jnp.swapaxes(left, -1, -2)) @ x
    if right.shape[-1]:
        x = x @ (jnp.swapaxes(right, -1, -2) if back else right)
    return x


def _next_basis(
    which: Array, stat: Array, basis: Array, nu: Array, axis: int
) -> tuple[Array, Array]:
    """The basis, and second moments in its order: 0 begun anew, 1 refreshed, 2 as they were."""

    def begun() -> tuple[Array, Array]:
        return jnp.linalg.eigh(stat)[1][..., ::-1], nu

    def refreshed() -> tuple[Array, Array]:
        moved = stat @ basis
        order = jnp.argsort(-jnp.sum(basis * moved, -2), axis=-1)
        q, _ = jnp.linalg.qr(jnp.take_along_axis(moved, order[:, None, :], -1))
        index = order[:, :, None] if axis == 1 else order[:, None, :]
        return q, jnp.take_along_axis(nu, index, axis)

    return jax.lax.switch(which, [begun, refreshed, lambda: (basis, nu)])
