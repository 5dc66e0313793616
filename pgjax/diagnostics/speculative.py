"""What speculative sampling gains: acceptance, tokens per pass of the target, speed-up."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pgjax import _checks


def acceptance_rate(
    draft_probs: Float[Array, "*batch V"], target_probs: Float[Array, "*batch V"]
) -> Float[Array, "*batch"]:
    """Probability that a token of the draft is accepted: `Σ_v min(p_v, q_v) = 1 - TVD(p, q)`.

    Args:
      draft_probs: p, after the temperature and filters it is sampled with.
      target_probs: q, after the same.

    Raises:
      ValueError: unequal shapes.

    Source: Leviathan et al. 2022, arXiv:2211.17192.
    """
    _checks.same_shape(draft_probs=draft_probs, target_probs=target_probs)
    return jnp.sum(jnp.minimum(draft_probs, target_probs), axis=-1)


def block_efficiency(
    acceptance: float | Float[Array, "*batch"], *, num_draft_tokens: int
) -> Float[Array, "*batch"]:
    """Expected tokens per pass of the target, each draft token accepted with probability α.

        τ = 1 + Σ_{i=1..γ} α^i = (1 - α^(γ+1)) / (1 - α)

    Args:
      acceptance: α in [0, 1].
      num_draft_tokens: γ, at least 1.

    Returns:
      f32 in [1, γ + 1]; the sum is used, so α = 1 gives γ + 1.

    Raises:
      ValueError: γ below 1.

    Source: Leviathan et al. 2022, arXiv:2211.17192.
    """
    _checks.in_range("num_draft_tokens", num_draft_tokens, 1)
    alpha = jnp.asarray(acceptance, jnp.float32)[..., None]
    return block_efficiency_by_position(
        jnp.broadcast_to(alpha, (*alpha.shape[:-1], num_draft_tokens))
    )


def block_efficiency_by_position(acceptance: Float[Array, "*batch g"]) -> Float[Array, "*batch"]:
    """As `block_efficiency`, with an acceptance for each position: `1 + Σ_i Π_{j≤i} α_j`.

    Args:
      acceptance: of each of the γ draft tokens, given that those before it were accepted.

    Source: Goel et al. 2024, arXiv:2403.00858.
    """
    return 1.0 + jnp.sum(jnp.cumprod(jnp.asarray(acceptance, jnp.float32), axis=-1), axis=-1)


def memory_bound_speedup(
    efficiency: float | Float[Array, "*batch"], *, num_draft_tokens: int, cost_ratio: float
) -> Float[Array, "*batch"]:
    """Speed-up over sampling from the target alone: `τ / (c·γ + 1)`.

    It holds where a pass costs what reading the weights costs, whatever the number of tokens.

    Args:
      efficiency: τ, tokens per pass of the target.
      num_draft_tokens: γ, passes of the draft per pass of the target, at least 1.
      cost_ratio: c, cost of a pass of the draft over one of the target (of their sizes), at
        least 0.

    Raises:
      ValueError: γ below 1, a negative ratio.

    Source: Goel et al. 2024, arXiv:2403.00858.
    """
    _checks.in_range("num_draft_tokens", num_draft_tokens, 1)
    _checks.in_range("cost_ratio", cost_ratio, 0.0)
    return jnp.asarray(efficiency, jnp.float32) / (cost_ratio * num_draft_tokens + 1.0)
