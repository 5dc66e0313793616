"""Rejecting tokens whose own step would move the policy, or its objective, too far.

A model of the output head alone: logits `z = W h`, one token's score `v = e(y) - p` in the logits,
its gradient in the head `g = A v hᵀ`, and a planned step ΔW = η G, which moves the logits by η u
with `u = G h`. To second order in η, this token's part of the change is

    gain = η <g, G> + η²/2 A ((v·u)² - Var_p(u))      of the objective,
    shift = η²/2 (v·u)²                               of the policy, as a KL divergence.

Averaged over tokens the policy draws, they are the objective's second-order expansion along G and
half the Fisher form `η²/2 uᵀFu`. Nothing here is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pgjax import _checks
from pgjax.types import TokenSupport

Direction = Callable[[Float[Array, "B K H"], Int[Array, "B K"]], Float[Array, "B K H"]]


class Curvature(NamedTuple):
    """Predicted change of the objective and of the policy by each token's own step."""

    gain: Float[Array, "B T"]
    shift: Float[Array, "B T"]


class ShadowAdam(NamedTuple):
    """Adam's moments of the head's rows, kept beside the optimizer's own."""

    mean: Float[Array, "V H"]
    square: Float[Array, "V H"]
    steps: Int[Array, ""]


def head_curvature_sgd(
    logprobs: Float[Array, "B T"],
    square_sum: Float[Array, "B T"],
    cube_sum: Float[Array, "B T"],
    feature_square_norm: Float[Array, "B T"],
    advantages: Float[Array, " B"] | Float[Array, "B T"],
    *,
    learning_rate: float | Float[Array, ""],
) -> Curvature:
    """Curvature of the plain gradient's step G = g, from four numbers a token.

    With p the token's probability, `S_k = Σ_v p(v)^k` and n = ‖h‖², `u = A n v` and

        ‖v‖² = (1 - p)² + S₂ - p²,   Σ_k p_k v_k = p - S₂,   Σ_k p_k v_k² = p - 2p² + S₃,
        gain = η A² n ‖v‖² + η²/2 A³ n² (‖v‖⁴ - Σ p v² + (Σ p v)²),   shift = η²/2 A² n² ‖v‖⁴.

    Args:
      logprobs: of the tokens under the policy before the update.
      square_sum, cube_sum: S₂ and S₃ of the distributions they were drawn from, over the whole
        vocabulary or a support that contains the token.
      feature_square_norm: n; for logits `W h / T` give `n / T²`.
      advantages: A, one per sequence or per token.
      learning_rate: η > 0, may be traced.

    Returns:
      `[B, T]` each; 0 where A = 0. `shift` is never negative.

    Raises:
      ValueError: wrong rank, dtype or unequal shapes, η not positive.

    Source: CAPO, 2025, arXiv 2510.00819; that power sums suffice is worked out here.
    """
    _checks.rank("logprobs", logprobs, 2)
    arrays = {
        "logprobs": logprobs,
        "square_sum": square_sum,
        "cube_sum": cube_sum,
        "feature_square_norm": feature_square_norm,
    }
    _checks.floating(**arrays)
    _checks.same_shape(**arrays)
    _check_rate(learning_rate)
    a = _per_token(advantages, logprobs)
    p = jnp.exp(logprobs)
    # The other tokens' sums; not below 0 where they are rounding errors of a certain token.
    others_square = jnp.maximum(square_sum - p**2, 0.0)
    others_cube = jnp.maximum(cube_sum - p**3, 0.0)
    norm = (1 - p) ** 2 + others_square
    mean = p * (1 - p) - others_square
    square = p * (1 - p) ** 2 + others_cube
    scale = a * feature_square_norm
    return _curvature(
        a,
        slope=a * scale * norm,
        along=scale * norm,
        variance=scale**2 * jnp.maximum(square - mean**2, 0.0),
        rate=learning_rate,
    )


