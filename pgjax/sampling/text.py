"""Sampling of completions: one prefill per prompt, then a jitted loop over new tokens."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from pgjax import _checks
from pgjax.models import CompletionCache, FunctionalDecoder, empty_completion_cache
from pgjax.sampling.filters import filter_logits
from pgjax.types import pytree_dataclass


@pytree_dataclass
class Samples:
    """`B = P · G` sampled sequences, the G of each prompt next to each other.

    Attributes:
      tokens: prompt, completion (starting right after the prompt's last real token), padding.
      mask: true on sampled tokens, the stop token included.
      behavior_logprobs: log-probs under the distribution that was sampled: after temperature and
        filters, renormalised. 0 where `mask` is false.
      logprobs: log-probs under the model itself (temperature 1, no filters), 0 off the mask.
      lengths: real tokens of each row, prompt and completion together.
      truncated: true where the budget ended before a stop token was sampled.
      prompt_ids: index of each row's prompt.
      steps: steps the loop took; below `max_new_tokens` where all sequences stopped early.
    """

    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    behavior_logprobs: Float[Array, "B T"]
    logprobs: Float[Array, "B T"]
    lengths: Int[Array, " B"]
    truncated: Bool[Array, " B"]
    prompt_ids: Int[Array, " B"]
    steps: Int[Array, ""]


def generate(
    decoder: FunctionalDecoder,
    params: Any,
    prompts: Int[Array, "P Tp"],
    prompt_lengths: Int[Array, " P"],
    key: PRNGKeyArray,
    *,
    num_samples: int,
    max_new_tokens: int,
    temperature: float | Float[Array, ""] = 1.0,
    top_k: int | Int[Array, ""] | None = None,
    top_p: float | Float[Array, ""] | None = None,
    min_p: float | Float[Array, ""] | None = None,
    stop_tokens: Sequence[int] = (),
    pad_token: int = 0,
) -> Samples:
    """Samples `num_samples` completions of each prompt.

        z = logits / temperature, then top-k, top-p, min-p (see `filters`)
        token ~ softmax(z);   temperature 0: the most probable token, behaviour log-prob 0

    The whole loop is one compiled program for each shape (P, Tp, G, N) and choice of filters;
    other values of temperature, top_k, top_p, min_p, pad_token and the stop tokens reuse it. It
    ends as soon as every sequence has stopped. The randomness of a token depends only on `key`,
    the prompt's index, the sample's index and the step: more padding, more prompts at the end,
    more samples or a larger budget do not change what is sampled (this holds for JAX's threefry
    keys, the default).

    Args:
      decoder: from `pgjax.models`.
      params: its parameters.
      prompts: token ids, right-padded; see `pad_prompts`.
      prompt_lengths: real tokens of each prompt, in [1, Tp].
      key: randomness.
      num_samples: G, completions per prompt.
      max_new_tokens: N, the length budget of a completion, stop token included.
      temperature: at least 0; 0 is greedy (the lowest id among equals).
      top_k: at least 1, more than V keeps all; None: off.
      top_p: in (0, 1]; None: off.
      min_p: in [0, 1]; None: off.
      stop_tokens: ids that end a completion; none: every completion uses its whole budget.
      pad_token: fills the rows after the completion.

    Returns:
      `Samples` with rows of `T = Tp + N` tokens. Its `logprobs` equal those recomputed by
      `decoder.apply` up to rounding.

    Raises:
      ValueError: a wrong rank, dtype or shape; values outside the ranges above (checked where
        they are not traced); rows longer than the decoder's `max_length`.
    """
    _check_arguments(decoder, prompts, prompt_lengths, num_samples, max_new_tokens)
    _checks.in_range("temperature", temperature, 0.0, np.inf, high_open=True)
    if top_k is not None:
        _checks.in_range("top_k", top_k, 1)
        _checks.integer(top_k=top_k)
    if top_p is not None:
        _checks.in_range("top_p", top_p, 0.0, 1.0, low_open=True)
    if min_p is not None:
        _checks.in_range("min_p", min_p, 0.0, 1.0)
    vocab = decoder.config.vocab_size
    for token in stop_tokens:
        if not 0 <= token < vocab:
            raise ValueError(f"stop_tokens: expected ids in [0, {vocab}), got {token}")
    settings = _Settings(
        temperature=jnp.asarray(temperature, jnp.float32),
        top_k=None if top_k is None else jnp.asarray(top_k, jnp.int32),
        top_p=None if top_p is None else jnp.asarray(top_p, jnp.float32),
        min_p=None if min_p is None else jnp.asarray(min_p, jnp.float32),
        stop_tokens=jnp.asarray(tuple(stop_tokens), jnp.int32),
        pad_token=jnp.asarray(pad_token, jnp.int32),
    )
    return _generate(
        decoder,
        params,
        jnp.asarray(prompts, jnp.int32),
        jnp.asarray(prompt_lengths, jnp.int32),
        key,
        settings,
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
    )


class _Settings(NamedTuple):
    temperature: Array
    top_k: Array | None
    top_p: Array | None
    min_p: Array | None
    stop_tokens: Array
    pad_token: Array


class _Loop(NamedTuple):
    """Carried from step to step; `step` tokens of each sequence are decided."""

    step: Array
    tokens: Int[Array, "N P G"]
    behavior_logprobs: Float[Array, "N P G"]
    logprobs: Float[Array, "N P G"]
    counts: Int[Array, "P G"]
    done: Bool[Array, "P G"]
    cache: CompletionCache


@functools.partial(jax.jit, static_argnames=("decoder", "num_samples", "max_new_tokens"))
def _generate(
    decoder: FunctionalDecoder,
    params: Any,
    prompts: Array,
    lengths: Array,
    key: Array,
    settings: _Settings,
    *,
    num_samples: int,
    max_new_tokens: int,
) -> Samples:
    num_prompts = prompts.shape[0]
    grid = (num_prompts, num_samples)
    row_keys = _row_keys(key, *grid)
    hidden, prefix = decoder.prefill(params, prompts, lengths)

    def draw(loop: _Loop, hidden: Array) -> _Loop:
        logits = decoder.logits(params, hidden)
        tokens, behavior, logprobs = _sample(logits, row_keys, loop.step, settings)

        def write(buffer: Array, values: Array) -> Array:
            values = jnp.where(loop.done, jnp.zeros((), buffer.dtype), values)
            return jax.lax.dynamic_update_index_in_dim(buffer, values, loop.step, 0)

        stopped = jnp.any(tokens[..., None] == settings.stop_tokens, axis=-1)
        return loop._replace(
            step=loop.step + 1,
            tokens=write(loop.tokens, tokens),
            behavior_logprobs=write(loop.behavior_logprobs, behavior),
            logprobs=write(loop.logprobs, logprobs),
            counts=loop.counts + ~loop.done,
            done=loop.done | stopped,
        )

    def unfinished(loop: _Loop) -> Array:
        return (loop.step < max_new_tokens) & ~jnp.all(loop.done)

    def advance(loop: _Loop) -> _Loop:
        slot = loop.step - 1
        tokens = jax.lax.dynamic_index_in_dim(loop.tokens, slot, keepdims=False)
        hidden, cache = decoder.decode_step(params, tokens, prefix, loop.cache, slot)
        return draw(loop._replace(cache=cache), hidden)

    empty = _Loop(
        step=jnp.zeros((), jnp.int32),
        tokens=jnp.zeros((max_new_tokens, *grid), jnp.int32),
        behavior_logprobs=jnp.zeros((max_new_tokens, *grid), jnp.float32),
        logprobs=jnp.zeros((max_new_tokens, *grid), jnp.float32),
        counts=jnp.zeros(grid, jnp.int32),
        done=jnp.zeros(grid, bool),
        # The last token is never run, so it needs no slot.
        cache=empty_completion_cache(
            decoder.config,
            num_prompts=num_prompts,
            num_samples=num_samples,
            num_slots=max(max_new_tokens - 1, 1),
        ),
    )
    first = draw(empty, jnp.broadcast_to(hidden[:, None], (*grid, hidden.shape[-1])))
    loop = jax.lax.while_loop(unfinished, advance, first)
    return _assemble(prompts, lengths, loop, settings.pad_token)


def _row_keys(key: Array, num_prompts: int, num_samples: int) -> Array:
    def of_prompt(prompt: Array) -> Array:
        prompt_key = jax.random.fold_in(key, prompt)
        return jax.vmap(lambda sample: jax.random.fold_in(prompt_key, sample))(
            jnp.arange(num_samples)
        )

    return jax.vmap(of_prompt)(jnp.arange(num_prompts))


def _sample(
    logits: Float[Array, "P G V"], row_keys: Array, step: Array, settings: _Settings
) -> tuple[Int[Array, "P G"], Float[Array, "P G"], Float[Array, "P G"]]:
    """One token per sequence, its log-prob as sampled and its log-prob under the model."""
    greedy = settings.temperature == 0.0
    tempered = filter_logits(
        logits / jnp.where(greedy, 1.0, settings.temperature),
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
    )

    def noise(key: Array) -> Array:
        return jax.random.gumbel(jax.random.fold_in(key, step), logits.shape[-1:], jnp.float32)

    gumbel = jax.vmap(jax.vmap(noise))(row_keys)
    tokens = jnp.argmax(tempered + jnp.where(greedy, 0.0, gumbel), axis=-1).astype(jnp.int32)

    def logprob(logits: Array) -> Array:
        chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    behavior = jnp.where(greedy, 0.0, logprob(tempered))
    return tokens, behavior, logprob(logits)


def _assemble(prompts: Array, lengths: Array, loop: _Loop, pad_token: Array) -> Samples:
    """From step-major buffers to rows in which the completion follows the prompt's real end."""
    max_new_tokens, num_prompts, num_samples = loop.tokens.shape
    width = prompts.shape[1] + max_new_tokens
    position = jnp.arange(width)
    offset = position - lengths[:, None]  # [P, T]: which new token a position holds
    mask = (offset[:, None] >= 0) & (offset[:, None] < loop.counts[..., None])  # [P, G, T]
    source = jnp.clip(offset, 0, max_new_tokens - 1)[:, None]

    def rows(buffer: Array, elsewhere: Array) -> Array:
        values = jnp.take_along_axis(jnp.transpose(buffer, (1, 2, 0)), source, axis=-1)
        return jnp.where(mask, values, elsewhere).reshape(-1, width)

    padded = jnp.pad(prompts, ((0, 0), (0, max_new_tokens)))
    outside = jnp.where(position < lengths[:, None], padded, pad_token)[:, None]
    zero = jnp.zeros((), jnp.float32)
    return Samples(
        tokens=rows(loop.tokens, outside),
        mask=mask.reshape(-1, width),
        behavior_logprobs=rows(loop.behavior_logprobs, zero),
        logprobs=rows(loop.logprobs, zero),
        lengths=(lengths[:, None] + loop.counts).reshape(-1),
        truncated=~loop.done.reshape(-1),
        prompt_ids=jnp.repeat(jnp.arange(num_prompts, dtype=jnp.int32), num_samples),
        steps=loop.step,
    )


def _check_arguments(
    decoder: FunctionalDecoder,
    prompts: Any,
    lengths: Any,
    num_samples: int,
    max_new_tokens: int,
) -> None:
    _checks.rank("prompts", prompts, 2)
    _checks.rank("prompt_lengths", lengths, 1)
    _checks.integer(prompts=prompts, prompt_lengths=lengths)
    _checks.in_range("num_samples", num_samples, 1)
    _checks.in_range("max_new_tokens", max_new_tokens, 1)
    num_prompts, width = np.shape(prompts)
    if num_prompts == 0 or width == 0:
        raise ValueError(
            f"prompts: expected at least one prompt and token, got {(num_prompts, width)}"
        )
    if np.shape(lengths) != (num_prompts,):
        raise ValueError(
            f"prompt_lengths: expected shape {(num_prompts,)}, got {np.shape(lengths)}"
        )
    limit = decoder.config.max_length
    if width + max_new_tokens > limit:
        raise ValueError(
            f"max_new_tokens: prompts of width {width} and {max_new_tokens} new tokens exceed the "
            f"decoder's max_length {limit}"
        )
    # Values are looked at on the host only: arrays on devices may be shared by many processes.
    if isinstance(lengths, np.ndarray) and not (lengths.min() >= 1 and lengths.max() <= width):
        raise ValueError(
            f"prompt_lengths: expected values in [1, {width}], got values in "
            f"[{lengths.min()}, {lengths.max()}]"
        )
    vocab = decoder.config.vocab_size
    if isinstance(prompts, np.ndarray) and not (prompts.min() >= 0 and prompts.max() < vocab):
        raise ValueError(
            f"prompts: expected ids in [0, {vocab}), got values in "
            f"[{prompts.min()}, {prompts.max()}]"
        )
