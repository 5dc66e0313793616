"""Critics of the present policy that learn from its own returns and from the data of others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from pgjax import _checks
from pgjax.surrogates.values import value_error


def hybrid_critic_loss(
    online_values: Float[Array, " N"],
    online_targets: Float[Array, " N"],
    offline_values: Float[Array, " M"],
    offline_targets: Float[Array, " M"],
    *,
    weight: float = 1.0,
) -> Float[Array, ""]:
    """mean_on (f - G)² + λ mean_off (f - y)²: returns where the policy has been, backups elsewhere.

    Args:
      online_values: f(s, a) of what the policy met, `[N]`, differentiable.
      online_targets: G, its returns to go, `[N]`; detached here.
      offline_values: f(s, a) of recorded transitions, `[M]`, differentiable.
      offline_targets: y = r + γ f'(s', a'), a' drawn by the present policy in s', `[M]`
        (`one_step_targets`); detached here.
      weight: λ ≥ 0.

    Returns:
      f32 scalar; a part without rows is 0.

    Raises:
      ValueError: unequal shapes, wrong dtypes or ranks, a negative λ.

    Source: HNPG, Zhou et al. 2023, arXiv 2311.08384; fitted Q-evaluation: Le et al. 2019.
    """
    _checks.in_range("weight", weight, 0.0)
    _checks.rank("online_values", online_values, 1)
    _checks.rank("offline_values", offline_values, 1)
    for name, pair in {
        "online": (online_values, online_targets),
        "offline": (offline_values, offline_targets),
    }.items():
        given = {f"{name}_values": pair[0], f"{name}_targets": pair[1]}
        _checks.floating(**given)
        _checks.same_shape(**given)

    def part(values: Array, targets: Array) -> Float[Array, ""]:
        return 2.0 * jnp.sum(value_error(values, targets)) / max(values.shape[0], 1)

    online = part(online_values, online_targets)
    return online + weight * part(offline_values, offline_targets)


def sampled_values(
    key: PRNGKeyArray,
    draw: Callable[[PRNGKeyArray], Any],
    action_value: Callable[[Any], Float[Array, "*B"]],
    *,
    number: int = 10,
) -> Float[Array, "*B"]:
    """V(s) = mean of f(s, a_i) over actions a_i drawn by the policy.

    Args:
      key: of the actions.
      draw: `key -> actions [..., A]`, one in each state.
      action_value: `actions -> f(s, a) [...]`.
      number: of draws, ≥ 1.

    Returns:
      f32 `[...]`.

    Raises:
      ValueError: a `number` below 1.
    """
    _checks.in_range("number", number, 1)
    keys = jax.random.split(key, number)
    return jax.vmap(lambda key: action_value(draw(key)))(keys).mean(axis=0)
