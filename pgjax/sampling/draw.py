"""The draw of one token, and the arguments that every way of sampling shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from pgjax import _checks
from pgjax.sampling.filters import filter_logits


class Settings(NamedTuple):
    """Of the sampling distribution; a filter that is None is off and costs nothing."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""] | None
    top_p: Float[Array, ""] | None
    min_p: Float[Array, ""] | None
    stop_tokens: Int[Array, " K"]
    pad_token: Int[Array, ""]


def settings(
    *,
    vocab_size: int,
    temperature: float | Float[Array, ""],
    top_k: int | Int[Array, ""] | None,
    top_p: float | Float[Array, ""] | None,
    min_p: float | Float[Array, ""] | None,
    stop_tokens: Sequence[int],
    pad_token: int,
) -> Settings:
    """The checked settings as arrays, so that other values of them reuse a compiled program.

    Raises:
      ValueError: temperature below 0, top_k below 1, top_p outside (0, 1], min_p outside [0, 1]
        (each checked where it is not traced), a stop token outside the vocabulary.
    """
    _checks.in_range("temperature", temperature, 0.0, np.inf, high_open=True)
    if top_k is not None:
        _checks.in_range("top_k", top_k, 1)
        _checks.integer(top_k=top_k)
    if top_p is not None:
        _checks.in_range("top_p", top_p, 0.0, 1.0, low_open=True)
    if min_p is not None:
        _checks.in_range("min_p", min_p, 0.0, 1.0)
    for token in stop_tokens:
        if not 0 <= token < vocab_size:
            raise ValueError(f"stop_tokens: expected ids in [0, {vocab_size}), got {token}")
    return Settings(
        temperature=jnp.asarray(temperature, jnp.float32),
        top_k=None if top_k is None else jnp.asarray(top_k, jnp.int32),
        top_p=None if top_p is None else jnp.asarray(top_p, jnp.float32),
        min_p=None if min_p is None else jnp.asarray(min_p, jnp.float32),
        stop_tokens=jnp.asarray(tuple(stop_tokens), jnp.int32),
        pad_token=jnp.asarray(pad_token, jnp.int32),
    )


def row_keys(key: PRNGKeyArray, num_prompts: int, num_samples: int) -> PRNGKeyArray:
    """Keys `[P, G]`: that of a sequence depends on its prompt's and its sample's index alone."""

    def of_prompt(prompt: Array) -> Array:
        prompt_key = jax.random.fold_in(key, prompt)
        return jax.vmap(lambda sample: jax.random.fold_in(prompt_key, sample))(
            jnp.arange(num_samples)
        )

    return jax.vmap(of_prompt)(jnp.arange(num_prompts))


def tempered(logits: Float[Array, "*batch V"], settings: Settings) -> Float[Array, "*batch V"]:
    """The logits sampled from: divided by the temperature, -inf where filtered out.

    At temperature 0 they are divided by 1; who uses them takes their maximum instead of sampling.
    """
    temperature = jnp.where(settings.temperature == 0.0, 1.0, settings.temperature)
    return filter_logits(
        logits / temperature, top_k=settings.top_k, top_p=settings.top_p, min_p=settings.min_p
    )


