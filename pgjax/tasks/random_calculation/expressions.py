"""Arithmetic expressions: the grammar, exact values, generation and worked solutions.

    prompt   := expr "="
    expr     := term op term                  (the root carries no outer parentheses)
    term     := NUMBER | "(" expr ")"         (no precedence rules are needed)
    response := { expr "=" } NUMBER           (zero or more worked lines, then the value)

The recursive generator follows Algorithm 1 of "Reasoning or Memorization? Unreliable Results of
Reinforcement Learning Due to Data Contamination" (2025, arXiv:2507.10532): an expression of level
k has exactly k binary operators. Departures: operands are drawn recursively instead of from pools
of earlier expressions, and the small presets bound every intermediate value, so that a model
trained from scratch can learn them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple, Protocol

from pgjax import _checks

MAX_REJECTIONS = 1000
_OPS = "+-*/"
_ATOM_KINDS = ("integer", "fraction", "square", "cube")
_LATEX_OPS = {"+": "+", "-": "-", "*": r"\times", "/": r"\div"}
# Keeps float(value) away from overflow; no level of the presets comes near it.
_MAX_BITS = 1000
# Level-1 expressions are listed for up to this many different atoms.
_MAX_TABLED = 100


class Uniform(Protocol):
    """Anything with `random() -> float in [0, 1)`: `random.Random` or `numpy.random.Generator`."""

    def random(self) -> float: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What expressions a task draws.

    Attributes:
      ops: the operators, a non-empty selection of "+-*/", drawn uniformly.
      lo: smallest atom.
      hi: largest atom.
      bound: every sub-expression's value is an integer in [0, bound]; None lets values be any
        rational number, computed exactly.
      atom_kinds: kinds of atoms, drawn uniformly: "integer" n; "fraction" a/b with b not 0;
        "square" n^2; "cube" n^3, with n, a, b in [lo, hi]. Other kinds than "integer" need
        `bound=None`.

    Raises:
      ValueError: no or unknown operators or atom kinds, `lo > hi`, a negative `lo`, atoms above
        the bound, fractions without a non-zero denominator.
    """

    ops: str = "+-*"
    lo: int = 1
    hi: int = 9
    bound: int | None = 19
    atom_kinds: tuple[str, ...] = ("integer",)

    def __post_init__(self) -> None:
        if not self.ops or set(self.ops) - set(_OPS) or len(set(self.ops)) != len(self.ops):
            raise ValueError(f"ops: expected distinct characters of {_OPS!r}, got {self.ops!r}")
        if self.lo > self.hi or self.lo < 0:
            raise ValueError(f"lo, hi: expected 0 <= lo <= hi, got lo={self.lo}, hi={self.hi}")
        if not self.atom_kinds or set(self.atom_kinds) - set(_ATOM_KINDS):
            raise ValueError(
                f"atom_kinds: expected some of {', '.join(_ATOM_KINDS)}, got {self.atom_kinds!r}"
            )
        if self.bound is not None:
            if self.hi > self.bound:
                raise ValueError(
                    f"bound: expected at least hi={self.hi}, the largest atom, got {self.bound}"
                )
            if tuple(self.atom_kinds) != ("integer",):
                raise ValueError(
                    f"atom_kinds: expected ('integer',) under a bound, got {self.atom_kinds!r}"
                )
        if "fraction" in self.atom_kinds and self.hi == 0:
            raise ValueError("hi: expected at least 1 where atoms may be fractions, got 0")

    @property
    def latex(self) -> bool:
        """Whether expressions are written in LaTeX, for tokenizers of pretrained models."""
        return self.bound is None


MICRO9 = Config(lo=0, hi=9, bound=9)
MICRO19 = Config(lo=1, hi=9, bound=19)
MINI99 = Config(lo=0, hi=9, bound=99)
PAPER = Config(ops="+-*/", lo=0, hi=100, bound=None, atom_kinds=_ATOM_KINDS)
PRESETS = {"micro9": MICRO9, "micro19": MICRO19, "mini99": MINI99, "paper": PAPER}


class Expr(NamedTuple):
    """An immutable expression; all strings are built bottom-up when a node is made.

    Attributes:
      op: the operator, None for an atom.
      left: left operand, None for an atom.
      right: right operand, None for an atom.
      value: the exact value.
      size: number of operators.
      text: plain notation, without outer parentheses.
      canonical: `text` with the operands of + and * in string order at every node.
      atom_latex: LaTeX notation of an atom; empty for a composite.
    """

    op: str | None
    left: Expr | None
    right: Expr | None
    value: int | Fraction
    size: int
    text: str
    canonical: str
    atom_latex: str


