"""Log-probs and entropy from hidden states, without ever holding the logits.

The vocabulary is walked in blocks. The forward pass keeps an online log-sum-exp (and, for the
entropy, one more running sum) per token; the backward pass makes each block of logits again and
turns it at once into its share of the hidden states' gradient and its columns of the unembedding's.
Blocks of the vocabulary, not of the tokens: each column of the unembedding's gradient is then
written once, and only the hidden states' gradient, which is small, is accumulated.

The online log-sum-exp is that of Milakov and Gimelshein, "Online normalizer calculation for
softmax" (2018, arXiv 1805.02867); recomputing blocks in the backward pass follows Wijmans et al.,
"Cut Your Losses in Large-Vocabulary Language Models" (2024, arXiv 2411.09009), whose skipping of
negligible gradients is left out: gradients here are exact.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from pgjax import _checks
from pgjax.logprobs._common import constant_temperature, next_tokens, token_range
from pgjax.logprobs.sequences import shift_right

_C = TypeVar("_C")
_Running = tuple[Array, Array, Array, Array]  # top, total, moment, logit of the chosen token


class _Static(NamedTuple):
    """What a compiled program is specialised to."""

    block: int
    vocab_axis: int
    soft_cap: float | None
    entropy: bool


class _Residuals(NamedTuple):
    hidden: Array
    unembedding: Array
    targets: Array
    temperature: Array
    top: Array  # each row's largest z
    log_total: Array  # log Σ_v exp(z_v - top)
    entropy: Array


def from_hidden(
    hidden: Float[Array, "B T H"],
    unembedding: Float[Array, "H V"] | Float[Array, "V H"],
    tokens: Int[Array, "B T"],
    *,
    temperature: float | Shaped[Array, ""] = 1.0,
    soft_cap: float | None = None,
    vocab_axis: int = 1,
    block_size: int | None = None,
) -> Float[Array, "B T"]:
    """Log-prob of each token given the past, from hidden states, at the token's own index.

        x = hidden @ unembedding,   c = soft_cap · tanh(x / soft_cap)  (c = x without a cap)
        z = c / temperature
        out[b, 0] = 0,   out[b, t] = z[b, t-1, tokens[b, t]] - log Σ_v exp z[b, t-1, v]

    Equal to `from_logits` of the same logits, but at no time are more than `block_size` of a
    token's V logits in memory, forwards or backwards. A backward pass costs one more product of
    hidden states and unembedding than if the logits had been kept. Under jit, inputs may be sharded
    along any axis; inside `shard_map`, each device must hold the whole vocabulary.

    Args:
      hidden: `[B, T, H]`, floating; `hidden[b, t-1]` predicts `tokens[b, t]`. The last position
        predicts nothing.
      unembedding: `[H, V]`, floating. For bfloat16 inputs products are of bfloat16 numbers with
        float32 sums, and logits, normalisers and accumulated gradients are float32.
      tokens: integer `[B, T]` in [0, V).
      temperature: positive scalar, treated as a constant: no gradient flows to it.
      soft_cap: positive bound on |logits|, applied before the temperature; None for no bound.
      vocab_axis: the axis of `unembedding` that runs over the vocabulary; 1 for `[H, V]`. Pass 0
        and a tied embedding table `[V, H]` as it is: the result is that of its transpose, without
        the transposed copies of table and gradient that `table.T` can cost.
      block_size: columns of logits held at once, at least 1. By default chosen from the number of
        tokens and H, so that a block of logits is about as large as the hidden states.

    Returns:
      f32 `[B, T]` (f64 if either input is). Reverse-mode differentiable, to first order, in
      `hidden` and `unembedding`; gradients have their dtypes. A position whose cotangent is zero
      adds exactly nothing to either, even if its hidden state is NaN. Where tokens are traced and
      cannot be checked, an id outside [0, V) gives NaN with a zero gradient.

    Raises:
      ValueError: on wrong ranks, shapes or dtypes, an option out of range, or concrete tokens out
        of range.
    """
    logprobs, _ = _from_hidden(
        hidden, unembedding, tokens, temperature, soft_cap, vocab_axis, block_size, entropy=False
    )
    return logprobs


def from_hidden_with_entropy(
    hidden: Float[Array, "B T H"],
    unembedding: Float[Array, "H V"] | Float[Array, "V H"],
    tokens: Int[Array, "B T"],
    *,
    temperature: float | Shaped[Array, ""] = 1.0,
    soft_cap: float | None = None,
    vocab_axis: int = 1,
    block_size: int | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """`from_hidden`, and the exact entropy of the distribution each token was drawn from.

        entropy[b, 0] = 0,   entropy[b, t] = -Σ_v p_v log p_v,   p = softmax z[b, t-1]

    One pass over the unembedding gives both, in either direction.

    Args:
      hidden, unembedding, tokens, temperature, soft_cap, vocab_axis, block_size: as `from_hidden`.

    Returns:
      log-probs and entropies in nats, each f32 `[B, T]` (f64 if either input is) at the token's own
      index. Both are differentiable, as in `from_hidden`.

    Raises:
      ValueError: as `from_hidden`.
    """
    return _from_hidden(
        hidden, unembedding, tokens, temperature, soft_cap, vocab_axis, block_size, entropy=True
    )


def _from_hidden(
    hidden: Array,
    unembedding: Array,
    tokens: Array,
    temperature: Any,
    soft_cap: float | None,
    vocab_axis: int,
    block_size: int | None,
    *,
    entropy: bool,
) -> tuple[Array, Array]:
    static = _checked(hidden, unembedding, tokens, soft_cap, vocab_axis, block_size, entropy)
    targets, vocabulary = next_tokens(jnp.asarray(tokens)), unembedding.shape[vocab_axis]
    accumulator = jnp.promote_types(_operand_dtype(hidden, unembedding), jnp.float32)
    temperature = jnp.asarray(constant_temperature(temperature), accumulator)
    arrays = _equally_varying(jnp.asarray(hidden), jnp.asarray(unembedding), targets, temperature)
    logprobs, entropies = _blockwise(static, *arrays)
    valid = (targets >= 0) & (targets < vocabulary)
    return shift_right(jnp.where(valid, logprobs, jnp.nan)), shift_right(entropies)


def _checked(
    hidden: Array,
    unembedding: Array,
    tokens: Array,
    soft_cap: float | None,
    vocab_axis: int,
    block_size: int | None,
    entropy: bool,
) -> _Static:
    """The options, if they and the arrays are sound."""
    _checks.rank("hidden", hidden, 3)
    _checks.rank("unembedding", unembedding, 2)
    _checks.rank("tokens", tokens, 2)
    _checks.floating(hidden=hidden, unembedding=unembedding)
    _checks.one_of("vocab_axis", vocab_axis, (0, 1))
    if hidden.shape[:2] != tokens.shape:
        raise ValueError(f"tokens: expected shape {hidden.shape[:2]}, got {tokens.shape}")
    features, vocabulary = unembedding.shape[1 - vocab_axis], unembedding.shape[vocab_axis]
    if features != hidden.shape[-1]:
        raise ValueError(
            f"unembedding: expected {hidden.shape[-1]} features (the last axis of hidden) on axis "
            f"{1 - vocab_axis}, got shape {unembedding.shape}"
        )
    token_range(tokens, vocabulary)
    if soft_cap is not None:
        _checks.in_range("soft_cap", soft_cap, 0.0, low_open=True, high_open=True)
        soft_cap = float(soft_cap)
    if block_size is None:
        block_size = _default_block(math.prod(tokens.shape), features)
    if block_size < 1:
        raise ValueError(f"block_size: expected at least 1, got {block_size}")
    return _Static(min(int(block_size), vocabulary), vocab_axis, soft_cap, entropy)


def _default_block(rows: int, features: int) -> int:
    """Columns per block: 2²¹ logits, but no fewer columns than features.

    With at least H columns the logits of a block are no smaller than the hidden states whose
    float32 gradient is accumulated anyway, so the traffic of that sum stays below the products'.
    """
    wanted = max(2**21 // max(rows, 1), features)
    return min(max(256 * math.ceil(wanted / 256), 1024), 8192)


def _equally_varying(*arrays: Array) -> tuple[Array, ...]:
    """Inside `shard_map`, gives all arrays the union of the mesh axes that they vary over.

    A replicated unembedding then gets its gradient summed over those axes, by the transpose of the
    cast, and the loops below carry one type throughout. Outside `shard_map`, returns them as given.
    """

    def varying(x: Array) -> frozenset[str]:
        kind = jax.typeof(x)
        axes = getattr(kind, "vma", ())  # its name in earlier releases
        return frozenset(getattr(getattr(kind, "manual_axis_type", None), "varying", axes))

    axes = [varying(x) for x in arrays]
    union = frozenset().union(*axes)
    return tuple(
        lax.pcast(x, tuple(union - own), to="varying") if union - own else x
        for x, own in zip(arrays, axes, strict=True)
    )


def _operand_dtype(hidden: Array, unembedding: Array) -> Any:
    """The dtype that products are taken in. float16 is widened: its gradients would underflow."""
    dtype = jnp.promote_types(hidden.dtype, unembedding.dtype)
    return dtype if dtype == jnp.bfloat16 else jnp.promote_types(dtype, jnp.float32)


def _over_blocks(
    step: Callable[[_C, Any, int], _C], init: _C, static: _Static, unembedding: Array
) -> _C:
    """Runs `step(carry, start, size)` over the vocabulary; a last, shorter block is not padded."""
    size = static.block
    whole, rest = divmod(unembedding.shape[static.vocab_axis], size)
    carry = init
    if whole > 1:
        carry = lax.fori_loop(0, whole, lambda i, c: step(c, i * size, size), carry)
    elif whole == 1:
        carry = step(carry, 0, size)
    return step(carry, whole * size, rest) if rest else carry


def _read(unembedding: Array, start: Any, size: int, axis: int) -> Array:
    def plain(w: Array, start: Array) -> Array:
        return lax.dynamic_slice_in_dim(w, start, size, axis)

    def as_bits(w: Array, start: Array) -> Array:
        return lax.bitcast_convert_type(plain(_bits(w), start), w.dtype)

    start = jnp.asarray(start, jnp.int32)
    if unembedding.dtype.itemsize != 2:
        return plain(unembedding, start)
    return lax.platform_dependent(unembedding, start, cpu=as_bits, default=plain)


def _write(out: Array, block: Array, start: Any, axis: int) -> Array:
    def plain(out: Array, block: Array, start: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(out, block, start, axis)

    def as_bits(out: Array, block: Array, start: Array) -> Array:
        return lax.bitcast_convert_type(plain(_bits(out), _bits(block), start), out.dtype)

    block, start = block.astype(out.dtype), jnp.asarray(start, jnp.int32)
    if out.dtype.itemsize != 2:
        return plain(out, block, start)
    return lax.platform_dependent(out, block, start, cpu=as_bits, default=plain)


def _bits(x: Array) -> Array:
    """16-bit floats as integers of the same bits.

    XLA on CPUs slices and updates bfloat16 by way of float32 copies of the *whole* array: one of
    the unembedding, and a pass over all of its gradient for each block. Integers are spared that.
    """
    return lax.bitcast_convert_type(x, jnp.uint16)


def _logits(h: Array, w: Array, static: _Static) -> Array:
    contract = (((h.ndim - 1,), (1 - static.vocab_axis,)), ((), ()))
    dtype = jnp.promote_types(h.dtype, jnp.float32)
    return lax.dot_general(h, w, contract, preferred_element_type=dtype)


def _capped(x: Array, soft_cap: float | None) -> Array:
    return x if soft_cap is None else soft_cap * jnp.tanh(x / soft_cap)


# Compiled as one program, so that calls outside jit reuse it instead of tracing the loops again.
@functools.partial(jax.jit, static_argnums=0)
def _blockwise(
    static: _Static, hidden: Array, unembedding: Array, targets: Array, temperature: Array
) -> tuple[Array, Array]:
    return _logprobs_and_entropy(static, hidden, unembedding, targets, temperature)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logprobs_and_entropy(
    static: _Static, hidden: Array, unembedding: Array, targets: Array, temperature: Array
) -> tuple[Array, Array]:
    return _forward(static, hidden, unembedding, targets, temperature)[0]


def _forward(
    static: _Static, hidden: Array, unembedding: Array, targets: Array, temperature: Array
) -> tuple[tuple[Array, Array], _Residuals]:
    dtype = _operand_dtype(hidden, unembedding)
    h = hidden.astype(dtype)
    inverse = 1 / temperature

    def step(carry: _Running, start: Any, size: int) -> _Running:
        top, total, moment, chosen = carry
        x = _logits(h, _read(unembedding, start, size, static.vocab_axis).astype(dtype), static)
        z = _capped(x, static.soft_cap) * inverse
        new_top = jnp.maximum(top, z.max(-1))
        d = z - new_top[..., None]
        e = jnp.exp(d)
        scale = jnp.exp(top - new_top)
        if static.entropy:
            # Σ (z - top) e^(z - top) under a new top: each term is shifted, then scaled.
            moment = scale * (moment + (top - new_top) * total) + (d * e).sum(-1)
        total = scale * total + e.sum(-1)
        column = targets - start
        here = jnp.take_along_axis(z, jnp.clip(column, 0, size - 1)[..., None], axis=-1)[..., 0]
        chosen = jnp.where((column >= 0) & (column < size), here, chosen)
        return new_top, total, moment, chosen

    zeros, _ = _equally_varying(jnp.zeros(targets.shape, temperature.dtype), h)
    # A finite floor instead of -inf: floor - floor is 0, and e^(floor - top) is 0 all the same.
    init = (zeros - 1e30, zeros, zeros, zeros)
    top, total, moment, chosen = _over_blocks(step, init, static, unembedding)
    log_total = jnp.log(total)
    entropy = log_total - moment / total if static.entropy else zeros
    residuals = _Residuals(hidden, unembedding, targets, temperature, top, log_total, entropy)
    # Differences from the top first: near 10⁴ a float32 top + log_total would lose digits.
    return (chosen - top - log_total, entropy), residuals


def _backward(
    static: _Static, residuals: _Residuals, cotangents: tuple[Array, Array]
) -> tuple[Array, Array, None, Array]:
    hidden, unembedding, targets, temperature, top, log_total, entropy = residuals
    g, g_entropy = cotangents
    dtype = _operand_dtype(hidden, unembedding)
    # Rows without a cotangent are blanked, so that not even a NaN there reaches a sum over rows.
    live = g != 0
    if static.entropy:
        live |= g_entropy != 0
    h = jnp.where(live[..., None], hidden, 0).astype(dtype)
    top, log_total, entropy = (jnp.where(live, x, 0)[..., None] for x in (top, log_total, entropy))
    inverse = 1 / temperature
    g, g_entropy = (g * inverse)[..., None], (g_entropy * inverse)[..., None]
    rows = tuple(range(h.ndim - 1))

    def step(carry: tuple[Array, Array], start: Any, size: int) -> tuple[Array, Array]:
        d_hidden, d_unembedding = carry
        w = _read(unembedding, start, size, static.vocab_axis).astype(dtype)
        x = _logits(h, w, static)
        c = _capped(x, static.soft_cap)
        log_p = (c * inverse - top) - log_total
        # d logprob / dz = 1[v chosen] - p,   d entropy / dz = -p (log p + entropy)
        weight = g
        if static.entropy:
            weight = weight + g_entropy * (log_p + entropy)
        column = lax.broadcasted_iota(targets.dtype, x.shape, x.ndim - 1)
        chosen = jnp.where(column == (targets - start)[..., None], g, 0)
        dx = chosen - weight * jnp.exp(log_p)
        if static.soft_cap is not None:
            dx = dx * (1 - (c / static.soft_cap) ** 2)
        dx = dx.astype(dtype)
        d_hidden = d_hidden + lax.dot_general(
            dx,
            w,
            (((dx.ndim - 1,), (static.vocab_axis,)), ((), ())),
            preferred_element_type=d_hidden.dtype,
        )
        left, right = (h, dx) if static.vocab_axis == 1 else (dx, h)
        block = lax.dot_general(
            left, right, ((rows, rows), ((), ())), preferred_element_type=d_hidden.dtype
        )
        return d_hidden, _write(d_unembedding, block, start, static.vocab_axis)

    zeros = jnp.zeros(h.shape, temperature.dtype), jnp.zeros(unembedding.shape, unembedding.dtype)
    *init, _ = _equally_varying(*zeros, h)
    d_hidden, d_unembedding = _over_blocks(step, (init[0], init[1]), static, unembedding)
    return (
        d_hidden.astype(hidden.dtype),
        d_unembedding,
        None,
        jnp.zeros_like(temperature),
    )


_logprobs_and_entropy.defvjp(_forward, _backward)
