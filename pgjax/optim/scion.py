"""Scion: each layer's step is the extreme point of its own norm's ball.

M ← (1 - a) M + a G;   W ← (1 - lr) W - lr · scale · lmo(M)     (constrained to the ball)
                       W ←          W - lr · scale · lmo(M)     (unconstrained)
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from pgjax import _checks
from pgjax.optim import oracles
from pgjax.optim.combine import matrix_transform
from pgjax.optim.layout import Layout
from pgjax.optim.matrix import Specs, frobenius_norm
from pgjax.optim.momentum import momentum
from pgjax.optim.oracles import Oracle

NORMS = ("spectral", "spectral_max", "columns", "columns_normalized", "rows", "sign", "bias")


def scion_lmo(norm: str, *, oracle: Oracle | None = None, eps: float = 1e-8) -> Oracle:
    """The (uphill) extreme point of a layer's unit ball for matrices of m outputs, n inputs.

    `spectral`: polar · √(m/n). `spectral_max`: polar · max(1, √(m/n)), for input layers.
    `columns`: columns of length √m, for one-hot inputs; `columns_normalized`: over n as well.
    `rows`: rows of length 1/√n. `sign`: signs over n. `bias`: `g / rms(g)` of a whole leaf, given
    as a matrix of one column.

    Args:
      oracle: of the spectral norms; None: `oracles.polar("ns")`.

    Raises:
      ValueError: another norm.

    Source: Pethick et al., Training deep learning models with norm-constrained LMOs, 2025, arXiv
    2502.07529.
    """
    _checks.one_of("norm", norm, NORMS)
    spectral = oracles.polar("ns") if oracle is None else oracle

    def direction(w: Float[Array, "*b m n"]) -> Float[Array, "*b m n"]:
        m, n = w.shape[-2:]
        if norm == "spectral":
            return spectral(w) * (m / n) ** 0.5
        if norm == "spectral_max":
            return spectral(w) * max(1.0, (m / n) ** 0.5)
        if norm == "columns":  # eps is added to the column's root mean square
            return oracles.columns(eps=eps * m**0.5)(w) * m**0.5
        if norm == "columns_normalized":
            return oracles.columns(eps=eps * m**0.5)(w) * (m**0.5 / n)
        if norm == "rows":
            return oracles.rows(eps=eps / n**0.5)(w) / n**0.5
        if norm == "sign":
            return jnp.sign(w) / n
        rms = frobenius_norm(w) / (m * n) ** 0.5
        return (w / (rms + eps)).astype(w.dtype)

    return Oracle(direction)


def scion(
    learning_rate: Any,
    norm: str = "spectral",
    *,
    scale: float = 1.0,
    averaging: Any = 0.1,
    constrained: bool = True,
    oracle: Oracle | None = None,
    specs: Specs | None = None,
    layout: Layout | None = None,
) -> optax.GradientTransformation:
    """Scion for leaves of one norm; `by_role` gives each layer its own.

    Args:
      learning_rate: in (0, 1] where constrained: the weight of the new extreme point.
      norm: one of `NORMS`.
      scale: radius of the ball.
      averaging: a, one minus the usual momentum.
      constrained: whether W also shrinks by `1 - lr`, which keeps it inside the ball.

    Raises:
      ValueError: another norm, a scale not above 0, `averaging` outside (0, 1].
    """
    _checks.in_range("scale", scale, 0, low_open=True)
    _checks.in_range("averaging", averaging, 0, 1, low_open=True)
    lmo = scion_lmo(norm, oracle=oracle)
    return optax.chain(
        matrix_transform(lmo, momentum=momentum(1 - averaging, "ema"), specs=specs, layout=layout),
        optax.scale(scale),
        optax.add_decayed_weights(1.0) if constrained else optax.identity(),
        optax.scale_by_learning_rate(learning_rate),
    )
