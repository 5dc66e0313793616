"""The optimizers that experiments know by name, one learning rate each."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

import pgjax as pg

OptimizerName = Literal[
    "adam", "adamw", "sgd", "lion", "muon", "moonshot_muon", "polar_grad", "symmetry", "soap"
]


def make(
    name: OptimizerName,
    rate: optax.Schedule,
    *,
    adam_rate: optax.Schedule | None = None,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    shardings: Any = None,
) -> optax.GradientTransformation:
    """The named optimizer; matrix optimizers leave what is no matrix to AdamW.

    Args:
      rate: the learning rate over steps. For "symmetry" it is the matrices', to which the other
        layers' stand as published.
      adam_rate: AdamW's beside a matrix optimizer, for "symmetry" that of vectors; None: `rate`,
        and for "symmetry" as published.
      betas: of Adam and AdamW.
      shardings: a tree of the trainable parameters' `NamedSharding`s, or of the parameters
        themselves; matrix optimizers deal whole matrices out over a mesh of several devices.
    """
    layout = None if shardings is None else pg.optim.layout_of(shardings)
    b1, b2 = betas
    if adam_rate is not None and name in ("adam", "adamw", "sgd", "lion"):
        raise ValueError(f"adam_learning_rate: {name!r} leaves nothing to another optimizer")

    def adamw() -> optax.GradientTransformation:
        return optax.adamw(rate, b1=b1, b2=b2, weight_decay=weight_decay)

    def others() -> optax.GradientTransformation:
        own = rate if adam_rate is None else adam_rate
        return optax.adamw(own, b1=b1, b2=b2, weight_decay=weight_decay)

    def muon(**options: Any) -> optax.GradientTransformation:
        return pg.optim.muon(
            rate, weight_decay=weight_decay, layout=layout, adam=others(), **options
        )

    def symmetry() -> optax.GradientTransformation:
        published = pg.optim.Rates()
        names = ("embedding", "head", "router", "matrices", "vectors")
        shares = {n: getattr(published, n) / published.matrices for n in names}
        scaled = {n: _times(rate, share) for n, share in shares.items()}
        if adam_rate is not None:
            scaled["vectors"] = adam_rate
        return pg.optim.symmetry_stack(
            pg.optim.Rates(**scaled), weight_decay=weight_decay, layout=layout
        )

    def soap() -> optax.GradientTransformation:
        matrices = optax.chain(
            pg.optim.scale_by_soap(),
            optax.add_decayed_weights(weight_decay),
            optax.scale_by_learning_rate(rate),
        )
        return pg.optim.with_adam(matrices, others())

    return {
        "adam": lambda: optax.adam(rate, b1=b1, b2=b2),
        "adamw": adamw,
        "sgd": lambda: optax.sgd(rate, momentum=0.9),
        "lion": lambda: optax.lion(rate, weight_decay=weight_decay),
        "muon": muon,
        "moonshot_muon": lambda: muon(kind="heavy_ball_nesterov", shape="moonshot"),
        "polar_grad": lambda: pg.optim.polar_grad_with_adam(
            rate, weight_decay=weight_decay, layout=layout, adam=others()
        ),
        "symmetry": symmetry,
        "soap": soap,
    }[name]()


def rising(peak: float, steps: int) -> optax.Schedule:
    """Linear to the peak, which step number `steps` is the first to have; then constant."""
    steps = max(steps, 1)
    return optax.linear_schedule(peak / steps, peak, steps)


def falling(peak: Any, steps: int) -> optax.Schedule:
    """Constant, then linear to zero over the last 40% of the steps; the peak may be traced."""
    start = 0.6 * steps
    return lambda count: peak * jnp.clip((steps - count) / (steps - start), 0.0, 1.0)


def _times(rate: optax.Schedule, factor: float) -> optax.Schedule:
    return lambda count: factor * rate(count)


def matrix_axes(params: Any) -> Any:
    """For Optax's Muon, the input and output axes of each matrix; None where Adam is to be used.

    The roles that `optim.with_adam` gives to a matrix optimizer, by the same names.
    """
    roles = pg.optim.default_roles(params)
    labels = iter(roles.values())

    def of(x: Any) -> Any:
        role = next(labels)
        kind = role.name.partition("/")[0]
        if role.spec is None or kind not in ("attention", "mlp", "experts", "dense"):
            return None
        axes = role.spec.resolved(x.shape, role.name)
        return optax.contrib.MuonDimensionNumbers(axes.into, axes.out)

    return jax.tree.map(of, params)
