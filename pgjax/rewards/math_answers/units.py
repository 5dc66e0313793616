"""What may stand behind a number: units, nouns and words of scale."""

from __future__ import annotations

import re

_KNOWN = {
    "dollar": "$ usd dollar buck",
    "cent": "¢ cent",
    "euro": "€ euro eur",
    "pound": "£ pound lb lbs gbp",
    "rupee": "₹ rupee rs",
    "m": "m meter metre",
    "cm": "cm centimeter centimetre",
    "mm": "mm millimeter millimetre",
    "km": "km kilometer kilometre",
    "ft": "ft foot feet",
    "in": "in inch inche",
    "yd": "yd yard",
    "mi": "mi mile",
    "kg": "kg kilogram",
    "g": "g gram",
    "mg": "mg milligram",
    "oz": "oz ounce",
    "l": "l liter litre",
    "ml": "ml milliliter millilitre",
    "s": "s sec second",
    "min": "min minute",
    "h": "h hr hour",
    "day": "day",
    "week": "week wk",
    "month": "month",
    "year": "year yr",
    "mi/h": "mph",
    "km/h": "kph kmh",
    "degree": "degree deg °",
    "radian": "radian rad",
    "unit": "unit",
}
KNOWN = {alias: name for name, aliases in _KNOWN.items() for alias in aliases.split()}
SYMBOLS = "$¢€£₹"
SCALES = {
    "dozen": 12,
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
# Words that change the value, state another one or take it back: no units.
_MEANINGFUL_WORDS = """
or nor and to plus minus times over factorial half halve third quarter fourth fifth sixth seventh
eighth ninth tenth hundredth thousandth pi sqrt root mod modulo base if not never than by infinity
sin cos tan log ln exp between through is are but except remainder then else where which wrong
incorrect divided multiplied choose maybe versus
"""
_MEANINGFUL = frozenset(_MEANINGFUL_WORDS.split())
_LETTERS = frozenset(alias for alias in KNOWN if len(alias) == 1 and alias.isalpha())
_WORD = re.compile(r"[A-Za-z]+|[$¢€£₹°]")
_SHAPE = re.compile(
    r"[\s.]*|\s*/?\s*[A-Za-z$¢€£₹°](?:[A-Za-z.\s/$¢€£₹°-]|\^\s*(?:\{\s*-?[123]\s*\}|-?[123]))*"
)
_POWER = re.compile(r"\^\s*\{?\s*(-?[123])")
_MAX_WORDS = 8

Unit = frozenset[str]
NONE: Unit = frozenset()


def _singular(word: str) -> str:
    word = word.lower()
    if word in KNOWN or word in SCALES:
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def parse_unit(text: str, *, spaced: bool) -> tuple[Unit, int] | None:
    """What the text behind a number says, or None where it is more than a unit.

    Args:
      text: everything behind the number, without a percent sign.
      spaced: whether a space stood between; "5x" and "5cm" differ only in what is known.

    Returns:
      The unit (known units by their own name with powers such as "m^2", other nouns as they are,
      in the singular; empty for none) and the factor of words like "thousand".
    """
    if not _SHAPE.fullmatch(text):
        return None
    words = [w for w in map(_singular, _WORD.findall(text)) if w != "a"]
    if len(words) > _MAX_WORDS or any(w in _MEANINGFUL for w in words):
        return None
    factor = 1
    while words and words[0] in SCALES:
        factor *= SCALES[words.pop(0)]
    known = [w for w in words if w in KNOWN]
    if any(len(w) == 1 and w not in KNOWN for w in words):
        return None  # a variable
    if words and not spaced and (words[0] not in KNOWN or words[0] in _LETTERS):
        return None
    if not known and {"squared", "cubed"} & set(words):
        return None
    return _canonical(words, text), factor


def _canonical(words: list[str], text: str) -> Unit:
    known = [KNOWN[w] for w in words if w in KNOWN]
    if not known:
        return frozenset(w for w in words if len(w) > 2)
    power = _POWER.search(text)
    exponent = power[1] if power else ""
    if {"square", "sq", "squared"} & set(words):
        exponent = "2"
    if {"cubic", "cu", "cubed"} & set(words):
        exponent = "3"
    suffix = f"^{exponent}" if exponent not in ("", "1") else ""
    # Of a compound such as miles per hour every part counts.
    per = "/" if "/" in text or "per" in words else ""
    return frozenset({per.join(known) + suffix if per else known[0] + suffix})


def compatible(a: Unit, b: Unit) -> bool:
    """Whether two units may mean the same; no unit, or just "units", goes with every unit."""
    if not a or not b or a & b:
        return True
    return any(name.split("^")[0] == "unit" for name in a | b)
