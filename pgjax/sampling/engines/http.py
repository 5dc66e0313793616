"""Sampling by a server beside the trainer (vLLM, SGLang), with what `sampling.generate` returns."""

from __future__ import annotations

import concurrent.futures
import functools
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from pgjax.sampling import draw
from pgjax.sampling.engines.client import HttpEngine
from pgjax.sampling.engines.protocols import Choice, EngineError, Request
from pgjax.sampling.samples import Samples, assemble


def generate(
    engine: HttpEngine,
    params: Any,
    prompts: Int[Array, "P Tp"],
    prompt_lengths: Int[Array, " P"],
    key: PRNGKeyArray,
    *,
    num_samples: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    pad_token: int = 0,
) -> Samples:
    """Samples `num_samples` completions of each prompt by a server.

    Called like `sampling.generate`, with an engine in place of the decoder, and returns the same
    layout, so `train.to_rollout` and every objective take it. `behavior_logprobs` are the
    *server's*: a server with other kernels, another precision or older weights samples from
    another policy than the learner's, which `objectives.with_mismatch_weights` corrects.

    To bring new weights to the server, give the engine a hook; the library does not choose how.
    Both ways below read a checkpoint that the hook wrote for them:

        def on_new_weights(params):
            save(params, path)                                   # in the Hugging Face format
            engine.post("/update_weights_from_disk", {"model_path": path})               # SGLang
            engine.post("/collective_rpc", {"method": "reload_weights"})  # vLLM, in its dev mode
            engine.post("/reset_prefix_cache", {})                        # vLLM, in its dev mode

    Args:
      engine: where the server is.
      params: given to `engine.on_new_weights`; None: the server's weights stay as they are.
      prompts, prompt_lengths, num_samples, max_new_tokens, top_k, top_p, min_p, stop_tokens,
        pad_token: as in `sampling.generate`; arrays and numbers of the host.
      key: gives each prompt's request its seed.
      temperature: as in `sampling.generate`; at 0 each prompt is asked for one completion, which
        stands for all of its samples.

    Returns:
      `Samples`. Its `logprobs` are NaN on the mask where the server's log-probs do not tell them:
      they belong to a tempered or filtered distribution. Its `steps` is the longest completion.

    Raises:
      ValueError: as in `sampling.generate`; a temperature or filter under which the server's
        log-probs are not those of the distribution it samples from.
      EngineError: the server could not be reached, refused, or answered something unusable: no
        token ids or log-probs, different numbers of them, ids outside the vocabulary, too few
        completions, one that is too long or ends with no stop token before its budget.
    """
    draw.check_arguments(
        prompts,
        prompt_lengths,
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        vocab_size=engine.vocab_size,
        max_length=None,
    )
    settings = draw.settings(
        vocab_size=engine.vocab_size,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        stop_tokens=stop_tokens,
        pad_token=pad_token,
    )
    greedy = float(temperature) == 0.0
    kind = engine.logprobs or engine.protocol.logprobs
    filtered = not (top_k is None and top_p is None and min_p is None)
    _check_known(kind, greedy=greedy, tempered=float(temperature) != 1.0, filtered=filtered)
    if params is not None and engine.on_new_weights is not None:
        engine.on_new_weights(params)

    host_prompts, lengths = np.asarray(prompts), np.asarray(prompt_lengths)
    asked = 1 if greedy else num_samples  # servers refuse several greedy completions
    seeds = np.asarray(_seeds(key, len(host_prompts)))
    requests = [
        Request(
            prompt=row[:length].tolist(),
            num_samples=asked,
            max_new_tokens=max_new_tokens,
            temperature=float(temperature),
            top_k=None if top_k is None else int(top_k),
            top_p=None if top_p is None else float(top_p),
            min_p=None if min_p is None else float(min_p),
            stop_tokens=tuple(int(token) for token in stop_tokens),
            seed=int(seed),
        )
        for row, length, seed in zip(host_prompts, lengths, seeds, strict=True)
    ]
    grid = (len(host_prompts), num_samples)
    tokens = np.zeros((*grid, max_new_tokens), np.int32)
    logprobs = np.zeros((*grid, max_new_tokens), np.float32)
    counts, stopped = np.zeros(grid, np.int32), np.zeros(grid, bool)
    for p, choices in enumerate(_ask_all(engine, requests)):
        for g in range(num_samples):
            choice = choices[0] if greedy else choices[g]
            assert choice.tokens is not None and choice.logprobs is not None
            count = len(choice.tokens)
            tokens[p, g, :count], logprobs[p, g, :count] = choice.tokens, choice.logprobs
            counts[p, g], stopped[p, g] = count, choice.tokens[-1] in stop_tokens

    same = float(temperature) == 1.0 and not filtered
    of_model = kind == "model" or same or (kind == "tempered" and greedy)
    return assemble(
        jnp.asarray(host_prompts, jnp.int32),
        jnp.asarray(lengths, jnp.int32),
        tokens=jnp.asarray(tokens),
        behavior_logprobs=jnp.asarray(np.zeros_like(logprobs) if greedy else logprobs),
        logprobs=jnp.asarray(logprobs if of_model else np.full_like(logprobs, np.nan)),
        counts=jnp.asarray(counts),
        stopped=jnp.asarray(stopped),
        pad_token=settings.pad_token,
        steps=jnp.asarray(counts.max(), jnp.int32),
    )


