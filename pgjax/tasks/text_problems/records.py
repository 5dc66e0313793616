r"""Reading one problem out of a record: GSM8K's fields, MATH's, or plain ones."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pgjax.rewards.math_answers.extraction import boxed
from pgjax.tasks.text_problems.problems import Problem

_QUESTIONS = ("question", "problem", "prompt")
_ANSWERS = ("answer", "solution")
_LONGEST_ANSWER = 200
_LEVEL = re.compile(r"\d+")
# "He has 48/2 = <<48/2=24>>24": marks for a calculator, no part of the text.
_CALCULATOR = re.compile(r"<<[^<>]*>>")


class RecordError(ValueError):
    """What is wrong with a record; the reader of the file adds where it stands."""


def _first(names: tuple[str, ...], record: Mapping[str, Any], what: str) -> str:
    for name in names:
        if name in record:
            return name
    raise RecordError(
        f"expected a field {' or '.join(map(repr, names))} with the {what}, got the fields "
        f"{sorted(map(str, record))}"
    )


def _text(record: Mapping[str, Any], name: str) -> str:
    if name not in record:
        raise RecordError(f"expected a field {name!r}, got the fields {sorted(map(str, record))}")
    value = record[name]
    if isinstance(value, bytes):
        value = value.decode()
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
        value = value.removesuffix(".0")
    if not isinstance(value, str) or not value.strip():
        raise RecordError(f"field {name!r}: expected a text that is not empty, got {value!r:.80}")
    return value.strip()


def _final(text: str, *, required: bool) -> str:
    r"""The answer at the end of a solution: `#### x`, else the last `\boxed{x}`, else all of it."""
    marked = text.rpartition("####")
    answer = marked[2].strip() if marked[1] else next(reversed([b for b in boxed(text) if b]), "")
    if answer:
        return answer
    whole_solution = "\n" in text or len(text) > _LONGEST_ANSWER
    if marked[1] or required or r"\boxed" in text or whole_solution:
        raise RecordError(
            rf"no answer can be extracted: expected '#### x' or '\boxed{{x}}' in {text[-80:]!r}"
        )
    return text


def problem_of(
    record: Mapping[str, Any], *, question: str | None = None, answer: str | None = None
) -> Problem:
    r"""The problem a record holds.

    Args:
      record: fields by name.
      question: the field with the question; None: the first of "question", "problem", "prompt".
      answer: the field with the answer; None: "answer", else "solution". A "solution" must mark its
        answer by `#### x` or `\boxed{x}`; an "answer" may, and is the answer itself otherwise,
        where it is one line of at most 200 characters.

    Raises:
      RecordError: a missing or empty field, or an answer that cannot be extracted.
    """
    asked = _text(record, question or _first(_QUESTIONS, record, "question"))
    name = answer or _first(_ANSWERS, record, "answer")
    said = _text(record, name)
    final = _final(said, required=name == "solution")
    solution = said if final != said else ""
    if not solution and isinstance(record.get("solution"), str | bytes):
        solution = _text(record, "solution")
    # GSM8K writes the thousands of its answers with commas: 1,000 is 1000.
    if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", final):
        final = final.replace(",", "")
    level = record.get("level")
    found = _LEVEL.search(str(level)) if level is not None else None
    kind = record.get("type", record.get("subject", ""))
    return Problem(
        question=asked,
        answer=final,
        solution=_CALCULATOR.sub("", solution),
        level=int(found[0]) if found else 0,
        kind=kind.decode() if isinstance(kind, bytes) else str(kind),
    )
