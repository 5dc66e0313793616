"""Rewards of mathematical answers: right or not, whatever a model has written."""

from __future__ import annotations

import collections
import functools
import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int

from pgjax import _checks, parallel
from pgjax.rewards.math_answers.cleaning import clean
from pgjax.rewards.math_answers.comparison import decide
from pgjax.rewards.math_answers.extraction import boxed, extract_final
from pgjax.rewards.math_answers.pool import Outcome, Pool
from pgjax.rewards.verifier import Failure, own_completions

# A format: <think>...</think>, then an answer, each tag once.
THINK_THEN_ANSWER = r"\s*<think>(?:(?!</?think>).)*</think>\s*(?!\s)(?:(?!</?think>).)+"

_log = logging.getLogger("pgjax.rewards")
_MEMORY_LIMIT = 2 << 30
_REMEMBERED = 1 << 14
Reference = str | int | float | Fraction


def _reference(given: Any, index: int) -> str:
    """The reference as a text: of a whole solution its final answer."""
    if isinstance(given, str):
        stated = extract_final(given) if boxed(given) or "####" in given else given.strip()
        if stated:
            return stated
    elif isinstance(given, int | float | Fraction | np.number) and not isinstance(given, bool):
        text = str(given)
        return text[:-2] if text.endswith(".0") else text
    raise ValueError(
        f"references: expected a number or a text with an answer for completion {index}, "
        f"got {given!r:.80}"
    )


class MathVerifier:
    r"""Grades completions: 1 where the final answer is right, 0 where not.

    The final answer is what `extract_final` finds. It is compared as text and as an exact number
    first; that decides nearly all answers to word problems and starts no process. What is left
    (roots, intervals, sets, expressions) goes to math-verify in worker processes with limits on
    time and memory. A comparison that does not come back is a wrong answer and a counted failure:
    no completion can stop, slow down by more than `timeout`, or crash a run.

        with MathVerifier(workers=4) as verifier:
            rewards, failures = verifier.grade_batch(completions, references)

    An instance is itself a verifier `(completion, example) -> float` for `rewards.call_verifier`
    and `train.text.host_reward`; an example is the reference, or a mapping with it as `answer`.

    Args:
      workers: most worker processes, at least 1.
      timeout: seconds for one comparison, above 0.
      last_number: whether the last number of a completion counts where it states no final answer.
      memory_limit: bytes of address space of a worker, where the system can limit it.

    Attributes:
      counts: how many completions had no answer ("none"), were decided without a process ("exact";
        also what is remembered from before) or by one ("symbolic"), or failed by
        "timeout", "memory", "crash", "recursion" or "error".

    Raises:
      ValueError: options out of range.
    """

    def __init__(
        self,
        *,
        workers: int = 2,
        timeout: float = 5.0,
        last_number: bool = False,
        memory_limit: int = _MEMORY_LIMIT,
    ) -> None:
        _checks.in_range("workers", workers, 1)
        _checks.in_range("timeout", timeout, 0, low_open=True, high_open=True)
        _checks.in_range("memory_limit", memory_limit, 1 << 28)
        self.timeout = timeout
        self.last_number = last_number
        self.counts: collections.Counter[str] = collections.Counter()
        self._pool = Pool(workers=workers, memory_limit=memory_limit)
        self._known: collections.OrderedDict[tuple[str, str], bool] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __enter__(self) -> MathVerifier:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the worker processes; they would start again with the next comparison."""
        self._pool.close()

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the workers that run now."""
        return self._pool.pids

    def __call__(self, completion: str, example: Reference | Mapping[str, Any]) -> float:
        """1.0 or 0.0 for one completion; a comparison that fails is 0.0 and counted."""
        reference = example["answer"] if isinstance(example, Mapping) else example
        return float(self.grade_batch([completion], [reference])[0][0])

    def grade_batch(
        self, completions: Sequence[str], references: Sequence[Reference]
    ) -> tuple[np.ndarray, list[Failure]]:
        r"""Grades many completions; the symbolic comparisons among them run in parallel.

        Args:
          completions: N texts.
          references: N right answers: numbers, LaTeX, words, or solutions that end in `\boxed{x}`
            or `#### x`.

        Returns:
          rewards: f32 `[N]`, 1 or 0.
          failures: of the comparisons that were given up, in order; their rewards are 0. The error
            is a TimeoutError, a MemoryError or a RuntimeError.

        Raises:
          ImportError: math-verify is needed and missing.
          ValueError: unequal lengths; a reference without an answer.
          TypeError: a completion that is no text.
        """
        if len(completions) != len(references):
            raise ValueError(
                f"references: expected one for each of {len(completions)} completions, "
                f"got {len(references)}"
            )
        rewards = np.zeros(len(completions), np.float32)
        open_pairs: dict[tuple[str, str], list[int]] = {}
        for i, (completion, given) in enumerate(zip(completions, references, strict=True)):
            if not isinstance(completion, str):
                raise TypeError(f"completions: expected a str at {i}, got {type(completion)}")
            reference = _reference(given, i)
            answer = extract_final(completion, last_number=self.last_number)
            if answer is None:
                self.counts["none"] += 1
                continue
            same, *pair = decide(answer, reference)
            key = (pair[0], pair[1])
            if same is None and key in self._known:
                same = self._known[key]
            if same is None:
                open_pairs.setdefault(key, []).append(i)
            else:
                self.counts["exact"] += 1
                rewards[i] = same
        outcomes = self._pool.run(list(open_pairs), timeout=self.timeout)
        failures = []
        for (key, rows), outcome in zip(open_pairs.items(), outcomes, strict=True):
            rewards[rows] = outcome.same
            self._remember(key, rows, outcome)
            if outcome.error is not None:
                failures += [Failure(row, _error(outcome, key, self.timeout)) for row in rows]
        return rewards, sorted(failures, key=lambda failure: failure.index)

    def _remember(self, key: tuple[str, str], rows: list[int], outcome: Outcome) -> None:
        if outcome.error is None:
            self.counts["symbolic"] += len(rows)
            with self._lock:
                self._known[key] = outcome.same
                if len(self._known) > _REMEMBERED:
                    self._known.popitem(last=False)
        else:
            kinds = ("timeout", "memory", "crash", "recursion")
            self.counts[outcome.error if outcome.error in kinds else "error"] += len(rows)


