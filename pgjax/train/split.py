"""Sampling on some devices while others learn, a fixed number of steps apart."""

from __future__ import annotations

import collections
import concurrent.futures
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from pgjax.train.collecting import Collect
from pgjax.train.loop import Batches
from pgjax.train.partial import combine
from pgjax.train.state import TrainState
from pgjax.train.update import Update
from pgjax.types import Rollout, _Replaceable, pytree_dataclass


@pytree_dataclass
class SplitState(_Replaceable):
    """What a split run carries: all that a resumed one needs to repeat what was in flight.

    Attributes:
      learner: parameters, optimizer state, steps, key.
      behavior: on the samplers' devices, the parameters before each of the last `staleness`
        updates, oldest first; before the first update, the initial ones.
    """

    learner: TrainState
    behavior: tuple[Any, ...]

    @property
    def params(self) -> Any:
        """The learner's."""
        return self.learner.params

    @property
    def step(self) -> Int[Array, ""]:
        """The learner's."""
        return self.learner.step

    @property
    def key(self) -> PRNGKeyArray:
        """The run's."""
        return self.learner.key


class Lookahead:
    """Each batch together with those that follow it; its position is that of the first."""

    def __init__(self, batches: Batches, ahead: int) -> None:
        """Args: `batches`, endless, and how many to see `ahead`, at least 0."""
        if ahead < 0:
            raise ValueError(f"ahead: expected at least 0, got {ahead}")
        self._batches, self._ahead = batches, ahead
        self._drawn: collections.deque[tuple[Any, Any]] = collections.deque()
        self._position = batches.get_state()

    def __next__(self) -> tuple[Any, ...]:
        while len(self._drawn) <= self._ahead:
            batch = next(self._batches)
            self._drawn.append((batch, self._batches.get_state()))
        following = tuple(batch for batch, _ in self._drawn)
        self._position = self._drawn.popleft()[1]
        return following

    def get_state(self) -> Any:
        return self._position

    def set_state(self, state: Any) -> None:
        self._batches.set_state(state)
        self._drawn.clear()
        self._position = state


class SplitStep:
    """A step `(state, batches of a Lookahead) -> (state, metrics)` for `fit`.

    While the learner makes update n from one rollout, a thread of the host samples and judges the
    next `staleness` ones on devices of its own: the rollout of update n has the parameters before
    update n - `staleness` (before the first, where there is no such), always, however long
    anything takes. So a run can be repeated, and resumed bit for bit: the state holds the
    parameters of what was in flight, which is sampled again. A step takes as long as the slower of
    the two, rewards on the host included.

    The surrogate sees how old a rollout is by its `behavior_logprobs`, and by
    `extras["staleness"]`, int32 `[B]`.
    """

    def __init__(
        self,
        collect: Collect,
        update: Update,
        *,
        staleness: int,
        rollout_shardings: Any,
        place_prompts: Any,
        place_rollout: Any,
        reference_params: Any | None = None,
        frozen: Any | None = None,
        rollout_frozen: Any | None = None,
    ) -> None:
        """Of one process; close it, or use it as a context manager.

        Args:
          collect: from `make_collect`, of a decoder on the samplers' mesh.
          update: from `make_update`, of one on the learner's.
          staleness: updates between sampling and learning, at least 1.
          rollout_shardings: where trained parameters go for sampling, one for all or a tree.
          place_prompts: of a batch of prompts, to the samplers' devices.
          place_rollout: of a rollout, to the learner's.
          reference_params, frozen: as for `make_text_step`, on the learner's devices.
          rollout_frozen: the same frozen parameters on the samplers'.

        Raises:
          ValueError: a staleness below 1, several processes.
        """
        if staleness < 1:
            raise ValueError(
                f"staleness: expected at least 1, got {staleness}; where sampling and learning "
                "take turns use make_text_step"
            )
        if jax.process_count() > 1:
            raise ValueError("split: one process is wanted, got several")
        if (frozen is None) != (rollout_frozen is None):
            raise ValueError("rollout_frozen: expected frozen parameters on both sides or neither")
        self._collect, self._update, self.staleness = collect, update, staleness
        self._shardings, self._place_prompts = rollout_shardings, place_prompts
        self._place_rollout, self._reference = place_rollout, reference_params
        self._frozen, self._rollout_frozen = frozen, rollout_frozen
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "pgjax-rollouts")
        self._pending: dict[int, concurrent.futures.Future[tuple[Rollout, dict[str, Any]]]] = {}
        self._next = -1  # the step whose state `_pending` belongs to

    def __enter__(self) -> SplitStep:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives up what is in flight, after the rollout that is being sampled."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    def init(self, learner: TrainState) -> SplitState:
        """The state before the first step."""
        published = self._publish(learner.params)
        return SplitState(learner=learner, behavior=(published,) * self.staleness)

    def _publish(self, params: Any) -> Any:
        """A copy for the samplers: the update donates what it is given."""
        return jax.device_put(params, self._shardings, may_alias=False)

    def __call__(
        self, state: SplitState, batches: tuple[Any, ...]
    ) -> tuple[SplitState, dict[str, Any]]:
        if len(batches) != self.staleness + 1:
            raise ValueError(
                f"batches: expected {self.staleness + 1}, from Lookahead(batches, "
                f"{self.staleness}), got {len(batches)}"
            )
        learner, began = state.learner, time.perf_counter()
        at = int(learner.step)
        if at != self._next:  # a run that begins, or another one
            self._forget()
        newest, key = self._publish(learner.params), _on_host(learner.key)
        behavior = (*state.behavior, newest)
        for offset, (params, batch) in enumerate(zip(behavior, batches, strict=True)):
            if at + offset not in self._pending:
                self._pending[at + offset] = self._worker.submit(
                    self._sample, params, key, at + offset, batch
                )
        rollout, collected = self._pending.pop(at).result()
        waited = time.perf_counter() - began
        age = min(self.staleness, at)
        ages = jnp.full(rollout.rewards.shape[0], age, jnp.int32)
        rollout = rollout.replace(extras={**(rollout.extras or {}), "staleness": ages})
        learner, metrics = self._update(
            learner, self._place_rollout(rollout), self._reference, self._frozen
        )
        jax.block_until_ready(metrics)
        self._next = at + 1
        return SplitState(learner=learner, behavior=behavior[1:]), {
            **metrics,
            **collected,
            "staleness": age,
            "seconds_waiting_for_rollouts": waited,
            "seconds_learning": time.perf_counter() - began - waited,
        }

    def _sample(
        self, params: Any, key: PRNGKeyArray, step: int, batch: Any
    ) -> tuple[Rollout, dict[str, Any]]:
        whole = combine(params, self._rollout_frozen)
        rollout, metrics = self._collect(whole, key, step, self._place_prompts(batch))
        return jax.block_until_ready(rollout), jax.device_get(metrics)

    def _forget(self) -> None:
        for future in self._pending.values():
            future.cancel()
        concurrent.futures.wait(self._pending.values())
        self._pending.clear()


def _on_host(key: PRNGKeyArray) -> PRNGKeyArray:
    """A copy of a key that goes with whatever devices it meets."""
    return jax.random.wrap_key_data(
        jnp.asarray(np.asarray(jax.random.key_data(key))), impl=jax.random.key_impl(key)
    )
