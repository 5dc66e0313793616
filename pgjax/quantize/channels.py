"""Channel-wise scaling and clipping before rounding, with any measure of importance (AWQ).

W is quantised as `Q(W · s) / s` with `s_j = I_j^r`, so that important input channels are rounded
finer; `1 / s` goes into whatever comes before the layer, and nothing changes but the rounding.

Source: Lin et al., "AWQ", 2023, arXiv:2306.00978.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pgjax import _checks
from pgjax.quantize import core, obq
from pgjax.quantize.hessian import quadratic_error
from pgjax.quantize.obq import QuantResult


class SearchResult(NamedTuple):
    """What `awq_search` found.

    Attributes:
      scale: `[in]`.
      error: mean squared error of the outputs with it.
      ratio: the exponent chosen.
      errors: of every exponent tried; the first is plain rounding's.
    """

    scale: Float[Array, " c"]
    error: Float[Array, ""]
    ratio: Float[Array, ""]
    errors: Float[Array, " n_grid"]


def activation_importance(x: Float[Array, "n c"]) -> Float[Array, " c"]:
    """`mean_n |x_nj|`, the importance of AWQ; at least 1e-4, as the scales are.

    Source: Lin et al., "AWQ", 2023, arXiv:2306.00978.
    """
    _checks.rank("x", x, 2)
    _checks.floating(x=x)
    return jnp.maximum(jnp.mean(jnp.abs(x.astype(jnp.float32)), axis=0), 1e-4)


def hessian_importance(h: Float[Array, "c c"]) -> Float[Array, " c"]:
    """`sqrt(H_jj)`, the root mean square of the channel's inputs; at least 1e-4."""
    _checks.rank("h", h, 2)
    return jnp.maximum(jnp.sqrt(jnp.diagonal(h).astype(jnp.float32)), 1e-4)


def awq_search(
    w: Float[Array, "r c"],
    x: Float[Array, "n c"],
    importance: Float[Array, " c"],
    *,
    bits: int,
    group: int | None = 128,
    n_grid: int = 20,
    symmetric: bool = False,
    scale_dtype: Any = jnp.float32,
) -> SearchResult:
    """The power of the importance that makes the quantised layer's outputs best on x.

        s = max(I^r, 1e-4),  r in {0, 1/n, ..., (n-1)/n},   least  mean ((Q(W·s)/s - W) x)²

    Args:
      w: the layer, or those that share an input one below the other.
      x: calibration inputs.
      importance: at least 0; below it counts as 0.
      bits, group, symmetric, scale_dtype: of the grid, see `uniform_grid`.
      n_grid: static, exponents tried; the first is 0, plain rounding.

    Raises:
      ValueError: wrong ranks or shapes, a group that does not divide, `n_grid` below 1.

    Source: Lin et al., "AWQ", 2023, arXiv:2306.00978, without its normalisation of s, as QuantLRM.
    """
    _checks.rank("x", x, 2)
    _checks.floating(x=x)
    if x.shape[0] < 1:
        raise ValueError(f"x: expected at least one row, got shape {x.shape}")
    wide = x.astype(jnp.float32)
    second = jnp.matmul(wide.T, wide, precision=jax.lax.Precision.HIGHEST) / x.shape[0]
    return channel_search(
        w,
        second,
        importance,
        bits=bits,
        group=group,
        n_grid=n_grid,
        symmetric=symmetric,
        scale_dtype=scale_dtype,
    )


@functools.partial(jax.jit, static_argnames=("bits", "group", "n_grid", "symmetric", "scale_dtype"))
def channel_search(
    w: Float[Array, "r c"],
    second_moment: Float[Array, "c c"],
    importance: Float[Array, " c"],
    *,
    bits: int,
    group: int | None = 128,
    n_grid: int = 20,
    symmetric: bool = False,
    scale_dtype: Any = jnp.float32,
) -> SearchResult:
    """`awq_search` with `E[x xᵀ]` in place of the inputs themselves: half of `input_hessian`."""
    _checks.rank("w", w, 2)
    columns = w.shape[1]
    if jnp.shape(importance) != (columns,):
        raise ValueError(f"importance: expected shape {(columns,)}, got {jnp.shape(importance)}")
    if jnp.shape(second_moment) != (columns, columns):
        raise ValueError(
            f"x: expected inputs of {columns} channels, got {jnp.shape(second_moment)[-1]}"
        )
    core.check_bits(bits)
    core.check_group(group, columns)
    _checks.in_range("n_grid", n_grid, 1)
    wide = w.astype(jnp.float32)
    known = jnp.maximum(jnp.asarray(importance, jnp.float32), 0.0)

    def scale_of(ratio: Array) -> Array:
        return jnp.maximum(known**ratio, 1e-4)

    def error(ratio: Array) -> Array:
        scale = scale_of(ratio)
        scaled = wide * scale
        grid = core.uniform_grid(
            scaled, bits=bits, group_size=group, symmetric=symmetric, scale_dtype=scale_dtype
        )
        back = core.fake_quant(scaled, *grid, bits=bits) / scale
        return 2 * quadratic_error(wide, back, second_moment) / w.shape[0]

    ratios = jnp.arange(n_grid) / n_grid
    errors = jax.lax.map(error, ratios)
    best = jnp.argmin(errors)
    return SearchResult(scale_of(ratios[best]), errors[best], ratios[best], errors)


