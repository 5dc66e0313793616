"""Sampling of completions: one prefill per prompt, then a jitted loop over new tokens."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from pgjax.models import CompletionCache, FunctionalDecoder, empty_completion_cache
from pgjax.sampling import draw
from pgjax.sampling.draw import Settings as _Settings
from pgjax.sampling.routes import assemble_experts
from pgjax.sampling.samples import Samples, assemble


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
    budgets: Int[Array, " B"] | None = None,
    record_experts: bool = False,
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
      budgets: length budget of each of the `B = P · G` completions, in [1, N]; None: N for all.
      record_experts: keep the experts each token was sent to, for routing replay; the decoder
        needs a mixture.

    Returns:
      `Samples` with rows of `T = Tp + N` tokens. Its `logprobs` equal those recomputed by
      `decoder.apply` up to rounding.

    Raises:
      ValueError: a wrong rank, dtype or shape; values outside the ranges above (checked where
        they are not traced); rows longer than the decoder's `max_length`.
    """
    config = decoder.config
    draw.check_arguments(
        prompts,
        prompt_lengths,
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        vocab_size=config.vocab_size,
        max_length=config.max_length,
        budgets=budgets,
    )
    settings = draw.settings(
        vocab_size=config.vocab_size,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        stop_tokens=stop_tokens,
        pad_token=pad_token,
    )
    return _generate(
        decoder,
        params,
        jnp.asarray(prompts, jnp.int32),
        jnp.asarray(prompt_lengths, jnp.int32),
        key,
        settings,
        None if budgets is None else jnp.asarray(budgets, jnp.int32),
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        record_experts=record_experts,
    )


class _Loop(NamedTuple):
    """Carried from step to step; `step` tokens of each sequence are decided."""

    step: Array
    tokens: Int[Array, "N P G"]
    behavior_logprobs: Float[Array, "N P G"]
    logprobs: Float[Array, "N P G"]
    counts: Int[Array, "P G"]
    stopped: Bool[Array, "P G"]
    done: Bool[Array, "P G"]
    cache: CompletionCache
    experts: Int[Array, "N L P G k"] | None


@functools.partial(
    jax.jit, static_argnames=("decoder", "num_samples", "max_new_tokens", "record_experts")
)
def _generate(
    decoder: FunctionalDecoder,
    params: Any,
    prompts: Array,
    lengths: Array,
    key: Array,
    settings: _Settings,
    budgets: Array | None = None,
    *,
    num_samples: int,
    max_new_tokens: int,
    record_experts: bool = False,
) -> Samples:
    num_prompts = prompts.shape[0]
    grid = (num_prompts, num_samples)
    row_keys = draw.row_keys(key, *grid)
    limits = max_new_tokens if budgets is None else budgets.reshape(grid)
    experts = None
    if record_experts:
        hidden, prefix, routing = decoder.prefill_with_routing(params, prompts, lengths)
        layers, _, _, k = routing.experts.shape
        experts = jnp.zeros((max_new_tokens, layers, *grid, k), jnp.int32)
    else:
        hidden, prefix = decoder.prefill(params, prompts, lengths)
    stepping, prefix = decoder.for_many_steps(params), decoder.caches_for_many_steps(prefix)

    def draw_next(loop: _Loop, hidden: Array) -> _Loop:
        logits = decoder.logits(stepping, hidden)
        tokens, behavior, logprobs = draw.sample(logits, row_keys, loop.step, settings)

        def write(buffer: Array, values: Array) -> Array:
            values = jnp.where(loop.done, jnp.zeros((), buffer.dtype), values)
            return jax.lax.dynamic_update_index_in_dim(buffer, values, loop.step, 0)

        stopped = loop.stopped | (draw.is_stop(tokens, settings) & ~loop.done)
        return loop._replace(
            step=loop.step + 1,
            tokens=write(loop.tokens, tokens),
            behavior_logprobs=write(loop.behavior_logprobs, behavior),
            logprobs=write(loop.logprobs, logprobs),
            counts=loop.counts + ~loop.done,
            stopped=stopped,
            done=stopped | (loop.step + 1 >= limits),
        )

    def unfinished(loop: _Loop) -> Array:
        return ~jnp.all(loop.done)

    def advance(loop: _Loop) -> _Loop:
        slot = loop.step - 1
        tokens = jax.lax.dynamic_index_in_dim(loop.tokens, slot, keepdims=False)
        if loop.experts is None:
            hidden, cache = decoder.decode_step(stepping, tokens, prefix, loop.cache, slot)
            return draw_next(loop._replace(cache=cache), hidden)
        hidden, cache, chosen = decoder.decode_step_with_routing(
            stepping, tokens, prefix, loop.cache, slot
        )
        recorded = jax.lax.dynamic_update_index_in_dim(loop.experts, chosen, slot, 0)
        return draw_next(loop._replace(cache=cache, experts=recorded), hidden)

    empty = _Loop(
        step=jnp.zeros((), jnp.int32),
        tokens=jnp.zeros((max_new_tokens, *grid), jnp.int32),
        behavior_logprobs=jnp.zeros((max_new_tokens, *grid), jnp.float32),
        logprobs=jnp.zeros((max_new_tokens, *grid), jnp.float32),
        counts=jnp.zeros(grid, jnp.int32),
        stopped=jnp.zeros(grid, bool),
        done=jnp.zeros(grid, bool),
        # The last token is never run, so it needs no slot.
        cache=decoder.caches_for_many_steps(
            empty_completion_cache(
                decoder.config,
                num_prompts=num_prompts,
                num_samples=num_samples,
                num_slots=max(max_new_tokens - 1, 1),
            )
        ),
        experts=experts,
    )
    first = draw_next(empty, jnp.broadcast_to(hidden[:, None], (*grid, hidden.shape[-1])))
    loop = jax.lax.while_loop(unfinished, advance, first)

    def by_row(buffer: Array) -> Array:
        return jnp.transpose(buffer, (1, 2, 0))

    samples = assemble(
        prompts,
        lengths,
        tokens=by_row(loop.tokens),
        behavior_logprobs=by_row(loop.behavior_logprobs),
        logprobs=by_row(loop.logprobs),
        counts=loop.counts,
        stopped=loop.stopped,
        pad_token=settings.pad_token,
        steps=loop.step,
    )
    if loop.experts is None:
        return samples
    return samples.replace(
        experts=assemble_experts(routing.experts, lengths, loop.experts, loop.counts)
    )
