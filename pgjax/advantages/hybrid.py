"""HPT: how much of each prompt's loss is reinforcement and how much imitation."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pgjax import _checks

# Of 8 samples solved: weight of reinforcement, weight of imitation.
_SOFT_TABLE = (
    (1.0, 1.0),
    (0.0, 1.0),
    (0.125, 0.5),
    (0.25, 0.25),
    (0.5, 0.125),
    (1.0, 0.0),
    (1.0, 0.0),
    (1.0, 0.0),
    (1.0, 0.0),
)


def switch_coefficients(
    success_rate: Float[Array, " S"], *, gate: float = 0.0
) -> tuple[Float[Array, " S"], Float[Array, " S"]]:
    """Hard switch: reinforcement where the success rate lies above the gate, imitation elsewhere.

    `α = 1[P > gate]`, `β = 1 - α`.

    Args:
      success_rate: P of each prompt's own samples, in [0, 1].
      gate: in [0, 1]; 0 imitates only where nothing was solved.

    Returns:
      f32 `[S]` each: α, the weight of reinforcement, and β, that of imitation.

    Raises:
      ValueError: `gate` out of range, a non-floating dtype.

    Source: HPT, Lv et al. 2025, arXiv 2509.04419; there gate 0 for Qwen, 2/8 for Llama models.
    """
    _checks.in_range("gate", gate, 0.0, 1.0)
    _checks.floating(success_rate=success_rate)
    reinforce = (jnp.asarray(success_rate) > gate).astype(jnp.float32)
    return reinforce, 1 - reinforce


def soft_coefficients(
    success_rate: Float[Array, " S"],
) -> tuple[Float[Array, " S"], Float[Array, " S"]]:
    """Gradual switch, by the number solved out of 8.

    | solved | 0 | 1 | 2 | 3 | 4 | 5 to 8 |
    |---|---|---|---|---|---|---|
    | α | 1 | 0 | 1/8 | 1/4 | 1/2 | 1 |
    | β | 1 | 1 | 1/2 | 1/4 | 1/8 | 0 |

    With none solved α has no effect: equal rewards give no gradient.

    Args:
      success_rate: in [0, 1]; with other than 8 samples the nearest eighth counts.

    Returns:
      f32 `[S]` each: α, the weight of reinforcement, and β, that of imitation.

    Raises:
      ValueError: a non-floating dtype.

    Source: the code of HPT, Lv et al. 2025, arXiv 2509.04419.
    """
    _checks.floating(success_rate=success_rate)
    solved = jnp.clip(jnp.round(8 * jnp.asarray(success_rate)), 0, 8).astype(jnp.int32)
    table = jnp.array(_SOFT_TABLE, jnp.float32)
    return table[solved, 0], table[solved, 1]
