"""Column-by-column quantisation of a linear layer: GPTQ, GPTAQ and FOEM as one sweep.

The layer is `y = W x` with W `[out, in]` and calibration inputs X `[n, in]`. The sweep rounds one
column and moves the columns to its right so that the outputs change as little as they can, by

    H = (2/n) XᵀX,   U upper with UᵀU = H⁻¹,   column i's compensation  -e Uᵢ,  e = (wᵢ - qᵢ)/Uᵢᵢ.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from pgjax import _checks
from pgjax.quantize import core
from pgjax.quantize.hessian import (
    check_factor,
    check_hessian,
    damped,
    factor,
    quadratic_error,
    wide,
)
from pgjax.quantize.sweep import SHIFTS, VARIANTS, sweep

_HIGHEST = jax.lax.Precision.HIGHEST


class QuantResult(NamedTuple):
    """A quantised matrix.

    Attributes:
      q: `[out, in]`, what the codes stand for: `scale · (codes - zero)` at each column's group.
      codes: `[out, in]`.
      scale, zero: `[out, groups]`.
      g_idx: the group of each column.
      latent: `[out, in]`, each column as it was when it was rounded.
      error: `½ Σ_i (wᵢ - qᵢ)² / Uᵢᵢ²`, which for GPTQ is `½ tr (W - Q) H (W - Q)ᵀ`.
    """

    q: Float[Array, "r c"]
    codes: UInt8[Array, "r c"]
    scale: Float[Array, "r k"]
    zero: Float[Array, "r k"]
    g_idx: Int[Array, " c"]
    latent: Float[Array, "r c"]
    error: Float[Array, ""]


def rtn(
    w: Float[Array, "r c"],
    h: Float[Array, "c c"] | None = None,
    *,
    bits: int,
    group: int | None = None,
    symmetric: bool = False,
    scale_dtype: Any = jnp.float32,
) -> QuantResult:
    """Plain rounding to the nearest grid point.

    Args:
      w: the layer.
      h: `input_hessian`, of which `error` is made; None: the identity. It changes nothing else.
      bits, group, symmetric, scale_dtype: as `gptq`.

    Raises:
      ValueError: as `gptq`.
    """
    _check_weight(w)
    columns = w.shape[1]
    core.check_bits(bits)
    size = core.check_group(group, columns)
    if h is not None:
        check_hessian(h, columns)
    return _nearest(
        w, h, bits=bits, group=size, symmetric=symmetric, scale_dtype=jnp.dtype(scale_dtype)
    )


def gptq(
    w: Float[Array, "r c"],
    h: Float[Array, "c c"],
    *,
    bits: int,
    group: int | None = 128,
    block: int = 128,
    damp: float = 0.01,
    act_order: bool = False,
    symmetric: bool = False,
    scale_dtype: Any = jnp.float32,
    grid: tuple[Array, Array] | None = None,
) -> QuantResult:
    """Rounds column by column; each column's error is made up for by those to its right.

        e = (wᵢ - qᵢ) / Uᵢᵢ,   W[:, i:] -= e U[i, i:]

    Args:
      w: the layer.
      h: `input_hessian(x)`, not damped. Columns with `Hⱼⱼ = 0` never see an input: they get
        `Hⱼⱼ = 1` and weight 0.
      bits: static, 2 to 8.
      group: static; columns that share a step and zero point, taken from the columns as they are
        when the first of them is reached. None: one for a row, from the given weights.
      block: static; columns after which the rest is updated, at once. It changes the time, not
        the result. It is a multiple of the group or divides it.
      damp: times `mean(diag H)` is added to the diagonal.
      act_order: static; columns with the largest `Hⱼⱼ` go first, and groups are of neighbours in
        that order; the result is in the given order.
      symmetric, scale_dtype: of the grid, see `uniform_grid`.
      grid: (scale, zero), `[out, groups]` each, to use instead of finding it.

    Raises:
      ValueError: wrong ranks or dtypes, numbers that are not finite, h not square, not symmetric,
        of another size, not positive definite after damping; an option out of range.

    Source: Frantar et al., "GPTQ", 2022, arXiv:2210.17323.
    """
    options = _Options(bits, group, block, damp, act_order, symmetric, scale_dtype, grid)
    return _run(w, h, options)


def gptaq(
    w: Float[Array, "r c"],
    h: Float[Array, "c c"],
    dxx: Float[Array, "c c"],
    *,
    bits: int,
    group: int | None = 128,
    block: int = 128,
    damp: float = 0.01,
    alpha: float | Float[Array, ""] = 0.25,
    act_order: bool = False,
    symmetric: bool = False,
    scale_dtype: Any = jnp.float32,
    grid: tuple[Array, Array] | None = None,
) -> QuantResult:
    """`gptq` that also steers the outputs back to those of the network before any quantisation.

        P = alpha · triu(D Uᵀ, 1) U,   additionally  W[:, i:] += wᵢ P[i, i:]

    Args:
      w: the layer.
      h: `input_hessian` of the inputs behind the quantised layers.
      dxx: D of `input_mismatch`.
      alpha: at least 0; 0 is `gptq`, 1 the whole of the paper's correction.
      bits, group, block, damp, act_order, symmetric, scale_dtype, grid: as `gptq`.

    Raises:
      ValueError: as `gptq`, a dxx of another shape, a negative alpha.

    Source: Li et al., "GPTAQ", 2025, arXiv:2504.02692. wᵢ is the column before it was rounded also
    where whole blocks are updated; the released code has the rounded one there.
    """
    options = _Options(bits, group, block, damp, act_order, symmetric, scale_dtype, grid)
    return _run(w, h, options, dxx=dxx, alpha=alpha)


def foem(
    w: Float[Array, "r c"],
    h: Float[Array, "c c"],
    dxx: Float[Array, "c c"] | None = None,
    *,
    bits: int,
    group: int | None = 128,
    block: int = 128,
    damp: float = 0.01,
    alpha: float | Float[Array, ""] = 0.0,
    beta: float | Float[Array, ""] = 0.2,
    shift: str = "next",
    variant: str = "v2",
    act_order: bool = False,
    symmetric: bool = False,
    scale_dtype: Any = jnp.float32,
    grid: tuple[Array, Array] | None = None,
) -> QuantResult:
    """`gptq` with a first-order term that pulls the drifting columns back to the given weights W⁰.

        e = ((wᵢ - qᵢ) - β (wᵢ - wᵢ⁰)) / Uᵢᵢ,   W[:, i:] -= e U[i, i:]  (and GPTAQ's part),
        then  w_j -= β (w_j - w_j⁰)  for j = i+1 ("next") or all j > i ("all")

    Args:
      w: the layer, W⁰.
      h: `input_hessian(x)`.
      dxx: D of `input_mismatch`; needed where alpha is not 0.
      alpha: as `gptaq`; the paper combines with 0.25.
      beta: β in [0, 1]; 0 is GPTQ (or GPTAQ). Good between 0.1 and 0.25, for "v1" near 3e-4.
      shift: static, "next" or "all". The derivation in `first_order_step` moves all columns, the
        released code the next one. Its loop leaves out the first column of every block; here
        that one moves as well.
      variant: static; "v1" is the paper's first version, `g = β (w - w⁰)` with the inverse of the
        trailing Hessian: `p = g H_F⁻¹`, `e = ((wᵢ - qᵢ) - pᵢ) / Uᵢᵢ`, `W_F -= e U[i, F] + p`. It
        takes one block and no shift.
      bits, group, block, damp, act_order, symmetric, scale_dtype, grid: as `gptq`.

    Raises:
      ValueError: as `gptaq`; beta outside [0, 1], an unknown shift or variant.

    Source: Zheng et al., "First-Order Error Matters", 2025, arXiv:2507.11017, and the authors'
    integration into GPTQModel. The shift is made after the compensation, as there, which damps
    that too; in the derivation it is made before.
    """
    options = _Options(bits, group, block, damp, act_order, symmetric, scale_dtype, grid)
    return _run(w, h, options, dxx=dxx, alpha=alpha, beta=beta, shift=shift, variant=variant)


class _Options(NamedTuple):
    bits: int
    group: int | None
    block: int
    damp: float
    act_order: bool
    symmetric: bool
    scale_dtype: Any
    grid: tuple[Array, Array] | None


def _run(
    w: Array,
    h: Array,
    options: _Options,
    *,
    dxx: Array | None = None,
    alpha: float | Float[Array, ""] = 0.0,
    beta: float | Float[Array, ""] = 0.0,
    shift: str = "next",
    variant: str = "v2",
) -> QuantResult:
    _check_weight(w)
    rows, columns = w.shape
    check_hessian(h, columns)
    group = core.check_group(options.group, columns)
    core.check_bits(options.bits)
    block = columns if variant == "v1" else min(options.block, columns)
    if block < 1 or (group < columns and block % group and group % block):
        raise ValueError(
            f"block: expected a multiple or a divisor of the group of {group}, got {options.block}"
        )
    _checks.in_range("damp", options.damp, 0.0)
    _checks.in_range("alpha", alpha, 0.0)
    _checks.in_range("beta", beta, 0.0, 1.0)
    _checks.one_of("shift", shift, SHIFTS)
    _checks.one_of("variant", variant, VARIANTS)
    steered = not (isinstance(alpha, int | float) and alpha == 0)
    if steered:
        if dxx is None:
            raise ValueError("dxx: expected the input_mismatch where alpha is not 0, got None")
        if jnp.shape(dxx) != (columns, columns):
            raise ValueError(f"dxx: expected shape {(columns, columns)}, got {jnp.shape(dxx)}")
    given = options.grid
    if given is not None:
        for name, part in zip(("scale", "zero"), given, strict=True):
            if jnp.shape(part) != (rows, columns // group):
                raise ValueError(
                    f"grid: expected {name} of shape {(rows, columns // group)}, got "
                    f"{jnp.shape(part)}"
                )
    result, upper = _swept(
        w,
        h,
        dxx if steered else None,
        given,
        options.damp,
        alpha,
        beta,
        pulled=not (isinstance(beta, int | float) and beta == 0),
        act_order=options.act_order,
        bits=options.bits,
        group=group,
        block=block,
        shift=shift,
        variant=variant,
        symmetric=options.symmetric,
        scale_dtype=jnp.dtype(options.scale_dtype),
    )
    check_factor(upper, options.damp)
    return result


@functools.partial(jax.jit, static_argnames=("bits", "group", "symmetric", "scale_dtype"))
def _nearest(
    w: Array, h: Array | None, *, bits: int, group: int, symmetric: bool, scale_dtype: Any
) -> QuantResult:
    full = wide(w)
    scale, zero = core.uniform_grid(
        full, bits=bits, group_size=group, symmetric=symmetric, scale_dtype=scale_dtype
    )
    codes = core.quantize(full, scale, zero, bits=bits)
    q = core.dequantize(codes, scale, zero)
    error = 0.5 * jnp.sum(jnp.square(full - q)) if h is None else quadratic_error(full, q, h)
    return QuantResult(q, codes, scale, zero, jnp.arange(full.shape[1]) // group, full, error)


@functools.partial(
    jax.jit,
    static_argnames=(
        *("pulled", "act_order", "bits", "group", "block", "shift", "variant", "symmetric"),
        "scale_dtype",
    ),
)
def _swept(
    w: Array,
    h: Array,
    dxx: Array | None,
    grid: tuple[Array, Array] | None,
    damp: Array,
    alpha: Array,
    beta: Array,
    *,
    act_order: bool,
    group: int,
    **options: Any,
) -> tuple[QuantResult, Array]:
    """The result, and U."""
    columns = w.shape[1]
    dead = jnp.diagonal(h) == 0
    h, order = damped(wide(h), damp), jnp.arange(columns)
    full = jnp.where(dead, 0.0, wide(w))
    if act_order:
        order = jnp.argsort(-jnp.diagonal(h), stable=True)
        full, h = full[:, order], h[order][:, order]
    upper = factor(h)
    steering = None
    if dxx is not None:
        moved = jnp.matmul(wide(dxx)[order][:, order], upper.T, precision=_HIGHEST)
        steering = alpha * jnp.matmul(jnp.triu(moved, 1), upper, precision=_HIGHEST)
    if grid is not None:
        grid = (wide(grid[0]), wide(grid[1]))
    beta = jnp.asarray(beta, full.dtype)
    found = sweep(full, upper, steering, grid, beta, group=group, **options)
    codes, latent, scale, zero, error = found
    back = jnp.argsort(order)
    q = core.dequantize(codes, scale, zero)[:, back]
    result = QuantResult(q, codes[:, back], scale, zero, back // group, latent[:, back], error)
    return result, upper


def _check_weight(w: Any) -> None:
    _checks.rank("w", w, 2)
    _checks.floating(w=w)
    if _checks.is_concrete(w) and not np.isfinite(np.asarray(w)).all():
        raise ValueError("w: expected finite numbers, got NaN or infinity")