def _check_known(kind: str, *, greedy: bool, tempered: bool, filtered: bool) -> None:
    if greedy or kind == "sampled" or not (filtered or (tempered and kind == "model")):
        return
    option = "top_k, top_p, min_p" if filtered else "temperature"
    raise ValueError(
        f"{option}: expected to be off, since the engine's log-probs are {kind!r} and would not be "
        "those of the distribution sampled from. Let the server return processed log-probs and "
        'say so with HttpEngine(logprobs="sampled")'
    )


@functools.partial(jax.jit, static_argnames="count")
def _seeds(key: Array, count: int) -> Array:
    def seed(prompt: Array) -> Array:
        return jax.random.bits(jax.random.fold_in(key, prompt), dtype=jnp.uint32) >> 1

    return jax.vmap(seed)(jnp.arange(count))


def _ask_all(engine: HttpEngine, requests: list[Request]) -> list[list[Choice]]:
    pool = concurrent.futures.ThreadPoolExecutor(min(engine.concurrency, len(requests)))
    try:
        futures = [pool.submit(_ask, engine, request) for request in requests]
        finished, _ = concurrent.futures.wait(futures, return_when="FIRST_EXCEPTION")
        for future in finished:
            future.result()  # raises the first failure at once, whatever is still under way
        return [future.result() for future in futures]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _ask(engine: HttpEngine, request: Request) -> list[Choice]:
    protocol = engine.protocol
    answer = engine.post(protocol.path, protocol.body(request, engine.model))
    where = f"{engine.url.rstrip('/')}{protocol.path}"
    try:
        choices = protocol.choices(answer)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise EngineError(
            f"{where}: expected an answer of the {protocol.name} protocol, got "
            f"{json.dumps(answer)[:300]}"
        ) from error
    if len(choices) < request.num_samples:
        raise EngineError(
            f"{where}: expected {request.num_samples} completions, got {len(choices)}"
        )
    for index, choice in enumerate(choices[: request.num_samples]):
        fault = _fault(choice, request, engine)
        if fault is not None:
            raise EngineError(f"{where}: completion {index}: {fault}")
    return choices


def _fault(choice: Choice, request: Request, engine: HttpEngine) -> str | None:
    """What is wrong with a completion, if anything."""
    tokens, logprobs = choice.tokens, choice.logprobs
    if tokens is None:
        return f"expected token ids, got none; {engine.protocol.help}"
    if logprobs is None:
        return f"expected log-probs, got none; {engine.protocol.help}"
    if len(tokens) != len(logprobs):
        return f"expected a log-prob for each token, got {len(logprobs)} for {len(tokens)} tokens"
    if not 1 <= len(tokens) <= request.max_new_tokens:
        return f"expected 1 to {request.max_new_tokens} tokens, got {len(tokens)}"
    outside = [t for t in tokens if not (isinstance(t, int) and 0 <= t < engine.vocab_size)]
    if outside:
        return f"expected ids in [0, {engine.vocab_size}), got {outside[0]}"
    if not all(isinstance(x, int | float) and -np.inf < x <= 1e-3 for x in logprobs):
        return f"expected log-probs, finite and at most 0, got {logprobs}"
    stops = [token in request.stop_tokens for token in tokens]
    if any(stops[:-1]):
        return f"expected its end at the stop token {tokens[stops.index(True)]}, got more tokens"
    if choice.finish_reason not in ("stop", "length"):
        return f"expected finish reason 'stop' or 'length', got {choice.finish_reason!r}"
    if choice.finish_reason == "stop" and not stops[-1]:
        return (
            f"expected one of the stop tokens {list(request.stop_tokens)} at its end, got "
            f"{tokens[-1]}; a token that ends the server's completions has to be among stop_tokens"
        )
    return None
