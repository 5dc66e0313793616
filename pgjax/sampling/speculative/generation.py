"""Sampling in blocks: the draft proposes, the target scores the whole block in one pass."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from pgjax import _checks
from pgjax.models import FunctionalDecoder, SlotCache, empty_slot_cache, insert_prefix
from pgjax.sampling import draw
from pgjax.sampling.samples import Samples, assemble
from pgjax.sampling.speculative.acceptance import accept
from pgjax.types import pytree_dataclass


@pytree_dataclass
class SpeculationStats:
    """How well the draft did; `accepted / blocks + 1` estimates the block efficiency.

    Attributes:
      blocks: passes of the target over drafted tokens, of each sequence.
      accepted: draft tokens accepted in them, also those behind a stop token or the budget.
    """

    blocks: Int[Array, " B"]
    accepted: Int[Array, " B"]


def generate(
    target: FunctionalDecoder,
    target_params: Any,
    draft: FunctionalDecoder,
    draft_params: Any,
    prompts: Int[Array, "P Tp"],
    prompt_lengths: Int[Array, " P"],
    key: PRNGKeyArray,
    *,
    num_samples: int = 1,
    num_draft_tokens: int = 3,
    max_new_tokens: int,
    temperature: float | Float[Array, ""] = 1.0,
    top_k: int | Int[Array, ""] | None = None,
    top_p: float | Float[Array, ""] | None = None,
    min_p: float | Float[Array, ""] | None = None,
    stop_tokens: Sequence[int] = (),
    pad_token: int = 0,
) -> tuple[Samples, SpeculationStats]:
    """Samples from the target in fewer passes over it, by drafts of a smaller model.

    A block: the draft samples γ tokens, one at a time; the target scores them in one pass; `accept`
    keeps some and adds one. What comes out is distributed as by `sampling.generate` of the target
    (token for token the same at temperature 0, and for each sequence's first token), whatever the
    draft; a good draft only makes it sooner. The loop is one compiled program; rows are at
    positions of their own, and tokens that were rejected are simply overwritten. Randomness
    depends on `key`, the prompt's and the sample's index and the position alone.

    Args:
      target: decoder whose distribution is sampled.
      target_params: its parameters.
      draft: decoder with the same vocabulary.
      draft_params: its parameters.
      num_draft_tokens: γ, at least 1.
      prompts, prompt_lengths, key, num_samples, max_new_tokens, temperature, top_k, top_p, min_p,
        stop_tokens, pad_token: as in `sampling.generate`; temperature and filters hold for both
        models.

    Returns:
      `Samples`, its `behavior_logprobs` under the target's tempered and filtered distribution and
      its `steps` the number of blocks; and how many draft tokens were accepted.

    Raises:
      ValueError: as in `sampling.generate`; different vocabularies; rows of `Tp + N + γ` tokens
        longer than either decoder's `max_length`.
    """
    vocab = target.config.vocab_size
    if draft.config.vocab_size != vocab:
        raise ValueError(
            f"draft: expected the target's vocabulary of {vocab}, got {draft.config.vocab_size}"
        )
    _checks.in_range("num_draft_tokens", num_draft_tokens, 1)
    draw.check_arguments(
        prompts,
        prompt_lengths,
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        vocab_size=vocab,
        max_length=min(target.config.max_length, draft.config.max_length) - num_draft_tokens,
    )
    settings = draw.settings(
        vocab_size=vocab,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        stop_tokens=stop_tokens,
        pad_token=pad_token,
    )
    return _generate(
        target,
        target_params,
        draft,
        draft_params,
        jnp.asarray(prompts, jnp.int32),
        jnp.asarray(prompt_lengths, jnp.int32),
        key,
        settings,
        num_samples=num_samples,
        num_draft_tokens=num_draft_tokens,
        max_new_tokens=max_new_tokens,
    )


class _Loop(NamedTuple):
    """Between blocks; both caches hold every token of a row but its newest."""

    blocks_run: Int[Array, ""]
    newest: Int[Array, "B two"]  # the last two tokens
    lengths: Int[Array, " B"]  # prompt and completion together
    tokens: Int[Array, "B room"]
    behavior_logprobs: Float[Array, "B room"]
    logprobs: Float[Array, "B room"]
    counts: Int[Array, " B"]
    stopped: Bool[Array, " B"]
    stats: SpeculationStats
    target_cache: SlotCache
    draft_cache: SlotCache


@functools.partial(
    jax.jit,
    static_argnames=("target", "draft", "num_samples", "num_draft_tokens", "max_new_tokens"),
)
def _generate(
    target: FunctionalDecoder,
    target_params: Any,
    draft: FunctionalDecoder,
    draft_params: Any,
    prompts: Array,
    prompt_lengths: Array,
    key: Array,
    settings: draw.Settings,
    *,
    num_samples: int,
    num_draft_tokens: int,
    max_new_tokens: int,
) -> tuple[Samples, SpeculationStats]:
    num_prompts, width = prompts.shape
    rows = num_prompts * num_samples
    grid = (num_prompts, num_samples)
    row_keys = draw.row_keys(key, *grid).reshape(rows)
    of_row = jnp.repeat(jnp.arange(num_prompts), num_samples)
    room = max_new_tokens + num_draft_tokens + 1  # a whole block can be written at the end
    of_target, of_draft = target.for_many_steps(target_params), draft.for_many_steps(draft_params)

    def law(logits: Array) -> tuple[Array, Array]:
        """Log-scores and probabilities of what is sampled from; at temperature 0 one token."""
        scores = draw.tempered(logits, settings)
        certain = jax.nn.one_hot(jnp.argmax(scores, axis=-1), scores.shape[-1])
        greedy = settings.temperature == 0.0
        return scores, jnp.where(greedy, certain, jax.nn.softmax(scores, axis=-1))

    def start(decoder: FunctionalDecoder, params: Any) -> tuple[Array, SlotCache]:
        hidden, prefix = decoder.prefill(params, prompts, prompt_lengths)
        empty = empty_slot_cache(
            decoder.config,
            num_slots=rows,
            capacity=width + max_new_tokens + num_draft_tokens,
            lookahead=num_draft_tokens + 1,
        )
        cache, given = decoder.caches_for_many_steps(empty), decoder.caches_for_many_steps(prefix)
        return hidden, insert_prefix(cache, given, of_row, jnp.arange(rows))

    def propose(loop: _Loop, keys: Array) -> tuple[Array, Array, SlotCache]:
        def choose(hidden: Array, index: Array) -> tuple[Array, Array]:
            _, probs = law(draft.logits(of_draft, hidden))
            each = jax.vmap(lambda k, p: jax.random.categorical(k, jnp.log(p)))
            tokens = each(jax.vmap(lambda k: jax.random.fold_in(k, index))(keys), probs)
            return tokens.astype(jnp.int32), probs

        def step(carry: tuple[Array, SlotCache], index: Array) -> tuple[Any, Any]:
            tokens, cache = carry
            hidden, cache = draft.extend(of_draft, tokens[:, None], cache, loop.lengths - 1 + index)
            chosen, probs = choose(hidden[:, 0], index)
            return (chosen, cache), (chosen, probs)

        # Of a block that was accepted whole the draft has not yet read the last token.
        hidden, cache = draft.extend(of_draft, loop.newest, loop.draft_cache, loop.lengths - 2)
        first, probs = choose(hidden[:, 1], jnp.zeros((), jnp.int32))
        (_, cache), rest = jax.lax.scan(step, (first, cache), jnp.arange(1, num_draft_tokens))
        tokens = jnp.concatenate([first[None], rest[0]])
        return tokens.T, jnp.concatenate([probs[None], rest[1]]).swapaxes(0, 1), cache

    def block(loop: _Loop) -> _Loop:
        keys = jax.vmap(jax.random.fold_in)(row_keys, loop.counts)
        draft_keys, accept_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        drafted, draft_probs, draft_cache = propose(loop, draft_keys)
        checked = jnp.concatenate([loop.newest[:, 1:], drafted], axis=1)
        hidden, target_cache = target.extend(
            of_target, checked, loop.target_cache, loop.lengths - 1
        )
        logits = target.logits(of_target, hidden)
        scores, target_probs = law(logits)
        tokens, emitted = jax.vmap(accept)(accept_keys, drafted, draft_probs, target_probs)
        running = ~loop.stopped & (loop.counts < max_new_tokens)
        stops = draw.is_stop(tokens, settings)
        until_stop = jnp.where(stops.any(-1), jnp.argmax(stops, axis=-1) + 1, room)
        kept = jnp.minimum(jnp.minimum(emitted, until_stop), max_new_tokens - loop.counts)
        kept = jnp.where(running, kept, 0)
        chosen = jnp.maximum(tokens, 0)
        behavior = jnp.where(settings.temperature == 0.0, 0.0, draw.logprob(scores, chosen))

        def write(buffer: Array, values: Array) -> Array:
            return jax.vmap(jax.lax.dynamic_update_slice)(buffer, values, loop.counts[:, None])

        sequence = jnp.concatenate([loop.newest, chosen], axis=1)
        accepted = jnp.where(running, emitted - 1, 0)
        return _Loop(
            blocks_run=loop.blocks_run + 1,
            newest=jnp.take_along_axis(sequence, kept[:, None] + jnp.arange(2), axis=1),
            lengths=loop.lengths + kept,
            tokens=write(loop.tokens, chosen),
            behavior_logprobs=write(loop.behavior_logprobs, behavior),
            logprobs=write(loop.logprobs, draw.logprob(logits, chosen)),
            counts=loop.counts + kept,
            stopped=loop.stopped | (running & (until_stop <= kept)),
            stats=SpeculationStats(
                blocks=loop.stats.blocks + running, accepted=loop.stats.accepted + accepted
            ),
            target_cache=target_cache,
            draft_cache=draft_cache,
        )

    hidden, target_cache = start(target, target_params)
    _, draft_cache = start(draft, draft_params)
    first, behavior, logprobs = draw.sample(
        target.logits(of_target, hidden)[of_row], row_keys, jnp.zeros((), jnp.int32), settings
    )
    last = jnp.take_along_axis(prompts, prompt_lengths[:, None] - 1, axis=1)[of_row, 0]

    def buffer(values: Array) -> Array:
        return jnp.zeros((rows, room), values.dtype).at[:, 0].set(values)

    zeros = jnp.zeros(rows, jnp.int32)
    loop = jax.lax.while_loop(
        lambda loop: jnp.any(~loop.stopped & (loop.counts < max_new_tokens)),
        block,
        _Loop(
            blocks_run=jnp.zeros((), jnp.int32),
            newest=jnp.stack([last, first], axis=1),
            lengths=prompt_lengths[of_row] + 1,
            tokens=buffer(first),
            behavior_logprobs=buffer(behavior),
            logprobs=buffer(logprobs),
            counts=zeros + 1,
            stopped=draw.is_stop(first, settings),
            stats=SpeculationStats(blocks=zeros, accepted=zeros),
            target_cache=target_cache,
            draft_cache=draft_cache,
        ),
    )

    def by_prompt(values: Array) -> Array:
        return values.reshape(*grid, *values.shape[1:])

    samples = assemble(
        prompts,
        prompt_lengths,
        tokens=by_prompt(loop.tokens[:, :max_new_tokens]),
        behavior_logprobs=by_prompt(loop.behavior_logprobs[:, :max_new_tokens]),
        logprobs=by_prompt(loop.logprobs[:, :max_new_tokens]),
        counts=by_prompt(loop.counts),
        stopped=by_prompt(loop.stopped),
        pad_token=settings.pad_token,
        steps=loop.blocks_run,
    )
    return samples, loop.stats
