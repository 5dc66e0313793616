"""What a run carries from step to step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray

from pgjax import parallel
from pgjax.objectives import Objective
from pgjax.types import _Replaceable, pytree_dataclass


@pytree_dataclass
class TrainState(_Replaceable):
    """Parameters, optimizer state, step count and PRNG key: all that an update reads and writes.

    Attributes:
      params: pytree of arrays: all that is trained, and only that.
      opt_state: of the optimizer the update was made with.
      step: int32 scalar, updates (rollout batches) so far.
      key: the run's key; every step derives its own by `fold_in(key, step)`, so the key itself
        never changes and a resumed run draws what the uninterrupted one would have.
      memory: of the objective, where it has one.
    """

    params: Any
    opt_state: optax.OptState
    step: Int[Array, ""]
    key: PRNGKeyArray
    memory: Any | None = None


def init(
    params: Any,
    optimizer: optax.GradientTransformation,
    key: PRNGKeyArray,
    *,
    objective: Objective | None = None,
) -> TrainState:
    """A fresh state at step 0, every array placed as the parameters are.

    Args:
      params: pytree of arrays, used as given, not copied (an update donates them).
      optimizer: any Optax transformation.
      key: from `jax.random.key`.
      objective: what is to be minimised, where it has a memory.

    Returns:
      the state; optimizer state that mirrors a parameter has its sharding, all else is replicated
      over the parameters' mesh.
    """
    remembers = None if objective is None else objective.memory
    state = TrainState(
        params=params,
        opt_state=jax.jit(optimizer.init)(params),
        step=jnp.int32(0),
        key=key,
        memory=None if remembers is None else jax.jit(remembers.init)(),  # no array twice
    )
    return parallel.shard_like(state, params)


def shardings(state: TrainState) -> TrainState:
    """Where each array of a state lies: what `make_update` takes as `state_shardings`."""
    return jax.tree.map(lambda x: x.sharding, state)