@functools.partial(
    jax.jit, static_argnames=("max_shrink", "bits", "group", "n_grid", "symmetric", "scale_dtype")
)
def clip_search(
    w: Float[Array, "r c"],
    second_moment: Float[Array, "c c"],
    *,
    bits: int,
    group: int | None = 128,
    n_grid: int = 20,
    max_shrink: float = 0.5,
    symmetric: bool = False,
    scale_dtype: Any = jnp.float32,
) -> Float[Array, "r k"]:
    """How far to clip each group of each row for the least error of its own share of the output.

        least  ‖(Q(clip(w_g, ±m)) - w_g) x_g‖²  for m in {1, 1 - 1/n, ...} · max|w_g|

    Args:
      w: the layer.
      second_moment: `E[x xᵀ]`, of which only the groups' own blocks are used.
      n_grid: static; `max_shrink · n_grid` steps are tried.
      max_shrink: static, in [0, 1).
      bits, group, symmetric, scale_dtype: of the grid.

    Returns:
      m; clip by `jnp.clip(w, -spread(m), spread(m))`.

    Raises:
      ValueError: wrong shapes, options out of range.

    Source: Lin et al., "AWQ", 2023, arXiv:2306.00978.
    """
    _checks.rank("w", w, 2)
    rows, columns = w.shape
    size = core.check_group(group, columns)
    if jnp.shape(second_moment) != (columns, columns):
        raise ValueError(
            f"second_moment: expected shape {(columns, columns)}, got {jnp.shape(second_moment)}"
        )
    _checks.in_range("n_grid", n_grid, 1)
    _checks.in_range("max_shrink", max_shrink, 0.0, 1.0, high_open=True)
    count = columns // size
    grouped = w.astype(jnp.float32).reshape(rows, count, size)
    blocks = second_moment.astype(jnp.float32).reshape(count, size, count, size)
    blocks = blocks[jnp.arange(count), :, jnp.arange(count)]
    largest = jnp.abs(grouped).max(-1)

    def error(shrink: Array) -> Array:
        bound = (largest * shrink)[..., None]
        clipped = jnp.clip(grouped, -bound, bound)
        grid = core.uniform_grid(clipped, bits=bits, symmetric=symmetric, scale_dtype=scale_dtype)
        gap = core.fake_quant(clipped, *grid, bits=bits) - grouped
        turned = jnp.einsum("rkg,kgh->rkh", gap, blocks, precision=jax.lax.Precision.HIGHEST)
        return jnp.sum(turned * gap, axis=-1)

    shrinks = 1.0 - jnp.arange(max(round(max_shrink * n_grid), 1)) / n_grid
    errors = jax.lax.map(error, shrinks)
    return largest * shrinks[jnp.argmin(errors, axis=0)]


@functools.partial(
    jax.jit, static_argnames=("max_shrink", "bits", "group", "n_grid", "symmetric", "scale_dtype")
)
def clipped_rtn(
    w: Float[Array, "r c"],
    h: Float[Array, "c c"],
    *,
    bits: int,
    group: int | None = 128,
    n_grid: int = 20,
    max_shrink: float = 0.5,
    symmetric: bool = False,
    scale_dtype: Any = jnp.float32,
) -> QuantResult:
    """Rounding after `clip_search`; `error` is that of the whole output, `½ tr (W-Q) H (W-Q)ᵀ`.

    Args:
      w: the layer, already scaled.
      h: `input_hessian` of its inputs.
      bits, group, n_grid, max_shrink, symmetric, scale_dtype: as `clip_search`.

    Raises:
      ValueError: as `clip_search`.
    """
    bound = clip_search(
        w,
        h / 2,
        bits=bits,
        group=group,
        n_grid=n_grid,
        max_shrink=max_shrink,
        symmetric=symmetric,
        scale_dtype=scale_dtype,
    )
    bound = core.spread(bound, w.shape[1])
    clipped = jnp.clip(w.astype(jnp.float32), -bound, bound)
    result = obq.rtn(clipped, bits=bits, group=group, symmetric=symmetric, scale_dtype=scale_dtype)
    return result._replace(error=quadratic_error(w, result.q, h))
