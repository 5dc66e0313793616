"""Numbers as people and models write them, as exact fractions; nothing is evaluated."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from pgjax.rewards.math_answers import units

_MAX_CHARACTERS = 400  # far below where Python refuses to convert digits
_PLAIN = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_FRACTION = (
    rf"\\frac\s*(?:\{{\s*(?P<top>[-+]?\s*(?:{_PLAIN}))\s*\}}|(?P<top1>\d))\s*"
    rf"(?:\{{\s*(?P<bottom>[-+]?\s*(?:{_PLAIN}))\s*\}}|(?P<bottom1>\d))"
)
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*(?P<currency>[{re.escape(units.SYMBOLS)}]?)\s*(?P<sign2>[-+]?)\s*"
    rf"(?:(?:(?P<whole>\d+)\s*)?{_FRACTION}"
    r"|(?P<mixed>\d+)\s+(?P<over>\d+)\s*/\s*(?P<under>\d+)"
    r"|(?P<fixed>\d*\.\d{0,40})\\overline\s*\{\s*(?P<repeated>\d{1,40})\s*\}"
    rf"|(?P<left>{_PLAIN})\s*/\s*(?P<right>{_PLAIN})"
    rf"|(?P<number>{_PLAIN})"
    r"(?:\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:\{\s*(?P<power>[-+]?\d{1,3})\s*\}|(?P<power1>\d))"
    r"|[eE](?P<exponent>[-+]?\d{1,3})(?![\d.]))?)"
)
_PERCENT = re.compile(r"\s*(?:%|percent\b|percentage\b|pct\b)\s*\.?$", re.IGNORECASE)


class Number(NamedTuple):
    """A number with what stands around it.

    Attributes:
      value: as written; "50%" has the value 50.
      percent: whether a percent sign follows.
      decimals: digits behind the decimal point, 0 for integers, None for fractions.
      unit: see `units.parse_unit`.
    """

    value: Fraction
    percent: bool
    decimals: int | None
    unit: units.Unit


def _fraction(text: str) -> Fraction:
    return Fraction(re.sub(r"[,\s]", "", text))


def parse_number(text: str) -> Number | None:
    r"""The number that a cleaned text is, or None where it is anything else.

    Reads `1,234.50`, `.5`, `3/4`, `\frac34`, `1 3/4`, `1\frac{3}{4}`, `1.2\times10^{5}`, `3e-4`,
    `0.1\overline{36}`, with a sign, a currency symbol in front, and a percent sign, a unit or a
    noun behind. Numbers of more than 400 characters and fractions over 0 are none.
    """
    if len(text) > _MAX_CHARACTERS:
        return None
    found = _NUMBER.match(text)
    if not found:
        return None
    parts = found.groupdict()
    value, decimals = _value(parts)
    if value is None:
        return None
    if parts["sign"] and parts["sign2"]:
        return None
    if "-" in (parts["sign"], parts["sign2"]):
        value = -value
    rest = text[found.end() :]
    percent = _PERCENT.match(rest)
    if percent:
        return Number(value, True, decimals, units.NONE)
    parsed = units.parse_unit(rest, spaced=not rest or not rest[0].isalpha())
    if parsed is None:
        return None
    unit, factor = parsed
    if parts["currency"]:
        unit = frozenset({units.KNOWN[parts["currency"]]})
    return Number(value * factor, False, decimals if factor == 1 else None, unit)


def _value(parts: dict[str, str | None]) -> tuple[Fraction | None, int | None]:
    """The absolute value and the number of decimals; None for a division by 0."""
    top, bottom = parts["top"] or parts["top1"], parts["bottom"] or parts["bottom1"]
    if top is None and parts["mixed"]:
        top, bottom = parts["over"], parts["under"]
    if top is None and parts["left"]:
        top, bottom = parts["left"], parts["right"]
    if top is not None and bottom is not None:
        under = _fraction(bottom)
        if under == 0:
            return None, None
        whole = parts["whole"] or parts["mixed"]
        value = _fraction(top) / under
        return (value + int(whole) if whole else value), None
    if parts["repeated"]:
        return _repeating(parts["fixed"] or "", parts["repeated"]), None
    number = parts["number"] or ""
    exponent = int(parts["power"] or parts["power1"] or parts["exponent"] or 0)
    decimals = len(number.partition(".")[2])
    return _fraction(number) * Fraction(10) ** exponent, decimals if exponent == 0 else None


def _repeating(fixed: str, repeated: str) -> Fraction:
    """0.1 and 36 are 0.1363636..."""
    whole, _, places = fixed.partition(".")
    scale = 10 ** len(places)
    period = Fraction(int(repeated), 10 ** len(repeated) - 1)
    return int(whole or 0) + (int(places or 0) + period) / scale


def _rounds_to(decimal: Number, exact: Fraction) -> bool:
    """Whether a long decimal is a fraction without a finite decimal, rounded or cut off."""
    if not decimal.decimals or decimal.decimals < 6:
        return False
    denominator = exact.denominator
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    step = Fraction(1, 10**decimal.decimals)
    return denominator != 1 and decimal.value != 0 and abs(decimal.value - exact) < step


def _same(a: Number, b: Number, x: Fraction, y: Fraction) -> bool:
    if x == y:
        return True
    if a.decimals is not None and b.decimals is None:
        return _rounds_to(a._replace(value=x), y)
    if b.decimals is not None and a.decimals is None:
        return _rounds_to(b._replace(value=y), x)
    return False


def equal(a: Number, b: Number) -> bool:
    """Whether two numbers are the same answer.

    They are compared exactly; only a decimal of at least 6 places may stand for a fraction that has
    no finite decimal, if it is that fraction rounded or cut off. Where one of the two carries a
    percent sign it may be meant or just be missing in the other: 50% equals 0.5 and 50. Units must
    be compatible (`units.compatible`); they are not converted.
    """
    if not units.compatible(a.unit, b.unit):
        return False
    if a.percent == b.percent:
        return _same(a, b, a.value, b.value)
    x = a.value / 100 if a.percent else a.value
    y = b.value / 100 if b.percent else b.value
    return x == y or _same(a, b, a.value, b.value)