def head_curvature(
    direction: Direction,
    hidden: Float[Array, "B T H"],
    support: TokenSupport,
    advantages: Float[Array, " B"] | Float[Array, "B T"],
    *,
    learning_rate: float | Float[Array, ""],
) -> Curvature:
    """Curvature of any planned step, on a head restricted to likely tokens.

    One position of the batch at a time, so that no `[B, T, K, H]` is made.

    Args:
      direction: `(gradient, ids) -> G`: the planned direction for every row's gradient
        `g[B, K, H]` in the head's rows `ids[B, K]`; `sgd_direction`, or
        `functools.partial(adam_direction, moments)`.
      hidden: h each token was drawn from, at the token's own index.
      support: of each token, from `head_support` for instance.
      advantages: A, one per sequence or per token.
      learning_rate: η > 0, may be traced.

    Returns:
      `[B, T]` each; 0 where A = 0 and `direction` is `sgd_direction`.

    Raises:
      ValueError: wrong ranks, dtypes or unequal shapes, η not positive; concrete probabilities that
        sum to more than 1, a concrete `chosen` outside the support.

    Source: CAPO, 2025, arXiv 2510.00819.
    """
    _check_head(hidden, support)
    _check_rate(learning_rate)
    a = _per_token(advantages, support.chosen)

    def position(_: None, at: Any) -> tuple[None, tuple[Array, Array, Array]]:
        h, p, ids, chosen, advantage = at
        score, gradient = _token_gradient(h, p, chosen, advantage)
        planned = direction(gradient, ids)
        u = jnp.einsum("bkh,bh->bk", planned, h)
        variance = jnp.sum(p * u**2, axis=1) - jnp.sum(p * u, axis=1) ** 2
        return None, (jnp.sum(gradient * planned, axis=(1, 2)), jnp.sum(score * u, 1), variance)

    _, found = jax.lax.scan(position, None, _by_position(hidden, support, a))
    slope, along, variance = (x.T for x in found)
    return _curvature(a, slope=slope, along=along, variance=variance, rate=learning_rate)


def curvature_mask(
    curvature: Curvature, *, gain_low: float, gain_high: float, shift_high: float
) -> Bool[Array, "B T"]:
    """True for tokens whose step stays in the trust region.

    `gain_low < gain < gain_high and shift < shift_high`; infinite limits accept all.

    Args:
      curvature: from `head_curvature` or `head_curvature_sgd`.
      gain_low, gain_high: limits of the change of the objective; ±0.01 in the paper for advantages
        scaled by their deviation, ±5e-4 for centred ones.
      shift_high: limit of the change of the policy, > 0; 1e-4 and 1e-3 in the paper.

    Returns:
      bool `[B, T]`; false where a prediction is not a number.

    Raises:
      ValueError: `gain_low` not below `gain_high`, `shift_high` not positive.

    Source: CAPO, 2025, arXiv 2510.00819.
    """
    _checks.in_range("shift_high", shift_high, 0.0, low_open=True)
    _checks.in_range("gain_high", gain_high, gain_low, low_open=True)
    gain = curvature.gain
    return (gain > gain_low) & (gain < gain_high) & (curvature.shift < shift_high)


# --- planned steps --------------------------------------------------------------------------------


def sgd_direction(gradient: Float[Array, "B K H"], ids: Int[Array, "B K"]) -> Array:
    """The plain gradient's step, G = g.

    Args:
      gradient: of the head's rows on one position's support.
      ids: of those rows; not read.

    Returns:
      the gradient itself.
    """
    return gradient


def adam_direction(
    moments: ShadowAdam,
    gradient: Float[Array, "B K H"],
    ids: Int[Array, "B K"],
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    epsilon: float = 1e-8,
) -> Float[Array, "B K H"]:
    """The step Adam would take if each gradient came next, nothing being remembered.

    `M' = b₁ M + (1 - b₁) g`, `Q' = b₂ Q + (1 - b₂) g²`,
    `G = (M' / (1 - b₁^{n+1})) / (√(Q' / (1 - b₂^{n+1})) + ε)` on the rows `ids` of M and Q.

    Args:
      moments: from `shadow_adam_init` and `shadow_adam_update`.
      gradient: of every row of the batch on its own, in the head's rows `ids`.
      ids: in `[0, V)`.
      b1, b2: in [0, 1).
      epsilon: ε > 0.

    Returns:
      `[B, K, H]`.

    Raises:
      ValueError: a number out of range, moments of another width, concrete ids out of range.

    Source: CAPO, 2025, arXiv 2510.00819; its code takes the plain gradient in the first step.
    """
    _check_adam(b1, b2)
    _checks.in_range("epsilon", epsilon, 0.0, low_open=True)
    _check_rows(moments, jnp.shape(gradient)[-1], ids)
    n = moments.steps + 1
    mean = b1 * moments.mean[ids] + (1 - b1) * gradient
    square = b2 * moments.square[ids] + (1 - b2) * gradient**2
    return (mean / (1 - b1**n)) / (jnp.sqrt(square / (1 - b2**n)) + epsilon)


