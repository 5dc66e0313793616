"""PolarGrad: steepest descent under the spectral norm, and its relatives with momentum.

    PolarGrad                   X ← X - γ ‖G‖_* polar(G)
    PolarGradM, momentum first  M ← β M + (1 - β) G;  X ← X - γ ‖M‖_* polar(M)
    PolarGradM, polar first     U = polar(G);  M ← β M + (1 - β) U;  X ← X - γ ‖G‖_* M
    PolarMuon                   M as first;  N = (1 - β) G + β M;  X ← X - γ ‖N‖_* polar(N)
    PolarHB                     X ← X - γ ‖G‖_* polar(G) + β (X - X_before)

The nuclear norm makes steps shrink with the gradient. Muon, the same without it, stalls at a
constant rate. `alpha` is its power, so that 0 is Muon and 1 is PolarGrad.
"""

from __future__ import annotations

from typing import Any

import optax

from pgjax import _checks
from pgjax.optim import oracles
from pgjax.optim.combine import matrix_transform
from pgjax.optim.layout import Layout
from pgjax.optim.matrix import Specs
from pgjax.optim.momentum import add_displacement, momentum
from pgjax.optim.oracles import Oracle
from pgjax.optim.routing import with_adam

ORDERS = ("momentum_first", "polar_first", "muon")


def scale_by_polar(
    *,
    beta: Any = 0.0,
    order: str = "momentum_first",
    alpha: float = 1.0,
    oracle: Oracle | None = None,
    specs: Specs | None = None,
    layout: Layout | None = None,
    eps: float = 1e-8,
    mu_dtype: Any = None,
) -> optax.GradientTransformation:
    """`max(<W, U>, eps)^alpha U` in one of the orders above, every leaf a matrix.

    Args:
      beta: in [0, 1); 0 makes all orders PolarGrad.
      order: static: "momentum_first", "polar_first", or "muon" for PolarMuon.
      alpha: static power of the nuclear norm.
      oracle: None: `oracles.polar("qdwh")` run to convergence. Step sizes published with two of
        its steps belong to `oracles.polar("qdwh", steps=2)`, which is not the polar factor.
      eps: the least nuclear norm.

    Raises:
      ValueError: another order, β outside [0, 1), a negative alpha.

    Source: Lau, Long and Su, PolarGrad, 2025, arXiv 2505.21799. PolarMuon is as its text has it.
    """
    _checks.one_of("order", order, ORDERS)
    _checks.in_range("beta", beta, 0, 1, high_open=True)
    none = isinstance(beta, int | float) and beta == 0
    return matrix_transform(
        oracles.polar("qdwh") if oracle is None else oracle,
        alpha=alpha,
        momentum=None
        if none
        else momentum(beta, "ema_nesterov" if order == "muon" else "ema", dtype=mu_dtype),
        order="oracle_first" if order == "polar_first" else "momentum_first",
        specs=specs,
        layout=layout,
        eps=eps,
    )


def polar_grad(
    learning_rate: Any = 0.02,
    *,
    beta: Any = 0.95,
    order: str = "momentum_first",
    weight_decay: Any = 0.0,
    alpha: float = 1.0,
    oracle: Oracle | None = None,
    specs: Specs | None = None,
    layout: Layout | None = None,
) -> optax.GradientTransformation:
    """PolarGrad for trees whose leaves all are matrices: `X ← (1 - γ w) X - γ · scale_by_polar`.

    For models with other leaves: `polar_grad_with_adam`. `beta=0` is PolarGrad itself; "muon" as
    order is PolarMuon.
    """
    return optax.chain(
        scale_by_polar(
            beta=beta, order=order, alpha=alpha, oracle=oracle, specs=specs, layout=layout
        ),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def polar_heavy_ball(
    learning_rate: Any = 0.02,
    *,
    beta: Any = 0.9,
    weight_decay: Any = 0.0,
    oracle: Oracle | None = None,
    specs: Specs | None = None,
    layout: Layout | None = None,
) -> optax.GradientTransformation:
    """PolarHB: PolarGrad and Polyak's momentum in the iterates, whatever the rate does."""
    return optax.chain(
        scale_by_polar(oracle=oracle, specs=specs, layout=layout),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
        add_displacement(beta),
    )


def polar_grad_with_adam(
    learning_rate: Any = 0.02,
    *,
    adam: optax.GradientTransformation | None = None,
    adam_learning_rate: Any = 1e-3,
    oracle: Oracle | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """PolarGrad on a model's matrices, AdamW (0.9, 0.95) on its other leaves; see `routing`.

    Args:
      oracle: None: `oracles.polar("polar_express")`, since exact factors cost too much in a model.
      options: of `polar_grad`.
    """
    chosen = oracles.polar("polar_express") if oracle is None else oracle
    rest = adam or optax.adamw(adam_learning_rate, b1=0.9, b2=0.95, weight_decay=0.0)
    return with_adam(polar_grad(learning_rate, oracle=chosen, **options), rest)
