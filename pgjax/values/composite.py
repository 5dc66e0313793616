"""Errors of the values of actions in parts, which share one target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pgjax import _checks
from pgjax.policies.composite import CompositeAction, CompositeValues, composite_taken
from pgjax.values.losses import huber_error


def composite_error(
    values: CompositeValues,
    action: CompositeAction,
    targets: Float[Array, "*B"],
    *,
    error: Callable[[Any, Any], Float[Array, "*B K"]] = huber_error,
) -> Float[Array, "*B"]:
    """Σ over the parts used of error(Q(s, part), y): the same y for element, verb and argument.

    Args:
      values: Q of all parts, differentiable.
      action: the one taken; a click's argument gets no error and no gradient.
      targets: y = r + γ(1 - terminated) `policies.composite_greedy_value`, `[...]`; detached here.
      error: `(values, targets) -> per entry`.

    Returns:
      f32 `[...]`.

    Raises:
      ValueError: as `policies.composite_taken`; targets of another shape or dtype.

    Source: QWeb, Gur et al. 2018, arXiv 1812.09195. That each part regresses on the element's
    maximum is a reconstruction; with the best verb and argument all three maxima agree in the
    limit.
    """
    _checks.floating(targets=targets)
    found, used = composite_taken(values, action)
    if np.shape(targets) != found.shape[:-1]:
        raise ValueError(f"targets: expected shape {found.shape[:-1]}, got {np.shape(targets)}")
    repeated = jnp.broadcast_to(jnp.asarray(targets)[..., None], found.shape)
    return jnp.sum(jnp.where(used, error(found, repeated), 0.0), axis=-1)
