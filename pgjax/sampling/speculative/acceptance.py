"""Which tokens of a draft are accepted, and what is emitted in place of the first that is not.

Source: Leviathan et al. 2022, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pgjax import _checks

_SUM_TOLERANCE = 1e-3


def acceptance(
    uniforms: Float[Array, "*batch g"],
    draft_tokens: Int[Array, "*batch g"],
    draft_probs: Float[Array, "*batch g V"],
    target_probs: Float[Array, "*batch g1 V"],
) -> tuple[Int[Array, "*batch"], Float[Array, "*batch V"]]:
    """How many draft tokens are accepted, and the law of the token that follows them.

        token i is accepted while u_i < min(1, q_i(x_i) / p_i(x_i));
        then, i being the first rejected:  normalised max(q_i - p_i, 0);  none rejected:  q_{γ+1}

    The rule is `accept` with its randomness given. Where `q_i - p_i` is nowhere positive (p = q up
    to rounding) the law is q_i.

    Args:
      uniforms: in [0, 1), one per draft token.
      draft_tokens, draft_probs, target_probs: as in `accept`.
    """
    chosen = draft_tokens[..., None]
    p = jnp.take_along_axis(draft_probs, chosen, axis=-1)[..., 0]
    q = jnp.take_along_axis(target_probs[..., :-1, :], chosen, axis=-1)[..., 0]
    accepted = uniforms * p < q
    count = jnp.sum(jnp.cumprod(accepted.astype(jnp.int32), axis=-1), axis=-1)
    # After the last draft token there is no p, and q - 0 is q.
    padded = jnp.concatenate([draft_probs, jnp.zeros_like(draft_probs[..., :1, :])], axis=-2)
    target, draft = (
        jnp.take_along_axis(probs, count[..., None, None], axis=-2)[..., 0, :]
        for probs in (target_probs, padded)
    )
    residual = jnp.maximum(target - draft, 0.0)
    total = jnp.sum(residual, axis=-1, keepdims=True)
    law = jnp.where(total > 0.0, residual / jnp.where(total > 0.0, total, 1.0), target)
    return count, law


def accept(
    key: PRNGKeyArray,
    draft_tokens: Int[Array, "*batch g"],
    draft_probs: Float[Array, "*batch g V"],
    target_probs: Float[Array, "*batch g1 V"],
) -> tuple[Int[Array, "*batch g1"], Int[Array, "*batch"]]:
    """Tokens distributed exactly as samples of the target, from those of a draft.

    See `acceptance` for the rule. With x_i drawn from p_i, the first token has the law q_1, the
    second (where there is one) q_2 given the first, and so on.

    Args:
      key: randomness.
      draft_tokens: x_1 ... x_γ, γ ≥ 1, each drawn from its `draft_probs`.
      draft_probs: p_1 ... p_γ, the laws they were drawn from.
      target_probs: q_1 ... q_{γ+1}, the target's laws at the same positions and the one after.

    Returns:
      tokens int32 `[..., γ+1]`, -1 behind the last emitted one, and how many were emitted, in
      [1, γ+1].

    Raises:
      ValueError: shapes that do not fit; and, where values are not traced, a sum of probabilities
        off 1 by more than 1e-3, a draft token outside the vocabulary or of probability 0.
    """
    _check_laws(draft_tokens, draft_probs, target_probs)
    uniform_key, token_key = jax.random.split(key)
    uniforms = jax.random.uniform(uniform_key, jnp.shape(draft_tokens), jnp.float32)
    count, law = acceptance(uniforms, draft_tokens, draft_probs, target_probs)
    token = jax.random.categorical(token_key, jnp.log(law), axis=-1)[..., None]
    padded = jnp.concatenate([draft_tokens, token], axis=-1)
    position = jnp.arange(padded.shape[-1])
    last = count[..., None]
    tokens = jnp.where(position < last, padded, jnp.where(position == last, token, -1))
    return tokens.astype(jnp.int32), count + 1


def _check_laws(draft_tokens: Any, draft_probs: Any, target_probs: Any) -> None:
    _checks.integer(draft_tokens=draft_tokens)
    _checks.floating(draft_probs=draft_probs, target_probs=target_probs)
    *batch, count = jnp.shape(draft_tokens) or (0,)
    if count < 1:
        raise ValueError(
            f"draft_tokens: expected at least one, got shape {jnp.shape(draft_tokens)}"
        )
    vocab = jnp.shape(draft_probs)[-1:]
    for name, probs, rows in (("draft_probs", draft_probs, 0), ("target_probs", target_probs, 1)):
        wanted = (*batch, count + rows, *vocab)
        if jnp.shape(probs) != wanted:
            raise ValueError(f"{name}: expected shape {wanted}, got {jnp.shape(probs)}")
    if not _checks.is_concrete(draft_tokens, draft_probs, target_probs):
        return
    for name, probs in (("draft_probs", draft_probs), ("target_probs", target_probs)):
        sums = np.asarray(probs, np.float64).sum(-1)
        if not (np.abs(sums - 1.0) <= _SUM_TOLERANCE).all():
            worst = sums.flat[np.argmax(np.abs(sums - 1.0))]
            raise ValueError(f"{name}: expected rows that sum to 1, got a sum of {worst}")
    tokens = np.asarray(draft_tokens)
    if tokens.min() < 0 or tokens.max() >= vocab[0]:
        raise ValueError(
            f"draft_tokens: expected ids in [0, {vocab[0]}), got values in "
            f"[{tokens.min()}, {tokens.max()}]"
        )
    drawn = np.take_along_axis(np.asarray(draft_probs), tokens[..., None], axis=-1)
    if (drawn <= 0).any():
        raise ValueError("draft_tokens: expected tokens that the draft can draw, got probability 0")
