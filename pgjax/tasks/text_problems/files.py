"""Problems from files with one JSON object a line."""

from __future__ import annotations

import json
import os
import pathlib

from pgjax.tasks.text_problems.problems import Problem, Problems
from pgjax.tasks.text_problems.records import RecordError, problem_of


def load_jsonl(
    path: str | os.PathLike[str], *, question: str | None = None, answer: str | None = None
) -> Problems:
    r"""Reads a file of problems.

    Fields are found by name: GSM8K's `question` and `answer` (ending in `#### x`), MATH's `problem`
    and `solution` (with `\boxed{x}`), `level` and `type`, or plain `prompt` and `answer`. A file
    with both `answer` and `solution` has its answer in the first.

    Args:
      path: a file with one JSON object a line; empty lines are skipped.
      question: the field with the question, where it has another name.
      answer: the field with the answer, or with a solution that ends in it.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a line that is no JSON object, a missing or empty field, an answer that cannot be
        extracted (each with file and line), or a file without problems.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"path: no such file, {str(file)!r}")
    problems: list[Problem] = []
    with file.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            where = f"{file}, line {number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if not line:
                    continue
                record = json.loads(line)
            except ValueError as error:  # includes bytes that are not UTF-8
                raise ValueError(f"{where}: not valid JSON: {error}") from None
            if not isinstance(record, dict):
                raise ValueError(f"{where}: expected a JSON object, got {line!r:.80}")
            try:
                problems.append(problem_of(record, question=question, answer=answer))
            except RecordError as error:
                raise ValueError(f"{where}: {error}") from None
    if not problems:
        raise ValueError(f"path: {str(file)!r} holds no problems")
    return Problems(problems, name=file.name)
