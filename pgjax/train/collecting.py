"""From a batch of prompts to a rollout: sample, judge."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from pgjax import models, sampling
from pgjax.train.rollouts import to_rollout
from pgjax.types import Rollout

# A batch of prompts: `prompts` int32[P, Tp], `prompt_lengths` int32[P], and whatever the reward
# function reads, one row per prompt.
PromptBatch = Mapping[str, Any]
RewardFunction = Callable[[sampling.Samples, PromptBatch, PRNGKeyArray], Float[Array, " B"]]
# (all parameters, run's key, updates so far, prompts) -> (rollout, metrics)
Collect = Callable[[Any, PRNGKeyArray, Any, PromptBatch], tuple[Rollout, dict[str, Any]]]


def make_collect(
    decoder: models.FunctionalDecoder,
    reward: RewardFunction,
    *,
    num_samples: int,
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    generate: Callable[..., sampling.Samples] = sampling.generate,
    extras: Callable[[sampling.Samples, PromptBatch], dict[str, Array]] | None = None,
    on_samples: Callable[[int, sampling.Samples, Any], None] | None = None,
) -> Collect:
    """What a step does before its update; randomness derives from the run's key and the step.

    Args:
      decoder, reward, ...: as for `make_text_step`.

    Returns:
      `collect(params, key, step, batch) -> (rollout, metrics)` of whole parameters, the run's key,
      the updates so far and P prompts: a rollout of `B = P * num_samples` rows, and the metrics
      `tokens` sampled, `seconds_sampling` and `seconds_rewarding`.

    Raises:
      ValueError: by `collect`, as `sampling.generate` and `to_rollout` do.
    """

    def collect(
        params: Any, key: PRNGKeyArray, step: Any, batch: PromptBatch
    ) -> tuple[Rollout, dict[str, Any]]:
        began = time.perf_counter()
        sample_key, reward_key = jax.random.split(jax.random.fold_in(key, step))
        samples = generate(
            decoder,
            params["decoder"],
            batch["prompts"],
            batch["prompt_lengths"],
            sample_key,
            num_samples=num_samples,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            stop_tokens=tuple(stop_tokens),
        )
        # Nothing is lost by waiting here: what comes next reads all of what came before.
        jax.block_until_ready(samples)
        sampled = time.perf_counter()
        scores = jax.block_until_ready(reward(samples, batch, reward_key))
        metrics = {
            "tokens": samples.mask.sum(),
            "seconds_sampling": sampled - began,
            "seconds_rewarding": time.perf_counter() - sampled,
        }
        if on_samples is not None:
            on_samples(int(step) + 1, samples, scores)
        facts = None if extras is None else extras(samples, batch)
        return to_rollout(samples, scores, extras=facts), metrics

    return collect
