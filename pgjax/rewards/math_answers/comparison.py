r"""Deciding without symbolic algebra whether two answers are the same, where that is possible."""

from __future__ import annotations

import re

from pgjax.rewards.math_answers import cleaning, rationals

# Longest answer that is handed to symbolic comparison. Honest answers are far shorter; longer ones
# are wrong without being looked into.
MAX_CHARACTERS = 500
_EQUALS = re.compile(r"(?<![<>!=\\:])=(?![=])")
_NAME = re.compile(
    r"\\?[A-Za-z]+(?:_(?:\w|\{\w+\}))?'?(?:\s*\([^()=]*\))?|(?:[A-Za-z]+\s+){1,5}[A-Za-z]+|"
    r"\\?(?:angle|triangle)\s*[A-Z]{1,3}|\|?[A-Z]{2}\|?"
)
# Sums, products and differences of what could be worked out; a sign in front is none.
_UNEVALUATED = re.compile(
    r"(?<=[\w)}!\]])\s*[-+*]|\\(?:times|cdot|div|sum|prod|int|binom|pm|mp)(?![A-Za-z])"
)
_PROSE = re.compile(
    r"(?<![\\A-Za-z])(?!(?:sqrt|sin|cos|tan|log|ln|exp|pi|frac|infty)(?![A-Za-z]))[A-Za-z]{2,}"
)
_BASED = re.compile(r"(-?[0-9][0-9A-Fa-f]*)\s*(?:_\s*(?:\{\s*(\w+)\s*\}|(\w)))?")
_SEPARATOR = re.compile(r"\s*(?:[,;]|(?<![A-Za-z])(?:or|and)(?![A-Za-z]))\s*")
_BRACKETS = ("()", "[]", "(]", "[)")


def _bracket(text: str) -> str:
    """The kind of bracket around a list: round, square, braces; empty for none."""
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return "{}"
    kind = text[:1] + text[-1:]
    return kind if kind in _BRACKETS and "," in text and _encloses(text) else ""


def _encloses(text: str) -> bool:
    depth = 0
    for i, c in enumerate(text):
        depth += (c in "([") - (c in ")]")
        if depth == 0:
            return i == len(text) - 1
    return False


def _sides(answer: str) -> list[str]:
    """The parts between equals signs that stand in no braces, as those of a sum's bounds do."""
    depth, cut, parts = 0, 0, []
    for i, c in enumerate(answer):
        depth += (c == "{") - (c == "}")
        if c == "=" and depth == 0 and _EQUALS.match(answer, i):
            parts.append(answer[cut:i].strip())
            cut = i + 1
    return [*parts, answer[cut:].strip()]


def _statement(answer: str) -> str | None:
    """What an equation says about a name: `x = 6 \\cdot 7 = 42` says 42.

    The left side must be a name or hold no letters, and numbers in the chain must agree; otherwise
    None: an equation such as `x^2 = 42` or `41 = 42` states no value.
    """
    parts = _sides(answer)
    if any(not p for p in parts):
        return None
    if not _NAME.fullmatch(parts[0]) and re.search(r"[A-Za-z]", re.sub(r"\\[a-z]+", "", parts[0])):
        return None
    last = rationals.parse_number(parts[-1])
    for part in parts[:-1]:
        number = rationals.parse_number(part)
        if number is not None and (last is None or not rationals.equal(number, last)):
            return None
    return parts[-1]


def _solutions(answer: str) -> str | None:
    """`x = 2 or x = 3` as `2,3`; None where there are not several values of one name."""
    sides = [_sides(part) for part in _SEPARATOR.split(answer)]
    if len(sides) < 2 or any(len(s) != 2 or not s[1] for s in sides):
        return None
    names = {name for name, _ in sides}
    return (
        ",".join(s[1] for s in sides) if len(names) == 1 and _NAME.fullmatch(names.pop()) else None
    )


def _based(prediction: str, reference: str) -> bool | None:
    """Compares numerals like `1011_2`: digits and, where both name one, the base."""
    a, b = _BASED.fullmatch(prediction), _BASED.fullmatch(reference)
    bases = [(m[2] or m[3]) if m else None for m in (a, b)]
    if a is None or b is None or not any(bases):
        return None
    return a[1].lower() == b[1].lower() and (not all(bases) or bases[0] == bases[1])


def _aligned(prediction: str, reference: str) -> tuple[str | None, str]:
    """Both answers without a name in front where only one of them has it."""
    listed = _solutions(prediction), _solutions(reference)
    if (listed[0] is None) != (listed[1] is None):
        return listed[0] or prediction, listed[1] or reference
    in_prediction, in_reference = len(_sides(prediction)) > 1, len(_sides(reference)) > 1
    if in_prediction and not in_reference:
        return _statement(prediction), reference
    if in_reference and not in_prediction:
        return prediction, _statement(reference) or reference
    return prediction, reference


def _no_number(answer: str) -> bool:
    """Whether an answer cannot stand for a number: words, variables, the question as a formula."""
    return (
        not re.search(r"[\d\\]", answer)
        or _PROSE.search(answer) is not None
        or _UNEVALUATED.search(answer) is not None
    )


def decide(prediction: str, reference: str) -> tuple[bool | None, str, str]:
    """Compares two answers by text and as exact numbers.

    Args:
      prediction: the answer to judge.
      reference: the right answer.

    Returns:
      Whether they are the same, or None where only symbolic comparison can tell; and the two
      answers, cleaned, for that.
    """
    if len(prediction) > max(MAX_CHARACTERS, 2 * len(reference)):
        return False, prediction[:MAX_CHARACTERS], reference
    cleaned, right = cleaning.clean(prediction), cleaning.clean(reference)
    if not cleaned:
        return False, cleaned, right
    if re.sub(r"\s", "", cleaned) == re.sub(r"\s", "", right):
        return True, cleaned, right
    stated, right = _aligned(cleaned, right)
    if stated is None:
        return False, cleaned, right
    based = _based(stated, right)
    if based is not None:
        return based, stated, right
    a, b = rationals.parse_number(stated), rationals.parse_number(right)
    if a is not None and b is not None:
        return rationals.equal(a, b), stated, right
    if cleaning.is_words(reference) or re.fullmatch(r"\(?[A-Z]\)?", right):
        return cleaning.words(stated) == cleaning.words(right), stated, right
    if re.sub(r"\s", "", stated) == re.sub(r"\s", "", right):
        return True, stated, right
    if b is not None and _no_number(stated):
        return False, stated, right
    brackets = _bracket(stated), _bracket(right)
    if all(brackets) and brackets[0] != brackets[1]:
        return False, stated, right
    return None, stated, right
