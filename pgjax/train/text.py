"""One step of reinforcement on text: sample, reward, update."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from pgjax import models, parallel, rewards, sampling
from pgjax.train.collecting import PromptBatch, RewardFunction, make_collect
from pgjax.train.loop import Step
from pgjax.train.partial import combine
from pgjax.train.state import TrainState
from pgjax.train.update import Update
from pgjax.types import Rollout

_log = logging.getLogger("pgjax.train")


def make_text_step(
    decoder: models.FunctionalDecoder,
    update: Update,
    reward: RewardFunction,
    *,
    num_samples: int,
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    reference_params: Any | None = None,
    frozen: Any | None = None,
    generate: Callable[..., sampling.Samples] = sampling.generate,
    extras: Callable[[sampling.Samples, PromptBatch], dict[str, Array]] | None = None,
    prepare: Callable[[Any, Rollout], Rollout] | None = None,
    on_samples: Callable[[int, sampling.Samples, Any], None] | None = None,
) -> Step:
    """A step `(state, prompt batch) -> (state, metrics)` for `fit`.

    Every random choice derives from the state's key and step, so a resumed run repeats it.

    Args:
      decoder: from `pgjax.models`; its parameters are `state.params["decoder"]`, combined with
        what is frozen.
      update: from `make_update`.
      reward: `(samples, batch, key) -> f32[P * G]`; pure JAX, or `host_reward`.
      num_samples: G, completions per prompt.
      max_new_tokens: the length budget.
      stop_tokens: ids that end a completion.
      temperature, top_k, top_p, min_p: of the sampling distribution.
      reference_params: of the reference policy, for objectives that need one.
      frozen: parameters that are not trained, see `train.combine`; with adapters, the base under
        "decoder".
      generate: how completions are sampled: `sampling.generate`, or another function of its
        arguments, such as `sampling.generate_continuous` with its `num_slots` bound.
      extras: what else the objective reads of each completion, such as `answer_ids`.
      prepare: `(all parameters, rollout) -> rollout`, before the update, such as
        `functools.partial(record_experts, decoder)`.
      on_samples: called with step, samples and rewards, for showing completions.

    Returns:
      the step. Its metrics are the update's, `tokens`, sampled in this step, and how long it took
      (`seconds_sampling`, `seconds_rewarding`, `seconds_learning`, preparation included).
    """

    collect = make_collect(
        decoder,
        reward,
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        generate=generate,
        extras=extras,
        on_samples=on_samples,
    )

    def step(state: TrainState, batch: PromptBatch) -> tuple[TrainState, dict[str, Any]]:
        params = combine(state.params, frozen)
        rollout, collected = collect(params, state.key, state.step, batch)
        began = time.perf_counter()
        if prepare is not None:
            rollout = prepare(params, rollout)
        state, metrics = update(state, rollout, reference_params, frozen)
        jax.block_until_ready(metrics)
        return state, {**metrics, **collected, "seconds_learning": time.perf_counter() - began}

    return step


def host_reward(
    verifier: Callable[[str, Any], float] | rewards.isolated.VerifierPool,
    decode: Callable[[Sequence[int]], str],
    examples: Callable[[PromptBatch], Sequence[Any]],
) -> RewardFunction:
    """A reward function that calls a Python verifier on every completion's text.

    A verifier that raises or returns something that is no number gives its sample the reward NaN,
    which every advantage function leaves out; the exception is logged with the sample's index.
    In a job of several processes each judges the completions that its own devices hold.

    Args:
      verifier: `(completion, example) -> float`, or a pool of processes that has one and bounds
        the time and memory of a verdict.
      decode: token ids of a completion, stop token included, to text.
      examples: the batch's examples, one per prompt.
    """

    def reward(samples: sampling.Samples, batch: PromptBatch, key: PRNGKeyArray) -> Array:
        del key
        texts, chosen = rewards.own_completions(samples, batch, decode, examples)
        if isinstance(verifier, rewards.isolated.VerifierPool):
            scores, failures = verifier.judge(texts, chosen)
        else:
            scores, failures = rewards.call_verifier(verifier, texts, chosen)
        for failure in failures:
            _log.warning("verifier failed, sample left out: %s", failure)
        return parallel.rows_of_all(np.asarray(scores, np.float32), samples.tokens)

    return reward
