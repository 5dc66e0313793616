"""Calling a verifier on the host without letting one bad completion stop a run."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pgjax import parallel


@dataclasses.dataclass(frozen=True)
class Failure:
    """A completion the verifier could not judge.

    Attributes:
      index: position in the batch.
      error: what was raised.
    """

    index: int
    error: Exception


def _scalar(value: Any, index: int) -> float:
    if isinstance(value, numbers.Real | np.bool_):
        return float(value)
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape == () and dtype is not None and np.dtype(dtype).kind in "biuf":
        return float(value)
    given = f"shape {shape}" if shape is not None else type(value).__name__
    raise ValueError(
        f"verifier: expected one number for completion {index}, got {given}: {value!r:.80}"
    )


def own_completions(
    samples: Any,
    batch: Mapping[str, Any],
    decode: Callable[[Sequence[int]], str],
    examples: Callable[[Mapping[str, Any]], Sequence[Any]],
) -> tuple[list[str], list[Any]]:
    """Texts of the completions that this process is to judge, and the example of each.

    In a job of several processes those on its own devices; else all.

    Args:
      samples: has `tokens` `[B, T]`, `mask` `[B, T]` and `prompt_ids` `[B]`.
      batch: arrays with a row for each prompt.
      decode: token ids of a completion, stop token included, to text.
      examples: of a batch of NumPy arrays, one per prompt.
    """
    (tokens, mask, prompts), _ = parallel.own_rows(
        (samples.tokens, samples.mask, samples.prompt_ids)
    )
    own_batch, first = parallel.own_rows(dict(batch))
    of_prompt = examples(own_batch)
    texts = [decode(row[kept].tolist()) for row, kept in zip(tokens, mask, strict=True)]
    return texts, [of_prompt[int(p) - first] for p in prompts]


def call_verifier(
    verifier: Callable[[Any, Mapping[str, Any]], Any],
    completions: Sequence[Any],
    examples: Sequence[Mapping[str, Any]],
) -> tuple[np.ndarray, list[Failure]]:
    """Judges completions one by one.

    Args:
      verifier: `(completion, example) -> reward`, a number.
      completions: N texts or rows of tokens.
      examples: N items.

    Returns:
      rewards: f32 `[N]`; NaN where the verifier raised or returned NaN or an infinity.
      failures: those, in order, so that the caller can log and mask them.

    Raises:
      ValueError: unequal lengths; a result that is not one real number, which is a mistake in the
        verifier and not in a completion.
    """
    if len(completions) != len(examples):
        raise ValueError(
            f"examples: expected one for each of {len(completions)} completions, "
            f"got {len(examples)}"
        )
    rewards = np.full(len(completions), np.nan, np.float32)
    failures: list[Failure] = []
    for i, (completion, example) in enumerate(zip(completions, examples, strict=True)):
        try:
            result = verifier(completion, example)
        except Exception as error:
            failures.append(Failure(i, error))
            continue
        reward = np.float32(_scalar(result, i))
        if np.isfinite(reward):
            rewards[i] = reward
        else:
            failures.append(Failure(i, ValueError(f"the verifier returned {result!r}")))
    return rewards, failures
