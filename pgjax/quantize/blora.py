"""Low-rank adapters that learn their rank and their bit-widths (B-LoRA).

    y = Qo[ Qa(Q(W₀)x + b) + (alpha / r) Qu( Qe( Qi( Q(A) drop(x) ) · Q(E) ) Q(B)ᵀ ) ]

Every Q is `bayesian_bits` with gates of its own; the first gate of E's quantiser is a vector, one
gate a rank component. The trained part and the gates are two entries of one tree, so that
`optax.partition` gives them an optimizer each.

Source: B-LoRA ("Bayesian-LoRA"), 2024, arXiv:2406.13046.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from pgjax import _checks
from pgjax.quantize.bayesian_bits import (
    bayesian_bits,
    gate_penalty,
    hard_concrete_mode,
    hard_concrete_sample,
    num_gates,
)

ACTIVATIONS = ("base_output", "inner", "scaled", "update", "output")
MATRICES = ("base", "a", "e", "b")
_PRECISION = jax.lax.Precision.HIGHEST

Ranges = dict[str, Array]


class BLora(NamedTuple):
    """What is trained.

    Attributes:
      weights: "a" `[r, in]`, "e" `[r]`, "b" `[out, r]`.
      gates: logits of each quantiser's gates for 4, 8, ... bits, `[k]`, by name in `MATRICES` and
        `ACTIVATIONS`; and "rank" `[r]`.
    """

    weights: dict[str, Array]
    gates: dict[str, Array]


def blora_init(
    key: PRNGKeyArray,
    in_size: int,
    out_size: int,
    *,
    rank: int,
    max_bits: int = 16,
    phi_rank: float = 6.0,
    phi_first: float = 1.0,
    phi_rest: float = 6.0,
    zero_init_b: bool = False,
) -> BLora:
    """A fresh adapter: A, B ~ N(0, 0.02²), E ~ N(0, 1), all gates most likely on.

    Args:
      key: randomness of the weights.
      in_size, out_size: of the layer.
      rank: r, at least 1.
      max_bits: a power of two of 4 to 32.
      phi_rank: logit of the rank gates. At 6, a gate is so surely on that its gradient is nearly
        0 and a penalty prunes nothing in a short run; 2 leaves it free to move.
      phi_first, phi_rest: logits of the gate for 4 bits, and of those for 8 and more.
      zero_init_b: B = 0, so that the layer starts as the base alone, as LoRA does.

    Raises:
      ValueError: a rank or size below 1, bits that are no power of two.
    """
    for name, size in (("rank", rank), ("in_size", in_size), ("out_size", out_size)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}: expected a positive int, got {size!r}")
    count = num_gates(max_bits) - 1
    if count < 1:
        raise ValueError(f"max_bits: expected a power of two of 4 to 32, got {max_bits}")
    a_key, e_key, b_key = jax.random.split(key, 3)
    draw = functools.partial(jax.random.normal, dtype=jnp.float32)
    b = 0.02 * draw(b_key, (out_size, rank))
    fine = jnp.array([phi_first, *[phi_rest] * (count - 1)], jnp.float32)
    gates = dict.fromkeys((*MATRICES, *ACTIVATIONS), fine)
    return BLora(
        weights={
            "a": 0.02 * draw(a_key, (rank, in_size)),
            "e": draw(e_key, (rank,)),
            "b": jnp.zeros_like(b) if zero_init_b else b,
        },
        gates={**gates, "rank": jnp.full(rank, phi_rank, jnp.float32)},
    )


def blora_ranges() -> Ranges:
    """The running ranges of the activations before any was seen."""
    return {name: jnp.zeros([], jnp.float32) for name in ACTIVATIONS}


def blora_apply(
    params: BLora,
    key: PRNGKeyArray | None,
    x: Float[Array, "*batch in"],
    *,
    base: Float[Array, "out in"],
    bias: Float[Array, " out"] | None = None,
    alpha: float,
    deterministic: bool,
    ranges: Ranges | None = None,
    dropout: float = 0.0,
    momentum: float = 0.1,
) -> tuple[Float[Array, "*batch out"], Ranges | None]:
    """The layer's output, and the ranges with this batch in their running means.

    Args:
      params: the adapter.
      key: randomness of the gates and of dropout; not looked at where deterministic.
      x: inputs.
      base, bias: the frozen layer; no gradient passes to them.
      alpha: the update is scaled by alpha / r.
      deterministic: static; gates at their mode, no dropout, ranges as they are.
      ranges: of the activations; a range of 0 (none seen yet) is that of the batch. None: only
        weights are quantised.
      dropout: static, share of the adapter's inputs that is dropped, in [0, 1).
      momentum: of the running means.

    Raises:
      ValueError: shapes that do not fit, no key where one is needed, options out of range.

    Departures: the range of a matrix is `max |w|` at every step, taken as a constant.
    """
    _check(params, x, base, bias)
    _checks.in_range("dropout", dropout, 0.0, 1.0, high_open=True)
    _checks.in_range("momentum", momentum, 0.0, 1.0)
    if key is None and not deterministic:
        raise ValueError("key: expected a key where not deterministic, got None")
    gate_key = drop_key = None
    if not deterministic:
        assert key is not None
        gate_key, drop_key = jax.random.split(key)
    gates = _gates(params, gate_key)
    matrices = _quantized(params, gates)
    seen: Ranges = {}

    def activation(name: str, value: Array) -> Array:
        if ranges is None:
            return value
        now = jnp.max(jnp.abs(jax.lax.stop_gradient(value)), initial=0.0).astype(jnp.float32)
        kept = ranges[name]
        if not deterministic:
            kept = jnp.where(kept > 0, (1 - momentum) * kept + momentum * now, now)
        seen[name] = kept
        bound = _positive(jnp.where(kept > 0, kept, now))
        return bayesian_bits(value, bound, (1.0, *gates[name]))

    frozen = jax.lax.stop_gradient(base)
    frozen = bayesian_bits(frozen, _range(frozen), (1.0, *gates["base"]))
    out = _product(x, frozen)
    if bias is not None:
        out = out + jax.lax.stop_gradient(bias)
    out = activation("base_output", out)
    dropped = x
    if dropout > 0 and not deterministic:
        assert drop_key is not None
        kept = jax.random.bernoulli(drop_key, 1 - dropout, x.shape)
        dropped = jnp.where(kept, x / (1 - dropout), 0.0)
    inner = activation("inner", _product(dropped, matrices["a"]))
    inner = activation("scaled", inner * matrices["e"])
    update = activation("update", _product(inner, matrices["b"]))
    rank = params.weights["e"].shape[0]
    out = activation("output", out + alpha / rank * update)
    return out.astype(x.dtype), None if ranges is None else seen


def blora_penalty(
    params: BLora,
    *,
    strength: float | Float[Array, ""] = 1e-3,
    parts: tuple[str, ...] = (*MATRICES, *ACTIVATIONS),
    weights: tuple[float, ...] | None = None,
    reduction: str = "mean",
) -> Float[Array, ""]:
    """`λ Σ_quantisers Σ_b w_b Π_{b' <= b} P(z_b' > 0)`, to be added to the task's loss.

    Args:
      params: the adapter.
      strength: λ, above 0.
      parts: static, the quantisers that count; leave out activations that are not quantised.
      weights: w_b for 2, 4, ... bits, see `bayesian_bits.bop_weights`; None: 1 each.
      reduction: static, "mean" or "sum" over rank gates, as `gate_penalty`.

    Raises:
      ValueError: λ not above 0, an unknown part, and as `gate_penalty`.
    """
    _checks.in_range("strength", strength, 0.0, low_open=True)
    total = jnp.zeros([])
    for name in parts:
        _checks.one_of("parts", name, (*MATRICES, *ACTIVATIONS))
        first = params.gates["rank"] if name == "e" else None
        phis = (first, *params.gates[name])
        total = total + gate_penalty(phis, weights, reduction=reduction)
    return strength * total


def effective_rank(params: BLora) -> Array:
    """Rank components whose gate is on after training, an int32 scalar."""
    return hard_concrete_mode(params.gates["rank"]).sum().astype(jnp.int32)


def effective_bits(params: BLora) -> dict[str, Array]:
    """Bits of each quantiser after training, int32 scalars: 2, 4, 8, ... up to its first gate off."""  # noqa: E501
    return {
        name: 2 ** (1 + jnp.cumprod(hard_concrete_mode(phi)).sum().astype(jnp.int32))
        for name, phi in params.gates.items()
        if name != "rank"
    }


def merge(params: BLora, base: Float[Array, "out in"], *, alpha: float) -> Float[Array, "out in"]:
    """`Q(W₀) + (alpha / r) Q(B) diag(Q(E)) Q(A)` with the gates at their modes."""
    gates = _gates(params, None)
    matrices = _quantized(params, gates)
    frozen = bayesian_bits(base, _range(base), (1.0, *gates["base"]))
    rank = params.weights["e"].shape[0]
    update = jnp.matmul(matrices["b"] * matrices["e"], matrices["a"], precision=_PRECISION)
    return frozen + alpha / rank * update.astype(base.dtype)


def factors(params: BLora) -> tuple[Float[Array, "in r"], Float[Array, "r out"]]:
    """The adapter after training as two matrices, `Q(A)ᵀ` and `diag(Q(E)) Q(B)ᵀ`.

    Gates are at their modes; the layer's update is `alpha / r` times the product.
    """
    matrices = _quantized(params, _gates(params, None))
    return matrices["a"].T, (matrices["b"] * matrices["e"]).T


def _gates(params: BLora, key: PRNGKeyArray | None) -> dict[str, Array]:
    """Draws of all gates; their modes without a key."""
    if key is None:
        return {name: hard_concrete_mode(phi) for name, phi in params.gates.items()}
    keys = jax.random.split(key, len(params.gates))
    return {
        name: hard_concrete_sample(own, params.gates[name])
        for own, name in zip(keys, sorted(params.gates), strict=True)
    }


def _quantized(params: BLora, gates: dict[str, Array]) -> dict[str, Array]:
    return {
        name: bayesian_bits(
            weight,
            _range(jax.lax.stop_gradient(weight)),
            (gates["rank"] if name == "e" else 1.0, *gates[name]),
        )
        for name, weight in params.weights.items()
    }


def _range(weight: Array) -> Array:
    return _positive(jnp.max(jnp.abs(weight)).astype(jnp.float32))


def _positive(bound: Array) -> Array:
    return jnp.where(bound > 0, bound, 1.0)


def _product(x: Array, matrix: Array) -> Array:
    return jnp.matmul(x, matrix.T, precision=_PRECISION)


def _check(params: BLora, x: Array, base: Array, bias: Array | None) -> None:
    _checks.floating(x=x, base=base, bias=bias)
    a, e, b = (params.weights[name] for name in ("a", "e", "b"))
    rank = e.shape[0]
    wanted = {"a": (rank, x.shape[-1]), "b": (base.shape[0], rank)}
    for name, got in (("a", a.shape), ("b", b.shape)):
        if got != wanted[name]:
            raise ValueError(f"params: expected {name} of shape {wanted[name]}, got {got}")
    if base.ndim != 2 or base.shape[1] != x.shape[-1]:
        raise ValueError(f"base: expected shape [out, {x.shape[-1]}], got {base.shape}")
    if params.gates["rank"].shape != (rank,):
        raise ValueError(
            f"params: expected {rank} rank gates, got shape {params.gates['rank'].shape}"
        )
    if bias is not None and bias.shape != base.shape[:1]:
        raise ValueError(f"bias: expected shape {base.shape[:1]}, got {bias.shape}")
