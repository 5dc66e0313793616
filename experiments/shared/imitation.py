"""Where the reproductions' policies come from: a few demonstrations, before any reward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

import pgjax as pg
from pgjax import objectives


def imitated(
    outputs: pg.train.OutputsFunction,
    params: Any,
    demonstrate: Callable[[PRNGKeyArray], pg.Rollout],
    key: PRNGKeyArray,
    *,
    updates: int,
    learning_rate: float = 3e-3,
) -> Any:
    """Parameters after updates of Adam on fresh demonstrations each; one compiled loop.

    Args:
      outputs: of the policy.
      params: to start from.
      demonstrate: a batch of demonstrations, as `train.demonstrations` makes them.
      key: of all batches.
      updates: how many.
      learning_rate: of Adam.
    """
    optimizer = optax.adam(learning_rate)
    imitate = pg.train.make_update(outputs, objectives.supervised(), optimizer)
    state = pg.train.TrainState(
        params=params, opt_state=optimizer.init(params), step=jnp.int32(0), key=key
    )

    def update(i: Array, state: Any) -> Any:
        return imitate(state, demonstrate(jax.random.fold_in(key, i)))[0]

    return jax.lax.fori_loop(0, updates, update, state).params