def batch_reward(
    verifier: MathVerifier,
    decode: Callable[[Sequence[int]], str],
    references: Callable[[Mapping[str, Any]], Sequence[Reference]],
) -> Callable[[Any, Mapping[str, Any], Any], Float[Array, " B"]]:
    """A reward function of whole batches for `train.text.make_text_step`.

    Like `train.text.host_reward` with the verifier, but the symbolic comparisons of a batch run on
    all workers at once. Comparisons that fail are logged; their reward is 0. In a job of several
    processes each grades the completions that its own devices hold.

    Args:
      verifier: grades the texts.
      decode: token ids of a completion, stop token included, to text.
      references: the batch's right answers, one per prompt.

    Returns:
      `(samples, batch, key) -> f32[B]`, which reads the samples' `tokens`, `mask`
      and `prompt_ids`.
    """

    def reward(samples: Any, batch: Mapping[str, Any], key: Any) -> Array:
        del key
        scores, failures = verifier.grade_batch(
            *own_completions(samples, batch, decode, references)
        )
        for failure in failures:
            _log.warning("answer not compared, reward 0: %s", failure)
        return parallel.rows_of_all(scores, samples.tokens)

    return reward


def answer_ids(texts: Sequence[str], *, last_number: bool = False) -> Int[np.ndarray, " B"]:
    """Integers that are equal where final answers are written alike, looks aside.

    Args:
      texts: completions.
      last_number: as in `extract_final`.

    Returns:
      int32 `[B]`; a text without an answer has an id of its own.
    """
    known: dict[str, int] = {}
    result = np.zeros(len(texts), np.int32)
    for row, text in enumerate(texts):
        answer = extract_final(text, last_number=last_number)
        key = f"no answer {row}" if answer is None else f"answer {clean(answer)}"
        result[row] = known.setdefault(key, len(known))
    return result


def _error(outcome: Outcome, pair: tuple[str, str], timeout: float) -> Exception:
    what = f"comparing {pair[0]!r:.60} with {pair[1]!r:.60}"
    if outcome.error == "timeout":
        return TimeoutError(f"{what} took more than {timeout} s")
    if outcome.error == "memory":
        return MemoryError(f"{what} took more than the memory limit")
    return RuntimeError(f"{what} failed: {outcome.error}")


@functools.cache
def _shared_pool() -> Pool:
    return Pool(workers=1, memory_limit=_MEMORY_LIMIT)


def grade(
    completion: str, reference: Reference, *, timeout: float = 5.0, last_number: bool = False
) -> float:
    r"""1.0 where a completion's final answer equals the reference, else 0.0.

    One completion at a time, with one worker process that is started when it is first needed and
    kept; for batches and for counts of what failed see `MathVerifier`.

    Args:
      completion: what a model wrote.
      reference: a number, LaTeX, words, or a solution that ends in `\boxed{x}` or `#### x`.
      timeout: seconds, above 0; a comparison that takes longer is 0.0.
      last_number: whether the last number counts where the completion states no final answer.

    Raises:
      ImportError: math-verify is needed and missing.
      ValueError: a reference without an answer, or a timeout not above 0.
    """
    _checks.in_range("timeout", timeout, 0, low_open=True, high_open=True)
    answer = extract_final(completion, last_number=last_number)
    right = _reference(reference, 0)
    if answer is None:
        return 0.0
    same, *pair = decide(answer, right)
    if same is None:
        same = _shared_pool().run([(pair[0], pair[1])], timeout=timeout)[0].same
    return float(same)


def format_reward(text: str, *, pattern: str | re.Pattern[str]) -> float:
    """1.0 where the whole text matches a regular expression, else 0.0.

    Args:
      text: a completion.
      pattern: matched against the whole text, where "." also matches line breaks (a compiled
        pattern keeps its own flags). Completions are long and come from a model: prefer patterns
        that cannot backtrack without end, such as `THINK_THEN_ANSWER`.
    """
    compiled = re.compile(pattern, re.DOTALL) if isinstance(pattern, str) else pattern
    return float(compiled.fullmatch(text) is not None)