@functools.lru_cache(maxsize=4096)
def number(value: int | Fraction) -> Expr:
    """The atom that stands for a value in a worked line."""
    if value.denominator == 1:
        text = str(value.numerator)
        if value < 0:
            return Expr(
                None, None, None, value, 0, f"({text})", f"({text})", rf"\left({text}\right)"
            )
        return Expr(None, None, None, value, 0, text, text, text)
    text = f"({value.numerator}/{value.denominator})"
    latex = rf"\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"
    return Expr(
        None, None, None, value, 0, text, text, latex if value > 0 else rf"\left(-{latex}\right)"
    )


def compose(op: str, left: Expr, right: Expr, value: int | Fraction) -> Expr:
    """The node `left op right`, whose value the caller has computed."""
    lt, rt, lc, rc = left.text, right.text, left.canonical, right.canonical
    if left.op is not None:
        lt, lc = f"({lt})", f"({lc})"
    if right.op is not None:
        rt, rc = f"({rt})", f"({rc})"
    canonical = rc + op + lc if op in "+*" and rc < lc else lc + op + rc
    return Expr(op, left, right, value, left.size + right.size + 1, lt + op + rt, canonical, "")


def _apply(
    config: Config, op: str, left: int | Fraction, right: int | Fraction
) -> int | Fraction | None:
    """The exact value, or None where the config forbids the node."""
    value: int | Fraction
    if op == "+":
        value = left + right
    elif op == "-":
        value = left - right
    elif op == "*":
        value = left * right
    elif right == 0:
        return None
    elif config.bound is None:
        value = Fraction(left) / right
    elif left % right:
        return None
    else:
        value = left // right
    if config.bound is None:
        numerator, denominator = value.numerator, value.denominator
        excess = abs(numerator.bit_length() - denominator.bit_length())
        return value if numerator == 0 or excess < _MAX_BITS else None
    return value if 0 <= value <= config.bound else None


def _atom(config: Config, uniform: Callable[[], float]) -> Expr:
    def integer(low: int) -> int:
        return low + int(uniform() * (config.hi - low + 1))

    kinds = config.atom_kinds
    kind = kinds[0] if len(kinds) == 1 else kinds[int(uniform() * len(kinds))]
    if kind == "integer":
        return number(integer(config.lo))
    if kind == "fraction":
        a, b = integer(config.lo), integer(max(config.lo, 1))
        text, latex = f"({a}/{b})", rf"\frac{{{a}}}{{{b}}}"
        return Expr(None, None, None, Fraction(a, b), 0, text, text, latex)
    n, power = integer(config.lo), 2 if kind == "square" else 3
    return Expr(
        None, None, None, n**power, 0, f"({n}^{power})", f"({n}^{power})", f"{n}^{{{power}}}"
    )


@functools.lru_cache(maxsize=64)
def _facts(config: Config) -> tuple[Expr, ...]:
    """All level-1 expressions of a bounded config, each as often as its operands can be drawn.

    Drawing two uniform atoms and a uniform operator until the value is allowed is drawing
    uniformly from this list.
    """
    atoms = [number(n) for n in range(config.lo, config.hi + 1)]
    facts = []
    for op in config.ops:
        for left in atoms:
            for right in atoms:
                value = _apply(config, op, left.value, right.value)
                if value is not None:
                    facts.append(compose(op, left, right, value))
    return tuple(facts)


def _infeasible(config: Config, level: int) -> ValueError:
    return ValueError(
        f"level: no expression with {level} operators within {config} after {MAX_REJECTIONS} "
        "draws at one node; widen bound, lo..hi or ops"
    )


def _draw(
    config: Config, uniform: Callable[[], float], facts: tuple[Expr, ...] | None, level: int
) -> Expr:
    if level == 0:
        return _atom(config, uniform)
    if level == 1 and facts is not None:
        if not facts:
            raise _infeasible(config, level)
        return facts[int(uniform() * len(facts))]
    ops, splits = config.ops, (level - 1) // 2 + 1
    for _ in range(MAX_REJECTIONS):
        j = int(uniform() * splits)
        left = _draw(config, uniform, facts, j)
        right = _draw(config, uniform, facts, level - 1 - j)
        if uniform() < 0.5:
            left, right = right, left
        op = ops[int(uniform() * len(ops))]
        value = _apply(config, op, left.value, right.value)
        if value is not None:
            return compose(op, left, right, value)
    raise _infeasible(config, level)


