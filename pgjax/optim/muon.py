"""Muon: momentum, orthogonalised."""

from __future__ import annotations

from typing import Any

import optax

from pgjax.optim import oracles
from pgjax.optim.combine import matrix_transform
from pgjax.optim.layout import Layout
from pgjax.optim.matrix import Specs
from pgjax.optim.momentum import momentum
from pgjax.optim.oracles import Oracle
from pgjax.optim.routing import with_adam

ScalarOrSchedule = Any


def scale_by_muon(
    *,
    beta: Any = 0.95,
    kind: str = "ema_nesterov",
    debias: bool = False,
    shape: str = "keller",
    oracle: Oracle | None = None,
    specs: Specs | None = None,
    layout: Layout | None = None,
    mu_dtype: Any = None,
) -> optax.GradientTransformation:
    """`√max(1, m/n) · polar(momentum(G))`, every leaf a matrix.

    Args:
      beta, kind, debias: of `momentum`. Keller Jordan's package averages; Moonshot's, with
        `kind="heavy_ball_nesterov"` and `shape="moonshot"`, sums; Optax's is `debias=True`.
      shape: one of `matrix.SHAPE_FACTORS`.
      oracle: None: `oracles.polar("ns")`, five of Keller's steps.
      specs: axes of each leaf's matrix; None: `default_specs`.
      layout: see `matrix_transform`.
      mu_dtype: of the momentum; None: the parameters'.

    Source: Jordan et al., Muon, 2024; Liu et al., Muon is scalable, 2025, arXiv 2502.16982.
    """
    return matrix_transform(
        oracles.polar("ns") if oracle is None else oracle,
        shape=shape,
        momentum=momentum(beta, kind, debias=debias, dtype=mu_dtype),
        specs=specs,
        layout=layout,
    )


def muon(
    learning_rate: ScalarOrSchedule = 0.02,
    *,
    beta: Any = 0.95,
    kind: str = "ema_nesterov",
    shape: str = "keller",
    weight_decay: Any = 0.0,
    oracle: Oracle | None = None,
    specs: Specs | None = None,
    layout: Layout | None = None,
    mu_dtype: Any = None,
    adam: optax.GradientTransformation | None = None,
    adam_learning_rate: ScalarOrSchedule = 3e-4,
    adam_weight_decay: Any = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Muon on matrices, AdamW on embeddings, heads, routers, norms, biases and adapters.

    `W ← (1 - lr·wd) W - lr · c(m, n) · polar(momentum(G))`; see `scale_by_muon`, and `routing` for
    who gets what. With `shape="moonshot"` steps are as large as AdamW's, and one learning rate
    serves both.

    Args:
      learning_rate: Muon's, a number or a schedule; in units of the spectral norm for "keller".
      adam: for everything else; None: AdamW (0.9, 0.95, 1e-10) at `adam_learning_rate`.

    Raises:
      ValueError: at `init`, a leaf that fits no role, or whose matrix is unknown; it is named.
    """
    matrices = optax.chain(
        scale_by_muon(
            beta=beta,
            kind=kind,
            shape=shape,
            oracle=oracle,
            specs=specs,
            layout=layout,
            mu_dtype=mu_dtype,
        ),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    rest = adam or optax.adamw(
        adam_learning_rate, b1=0.9, b2=0.95, eps=1e-10, weight_decay=adam_weight_decay
    )
    return with_adam(matrices, rest)