def shadow_adam_init(num_rows: int, size: int) -> ShadowAdam:
    """Adam's moments of the output head before any step: zeros.

    Args:
      num_rows: V, tokens of the head.
      size: H, features.

    Returns:
      two f32 `[V, H]` and a step count of 0.

    Raises:
      ValueError: a size below 1.
    """
    _checks.in_range("num_rows", num_rows, 1)
    _checks.in_range("size", size, 1)
    shape = (num_rows, size)  # two arrays: a step that donates them takes each once
    return ShadowAdam(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32), jnp.int32(0))


def shadow_adam_update(
    moments: ShadowAdam,
    gradient: Float[Array, "V H"],
    accepted: Bool[Array, "B T"],
    *,
    b1: float = 0.9,
    b2: float = 0.999,
) -> ShadowAdam:
    """The moments after a step with this gradient.

    Args:
      moments: before it.
      gradient: of the accepted tokens, from `head_gradient`.
      accepted: tokens that were learnt from; if there are none, there was no step and the moments
        stay, their count too.
      b1, b2: in [0, 1).

    Returns:
      the new moments. Rows without gradient decay as Adam's do; the paper's code leaves them.

    Raises:
      ValueError: a number out of range, unequal shapes.

    Source: CAPO, 2025, arXiv 2510.00819.
    """
    _check_adam(b1, b2)
    _checks.same_shape(moments=moments.mean, gradient=gradient)
    _checks.boolean(accepted=accepted)
    stepped = ShadowAdam(
        b1 * moments.mean + (1 - b1) * gradient,
        b2 * moments.square + (1 - b2) * gradient**2,
        moments.steps + 1,
    )
    any_accepted = jnp.any(accepted)
    return jax.tree.map(
        lambda new, old: jnp.where(any_accepted, new, old).astype(old.dtype), stepped, moments
    )


def head_gradient(
    hidden: Float[Array, "B T H"],
    support: TokenSupport,
    advantages: Float[Array, " B"] | Float[Array, "B T"],
    accepted: Bool[Array, "B T"],
    *,
    num_rows: int,
) -> Float[Array, "V H"]:
    """Mean over the accepted tokens of `A v hᵀ`, in the rows of the whole head.

    Args:
      hidden, support, advantages: as in `head_curvature`.
      accepted: tokens that count.
      num_rows: V, static.

    Returns:
      `[V, H]`, 0 if no token counts; the direction of ascent.

    Raises:
      ValueError: as `head_curvature`; concrete ids of the support out of range.
    """
    _check_head(hidden, support)
    _checks.boolean(accepted=accepted)
    _checks.same_shape(chosen=support.chosen, accepted=accepted)
    _check_ids(support.ids, num_rows)
    a = jnp.where(accepted, _per_token(advantages, support.chosen), 0.0)

    def position(total: Array, at: Any) -> tuple[Array, None]:
        h, p, ids, chosen, advantage = at
        _, gradient = _token_gradient(h, p, chosen, advantage)
        return total.at[ids].add(gradient), None

    dtype = jnp.result_type(hidden, support.probabilities, a)
    zeros = jnp.zeros((num_rows, hidden.shape[2]), dtype)
    total, _ = jax.lax.scan(position, zeros, _by_position(hidden, support, a))
    return total / jnp.maximum(jnp.sum(accepted), 1)


def head_support(
    logits: Float[Array, "B T V"], tokens: Int[Array, "B T"], *, size: int
) -> TokenSupport:
    """The `size` most likely tokens; the drawn one takes the last place if it is not among them.

    Args:
      logits: each token was drawn from, at the token's own index.
      tokens: drawn, in `[0, V)`.
      size: K, static, at most V.

    Returns:
      probabilities out of the whole vocabulary, ids, and where the drawn token is among them.

    Raises:
      ValueError: wrong ranks, dtypes or unequal shapes, K outside [1, V].
    """
    _checks.rank("logits", logits, 3)
    _checks.floating(logits=logits)
    _checks.integer(tokens=tokens)
    if jnp.shape(tokens) != jnp.shape(logits)[:2]:
        raise ValueError(
            f"tokens: expected shape {jnp.shape(logits)[:2]} like logits, got {jnp.shape(tokens)}"
        )
    _checks.in_range("size", size, 1, jnp.shape(logits)[-1])
    probabilities = jax.nn.softmax(logits)
    _, ids = jax.lax.top_k(logits, size)
    drawn = jnp.asarray(tokens)[..., None]
    inside = jnp.any(ids == drawn, axis=-1, keepdims=True)
    ids = jnp.where(~inside & (jnp.arange(size) == size - 1), drawn, ids)
    return TokenSupport(
        jnp.take_along_axis(probabilities, ids, axis=-1), ids, jnp.argmax(ids == drawn, axis=-1)
    )