def generate(config: Config, rng: Uniform, level: int) -> Expr:
    """Draws one expression with exactly `level` operators.

    Level 0 is an atom. Level k draws j uniformly from {0, ..., floor((k-1)/2)}, operands of levels
    j and k-1-j, swaps them with probability 1/2 and draws the operator; a node whose value the
    config forbids is drawn again together with its operands.

    Args:
      config: what is allowed.
      rng: source of randomness; advanced.
      level: number of operators, at least 0.

    Returns:
      The expression.

    Raises:
      ValueError: a negative level, or a level the config makes infeasible (1000 rejections at
        one node).

    Source: "Reasoning or Memorization?" (2025, arXiv:2507.10532), Algorithm 1; see the module for
    departures.
    """
    _checks.in_range("level", level, 0)
    tabled = config.bound is not None and config.hi - config.lo < _MAX_TABLED
    return _draw(config, rng.random, _facts(config) if tabled else None, level)


def render(expr: Expr) -> str:
    """Plain notation: `((3+5)*2)-7`, without outer parentheses."""
    return expr.text


def render_latex(expr: Expr) -> str:
    r"""LaTeX notation: `\left(3^{2} + 5\right) \times \frac{1}{2}`, without outer parentheses."""
    if expr.left is None or expr.right is None or expr.op is None:
        return expr.atom_latex
    sides = [
        render_latex(side) if side.op is None else rf"\left({render_latex(side)}\right)"
        for side in (expr.left, expr.right)
    ]
    return f"{sides[0]} {_LATEX_OPS[expr.op]} {sides[1]}"


def canonical(expr: Expr) -> str:
    """The plain notation with the operands of + and * sorted as strings at every node.

    `3+4` and `4+3` share it, `3-4` and `4-3` do not. Operands are compared as they are written,
    parentheses included.
    """
    return expr.canonical


def reduce_once(expr: Expr) -> Expr:
    """Replaces the first reducible node (left subtree, then right subtree, then self) by its value.

    Raises:
      ValueError: `expr` is an atom.
    """
    if expr.left is None or expr.right is None or expr.op is None:
        raise ValueError(f"expr: expected at least one operator, got the atom {expr.text!r}")
    if expr.left.op is not None:
        return compose(expr.op, reduce_once(expr.left), expr.right, expr.value)
    if expr.right.op is not None:
        return compose(expr.op, expr.left, reduce_once(expr.right), expr.value)
    return number(expr.value)


def reductions(expr: Expr) -> list[Expr]:
    """The expressions of the worked lines, one for each operator; the last is the value."""
    lines = []
    while expr.op is not None:
        expr = reduce_once(expr)
        lines.append(expr)
    return lines


def worked_lines(expr: Expr, *, latex: bool = False) -> list[str]:
    """The worked solution, a line for each operator: `((3+5)*2)-7` gives `(8*2)-7`, `16-7`, `9`."""
    return [(render_latex if latex else render)(line) for line in reductions(expr)]


def answer(config: Config, expr: Expr) -> int | float:
    """The answer: the integer under a bound, else the float of 15 significant digits."""
    return int(expr.value) if config.bound is not None else float(answer_text(config, expr))


def answer_text(config: Config, expr: Expr) -> str:
    """The answer as written: digits under a bound, else 15 significant digits."""
    return str(expr.value) if config.bound is not None else format(float(expr.value), ".15g")


def prompt_length_bound(config: Config, level: int) -> int:
    """An upper bound on the characters of a plain prompt, the final "=" included."""
    return len(str(config.hi)) * (level + 1) + level + 2 * max(level - 1, 0) + 1


def response_length_bound(config: Config, level: int) -> int:
    """An upper bound on the tokens of a plain worked response, the end of sequence included.

    Raises:
      ValueError: the config has no bound, so that values may have any number of digits.
    """
    if config.bound is None:
        raise ValueError("config: expected one with a bound, got bound=None")
    widest, atom = len(str(config.bound)), len(str(config.hi))
    total = widest + 1
    for m in range(1, level):  # the line with m operators has m+1 literals, some of them computed
        computed = min(level - m, m + 1)
        total += computed * widest + (m + 1 - computed) * atom + m + 2 * (m - 1) + 1
    return total