def logprob(logits: Float[Array, "*batch V"], tokens: Int[Array, "*batch"]) -> Array:
    """`log softmax(logits)[token]`, f32 `[*batch]`."""
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def sample(
    logits: Float[Array, "*batch V"],
    keys: PRNGKeyArray,
    steps: Int[Array, "*batch"] | Int[Array, ""],
    settings: Settings,
) -> tuple[Int[Array, "*batch"], Float[Array, "*batch"], Float[Array, "*batch"]]:
    """One token per sequence, its log-prob as sampled and its log-prob under the model.

    Args:
      logits: of the model.
      keys: of the sequences `[*batch]`, from `row_keys`.
      steps: index of the token within its completion; one for all, or one a sequence.
      settings: of the sampling distribution.
    """

    def most_probable() -> tuple[Array, Array]:
        tokens = first_largest(logits)
        return tokens, jnp.zeros(tokens.shape, jnp.float32)

    def drawn() -> tuple[Array, Array]:
        scores = tempered(logits, settings)

        def noise(key: Array, step: Array) -> Array:
            return jax.random.gumbel(jax.random.fold_in(key, step), logits.shape[-1:], jnp.float32)

        for _ in keys.shape:
            noise = jax.vmap(noise)
        tokens = first_largest(scores + noise(keys, jnp.broadcast_to(steps, keys.shape)))
        return tokens, logprob(scores, tokens).astype(jnp.float32)

    # Noise for every entry of the vocabulary costs more than a small model's step.
    tokens, behavior = jax.lax.cond(settings.temperature == 0.0, most_probable, drawn)
    return tokens, behavior, logprob(logits, tokens)


def first_largest(scores: Float[Array, "*batch V"]) -> Int[Array, "*batch"]:
    """The lowest id of the largest score, as `argmax`; two plain reductions, which CPUs do faster.

    Of scores with a NaN, 0.
    """
    largest = jnp.max(scores, axis=-1, keepdims=True)
    ids = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    return jnp.min(jnp.where(scores < largest, scores.shape[-1], ids), axis=-1).astype(jnp.int32)


def is_stop(tokens: Int[Array, "*batch"], settings: Settings) -> Bool[Array, "*batch"]:
    """True where a token ends its completion."""
    return jnp.any(tokens[..., None] == settings.stop_tokens, axis=-1)


def check_arguments(
    prompts: Any,
    prompt_lengths: Any,
    *,
    num_samples: int,
    max_new_tokens: int,
    vocab_size: int,
    max_length: int | None,
    budgets: Any | None = None,
) -> None:
    """Raises ValueError on wrong ranks, dtypes, shapes, and on host values out of range."""
    _checks.rank("prompts", prompts, 2)
    _checks.rank("prompt_lengths", prompt_lengths, 1)
    _checks.integer(prompts=prompts, prompt_lengths=prompt_lengths)
    _checks.in_range("num_samples", num_samples, 1)
    _checks.in_range("max_new_tokens", max_new_tokens, 1)
    num_prompts, width = np.shape(prompts)
    if num_prompts == 0 or width == 0:
        raise ValueError(
            f"prompts: expected at least one prompt and token, got {(num_prompts, width)}"
        )
    if np.shape(prompt_lengths) != (num_prompts,):
        raise ValueError(
            f"prompt_lengths: expected shape {(num_prompts,)}, got {np.shape(prompt_lengths)}"
        )
    if max_length is not None and width + max_new_tokens > max_length:
        raise ValueError(
            f"max_new_tokens: prompts of width {width} and {max_new_tokens} new tokens exceed the "
            f"decoder's max_length {max_length}"
        )
    _host_values("prompt_lengths", prompt_lengths, 1, width)
    if isinstance(prompts, np.ndarray) and not (prompts.min() >= 0 and prompts.max() < vocab_size):
        raise ValueError(
            f"prompts: expected ids in [0, {vocab_size}), got values in "
            f"[{prompts.min()}, {prompts.max()}]"
        )
    if budgets is not None:
        _checks.integer(budgets=budgets)
        if np.shape(budgets) != (num_prompts * num_samples,):
            raise ValueError(
                f"budgets: expected shape {(num_prompts * num_samples,)}, one per completion, "
                f"got {np.shape(budgets)}"
            )
        _host_values("budgets", budgets, 1, max_new_tokens)


def _host_values(name: str, values: Any, low: int, high: int) -> None:
    # Values are looked at on the host only: arrays on devices may be shared by many processes.
    if isinstance(values, np.ndarray) and not (values.min() >= low and values.max() <= high):
        raise ValueError(
            f"{name}: expected values in [{low}, {high}], got values in "
            f"[{values.min()}, {values.max()}]"
        )
