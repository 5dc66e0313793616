"""Problems in random access, split without leakage and bounded in length."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from pgjax import _checks

_log = logging.getLogger("pgjax.tasks")


class Problem(NamedTuple):
    """One problem.

    Attributes:
      question: what is asked.
      answer: the final answer alone, as text: a number, LaTeX or words.
      solution: the reference solution, empty where there is none.
      level: difficulty, 0 where it is not known.
      kind: subject or template, empty where it is not known.
    """

    question: str
    answer: str
    solution: str = ""
    level: int = 0
    kind: str = ""


class Problems(Sequence[dict[str, Any]]):
    """Random access to problems as the items that loaders take.

    An item is a dict of `id` (its index), `prompt` (the question), `answer` (str), `level` (int),
    `solution` and `kind` (str).

    Args:
      problems: at least one.
      name: for messages.

    Attributes:
      levels: int32 `[N]`.

    Raises:
      ValueError: no problems.
    """

    def __init__(self, problems: Iterable[Problem], *, name: str = "problems") -> None:
        self.problems = tuple(problems)
        self.name = name
        if not self.problems:
            raise ValueError(f"{name}: expected at least one problem, got none")
        self.levels: np.ndarray = np.array([p.level for p in self.problems], np.int32)

    def __len__(self) -> int:
        return len(self.problems)

    def __getitem__(self, index: Any) -> Any:
        i = index.__index__()
        if not -len(self) <= i < len(self):
            raise IndexError(f"index: expected one in [0, {len(self)}), got {i}")
        i %= len(self)
        problem = self.problems[i]
        return {
            "id": i,
            "prompt": problem.question,
            "answer": problem.answer,
            "level": problem.level,
            "solution": problem.solution,
            "kind": problem.kind,
        }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"Problems({self.name}, {len(self)} items)"

    def where(self, keep: Callable[[Problem], bool], *, name: str) -> Problems:
        """The problems that a predicate keeps, in order; raises ValueError where it keeps none."""
        return Problems(filter(keep, self.problems), name=name)


def _share(question: str, salt: str) -> float:
    """A number in [0, 1) that depends on the words of a question alone."""
    words = " ".join(question.split()).casefold()
    digest = hashlib.sha256(f"{salt}\x1f{words}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split(
    problems: Problems, *, held_out: float = 0.1, salt: str = ""
) -> tuple[Problems, Problems]:
    """Training and held-out problems, by a hash of the question.

    A question goes to the held-out side where sha256(salt, question)/2^64 < `held_out`, whatever
    set, order or file it stands in; letter case and spacing do not matter. So a question that
    occurs twice is never on both sides, and adding problems moves none of those already there.

    Args:
      problems: what to split.
      held_out: expected share of held-out problems, in (0, 1).
      salt: another one gives another split.

    Raises:
      ValueError: a share out of range, or a side without problems.
    """
    _checks.in_range("held_out", held_out, 0, 1, low_open=True, high_open=True)
    return (
        problems.where(
            lambda p: _share(p.question, salt) >= held_out, name=f"{problems.name}, training"
        ),
        problems.where(
            lambda p: _share(p.question, salt) < held_out, name=f"{problems.name}, held out"
        ),
    )


def within_length(
    problems: Problems,
    encode: Callable[[str], Any],
    *,
    max_length: int,
    long: str = "error",
) -> Problems:
    """The problems whose prompts have at most so many tokens.

    Args:
      problems: what to filter.
      encode: a question to its prompt's tokens, such as `chat.prompt_encoder(tokenizer)`.
      max_length: tokens, at least 1.
      long: "error" raises for the first prompt that is longer; "drop" leaves those out, and logs
        how many.

    Raises:
      ValueError: an unknown `long`, a prompt that is too long, or none that is short enough.
    """
    _checks.in_range("max_length", max_length, 1)
    _checks.one_of("long", long, ("error", "drop"))
    kept, dropped = [], 0
    for i, problem in enumerate(problems.problems):
        length = len(encode(problem.question))
        if length <= max_length:
            kept.append(problem)
        elif long == "drop":
            dropped += 1
        else:
            raise ValueError(
                f"max_length: the prompt of problem {i} of {problems.name} takes {length} tokens, "
                f"got {max_length}; long='drop' would leave it out: {problem.question!r:.80}"
            )
    if not kept:
        raise ValueError(
            f"max_length: no prompt of {problems.name} has at most {max_length} tokens"
        )
    if dropped:
        _log.warning(
            "%s: left out %d of %d problems whose prompts have more than %d tokens",
            *(problems.name, dropped, len(problems), max_length),
        )
    return Problems(kept, name=problems.name)
