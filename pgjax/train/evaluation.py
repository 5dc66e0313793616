"""Accuracy of sampled answers: avg@G, pass@k, maj@k, with intervals, by level of difficulty."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from pgjax import models, parallel, sampling
from pgjax.tasks import metrics

AnswerFunction = Callable[[sampling.Samples], tuple[Int[Array, " B"], Bool[Array, " B"]]]


class Graded(NamedTuple):
    """Answers of G samples to each of P prompts, as NumPy arrays.

    Attributes:
      values: the stated answers, int `[P, G]`.
      ok: whether an answer was stated at all, bool `[P, G]`.
      reference: the right answers, int `[P]`.
      levels: difficulty of each prompt, int `[P]`.
      lengths: completion lengths in tokens, int `[P, G]`.
    """

    values: Int[np.ndarray, "P G"]
    ok: Bool[np.ndarray, "P G"]
    reference: Int[np.ndarray, " P"]
    levels: Int[np.ndarray, " P"]
    lengths: Int[np.ndarray, "P G"]

    @property
    def correct(self) -> Bool[np.ndarray, "P G"]:
        return self.ok & (self.values == self.reference[:, None])


class Accuracy(NamedTuple):
    """Of one level: `average` is avg@G (= pass@1), `low` and `high` its 95% interval."""

    average: float
    low: float
    high: float
    pass_at_k: float
    majority_at_k: float
    length: float
    num_prompts: int


def evaluate_text(
    decoder: models.FunctionalDecoder,
    params: Any,
    batches: Iterable[Mapping[str, Any]],
    answer: AnswerFunction,
    key: PRNGKeyArray,
    *,
    num_samples: int,
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    temperature: float = 1.0,
) -> Graded:
    """Samples answers to every prompt of `batches` and collects them.

    Args:
      decoder: from `pgjax.models`.
      params: the decoder's parameters.
      batches: finite; dicts with `prompts` int32[P, Tp], `prompt_lengths`, `answers` and `levels`.
        Batches of one shape share one compiled program.
      answer: `samples -> (values int[B], ok bool[B])`.
      key: randomness of batch i is `fold_in(key, i)`.
      num_samples: G, samples per prompt.
      max_new_tokens: the length budget.
      stop_tokens: ids that end a completion.
      temperature: 0 is greedy.

    Raises:
      ValueError: no batches at all.
    """
    columns: list[tuple[Any, ...]] = []
    for index, batch in enumerate(batches):
        samples = sampling.generate(
            decoder,
            params,
            batch["prompts"],
            batch["prompt_lengths"],
            jax.random.fold_in(key, index),
            num_samples=num_samples,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            stop_tokens=tuple(stop_tokens),
        )
        values, ok = answer(samples)
        found = parallel.fetch((values, ok, samples.mask.sum(-1)))
        stated, given, lengths = (np.reshape(x, (-1, num_samples)) for x in found)
        columns.append((stated, given, batch["answers"], batch["levels"], lengths))
    if not columns:
        raise ValueError("batches: expected at least one batch of prompts, got none")
    return Graded(*(np.concatenate([np.asarray(x) for x in c]) for c in zip(*columns, strict=True)))


def accuracy_by_level(graded: Graded, *, k: int) -> dict[int, Accuracy]:
    """Accuracy of each level present: avg@G with a 95% interval over prompts, pass@k, maj@k."""
    result = {}
    for level in np.unique(graded.levels):
        rows = graded.levels == level
        correct = graded.correct[rows]
        average, low, high = metrics.accuracy_interval(correct)
        result[int(level)] = Accuracy(
            average=float(average),
            low=float(low),
            high=float(high),
            pass_at_k=float(np.mean(metrics.pass_at_k(correct, k=k))),
            majority_at_k=float(
                np.mean(
                    metrics.majority_at_k(
                        graded.values[rows], graded.ok[rows], graded.reference[rows], k=k
                    )
                )
            ),
            length=float(graded.lengths[rows].mean()),
            num_prompts=int(rows.sum()),
        )
    return result