# --- pieces ---------------------------------------------------------------------------------------


def _curvature(a: Array, *, slope: Array, along: Array, variance: Array, rate: Any) -> Curvature:
    quadratic = a * (along**2 - variance)
    gain = rate * slope + rate**2 / 2 * quadratic
    return jax.lax.stop_gradient(Curvature(gain, rate**2 / 2 * along**2))


def _token_gradient(
    hidden: Array, probabilities: Array, chosen: Array, advantage: Array
) -> tuple[Float[Array, "B K"], Float[Array, "B K H"]]:
    """v and `A v hᵀ` of one token of each row."""
    one_hot = jax.nn.one_hot(chosen, probabilities.shape[1], dtype=probabilities.dtype)
    score = one_hot - probabilities
    return score, (advantage[:, None] * score)[:, :, None] * hidden[:, None, :]


def _by_position(hidden: Array, support: TokenSupport, a: Array) -> Any:
    arrays = (hidden, support.probabilities, support.ids, support.chosen, a)
    return jax.tree.map(lambda x: jnp.swapaxes(jnp.asarray(x), 0, 1), arrays)


def _per_token(advantages: Any, like: Any) -> Float[Array, "B T"]:
    _checks.rank("advantages", advantages, 1, 2)
    _checks.floating(advantages=advantages)
    given, shape = jnp.asarray(advantages), jnp.shape(like)
    given = given[:, None] if given.ndim == 1 else given
    if given.shape not in (shape, (shape[0], 1)):
        raise ValueError(
            f"advantages: expected shape {shape[:1]} or {shape}, got {jnp.shape(advantages)}"
        )
    return jnp.broadcast_to(given, shape)


def _check_head(hidden: Any, support: TokenSupport) -> None:
    _checks.rank("hidden", hidden, 3)
    _checks.rank("probabilities", support.probabilities, 3)
    _checks.floating(hidden=hidden, probabilities=support.probabilities)
    _checks.integer(ids=support.ids, chosen=support.chosen)
    _checks.same_shape(probabilities=support.probabilities, ids=support.ids)
    for name, array in (("probabilities", support.probabilities), ("chosen", support.chosen)):
        if jnp.shape(array)[:2] != jnp.shape(hidden)[:2]:
            raise ValueError(
                f"{name}: expected shape {jnp.shape(hidden)[:2]} of rows and tokens like hidden, "
                f"got {jnp.shape(array)}"
            )
    _checks.rank("chosen", support.chosen, 2)
    if _readable(support.probabilities):
        total = np.asarray(support.probabilities).sum(-1).max(initial=0.0)
        if total > 1 + 1e-3:
            raise ValueError(f"probabilities: expected sums of at most 1, got {total}")
    if _readable(support.chosen):
        size = jnp.shape(support.probabilities)[2]
        wrong = np.asarray(support.chosen)
        wrong = wrong[(wrong < 0) | (wrong >= size)]
        if wrong.size:
            raise ValueError(
                f"chosen: expected a place in the support, [0, {size}), got {wrong[0]}: the drawn "
                "token has to be in it"
            )


def _check_rows(moments: ShadowAdam, size: int, ids: Any) -> None:
    if moments.mean.shape[1] != size:
        raise ValueError(
            f"moments: expected {size} features like the gradient, got {moments.mean.shape[1]}"
        )
    _check_ids(ids, moments.mean.shape[0])


def _check_ids(ids: Any, num_rows: int) -> None:
    if _readable(ids):
        values = np.asarray(ids)
        if values.size and (values.min() < 0 or values.max() >= num_rows):
            raise ValueError(
                f"ids: expected rows in [0, {num_rows}), got [{values.min()}, {values.max()}]"
            )


def _check_rate(learning_rate: Any) -> None:
    _checks.in_range("learning_rate", learning_rate, 0.0, low_open=True)


def _check_adam(b1: float, b2: float) -> None:
    _checks.in_range("b1", b1, 0.0, 1.0, high_open=True)
    _checks.in_range("b2", b2, 0.0, 1.0, high_open=True)


def _readable(x: Any) -> bool:
    return _checks.is_concrete(x) and getattr(x, "is_fully_addressable", True)
