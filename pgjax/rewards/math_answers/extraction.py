r"""Finding the final answer in a text: `\boxed{x}`, `#### x`, "the answer is x"."""

from __future__ import annotations

import re

_LONGEST_STATEMENT = 1000
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BARE = re.compile(r"[^\s{}$\\]+")
_HASHES = re.compile(r"####[ \t]*([^\n#]*)")
_STATED = re.compile(r"\banswer\b(?:[^\n.:=]{0,60}?\bis\b|[ \t]*(?=:))\s*:?\s*", re.IGNORECASE)
_FORMULA = re.compile(r"\$\$?([^$\n]+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]")
# "$40 and not $50" are two amounts of money, no formula.
_MONEY = re.compile(r"\$\s?\d[\d,.]*[.,;!?)]*\s+[^$\n\\]*?[A-Za-z]{2}")
# A sentence ends at a full stop that is no decimal point, or where a subordinate clause begins.
_SENTENCE_END = re.compile(
    r"[.!?](?=\s|$)|[;\n]|,?\s+(?:because|since|so that|which|where|as we)\b|,\s+(?:as|so|not)\b"
)
_NUMBER = re.compile(
    r"(?<![\w.])[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?(?![\w/]|\.\d)\s?%?|"
    r"(?<![\w.])[-+−]?\.\d+(?!\w)"
)


def boxed(text: str) -> list[str]:
    r"""The contents of all outermost `\boxed{...}` (or `\fbox`) with balanced braces, in order.

    One pass over the text, whatever is in it. An escaped brace (`\{`) does not count. A box whose
    brace is never closed is no box; what is inside it may be. `\boxed 7` without braces holds what
    follows up to the next space, dollar sign or brace.
    """
    found: list[tuple[int, int, int]] = []  # start of the command, start and end of the content
    opened: list[tuple[int, int] | None] = []  # per open brace: the box it belongs to
    i, n = 0, len(text)
    while i < n:
        c = text[i]
        if c == "\\":
            box = _BOX.match(text, i)
            if box is None:
                i += 2
            elif box.end() < n and text[box.end()] == "{":
                opened.append((i, box.end() + 1))
                i = box.end() + 1
            else:
                bare = _BARE.match(text, box.end())
                if bare:
                    found.append((i, bare.start(), bare.end()))
                i = max(box.end(), bare.end() if bare else 0)
            continue
        if c == "{":
            opened.append(None)
        elif c == "}" and opened:
            start = opened.pop()
            if start is not None:
                found.append((*start, i))
        i += 1
    found.sort()
    outermost, reached = [], -1
    for begin, inside, end in found:
        if begin > reached:
            outermost.append(text[inside:end].strip())
            reached = end
    return outermost


def _first_statement(text: str) -> str:
    """What directly follows "the answer is": a formula, or the rest of the sentence."""
    text = text.lstrip("*_` \t")
    formula = _FORMULA.match(text)
    if formula and not _MONEY.match(formula[0]):
        return next(g for g in formula.groups() if g is not None).strip()
    end = _SENTENCE_END.search(text)
    return (text[: end.start()] if end else text).strip(" \t*_`.,;:")


def extract_final(text: str, *, last_number: bool = False) -> str | None:
    r"""The final answer that a text states, or None where it states none.

    The first of these that occurs, and of several the last one:

    1. `\boxed{x}` that is not empty, braces balanced;
    2. `#### x`;
    3. "the answer is x", "Answer: x" (also "the final answer to ... is x");
    4. the last number, only on request: it makes a reward of any number that happens to come last.

    Args:
      text: a completion, or a reference solution.
      last_number: whether the last number of the text counts where nothing else was found.

    Returns:
      the answer as it is written, stripped.
    """
    boxes = [b for b in boxed(text) if b]
    if boxes:
        inner = boxed(boxes[-1])  # \boxed{\boxed{7}}
        return inner[-1] if inner and inner[-1] else boxes[-1]
    hashes = [h.strip() for h in _HASHES.findall(text)]
    hashes = [h for h in hashes if h]
    if hashes:
        return hashes[-1]
    for match in reversed(list(_STATED.finditer(text))):
        stated = _first_statement(text[match.end() : match.end() + _LONGEST_STATEMENT])
        if stated:
            return stated
    if last_number:
        numbers = _NUMBER.findall(text)
        if numbers:
            return numbers[-1].strip()
    return None
