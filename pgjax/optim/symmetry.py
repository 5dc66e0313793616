"""Updates that commute with the symmetries of the weight they are for.

A hidden matrix may be turned on both sides, an embedding's rows may be permuted and its columns
turned, a router's experts may be permuted and all its logits shifted, a gated MLP's neurons may be
permuted: the update turns, permutes and ignores shifts alike. With `C` subtracting the mean row,
`N` dividing rows by their lengths, `P` the polar factor, and M an average of gradients:

    rows             N(M)                     embeddings
    centred rows     C N C(M)                 heads
    left spectral    ν^a (MMᵀ + ε)^(-1/2) M   routers, centred before and after
    hybrid           q = N(M), u = P(q), <q, u>^a u; or N(P(M))
    per-head Muon    attention

C is there for what a softmax reads: one vector added to all of its rows changes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from pgjax import _checks
from pgjax.optim import oracles
from pgjax.optim.coefficients import polar_express
from pgjax.optim.combine import matrix_transform
from pgjax.optim.layout import Layout
from pgjax.optim.matrix import MatrixSpec, center_rows, dual_scale, row_normalize
from pgjax.optim.momentum import momentum
from pgjax.optim.muon import scale_by_muon
from pgjax.optim.oracles import Oracle
from pgjax.optim.polar import polar
from pgjax.optim.roles import Role, default_roles, default_specs, per_head_specs
from pgjax.optim.routing import by_role

HYBRID_ORDERS = ("row_then_polar", "polar_then_row")
ORIENTATIONS = ("row", "column", "interleaved_pair", "halves_pair")
TABLE_CHOICES = ("rows", "centred_rows", "hybrid", "centred_hybrid", "adam")
ROUTER_CHOICES = ("centred_left", "left", "centred_rows", "adam")
MLP_CHOICES = ("muon", "hybrid")
STEPS, SAFETY = 5, 1.05


def _polar(w: Array) -> Array:
    table = polar_express(steps=STEPS, safety=SAFETY)
    # The start of quintics with this safety is as much smaller.
    return polar(w / SAFETY, method="ns", coefficients=table, eps=1e-7)


def right_spectral(
    m: Float[Array, "*b m n"], *, a: float = 1.0, eps: float = 1e-8, center: bool = False
) -> Float[Array, "*b m n"]:
    """`max(ν, ε)^a M (MᵀM + ε I)^(-1/2)` with `ν = <M, U>`; centred before and after if asked."""
    return _spectral(m, oracles.right_spectral(eps=eps), a, eps, center)


def left_spectral(
    m: Float[Array, "*b m n"], *, a: float = 1.0, eps: float = 1e-8, center: bool = False
) -> Float[Array, "*b m n"]:
    """`max(ν, ε)^a (MMᵀ + ε I)^(-1/2) M`: the same update, from the Gram matrix of rows."""
    return _spectral(m, oracles.left_spectral(eps=eps), a, eps, center)


def _spectral(m: Array, oracle: Oracle, a: float, eps: float, center: bool) -> Array:
    w = center_rows(m) if center else m
    u = oracle(w)
    scaled = dual_scale(w, u, alpha=a, eps=eps)[..., None, None] * u
    return (center_rows(scaled) if center else scaled).astype(m.dtype)


def row_norm_update(
    m: Float[Array, "*b m n"], *, eps: float = 1e-8, center: bool = False
) -> Float[Array, "*b m n"]:
    """`N(M)`, or `C N C(M)`; a row of zeros stays zero where it is not centred."""
    if not center:
        return row_normalize(m, eps=eps)
    return center_rows(row_normalize(center_rows(m), eps=eps))


def hybrid_update(
    m: Float[Array, "*b m n"],
    *,
    order: str = "row_then_polar",
    center: bool = False,
    a: float = 1.0,
    eps: float = 1e-8,
) -> Float[Array, "*b m n"]:
    """Rows normalised and the polar factor taken, in either order.

    `row_then_polar`: `q = N(w)`, `u = P(q)`, `max(<q, u>, ε)^a u`, with `w = M` or `C(M)`; q and
    the result are centred again if asked. `polar_then_row`: `N(P(w))`, where a scale would cancel.

    Raises:
      ValueError: another order.
    """
    _checks.one_of("order", order, HYBRID_ORDERS)
    w = center_rows(m) if center else m
    if order == "polar_then_row":
        u = row_normalize(_polar(w), eps=eps)
        return center_rows(u) if center else u
    q = row_normalize(w, eps=eps)
    q = center_rows(q) if center else q
    u = _polar(q)
    u = (dual_scale(q, u, alpha=a, eps=eps)[..., None, None] * u).astype(m.dtype)
    return center_rows(u) if center else u


def orient(x: Float[Array, "*b p q"], kind: str) -> Float[Array, "*b m n"]:
    """A leaf as matrices with one row a neuron.

    `row`: as it is (gates as (neurons, inputs)). `column`: transposed (down projections).
    `interleaved_pair`: `[..., d, 2r]` whose columns alternate gate and up, as `[..., r, 2d]`.
    `halves_pair`: `[..., 2r, d]`, gates above ups, as `[..., r, 2d]`.

    Raises:
      ValueError: another kind; a pair's axis of odd length.
    """
    _checks.one_of("kind", kind, ORIENTATIONS)
    axis = {"interleaved_pair": -1, "halves_pair": -2}.get(kind)
    if axis is not None and x.shape[axis] % 2:
        raise ValueError(f"x: {kind} needs an even axis {axis}, got shape {x.shape}")
    if kind == "row":
        return x
    if kind == "column":
        return jnp.swapaxes(x, -1, -2)
    if kind == "interleaved_pair":
        return jnp.concatenate(
            [jnp.swapaxes(x[..., 0::2], -1, -2), jnp.swapaxes(x[..., 1::2], -1, -2)], -1
        )
    half = x.shape[-2] // 2
    return jnp.concatenate([x[..., :half, :], x[..., half:, :]], -1)


def unorient(y: Float[Array, "*b m n"], kind: str) -> Float[Array, "*b p q"]:
    """The inverse of `orient`."""
    _checks.one_of("kind", kind, ORIENTATIONS)
    if kind == "row":
        return y
    if kind == "column":
        return jnp.swapaxes(y, -1, -2)
    half = y.shape[-1] // 2
    gate, up = y[..., :half], y[..., half:]
    if kind == "halves_pair":
        return jnp.concatenate([gate, up], -2)
    both = jnp.stack([jnp.swapaxes(gate, -1, -2), jnp.swapaxes(up, -1, -2)], -1)
    return both.reshape(*both.shape[:-2], -1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """Learning rates by role, numbers or schedules; defaults as published for a dense 0.6B model.

    Attributes:
      embedding: 0.5 with "rows", 1.0 with "hybrid", 0.1 with "adam".
      head: 5e-3 with "centred_rows", 1e-2 with "centred_hybrid", 1e-3 with "adam".
      router, matrices, vectors: as named.
    """

    embedding: Any = 0.5
    head: Any = 5e-3
    router: Any = 7.5e-4
    matrices: Any = 2e-2
    vectors: Any = 5e-2


def tied_roles(tree: Any) -> Mapping[str, Role]:
    """`default_roles`, but an embedding without a head beside it is the head as well."""
    found = default_roles(tree)
    if any(role.name == "head" for role in found.values()):
        return found
    return {
        path: Role("head", role.spec) if role.name == "embedding" else role
        for path, role in found.items()
    }


def _columns_as_rows(tree: Any) -> dict[str, MatrixSpec]:
    """Specs in which a neuron is a row, of down projections too."""
    roles = default_roles(tree)
    return {
        path: MatrixSpec(spec.in_axes, spec.out_axes) if roles[path].name.endswith("down") else spec
        for path, spec in default_specs(tree).items()
    }


def symmetry_stack(
    rates: Rates | None = None,
    *,
    embedding: Literal["rows", "centred_rows", "hybrid", "centred_hybrid", "adam"] = "rows",
    head: Literal["rows", "centred_rows", "hybrid", "centred_hybrid", "adam"] = "centred_rows",
    router: Literal["centred_left", "left", "centred_rows", "adam"] = "centred_left",
    mlp: Literal["muon", "hybrid"] = "muon",
    beta: float = 0.95,
    a: float = 1.0,
    eps: float = 1e-8,
    weight_decay: float = 1e-3,
    layout: Layout | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Each layer of a model by the update that its symmetries call for.

    Attention is Muon head by head, with a heavy ball in Nesterov's form; everything else averages
    (β, no bias correction). An embedding that is the head too follows the head's rule.

    Args:
      rates: None: `Rates()`.
      embedding, head, router, mlp: static choices; "adam" is AdamW (0.9, 0.95) without decay.
      a: power of dual norms.
      weight_decay: of matrices and vectors; embedding, head and router have none.
      layout: see `matrix_transform`.

    Raises:
      ValueError: an unknown choice; at `init`, a leaf that fits no role, by name.

    Source: Lau and Su, 2026, arXiv 2605.18106. Scales are per expert; the released code sums them
    over a layer's experts, for which `matrix_transform` has `couple`.
    """
    _checks.one_of("embedding", embedding, TABLE_CHOICES)
    _checks.one_of("head", head, TABLE_CHOICES)
    _checks.one_of("router", router, ROUTER_CHOICES)
    _checks.one_of("mlp", mlp, MLP_CHOICES)
    _checks.in_range("eps", eps, 0, low_open=True)
    rates = Rates() if rates is None else rates

    def average() -> optax.GradientTransformation:
        return momentum(beta, "ema")

    def updates(choice: str, specs: Any = None) -> optax.GradientTransformation:
        center = choice.startswith("centred")
        if choice.endswith("rows"):
            oracle = Oracle(lambda w: row_norm_update(w, eps=eps, center=center))
        elif choice.endswith("hybrid"):
            oracle = Oracle(lambda w: hybrid_update(w, center=center, a=a, eps=eps))
        else:
            oracle = Oracle(lambda w: left_spectral(w, a=a, eps=eps, center=center))
        return matrix_transform(oracle, momentum=average(), specs=specs, layout=layout)

    def stepped(
        updates: optax.GradientTransformation, rate: Any, decay: float = 0.0
    ) -> optax.GradientTransformation:
        parts = [updates, optax.add_decayed_weights(decay), optax.scale_by_learning_rate(rate)]
        return optax.chain(*parts)

    def table(choice: str, rate: Any) -> optax.GradientTransformation:
        if choice == "adam":
            return optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.0)
        return stepped(updates(choice), rate)

    muon = scale_by_muon(
        beta=beta, kind="heavy_ball_nesterov", oracle=Oracle(_polar, True), layout=layout
    )
    heads = scale_by_muon(
        beta=beta,
        kind="heavy_ball_nesterov",
        oracle=Oracle(_polar, True),
        specs=per_head_specs,
        layout=layout,
    )
    neurons = muon if mlp == "muon" else updates("hybrid", _columns_as_rows)
    rest = optax.adamw(rates.vectors, b1=0.9, b2=0.95, weight_decay=weight_decay)
    return by_role(
        {
            "embedding*": table(embedding, rates.embedding),
            "head": table(head, rates.head),
            "router": table(router, rates.router),
            "attention/*": stepped(heads, rates.matrices, weight_decay),
            "mlp/*": stepped(neurons, rates.matrices, weight_decay),
            "experts/*": stepped(neurons, rates.matrices, weight_decay),
            "dense": stepped(muon, rates.matrices, weight_decay),
            "conv": stepped(muon, rates.matrices, weight_decay),
            "*": rest,
        },
        roles=tied_roles,
    )
