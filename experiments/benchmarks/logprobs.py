"""Log-probs from hidden states against the full log-softmax, and from logits against distrax.

`python -m experiments.benchmarks.logprobs` prints the table.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from experiments.benchmarks.harness import Row, main, milliseconds, paired
from pgjax import logprobs

ROWS, LENGTH = 2, 256


def log_softmax_of_all_logits(hidden: Array, unembedding: Array, tokens: Array) -> Array:
    """The textbook formula: all logits, all log-probs, then the one that was drawn."""
    logits = jnp.einsum("bth,hv->btv", hidden, unembedding, preferred_element_type=jnp.float32)
    log_p = jax.nn.log_softmax(logits[:, :-1])
    chosen = jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.pad(chosen, ((0, 0), (1, 0)))


def logit_less_logsumexp(hidden: Array, unembedding: Array, tokens: Array) -> Array:
    """The leanest formula that still makes all logits."""
    logits = jnp.einsum("bth,hv->btv", hidden, unembedding, preferred_element_type=jnp.float32)
    logits = logits[:, :-1]
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.pad(chosen - jax.nn.logsumexp(logits, axis=-1), ((0, 0), (1, 0)))


def _problem(features: int, vocabulary: int) -> tuple[Array, Array, Array, Array]:
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (ROWS, LENGTH, features))
    unembedding = jax.random.normal(keys[1], (features, vocabulary)) / features**0.5
    tokens = jax.random.randint(keys[2], (ROWS, LENGTH), 0, vocabulary)
    # A policy-gradient loss: an advantage per token over the number of tokens.
    weights = jax.random.normal(keys[3], (ROWS, LENGTH)) / (ROWS * LENGTH)
    return hidden, unembedding, tokens, weights


def _forward_backward(f: Callable[..., Array]) -> Callable[..., Any]:
    def loss(hidden: Array, unembedding: Array, tokens: Array, weights: Array) -> Array:
        return (f(hidden, unembedding, tokens) * weights).sum()

    return jax.value_and_grad(loss, (0, 1))


def _largest_difference(a: Any, b: Any) -> float:
    gaps = jax.tree.map(lambda x, y: jnp.abs(x - y).max(), a, b)
    return float(max(jax.tree.leaves(gaps)))


def _temporary_bytes(program: Any) -> int:
    return int(program.memory_analysis().temp_size_in_bytes)


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.4g} MiB"


def _time_row(
    name: str,
    peer: str,
    ours: Callable[..., Any],
    theirs: Callable[..., Any],
    arguments: tuple[Array, ...],
    *,
    limit: float | None,
    runs: int,
) -> Row:
    a = jax.jit(ours).lower(*arguments).compile()
    b = jax.jit(theirs).lower(*arguments).compile()
    gap = _largest_difference(a(*arguments), b(*arguments))
    return paired(
        name,
        peer,
        lambda: a(*arguments),
        lambda: b(*arguments),
        runs=runs,
        shown=milliseconds,
        max_abs_error=gap,
        limit=limit,
    )


def _memory_row(features: int, vocabulary: int, dtype: Any) -> Row:
    shapes = (
        jax.ShapeDtypeStruct((ROWS, LENGTH, features), dtype),
        jax.ShapeDtypeStruct((features, vocabulary), dtype),
        jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32),
        jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.float32),
    )
    ours, theirs = (
        _temporary_bytes(jax.jit(_forward_backward(f)).lower(*shapes).compile())
        for f in (logprobs.from_hidden, log_softmax_of_all_logits)
    )
    return Row(
        f"from_hidden, temporaries, H={features} V={vocabulary} {jnp.dtype(dtype).name}",
        "log_softmax of all logits",
        _mebibytes(ours),
        _mebibytes(theirs),
        ours / theirs,
        limit=0.2,
    )


def _hidden_rows() -> list[Row]:
    ours = _forward_backward(logprobs.from_hidden)
    textbook = _forward_backward(log_softmax_of_all_logits)
    lean = _forward_backward(logit_less_logsumexp)
    small, wide = _problem(256, 65536), _problem(1024, 65536)
    name = "from_hidden, value and gradient, H={} V=65536 float32"
    # At large H the products are all the time there is, and recomputing the logits makes them
    # 4/3 of the peers': what is bought there is memory. So only the first row has a limit.
    return [
        _time_row(name.format(256), "log_softmax of all logits", ours, textbook, small,
                  limit=1.0, runs=9),
        _time_row(name.format(256), "logit - logsumexp", ours, lean, small, limit=None, runs=5),
        _time_row(name.format(1024), "log_softmax of all logits", ours, textbook, wide,
                  limit=None, runs=3),
        _time_row(name.format(1024), "logit - logsumexp", ours, lean, wide, limit=None, runs=3),
        _memory_row(256, 65536, jnp.float32),
        _memory_row(256, 151936, jnp.bfloat16),
    ]  # fmt: skip


def _logits_rows() -> list[Row]:
    try:
        import distrax

        peer = "distrax.Categorical"

        def their_logprobs(logits: Array, tokens: Array) -> Array:
            chosen = distrax.Categorical(logits=logits[:, :-1]).log_prob(tokens[:, 1:])
            return jnp.pad(chosen, ((0, 0), (1, 0)))

        def their_entropy(logits: Array) -> Array:
            return distrax.Categorical(logits=logits).entropy()

    except ImportError:
        peer = "jax.nn.log_softmax (distrax is not installed)"

        def their_logprobs(logits: Array, tokens: Array) -> Array:
            log_p = jax.nn.log_softmax(logits[:, :-1])
            chosen = jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]
            return jnp.pad(chosen, ((0, 0), (1, 0)))

        def their_entropy(logits: Array) -> Array:
            log_p = jax.nn.log_softmax(logits)
            return -(jnp.exp(log_p) * log_p).sum(-1)

    hidden, unembedding, tokens, weights = _problem(64, 16384)
    logits = jnp.einsum("bth,hv->btv", hidden, unembedding)

    def of_tokens(f: Callable[..., Array]) -> Callable[..., Any]:
        return jax.value_and_grad(lambda logits: (f(logits, tokens) * weights).sum())

    def of_entropy(f: Callable[..., Array]) -> Callable[..., Any]:
        return jax.value_and_grad(lambda logits: (f(logits) * weights).sum())

    size = "value and gradient, V=16384 float32"
    return [
        _time_row(f"from_logits, {size}", peer, of_tokens(logprobs.from_logits),
                  of_tokens(their_logprobs), (logits,), limit=1.0, runs=15),
        _time_row(f"entropy_from_logits, {size}", peer, of_entropy(logprobs.entropy_from_logits),
                  of_entropy(their_entropy), (logits,), limit=1.0, runs=15),
    ]  # fmt: skip


def rows() -> list[Row]:
    """All comparisons; `limit` is the ratio a row must stay within, where one is claimed."""
    return _hidden_rows() + _logits_rows()


if __name__ == "__main__":
    sys.exit(main("logprobs", __doc__, rows, None))
