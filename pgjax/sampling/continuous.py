"""Continuous batching: a finished sequence's place is taken by the next one in the queue."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from pgjax import _checks
from pgjax.models import (
    FunctionalDecoder,
    PrefixCache,
    SlotCache,
    empty_slot_cache,
    insert_prefix,
)
from pgjax.sampling import draw
from pgjax.sampling.routes import assemble_experts
from pgjax.sampling.samples import Samples, assemble


def generate_continuous(
    decoder: FunctionalDecoder,
    params: Any,
    prompts: Int[Array, "P Tp"],
    prompt_lengths: Int[Array, " P"],
    key: PRNGKeyArray,
    *,
    num_samples: int,
    num_slots: int,
    max_new_tokens: int,
    temperature: float | Float[Array, ""] = 1.0,
    top_k: int | Int[Array, ""] | None = None,
    top_p: float | Float[Array, ""] | None = None,
    min_p: float | Float[Array, ""] | None = None,
    stop_tokens: Sequence[int] = (),
    pad_token: int = 0,
    budgets: Int[Array, " B"] | None = None,
    refill_size: int | None = None,
    prefill_size: int | None = None,
    max_tail_steps: int | None = None,
    record_experts: bool = False,
) -> Samples:
    """Samples `num_samples` completions of each prompt, `num_slots` of them at a time.

    The `B = P · G` completions form a queue, prompt after prompt. As soon as R slots are free the
    next R completions take them, while the others go on; each prompt is run once, whatever the
    number of its samples. Once the queue is empty the batch is halved whenever half of it is
    enough, so the longest completions do not hold up a whole batch. It is one compiled program,
    and what it returns is what `sampling.generate` returns for the same key, whatever S and R:
    randomness depends on `key`, the prompt's index, the sample's index and the step alone.

    It pays where completions differ in length and B is several times S. Where all are equally
    long, `sampling.generate` is faster: there a prompt's keys are read once for all its samples.

    Args:
      decoder: from `pgjax.models`.
      params: its parameters.
      prompts, prompt_lengths, key, num_samples, max_new_tokens, temperature, top_k, top_p, min_p,
        stop_tokens, pad_token, budgets: as in `sampling.generate`.
      num_slots: S, completions under way at the same time; more than B are not used.
      refill_size: R in [1, S], free slots that are waited for; None: S/8. Larger ones refill more
        rarely and leave more slots idle.
      prefill_size: prompts that are run together, to bound the memory that takes; None: all.
      max_tail_steps: after so many steps with an empty queue what is not done is cut off, marked
        `truncated`. None: everything is finished.
      record_experts: as in `sampling.generate`.

    Returns:
      `Samples`, its `steps` counting steps of any number of slots.

    Raises:
      ValueError: as in `sampling.generate`; sizes out of range.
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
    _checks.in_range("num_slots", num_slots, 1)
    if refill_size is not None:
        _checks.in_range("refill_size", refill_size, 1, num_slots)
    if prefill_size is not None:
        _checks.in_range("prefill_size", prefill_size, 1)
    if max_tail_steps is not None:
        _checks.in_range("max_tail_steps", max_tail_steps, 0)
    num_prompts = jnp.shape(prompts)[0]
    total = num_prompts * num_samples
    slots = min(num_slots, total)
    if budgets is None:
        budgets = jnp.full(total, max_new_tokens)
    if max_tail_steps is None:
        max_tail_steps = np.iinfo(np.int32).max
    return _generate(
        decoder,
        params,
        jnp.asarray(prompts, jnp.int32),
        jnp.asarray(prompt_lengths, jnp.int32),
        key,
        settings,
        jnp.asarray(budgets, jnp.int32),
        jnp.asarray(max_tail_steps, jnp.int32),
        num_samples=num_samples,
        num_slots=slots,
        max_new_tokens=max_new_tokens,
        refill_size=min(refill_size or max(num_slots // 8, 1), slots),
        prefill_size=min(prefill_size or num_prompts, num_prompts),
        record_experts=record_experts,
    )


class _Slots(NamedTuple):
    """What is under way; a slot's cache holds every token of its sequence but the newest."""

    request: Int[Array, " S"]  # index in the queue; B where the slot is free
    newest: Int[Array, " S"]  # the last token sampled
    counts: Int[Array, " S"]  # tokens sampled
    cache: SlotCache


class _Results(NamedTuple):
    """One row a request; written to as tokens are sampled."""

    tokens: Int[Array, "B N"]
    behavior_logprobs: Float[Array, "B N"]
    logprobs: Float[Array, "B N"]
    counts: Int[Array, " B"]
    stopped: Bool[Array, " B"]
    experts: Int[Array, "B N L k"] | None  # the last token of each is never run


class _Loop(NamedTuple):
    queued: Int[Array, ""]  # requests taken from the queue so far
    steps: Int[Array, ""]
    tail_steps: Int[Array, ""]  # those with an empty queue
    slots: _Slots
    results: _Results


@functools.partial(
    jax.jit,
    static_argnames=(
        *("decoder", "num_samples", "num_slots", "max_new_tokens", "refill_size", "prefill_size"),
        "record_experts",
    ),
)
def _generate(
    decoder: FunctionalDecoder,
    params: Any,
    prompts: Array,
    prompt_lengths: Array,
    key: Array,
    settings: draw.Settings,
    budgets: Array,
    max_tail_steps: Array,
    *,
    num_samples: int,
    num_slots: int,
    max_new_tokens: int,
    refill_size: int,
    prefill_size: int,
    record_experts: bool,
) -> Samples:
    num_prompts, width = prompts.shape
    total = num_prompts * num_samples
    row_keys = draw.row_keys(key, num_prompts, num_samples).reshape(total)
    hidden, prefix, prompt_experts = _prefill(
        decoder, params, prompts, prompt_lengths, prefill_size, record_experts=record_experts
    )
    stepping, prefix = decoder.for_many_steps(params), decoder.caches_for_many_steps(prefix)

    def sample(
        hidden: Array, request: Array, count: Array, results: _Results
    ) -> tuple[Array, Array, _Results]:
        """The next token of each request, which of them end with it, and both written down.

        A request of B stands for nothing; what is sampled for it is dropped.
        """
        row = jnp.minimum(request, total - 1)
        tokens, behavior, logprobs = draw.sample(
            decoder.logits(stepping, hidden), row_keys[row], count, settings
        )
        stopped = draw.is_stop(tokens, settings)

        def write(buffer: Array, values: Array) -> Array:
            return buffer.at[request, count].set(values, mode="drop")

        results = _Results(
            tokens=write(results.tokens, tokens),
            behavior_logprobs=write(results.behavior_logprobs, behavior),
            logprobs=write(results.logprobs, logprobs),
            counts=results.counts.at[request].set(count + 1, mode="drop"),
            stopped=results.stopped.at[request].set(stopped, mode="drop"),
            experts=results.experts,
        )
        return tokens, stopped | (count + 1 >= budgets[row]), results

    def refill(loop: _Loop) -> _Loop:
        """The next requests into free slots, and their first tokens."""
        free = jnp.argsort(loop.slots.request < total, stable=True)[:refill_size]
        request = jnp.minimum(loop.queued + jnp.arange(refill_size), total)
        into = jnp.where(request < total, free, num_slots)
        of_prompt = jnp.minimum(request, total - 1) // num_samples
        cache = insert_prefix(loop.slots.cache, prefix, of_prompt, into)
        zeros = jnp.zeros(refill_size, jnp.int32)
        tokens, done, results = sample(hidden[of_prompt], request, zeros, loop.results)
        slots = _Slots(
            request=loop.slots.request.at[into].set(jnp.where(done, total, request), mode="drop"),
            newest=loop.slots.newest.at[into].set(tokens, mode="drop"),
            counts=loop.slots.counts.at[into].set(1, mode="drop"),
            cache=cache,
        )
        queued = jnp.minimum(loop.queued + refill_size, total)
        return loop._replace(queued=queued, slots=slots, results=results)

    def step(loop: _Loop) -> _Loop:
        """One token of every slot."""
        slots = loop.slots
        busy = slots.request < total
        # The newest token lies at the position after all the others; a free slot writes at 0.
        of_prompt = jnp.minimum(slots.request, total - 1) // num_samples
        lengths = jnp.where(busy, prompt_lengths[of_prompt] + slots.counts - 1, 0)
        results, newest = loop.results, slots.newest[:, None]
        if results.experts is None:
            new, cache = decoder.extend(stepping, newest, slots.cache, lengths)
        else:
            new, cache, chosen = decoder.extend_with_routing(stepping, newest, slots.cache, lengths)
            where = slots.request, slots.counts - 1
            recorded = results.experts.at[where].set(
                jnp.moveaxis(chosen[:, :, 0], 0, 1), mode="drop"
            )
            results = results._replace(experts=recorded)
        tokens, done, results = sample(new[:, 0], slots.request, slots.counts, results)
        return loop._replace(
            steps=loop.steps + 1,
            tail_steps=loop.tail_steps + (loop.queued >= total),
            slots=_Slots(
                request=jnp.where(done, total, slots.request),
                newest=tokens,
                counts=slots.counts + 1,
                cache=cache,
            ),
            results=results,
        )

    def run(loop: _Loop, fewer: int) -> _Loop:
        """Steps until there are slots to refill or, with an empty queue, `fewer` still busy."""

        def go_on(loop: _Loop) -> Array:
            free = jnp.sum(loop.slots.request >= total)
            left = total - loop.queued
            size = loop.slots.request.shape[0]
            going = free < jnp.where(left > 0, jnp.minimum(refill_size, left), size - fewer)
            return going & (loop.tail_steps < max_tail_steps)

        return jax.lax.while_loop(go_on, step, loop)

    capacity = width + max_new_tokens
    idle = jnp.full(num_slots, total)
    zero = jnp.zeros((), jnp.int32)
    loop = _Loop(
        queued=zero,
        steps=zero,
        tail_steps=zero,
        slots=_Slots(
            request=idle,
            newest=jnp.zeros_like(idle),
            counts=jnp.zeros_like(idle),
            cache=decoder.caches_for_many_steps(
                empty_slot_cache(decoder.config, num_slots=num_slots, capacity=capacity)
            ),
        ),
        results=_Results(
            tokens=jnp.zeros((total, max_new_tokens), jnp.int32),
            behavior_logprobs=jnp.zeros((total, max_new_tokens), jnp.float32),
            logprobs=jnp.zeros((total, max_new_tokens), jnp.float32),
            counts=jnp.zeros(total, jnp.int32),
            stopped=jnp.zeros(total, bool),
            experts=None
            if prompt_experts is None
            else jnp.zeros(
                (total, max_new_tokens, prompt_experts.shape[0], prompt_experts.shape[-1]),
                jnp.int32,
            ),
        ),
    )
    # Each width is compiled by itself; below a few slots a step costs the same anyway.
    tail = [size for size in (num_slots // 2, num_slots // 4, num_slots // 8) if size >= 4]
    fewer = [*tail, 0]
    loop = jax.lax.while_loop(
        lambda loop: loop.queued < total, lambda loop: run(refill(loop), fewer[0]), loop
    )
    for size, next_size in zip(tail, fewer[1:], strict=True):
        loop = run(loop._replace(slots=_keep(loop.slots, size, total)), next_size)

    def by_prompt(values: Array) -> Array:
        return values.reshape(num_prompts, num_samples, *values.shape[1:])

    results = loop.results
    counts = by_prompt(results.counts)
    samples = assemble(
        prompts,
        prompt_lengths,
        tokens=by_prompt(results.tokens),
        behavior_logprobs=by_prompt(results.behavior_logprobs),
        logprobs=by_prompt(results.logprobs),
        counts=counts,
        stopped=by_prompt(results.stopped),
        pad_token=settings.pad_token,
        steps=loop.steps,
    )
    if results.experts is None or prompt_experts is None:
        return samples
    of_step = by_prompt(results.experts).transpose(2, 3, 0, 1, 4)
    return samples.replace(
        experts=assemble_experts(prompt_experts, prompt_lengths, of_step, counts)
    )


def _keep(slots: _Slots, size: int, total: int) -> _Slots:
    """The busy slots, and free ones up to `size`, as a smaller batch."""
    chosen = jnp.argsort(slots.request >= total, stable=True)[:size]
    return _Slots(
        request=slots.request[chosen],
        newest=slots.newest[chosen],
        counts=slots.counts[chosen],
        cache=jax.tree.map(lambda rows: jnp.take(rows, chosen, axis=-4), slots.cache),
    )


def _prefill(
    decoder: FunctionalDecoder,
    params: Any,
    prompts: Array,
    lengths: Array,
    size: int,
    *,
    record_experts: bool,
) -> tuple[Array, PrefixCache, Int[Array, "L P Tp k"] | None]:
    """`decoder.prefill` of `size` prompts at a time, and the prompts' experts where wanted."""

    def run(tokens: Array, lengths: Array) -> tuple[Array, PrefixCache, Array | None]:
        if not record_experts:
            return *decoder.prefill(params, tokens, lengths), None
        hidden, prefix, routing = decoder.prefill_with_routing(params, tokens, lengths)
        return hidden, prefix, routing.experts

    count, width = prompts.shape
    if size >= count:
        return run(prompts, lengths)
    chunks = -(-count // size)
    missing = chunks * size - count
    padded = jnp.pad(prompts, ((0, missing), (0, 0))).reshape(chunks, size, width)
    known = jnp.pad(lengths, (0, missing), constant_values=1).reshape(chunks, size)
    hidden, prefix, experts = jax.lax.map(lambda chunk: run(*chunk), (padded, known))

    def layers_first(rows: Array) -> Array:  # [chunks, L, size, ...] -> [L, P, ...]
        return rows.swapaxes(0, 1).reshape(rows.shape[1], -1, *rows.shape[3:])[:, :count]

    keys, values = (tuple(map(layers_first, part)) for part in (prefix.keys, prefix.values))
    return (
        hidden.reshape(-1, hidden.shape[-1])[:count],
        PrefixCache(keys=keys, values=values, lengths=lengths),
        None if experts is None else layers_first(experts),
    )
