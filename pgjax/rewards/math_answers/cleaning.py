r"""Writing an answer in one way: Unicode, LaTeX spacing and styles, dollar signs, text commands."""

from __future__ import annotations

import re

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
# Pairs of a character and how it is written; a space behind a command ends it.
_COMMANDS = r"""
× \times · \cdot ⋅ \cdot π \pi ∞ \infty ≤ \le ≥ \ge ≠ \ne ± \pm ∪ \cup ∩ \cap ∈ \in θ \theta
α \alpha β \beta ° ^\circ ∅ \emptyset ℝ \mathbb{R} ½ \frac{1}{2} ⅓ \frac{1}{3} ⅔ \frac{2}{3}
¼ \frac{1}{4} ¾ \frac{3}{4} ⅕ \frac{1}{5} ⅛ \frac{1}{8}
"""
_PAIRS = _COMMANDS.split()
_SAME = dict(zip("÷⁄∕％“”’‘（）＝，", "///%\"\"''()=,", strict=True))
_UNICODE = {
    **dict.fromkeys("−–—‐‑﹣－", "-"),
    **dict.fromkeys("\u00a0\u2009\u202f\u2007\u3000\u200a\u2002\u2003", " "),
    **dict.fromkeys("\u200b\u200c\u200d\ufeff\u2060", ""),
    **_SAME,
    **{c: f"{name} " for c, name in zip(_PAIRS[::2], _PAIRS[1::2], strict=True)},
}
_TABLE = str.maketrans(_UNICODE)
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|(\d+|[A-Za-z]))")
_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|normal|sf|tt)?|math(?:rm|bf|it|sf)|mbox|operatorname|bf|rm)\s*"
    r"\{([^{}]*)\}"
)
_SIZES = re.compile(
    r"\\(?:m?left|m?right|[bB]igg?[lr]?)(?![A-Za-z])\s*\.?|"
    r"\\(?:displaystyle|textstyle|limits)(?![A-Za-z])"
)
_THOUSANDS = re.compile(r"(?<=\d)(?:\\[,!]|\{,\})\s*(?=\d{3}(?!\d))")
_SPACES = re.compile(r"(?<!\\)\\[,;:> ]|\\q?quad(?![A-Za-z])|(?<!\\)~|\s+")
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ(?![A-Za-z])\s*\}?|\\degree(?:s)?(?![A-Za-z])")
_WRAPPED = re.compile(r"\$+([^$]*)\$+|\\\((.*)\\\)|\\\[(.*)\\\]", re.DOTALL)
_SHORT_FRACTION = re.compile(r"\\[dtc]frac(?![A-Za-z])")


def clean(text: str) -> str:
    r"""The same answer in plain ASCII LaTeX, without what only changes its looks.

    Signs are unified (Unicode minus, superscripts, fractions, roots), `\left`, `\displaystyle`,
    thin spaces and enclosing dollar signs go, `\text{...}` is replaced by its words, `^\circ` by
    "degrees", `\$` and `\%` lose their backslash, and closing punctuation is cut off.
    """
    text = _RAISED.sub(lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}", text)
    text = _ROOT.sub(lambda m: rf"\sqrt{{{m[1] or m[2]}}}", text).translate(_TABLE).strip()
    wrapped = _WRAPPED.fullmatch(text.rstrip(".,;: "))
    if wrapped:
        text = next(g for g in wrapped.groups() if g is not None)
    text = _THOUSANDS.sub("", text).replace(r"\!", "").replace("{,}", ",")
    text = _SHORT_FRACTION.sub(r"\\frac", text)
    text = _SIZES.sub("", _DEGREES.sub(" degrees ", text))
    text = _TEXT.sub(r" \1 ", _TEXT.sub(r" \1 ", text))
    text = text.replace(r"\$", "$").replace(r"\%", "%").replace(r"\varnothing", r"\emptyset")
    text = _SPACES.sub(" ", text).strip()
    text = text.rstrip(".,;: ").strip("*`").strip()
    while len(text) > 2 and text[0] == "{" and text[-1] == "}" and _one_group(text):
        text = text[1:-1].strip()
    return text


def _one_group(text: str) -> bool:
    """Whether the first brace is closed by the last one."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "{") - (c == "}")
        if depth == 0:
            return i == len(text) - 1
    return False


_WORDS = re.compile(r"[A-Za-z][A-Za-z\s,.'\"-]*")
_LETTER = re.compile(r"\(?\s*([A-Za-z])\s*[).:]?")
_TEXT_COMMAND = re.compile(r"\\(?:text|mbox|mathrm)")


def is_words(raw: str) -> bool:
    r"""Whether an answer is words and no formula: `\text{even}`, "Monday", but not xy.

    Letters without a text command count as words from four on.
    """
    cleaned = clean(raw)
    if not _WORDS.fullmatch(cleaned):
        return False
    return bool(_TEXT_COMMAND.search(raw)) or max(map(len, cleaned.split())) > 3


def words(cleaned: str) -> str:
    """Words without case, punctuation, articles and spaces; a choice "(A)" is its letter."""
    letter = _LETTER.fullmatch(cleaned)
    if letter:
        return letter[1].lower()
    kept = re.sub(r"[^a-z0-9\s]", "", cleaned.lower()).split()
    return "".join(w for w in kept if w not in ("the", "a", "an")) or "".join(kept)
