"""Tasks: grammar, splits, tokens, verifiers, the data set on disk, loaders, metrics.

Expressions are judged by Python's own parser on their text, never by the code that made them.
"""

from __future__ import annotations

import ast
import collections
import functools
import hashlib
import itertools
import json
import math
import operator
import pathlib
import random
import re
import shutil
import subprocess
import sys
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from pgjax import tasks
from pgjax.tasks import random_calculation as rc

_OPERATORS = {
    ast.Add: (operator.add, "+"),
    ast.Sub: (operator.sub, "-"),
    ast.Mult: (operator.mul, "*"),
    ast.Div: (operator.truediv, "/"),
}


# ------------------------------------------------------------------ independent reference


@functools.cache
def _tree(text: str):
    """Nested (op, left, right) tuples and integers, by Python's parser."""

    def convert(node):
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        if isinstance(node, ast.UnaryOp):
            assert isinstance(node.op, ast.USub)
            return -convert(node.operand)
        return (_OPERATORS[type(node.op)][1], convert(node.left), convert(node.right))

    return convert(ast.parse(text, mode="eval").body)


def _values(tree) -> list[Fraction]:
    """Values of all nodes, the root's last."""
    if isinstance(tree, Fraction):
        return [tree]
    op, left, right = tree
    functions = {symbol: f for f, symbol in _OPERATORS.values()}
    a, b = _values(left), _values(right)
    return [*a, *b, functions[op](a[-1], b[-1])]


def _size(tree) -> int:
    return 0 if isinstance(tree, Fraction) else 1 + _size(tree[1]) + _size(tree[2])


@functools.cache
def _canonical(tree) -> str:
    if isinstance(tree, Fraction):
        return str(tree)
    op, *sides = tree
    terms = [_canonical(s) if isinstance(s, Fraction) else f"({_canonical(s)})" for s in sides]
    return op.join(sorted(terms) if op in "+*" else terms)


def _subtrees(tree):
    if not isinstance(tree, Fraction):
        yield tree
        yield from _subtrees(tree[1])
        yield from _subtrees(tree[2])


def _bucket(canonical: str) -> int:
    return int(hashlib.sha256(canonical.encode()).hexdigest()[:8], 16) % 10


@functools.cache
def _shown(line: str) -> frozenset[str]:
    """Canonical forms of all sub-trees with at least two operators."""
    return frozenset(_canonical(t) for t in _subtrees(_tree(line)) if _size(t) >= 2)


def _next_line(line: str) -> str:
    """Replaces the leftmost innermost `(a op b)`, or the whole line, by its value."""
    match = re.search(r"\((\d+[-+*]\d+)\)", line)
    start, end = match.span() if match else (0, len(line))
    value = _values(_tree(match.group(1) if match else line))[-1]
    return line[:start] + str(value) + line[end:]


# ------------------------------------------------------------------ expressions


@pytest.mark.parametrize("preset", ["micro9", "micro19", "mini99"])
@pytest.mark.parametrize("level", [0, 1, 2, 3, 4, 6])
def test_expressions_are_what_they_claim(preset, level):
    config, rng = rc.PRESETS[preset], random.Random(level)
    for _ in range(150):
        expr = rc.generate(config, rng, level)
        text = rc.render(expr)
        tree = _tree(text)
        values = _values(tree)
        assert _size(tree) == expr.size == level
        assert all(v.denominator == 1 and 0 <= v <= config.bound for v in values)
        atoms = [int(n) for n in re.findall(r"\d+", text)]
        assert len(atoms) == level + 1 and all(config.lo <= a <= config.hi for a in atoms)
        assert rc.answer(config, expr) == values[-1]
        assert rc.answer_text(config, expr) == str(values[-1])
        assert rc.canonical(expr) == _canonical(tree)
        lines, line = rc.worked_lines(expr), text
        assert len(lines) == level
        for written in lines:
            line = _next_line(line)
            assert written == line
        assert line == str(values[-1])


def test_every_inner_composite_is_parenthesised():
    rng = random.Random(0)
    for _ in range(300):
        text = rc.render(rc.generate(rc.MICRO19, rng, 5))
        while re.search(r"\(\d+[-+*]\d+\)", text):
            text = re.sub(r"\(\d+[-+*]\d+\)", "0", text)
        assert re.fullmatch(r"\d+[-+*]\d+", text)


def test_exact_division_under_a_bound():
    config = rc.Config(ops="/-", lo=0, hi=9, bound=9)
    rng = random.Random(0)
    seen = set()
    for _ in range(500):
        text = rc.render(rc.generate(config, rng, 3))
        assert all(v.denominator == 1 and 0 <= v <= 9 for v in _values(_tree(text)))
        seen |= set(text)
    assert "/" in seen


def test_worked_solution_of_the_grammar_example():
    def atom(n):
        return rc.expressions.number(n)

    compose = rc.expressions.compose
    expr = compose("-", compose("*", compose("+", atom(3), atom(5), 8), atom(2), 16), atom(7), 9)
    item = rc.make_item(rc.MICRO19, expr)
    assert item == rc.Item("((3+5)*2)-7=", "9", "(8*2)-7=16-7=9", 9, 3)


def test_canonical_form_sorts_only_commutative_operands():
    def pair(op, a, b, value):
        return rc.canonical(
            rc.expressions.compose(op, rc.expressions.number(a), rc.expressions.number(b), value)
        )

    assert pair("+", 3, 4, 7) == pair("+", 4, 3, 7)
    assert pair("*", 3, 4, 12) == pair("*", 4, 3, 12)
    assert pair("-", 4, 3, 1) != pair("-", 3, 4, -1)


def test_level_two_has_the_distribution_of_redrawing_whole_nodes():
    config = rc.Config(ops="+-*", lo=1, hi=3, bound=5)
    numbers, ops = range(1, 4), {"+": operator.add, "-": operator.sub, "*": operator.mul}
    inner = [
        (f"({a}{o}{b})", f(a, b))
        for o, f in ops.items()
        for a in numbers
        for b in numbers
        if 0 <= f(a, b) <= 5
    ]
    weights = collections.Counter()
    for n, (text, value), (o, f) in itertools.product(numbers, inner, ops.items()):
        if 0 <= f(n, value) <= 5:
            weights[f"{n}{o}{text}"] += 1
        if 0 <= f(value, n) <= 5:
            weights[f"{text}{o}{n}"] += 1
    total, draws = sum(weights.values()), 40_000
    rng = random.Random(1)
    counts = collections.Counter(rc.render(rc.generate(config, rng, 2)) for _ in range(draws))
    assert set(counts) <= set(weights)
    keys = sorted(weights)
    result = scipy.stats.chisquare(
        [counts[k] for k in keys], [draws * weights[k] / total for k in keys]
    )
    assert result.pvalue > 1e-3


def test_number_of_distinct_primitive_facts():
    def count(config):
        facts = {rc.render(e) for e in rc.expressions._facts(config)}
        return len(facts)

    def brute(lo, hi, bound):
        numbers = range(lo, hi + 1)
        return sum(
            0 <= f(a, b) <= bound
            for f in (operator.add, operator.sub, operator.mul)
            for a in numbers
            for b in numbers
        )

    assert count(rc.MICRO19) == brute(1, 9, 19) == 166
    assert count(rc.Config(lo=1, hi=9, bound=9)) == brute(1, 9, 9) == 104
    assert count(rc.Config(lo=1, hi=9, bound=99)) == brute(1, 9, 99) == 207


def _latex_value(latex: str) -> Fraction:
    def number(match):
        a, b, base, power, plain = match.groups()
        if a is not None:
            return f"(F({a})/F({b}))"
        return f"(F({base})**{power})" if base is not None else f"F({plain})"

    python = re.sub(r"\\frac\{(\d+)\}\{(\d+)\}|(\d+)\^\{(\d)\}|(\d+)", number, latex)
    for symbol, meaning in ((r"\left", ""), (r"\right", ""), (r"\times", "*"), (r"\div", "/")):
        python = python.replace(symbol, meaning)
    return eval(python, {"F": Fraction, "__builtins__": {}})


@pytest.mark.parametrize("level", [0, 1, 2, 5, 12])
def test_paper_preset_is_exact_and_written_in_latex(level):
    rng = random.Random(level)
    for _ in range(60):
        expr = rc.generate(rc.PAPER, rng, level)
        latex = rc.render_latex(expr)
        value = _latex_value(latex)
        assert expr.size == level
        assert value == expr.value
        assert rc.answer_text(rc.PAPER, expr) == f"{float(value):.15g}"
        assert math.isclose(rc.answer(rc.PAPER, expr), float(value), rel_tol=1e-14)
        lines = rc.worked_lines(expr, latex=True)
        assert len(lines) == level
        assert all(_latex_value(line) == value for line in lines)
        item = rc.make_item(rc.PAPER, expr)
        assert item.prompt.startswith(rc.INSTRUCTION) and latex in item.prompt
        assert rc.parse_boxed(item.worked) == rc.parse_boxed(item.direct) == item.answer
        assert rc.verify_boxed(item.worked, item._asdict()) == 1.0


def test_paper_preset_draws_every_kind_of_atom():
    rng = random.Random(0)
    kinds = collections.Counter()
    for _ in range(4000):
        latex = rc.render_latex(rc.generate(rc.PAPER, rng, 0))
        kind = "frac" if "frac" in latex else latex.partition("^")[2] or "integer"
        kinds[kind] += 1
    assert (
        scipy.stats.chisquare([kinds[k] for k in ("integer", "frac", "{2}", "{3}")]).pvalue > 1e-3
    )
    assert sum(kinds.values()) == sum(kinds[k] for k in ("integer", "frac", "{2}", "{3}"))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"ops": ""}, "ops"),
        ({"ops": "+%"}, "ops"),
        ({"ops": "++"}, "ops"),
        ({"lo": 5, "hi": 4}, "lo, hi"),
        ({"lo": -1}, "lo, hi"),
        ({"bound": 5}, "bound"),
        ({"atom_kinds": ()}, "atom_kinds"),
        ({"atom_kinds": ("root",), "bound": None}, "atom_kinds"),
        ({"atom_kinds": ("square",)}, "atom_kinds"),
        ({"atom_kinds": ("fraction",), "bound": None, "lo": 0, "hi": 0}, "hi"),
    ],
)
def test_bad_config(arguments, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        rc.Config(**arguments)


def test_bad_levels():
    with pytest.raises(ValueError, match="level: expected a number in"):
        rc.generate(rc.MICRO19, random.Random(0), -1)
    tight = rc.Config(ops="+", lo=5, hi=5, bound=9)
    with pytest.raises(ValueError, match="level: no expression with 1 operators"):
        rc.generate(tight, random.Random(0), 1)
    with pytest.raises(ValueError, match="level: no expression with 2 operators"):
        rc.generate(rc.Config(ops="+", lo=5, hi=5, bound=14), random.Random(0), 2)
    untabled = rc.Config(ops="+", lo=200, hi=400, bound=401)
    with pytest.raises(ValueError, match="after 1000 draws at one node"):
        for _ in range(3):
            rc.generate(untabled, random.Random(0), 3)
    with pytest.raises(ValueError, match="expr: expected at least one operator"):
        rc.expressions.reduce_once(rc.expressions.number(3))


# ------------------------------------------------------------------ splits and items


def test_no_training_item_shows_a_held_out_problem():
    options = {"seed": 3, "levels": (1, 2, 3, 4), "strict": True}
    train = rc.make_items(rc.MICRO19, split="train", per_level=12_500, **options)
    assert len(train) == 50_000
    shown = set()
    for worked in {i.prompt + i.worked for i in train}:
        for line in worked.split("=")[:-1]:
            shown |= _shown(line)
    held_out = {}
    for split, bucket in (("test", 0), ("validation", 1)):
        items = rc.make_items(rc.MICRO19, split=split, per_level=600, **options)
        forms = {_canonical(_tree(i.prompt[:-1])) for i in items if i.level >= 2}
        assert len(forms) > 1000
        assert all(_bucket(form) == bucket for form in forms)
        assert not forms & shown
        held_out[split] = forms
    assert not held_out["test"] & held_out["validation"]
    assert all(_bucket(form) > 1 for form in shown)


@pytest.mark.parametrize("level", [0, 1, 2, 3, 5])
def test_split_of_against_its_definition(level):
    rng = random.Random(level)
    seen = collections.Counter()
    for _ in range(400):
        expr = rc.generate(rc.MICRO19, rng, level)
        lines = [rc.render(expr), *rc.worked_lines(expr)]
        shown = set().union(*(_shown(line) for line in lines))
        root = _bucket(_canonical(_tree(lines[0])))
        if level < 2:
            wanted = "train"
        elif root < 2:
            wanted = ("test", "validation")[root]
        else:
            wanted = "excluded" if any(_bucket(s) < 2 for s in shown) else "train"
        assert rc.split_of(expr) == wanted
        assert rc.root_split_of(expr) == ("train" if wanted == "excluded" else wanted)
        seen[wanted] += 1
    assert level < 2 or set(seen) >= {"train", "test", "validation"}
    assert (seen["excluded"] > 0) == (level > 2)


def test_items_are_reproducible_and_levels_independent():
    options = {"split": "train", "per_level": 50}
    a = rc.make_items(rc.MICRO19, seed=1, levels=(1, 2, 3), **options)
    b = rc.make_items(rc.MICRO19, seed=1, levels=(1, 2, 3), **options)
    c = rc.make_items(rc.MICRO19, seed=2, levels=(1, 2, 3), **options)
    d = rc.make_items(rc.MICRO19, seed=1, levels=(3, 2), **options)
    assert a == b and rc.dataset_fingerprint(a) == rc.dataset_fingerprint(b)
    assert rc.dataset_fingerprint(a) != rc.dataset_fingerprint(c)
    assert rc.dataset_fingerprint(a) != rc.dataset_fingerprint(a[::-1])
    assert [i for i in a if i.level == 3] == [i for i in d if i.level == 3]
    assert [i.level for i in a] == [1, 2, 3] * 50 and [i.level for i in d] == [3, 2] * 50


def test_fingerprint_is_stable():
    items = rc.make_items(rc.MICRO19, seed=0, split="test", levels=(1, 2, 3), per_level=20)
    assert rc.dataset_fingerprint(items)[:16] == "1ef27732fc4175b0"


def test_held_out_items_repeat_only_when_they_must():
    items = rc.make_items(rc.MICRO19, seed=0, split="test", levels=(1, 2, 3), per_level=1024)
    distinct = {k: {i.prompt for i in items if i.level == k} for k in (1, 2, 3)}
    assert len(distinct[1]) == 166
    assert 200 < len(distinct[2]) < 1024
    assert len(distinct[3]) == 1024
    repeats = collections.Counter(i.prompt for i in items if i.level == 2)
    assert max(repeats.values()) - min(repeats.values()) <= 1


@pytest.mark.parametrize(
    "change",
    [
        {"split": "dev"},
        {"levels": ()},
        {"levels": (1, 1)},
        {"levels": (-1,)},
        {"per_level": 0},
    ],
)
def test_bad_items(change):
    options = {"seed": 0, "split": "train", "levels": (1,), "per_level": 2}
    with pytest.raises(ValueError, match=f"^{next(iter(change))}: expected"):
        rc.make_items(rc.MICRO19, **{**options, **change})


def test_a_level_without_training_expressions_raises(monkeypatch):
    monkeypatch.setattr(rc.dataset, "_MAX_MISSES", 50)
    monkeypatch.setattr(rc.splits, "split_of", lambda expr: "excluded")
    with pytest.raises(ValueError, match="no train expression of level 3"):
        rc.make_items(rc.MICRO19, seed=0, split="train", levels=(3,), per_level=1)


@pytest.mark.parametrize("preset", ["micro9", "micro19", "mini99"])
def test_length_bounds(preset):
    config = rc.PRESETS[preset]
    for level in range(6):
        items = rc.make_items(
            config, seed=5, split="test", levels=(level,), per_level=300, strict=True
        )
        assert max(len(i.prompt) for i in items) <= rc.prompt_length_bound(config, level)
        assert max(len(i.worked) for i in items) + 1 <= rc.response_length_bound(config, level)
    if preset == "micro19":
        assert [rc.prompt_length_bound(config, k) for k in range(1, 6)] == [4, 8, 12, 16, 20]
    with pytest.raises(ValueError, match="bound"):
        rc.response_length_bound(rc.PAPER, 2)


# ------------------------------------------------------------------ tokens


def test_vocabulary_is_fixed():
    assert rc.VOCAB_SIZE == len(rc.VOCABULARY) == 19
    assert (rc.PAD, rc.EOS) == (0, 1)
    np.testing.assert_array_equal(rc.encode("0123456789+-*/()="), np.arange(2, 19))
    assert rc.encode("12=").dtype == np.int32


@given(st.text(alphabet="0123456789+-*/()=", max_size=40))
def test_tokens_round_trip(text):
    assert rc.decode(rc.encode(text)) == text
    assert rc.decode([*rc.encode(text), rc.EOS, 5, 0]) == text
    assert rc.decode([*rc.encode(text), rc.PAD, rc.PAD]) == text


def test_unknown_characters_and_ids():
    with pytest.raises(ValueError, match=r"text: .* got 'x' at position 2"):
        rc.encode("1+x")
    for bad in (19, -1):
        with pytest.raises(ValueError, match=r"tokens: expected ids in \[0, 19\)"):
            rc.decode([3, bad])


def test_token_rows():
    tokens, mask = rc.token_row("1+2=", "3", length=8)
    np.testing.assert_array_equal(tokens, [3, 12, 4, 18, 5, rc.EOS, 0, 0])
    np.testing.assert_array_equal(mask, [0, 0, 0, 0, 1, 1, 0, 0])
    assert tokens.dtype == np.int32 and mask.dtype == np.bool_
    with pytest.raises(ValueError, match=r"length: .* take 6 tokens, got 5"):
        rc.token_row("1+2=", "3", length=5)
    with pytest.raises(ValueError, match="length: the prompt"):
        rc.prompt_batch(["1+2="], length=3)
    with pytest.raises(ValueError, match="responses"):
        rc.token_batch(["1="], [], length=4)
    with pytest.raises(ValueError, match="prompts"):
        rc.prompt_batch([], length=4)
    batch = rc.token_batch(["1=", "2+3="], ["1", "5"], length=7)
    assert batch["tokens"].shape == batch["mask"].shape == (2, 7)


# ------------------------------------------------------------------ verifiers


def _row(text: str, *, eos: bool = True, length: int = 40) -> tuple[np.ndarray, np.ndarray]:
    ids = [*rc.encode(text), *([rc.EOS] if eos else [])]
    tokens, mask = np.zeros(length, np.int32), np.zeros(length, bool)
    tokens[: len(ids)], mask[: len(ids)] = ids, True
    return tokens, mask


_CASES = [
    ("9", True, 9),
    ("(8*2)-7=16-7=9", True, 9),
    ("9", False, None),  # no end of sequence
    ("", True, None),  # empty
    ("9=", True, None),  # trailing "="
    ("=9", True, 9),
    ("==9", True, 9),
    ("007", True, 7),  # leading zeros
    ("0", True, 0),
    ("000", True, 0),
    ("-3", True, None),
    ("+3", True, None),
    ("3+4", True, None),
    ("(3)", True, None),
    ("3+4=7", True, 7),
    ("12=x".replace("x", "("), True, None),
    ("999999999", True, 999_999_999),
    ("1000000000", True, None),  # ten digits
    ("2147483648", True, None),
    ("99999999999999999999999999999", True, None),
    ("00000000000000000000999999999", True, 999_999_999),
    ("00000000000000000001000000000", True, None),
]


@pytest.mark.parametrize(("text", "eos", "wanted"), _CASES)
def test_parsers_on_edge_cases(text, eos, wanted):
    tokens, mask = _row(text, eos=eos)
    assert rc.parse_row(tokens, mask) == wanted
    assert rc.verify_tokens(tokens[mask], {"answer": 9}) == float(wanted == 9)
    if eos:
        assert rc.parse_text(text) == wanted
        assert rc.verify(text, {"answer": 9}) == float(wanted == 9)
    value, ok = rc.parse_answer(jnp.asarray(tokens)[None], jnp.asarray(mask)[None])
    assert value.dtype == jnp.int32 and ok.dtype == jnp.bool_
    assert bool(ok[0]) == (wanted is not None)
    assert int(value[0]) == (wanted or 0)


def _random_rows(seed: int, count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, rc.VOCAB_SIZE, (count, length)).astype(np.int32)
    digits = rng.integers(2, 12, (count, length))
    tokens = np.where(
        rng.random((count, 1)) < rng.choice([0.0, 0.7, 0.95, 1.0], (count, 1)),
        np.where(rng.random((count, length)) < 0.9, digits, tokens),
        tokens,
    )
    zeros = rng.random((count, length)) < rng.choice([0.0, 0.8], (count, 1))
    tokens = np.where(zeros & (tokens >= 2) & (tokens < 12), 2, tokens)
    for b in range(count):
        for token, probability in ((18, 0.6), (rc.EOS, 0.8)):
            if rng.random() < probability:
                tokens[b, rng.integers(length)] = token
    start, end = np.sort(rng.integers(0, length + 1, (2, count)), axis=0)
    place = np.arange(length)
    mask = (place >= start[:, None]) & (place < end[:, None])
    holes = rng.random((count, length)) < rng.choice([0.0, 0.2], (count, 1))
    return tokens.astype(np.int32), mask & ~holes


@pytest.mark.parametrize("length", [1, 6, 30])
def test_host_and_jax_parsers_agree(length):
    tokens, mask = _random_rows(length, 10_000, length)
    value, ok = jax.jit(rc.parse_answer)(tokens, mask)
    wanted = [rc.parse_row(t, m) for t, m in zip(tokens.tolist(), mask.tolist(), strict=True)]
    np.testing.assert_array_equal(np.asarray(ok), [w is not None for w in wanted])
    np.testing.assert_array_equal(np.asarray(value), [w or 0 for w in wanted])
    if length > 1:
        assert np.asarray(ok).sum() > 300 and (~np.asarray(ok)).sum() > 300


def test_ids_outside_the_vocabulary_are_no_digits():
    tokens = np.array([[3, 99, rc.EOS], [3, -5, rc.EOS], [3, 2**31 - 1, rc.EOS]], np.int32)
    mask = np.ones((3, 3), bool)
    value, ok = rc.parse_answer(tokens, mask)
    assert not np.asarray(ok).any() and not np.asarray(value).any()
    assert [rc.parse_row(t, m) for t, m in zip(tokens, mask, strict=True)] == [None] * 3


def test_prompt_and_padding_do_not_matter():
    tokens, mask = rc.token_row("(1+2)*3=", "3*3=9", length=20)
    wide, wide_mask = rc.token_row("(1+2)*3=", "3*3=9", length=33)
    other = np.where(mask, tokens, 7).astype(np.int32)
    for t, m in ((tokens, mask), (wide, wide_mask), (other, mask)):
        value, ok = rc.parse_answer(t[None], m[None])
        assert int(value[0]) == 9 and bool(ok[0])
        assert bool(rc.has_worked_lines(t[None], m[None])[0])
    direct, direct_mask = rc.token_row("(1+2)*3=", "9", length=20)
    assert not bool(rc.has_worked_lines(direct[None], direct_mask[None])[0])


def test_every_demonstration_is_verified_as_right():
    items = rc.make_items(rc.MICRO19, seed=0, split="test", levels=(1, 2, 3, 4), per_level=50)
    for kind in ("direct", "worked"):
        responses = [getattr(i, kind) for i in items]
        batch = rc.token_batch([i.prompt for i in items], responses, length=48)
        value, ok = rc.parse_answer(batch["tokens"], batch["mask"])
        np.testing.assert_array_equal(value, [i.answer for i in items])
        assert np.asarray(ok).all()
        assert all(rc.verify(r, i._asdict()) == 1 for r, i in zip(responses, items, strict=True))
        worked = np.asarray(rc.has_worked_lines(batch["tokens"], batch["mask"]))
        np.testing.assert_array_equal(worked, [kind == "worked" and i.level > 1 for i in items])


def test_boxed_numbers():
    assert rc.parse_boxed(r"so \boxed{1} or rather \boxed{ -2.5e1 }") == -25.0
    assert rc.parse_boxed(r"\boxed{.5}") == 0.5
    for bad in ("3", r"\boxed{}", r"\boxed{nan}", r"\boxed{1e999}", r"\boxed{1/2}", r"\boxed{--1}"):
        assert rc.parse_boxed(bad) is None
    assert rc.verify_boxed(r"\boxed{9.99}", {"answer": 10.0}) == pytest.approx(0.9945, abs=1e-8)
    assert rc.verify_boxed("none", {"answer": 10.0}) == 0.0


def test_parser_bad_input():
    with pytest.raises(ValueError, match="tokens: expected rank 2"):
        rc.parse_answer(jnp.zeros(3, jnp.int32), jnp.zeros(3, bool))
    with pytest.raises(ValueError, match="mask: expected shape"):
        rc.parse_answer(jnp.zeros((1, 3), jnp.int32), jnp.zeros((1, 4), bool))
    with pytest.raises(ValueError, match="tokens: expected an integer"):
        rc.parse_answer(jnp.zeros((1, 3)), jnp.zeros((1, 3), bool))
    with pytest.raises(ValueError, match="mask: expected dtype bool"):
        rc.parse_answer(jnp.zeros((1, 3), jnp.int32), jnp.zeros((1, 3)))


# ------------------------------------------------------------------ the data set on disk

_SMALL = """
from pgjax.tasks import random_calculation as rc
import sys
LIGHT = not {'grain', 'tensorflow_datasets'} & set(sys.modules)
from pgjax.tasks.random_calculation import random_calculation_dataset_builder as module
def small(name="small", preset="micro19", **changes):
    options = dict(task=rc.PRESETS[preset], levels=(1, 2, 3), train_per_level=200,
                   validation_per_level=20, test_per_level=30)
    return module.RandomCalculationConfig(name=name, **{**options, **changes})
"""


def _small(*args, **kwargs):
    scope: dict = {}
    exec(_SMALL, scope)
    return scope["small"](*args, **kwargs)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    rc.data_source(_small(), "train", data_dir=directory)
    return directory


def test_data_set_holds_what_was_drawn(data_dir):
    config = _small()
    for split, count in (("train", 600), ("validation", 60), ("test", 90)):
        source = rc.data_source(config, split, data_dir=data_dir)
        items = rc.make_items(
            rc.MICRO19, seed=0, split=split, levels=(1, 2, 3), per_level=count // 3
        )
        assert len(source) == count
        read = list(source)
        assert [rc.Item(**{k: v for k, v in r.items() if k != "id"}) for r in read] == items
        assert [r["id"] for r in read] == list(range(count))
        np.testing.assert_array_equal(source.levels, [i.level for i in items])
        assert source[-1] == read[-1]
        with pytest.raises(IndexError, match="index"):
            source[count]
    assert "tensorflow" not in sys.modules


def test_decimals_survive_the_disk(tmp_path):
    config = _small("decimals", "paper", strict=False, train_per_level=20)
    source = rc.data_source(config, "train", data_dir=tmp_path)
    items = rc.make_items(
        rc.PAPER, seed=0, split="train", levels=(1, 2, 3), per_level=20, strict=False
    )
    assert [s["answer"] for s in source] == [i.answer for i in items]
    assert [s["worked"] for s in source] == [i.worked for i in items]


def test_presets_and_metadata_of_the_builder(tmp_path):
    for name, config in rc.PRESETS.items():
        made = rc.builder(name, data_dir=tmp_path)
        assert made.settings().task == config and made.name == "random_calculation"
        assert "2507.10532" in made.info.citation and "Arithmetic" in made.info.description
    with pytest.raises(ValueError, match="preset: expected one of 'micro9'"):
        rc.data_source("micro20", "train", data_dir=tmp_path)
    with pytest.raises(ValueError, match="split: expected one of 'train'"):
        rc.data_source("micro19", "dev", data_dir=tmp_path)


def test_two_processes_build_at_once_without_tensorflow(tmp_path):
    program = _SMALL + (
        "import sys, pathlib, time\n"
        "assert LIGHT  # importing the tasks imports neither\n"
        "here = pathlib.Path(sys.argv[1])\n"
        "(here / sys.argv[2]).touch()\n"
        "while len(list(here.glob('ready*'))) < 2: time.sleep(0.005)\n"
        "items = list(rc.data_source(small(), 'train', data_dir=here / 'data'))\n"
        "assert 'tensorflow' not in sys.modules\n"
        "print(len(items))\n"
    )
    root = pathlib.Path(rc.__file__).parents[3]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path), f"ready{i}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=root,
        )
        for i in range(2)
    ]
    for process in started:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out == "600\n"
    left = [p.name for p in (tmp_path / "data" / "random_calculation" / "small").iterdir()]
    assert left == ["1.0.0"]


@pytest.fixture
def copied(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "data")
    return tmp_path / "data", tmp_path / "data" / "random_calculation" / "small" / "1.0.0"


def _damage_truncate(directory):
    file = next(directory.glob("*train.array_record*"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _damage_flip(directory):
    file = next(directory.glob("*train.array_record*"))
    content = bytearray(file.read_bytes())
    middle = len(content) // 4
    content[middle : middle + 64] = bytes(64)
    file.write_bytes(bytes(content))


def _damage_missing_shard(directory):
    next(directory.glob("*train.array_record*")).unlink()


def _damage_missing_info(directory):
    (directory / "dataset_info.json").unlink()


@pytest.mark.parametrize(
    "damage", [_damage_truncate, _damage_flip, _damage_missing_shard, _damage_missing_info]
)
def test_damaged_data_name_the_directory_to_delete(copied, damage):
    root, directory = copied
    damage(directory)
    with pytest.raises(RuntimeError, match=f"{directory}.*delete"):
        rc.data_source(_small(), "train", data_dir=root)
    shutil.rmtree(directory)
    assert len(rc.data_source(_small(), "train", data_dir=root)) == 600


def test_data_of_other_settings_are_refused(copied):
    root, directory = copied
    with pytest.raises(ValueError, match=f"data_dir: {directory} was built with other settings"):
        rc.data_source(_small(train_per_level=100), "train", data_dir=root)


def test_an_interrupted_build_is_repeated(tmp_path, monkeypatch):
    original, calls = rc.dataset.make_items, []

    def interrupted(*args, **kwargs):
        calls.append(kwargs["split"])
        if kwargs["split"] == "test" and calls.count("test") == 1:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(rc.dataset, "make_items", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rc.data_source(_small(), "train", data_dir=tmp_path)
    assert len(rc.data_source(_small(), "test", data_dir=tmp_path)) == 90


def test_building_says_little(tmp_path, capsys):
    rc.data_source(_small(train_per_level=5), "train", data_dir=tmp_path)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Building random_calculation/small" in captured.err
    rc.data_source(_small(train_per_level=5), "train", data_dir=tmp_path)
    assert "Building" not in capsys.readouterr().err


# ------------------------------------------------------------------ loaders


class _List:
    """The smallest source."""

    def __init__(self, items):
        self.items = [{"id": i, **item._asdict()} for i, item in enumerate(items)]
        self.levels = np.array([item.level for item in items], np.int32)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


@pytest.fixture(scope="module")
def listed():
    return _List(rc.make_items(rc.MICRO19, seed=0, split="train", levels=(1, 2, 3), per_level=20))


def _prompts(source, **changes):
    options = {"prompt_length": 12, "num_prompts": 10, "seed": 0, "levels": (2, 3)}
    return tasks.prompts_loader(source, **{**options, **changes})


def _demonstrations(source, **changes):
    options = {"length": 32, "batch_size": 15, "seed": 0, "worked_probability": 0.5}
    return tasks.sft_loader(source, **{**options, **changes})


def test_prompts_are_what_the_source_says(listed):
    loader = _prompts(listed)
    for _ in range(3):
        batch = next(loader)
        assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
            "prompts": ((10, 12), "int32"),
            "prompt_lengths": ((10,), "int32"),
            "answers": ((10,), "int32"),
            "levels": ((10,), "int32"),
            "ids": ((10,), "int32"),
        }
        for row in range(10):
            item = listed[batch["ids"][row]]
            assert item["level"] == batch["levels"][row] in (2, 3)
            assert item["answer"] == batch["answers"][row]
            assert rc.decode(batch["prompts"][row]) == item["prompt"]
            assert batch["prompt_lengths"][row] == len(item["prompt"])


def test_each_pass_visits_every_prompt_once_in_a_new_order(listed):
    loader = _prompts(listed)
    passes = [np.concatenate([next(loader)["ids"] for _ in range(4)]) for _ in range(4)]
    wanted = np.flatnonzero(listed.levels >= 2)
    for ids in passes:
        np.testing.assert_array_equal(np.sort(ids), wanted)
    assert all((a != b).any() for a, b in itertools.combinations(passes, 2))
    other = np.concatenate([next(_prompts(listed, seed=1))["ids"]])
    assert (other != passes[0][:10]).any()
    again = next(_prompts(listed))["ids"]
    np.testing.assert_array_equal(again, passes[0][:10])


@pytest.mark.parametrize("make", [_prompts, _demonstrations])
def test_a_restored_loader_continues_exactly(listed, make):
    loader = make(listed)
    for _ in range(7):  # beyond the end of a pass
        next(loader)
    state = json.loads(json.dumps(loader.get_state()))
    wanted = [next(loader) for _ in range(9)]
    fresh = make(listed)
    next(fresh)
    for restored in (loader, fresh):
        restored.set_state(state)
        for batch in wanted:
            got = next(restored)
            assert got.keys() == batch.keys()
            for name in batch:
                np.testing.assert_array_equal(got[name], batch[name])


@pytest.mark.parametrize("prompt_length", [12, tuple(range(5, 13))])
def test_shards_of_a_batch_are_its_parts_in_order(listed, prompt_length):
    options = {"prompt_length": prompt_length, "levels": (1, 2, 3)}
    whole, parts = (
        _prompts(listed, num_prompts=3, **options),
        [
            _prompts(listed, num_prompts=1, shard_index=i, shard_count=3, **options)
            for i in range(3)
        ],
    )
    widths = set()
    for _ in range(9):
        batch, shares = next(whole), [next(part) for part in parts]
        widths.add(batch["prompts"].shape[1])
        for name, value in batch.items():
            np.testing.assert_array_equal(np.concatenate([s[name] for s in shares]), value)
    assert (len(widths) > 1) == isinstance(prompt_length, tuple)
    # A position is the same for all, and for another number of shards.
    other = _prompts(listed, num_prompts=3, **options)
    other.set_state(parts[0].get_state())
    np.testing.assert_array_equal(next(other)["ids"], next(whole)["ids"])


def test_demonstrations_mix_responses_item_by_item(listed):
    kinds: dict[int, set] = collections.defaultdict(set)
    loader = _demonstrations(listed)
    for _ in range(12):  # three passes
        batch = next(loader)
        for tokens, mask, index in zip(*batch.values(), strict=True):
            item = listed[index]
            response = rc.decode(tokens[mask])
            assert rc.decode(tokens) == item["prompt"] + response
            assert tokens[np.flatnonzero(mask)[-1]] == rc.EOS
            assert (tokens[np.flatnonzero(mask)[-1] + 1 :] == rc.PAD).all()
            assert response in (item["direct"], item["worked"])
            if item["level"] > 1:
                kinds[int(index)].add(response == item["worked"])
    assert len(kinds) == 40 and all(len(k) == 1 for k in kinds.values())
    share = np.mean([k == {True} for k in kinds.values()])
    assert abs(share - 0.5) < 4 * 0.5 / math.sqrt(40)
    for probability, name in ((0.0, "direct"), (1.0, "worked")):
        batch = next(_demonstrations(listed, worked_probability=probability))
        for tokens, mask, index in zip(*batch.values(), strict=True):
            assert rc.decode(tokens[mask]) == listed[index][name]


def test_shuffling_hides_the_order_of_levels():
    levels = np.tile(np.array([1, 2, 3, 4, 5], np.int32), 8000)

    class Numbers:
        def __init__(self):
            self.levels = levels

        def __len__(self):
            return len(levels)

        def __getitem__(self, i):
            return {"prompt": "1=", "answer": 1, "level": int(levels[i])}

    loader = tasks.prompts_loader(Numbers(), prompt_length=2, num_prompts=32, seed=0, levels=(2, 3))
    drawn = np.stack([next(loader)["levels"] for _ in range(200)])
    same = (drawn.ravel()[1:] == drawn.ravel()[:-1]).mean()
    assert abs(same - 0.5) < 4 * 0.5 / math.sqrt(drawn.size)


def test_loader_of_the_data_set(data_dir):
    source = rc.data_source(_small(), "train", data_dir=data_dir)
    batch = next(tasks.sft_loader(source, length=32, batch_size=8, worked_probability=1, seed=0))
    value, ok = rc.parse_answer(batch["tokens"], batch["mask"])
    assert np.asarray(ok).all()
    np.testing.assert_array_equal(value, [source[i]["answer"] for i in batch["ids"]])


def test_evaluation_prompts(listed):
    everything = tasks.prompt_arrays(listed, prompt_length=12)
    np.testing.assert_array_equal(everything["ids"], np.arange(60))
    few = tasks.prompt_arrays(listed, prompt_length=12, levels=(1, 3), per_level=2)
    np.testing.assert_array_equal(few["ids"], [0, 2, 3, 5])
    np.testing.assert_array_equal(few["levels"], [1, 3, 1, 3])
    for name in few:
        np.testing.assert_array_equal(few[name], everything[name][few["ids"]])
    with pytest.raises(ValueError, match="per_level: expected at most the 20 items of level 1"):
        tasks.prompt_arrays(listed, prompt_length=12, per_level=21)
    with pytest.raises(ValueError, match="levels: no items"):
        tasks.prompt_arrays(listed, prompt_length=12, levels=(7,))


def test_loader_with_another_tokenizer(listed):
    def letters(text):
        return [100 + ord(c) for c in text]

    batch = next(_prompts(listed, encode=letters, pad=-1))
    item = listed[batch["ids"][0]]
    row = batch["prompts"][0]
    assert row[: len(item["prompt"])].tolist() == letters(item["prompt"])
    assert (row[len(item["prompt"]) :] == -1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": (4,)}, r"levels: no items of \[4\]"),
        ({"levels": (3, 4)}, r"levels: no items of \[4\]"),
        ({"levels": ()}, "levels: nothing selected"),
        ({"seed": -1}, "seed"),
        ({"num_prompts": 0}, "batch_size"),
        ({"prompt_length": 0}, "prompt_length"),
        ({"shard_index": 2, "shard_count": 2}, "shard_index"),
    ],
)
def test_bad_loaders(listed, change, message):
    with pytest.raises(ValueError, match=message):
        _prompts(listed, **change)


def test_bad_demonstrations(listed):
    with pytest.raises(ValueError, match="worked_probability"):
        _demonstrations(listed, worked_probability=1.1)
    with pytest.raises(ValueError, match="length: "):
        next(_demonstrations(listed, length=6))
    with pytest.raises(ValueError, match="length: the prompt"):
        next(_prompts(listed, prompt_length=6))
    with pytest.raises(ValueError, match="levels: nothing selected"):
        _demonstrations(_List([]))


# ------------------------------------------------------------------ metrics


@given(st.integers(1, 7).flatmap(lambda g: st.lists(st.booleans(), min_size=g, max_size=g)))
@settings(max_examples=40, deadline=None)
def test_pass_at_k_is_the_share_of_subsets(row):
    for k in range(1, len(row) + 1):
        subsets = list(itertools.combinations(row, k))
        wanted = sum(any(s) for s in subsets) / len(subsets)
        got = tasks.pass_at_k(jnp.array([row]), k=k)
        assert got.shape == (1,) and got.dtype == jnp.float32
        assert float(got[0]) == pytest.approx(wanted, abs=1e-6)


def test_pass_at_k_stays_finite_for_many_samples():
    correct = jnp.arange(4096)[None] < jnp.array([0, 1, 2000, 4096])[:, None]
    got = tasks.pass_at_k(correct, k=100)
    wanted = [1 - math.comb(4096 - c, 100) / math.comb(4096, 100) for c in (0, 1, 2000, 4096)]
    np.testing.assert_allclose(got, wanted, atol=2e-6)


@given(
    st.lists(st.tuples(st.integers(-2, 2), st.booleans()), min_size=8, max_size=8),
    st.integers(-2, 2),
)
@settings(max_examples=60, deadline=None)
def test_majority_at_k_against_counting(samples, ref):
    for k in (1, 2, 4):
        wins = []
        for start in range(0, len(samples), k):
            votes = collections.Counter(a for a, ok in samples[start : start + k] if ok)
            best = max(votes.values(), default=0)
            winner = min((a for a, n in votes.items() if n == best), default=None)
            wins.append(winner == ref)
        got = tasks.majority_at_k(
            jnp.array([[a for a, _ in samples]]),
            jnp.array([[ok for _, ok in samples]]),
            jnp.array([ref]),
            k=k,
        )
        assert float(got[0]) == pytest.approx(np.mean(wins), abs=1e-6)


@pytest.mark.parametrize(("right", "total"), [(0, 20), (7, 20), (20, 20), (1, 1), (500, 1024)])
def test_interval_with_one_sample_each_is_wilsons(right, total):
    correct = (np.arange(total) < right)[:, None]
    mean, low, high = tasks.accuracy_interval(jnp.asarray(correct))
    wanted = scipy.stats.binomtest(right, total).proportion_ci(method="wilson")
    assert float(mean) == pytest.approx(right / total, abs=1e-6)
    assert float(low) == pytest.approx(wanted.low, abs=2e-6)
    assert float(high) == pytest.approx(wanted.high, abs=2e-6)


def test_interval_covers_when_samples_of_a_prompt_agree():
    rng = np.random.default_rng(0)
    prompts, samples, runs = 60, 16, 1000
    chance = rng.beta(0.4, 0.8, (runs, prompts, 1))
    correct = rng.random((runs, prompts, samples)) < chance
    _, low, high = jax.vmap(tasks.accuracy_interval)(jnp.asarray(correct))
    truth = 0.4 / 1.2
    covered = np.mean((np.asarray(low) <= truth) & (truth <= np.asarray(high)))
    assert 0.93 < covered < 0.975
    flat = correct.reshape(runs, -1, 1)
    _, low, high = jax.vmap(tasks.accuracy_interval)(jnp.asarray(flat))
    naive = np.mean((np.asarray(low) <= truth) & (truth <= np.asarray(high)))
    assert naive < 0.7


@pytest.mark.parametrize("row", [[True] * 8, [False] * 8, [True, False] * 4])
def test_interval_of_identical_prompts(row):
    mean, low, high = tasks.accuracy_interval(jnp.array([row] * 5))
    assert 0 <= float(low) <= float(mean) <= float(high) <= 1
    wanted = (
        scipy.stats.binomtest(20, 40)  # no spread at all between prompts: 40 samples
        if len(set(row)) > 1
        else scipy.stats.binomtest(5 * row[0], 5)  # nothing shows that samples are independent
    ).proportion_ci(method="wilson")
    assert (float(low), float(high)) == pytest.approx((wanted.low, wanted.high), abs=2e-6)


def test_interval_of_one_prompt_counts_one():
    _, low, high = tasks.accuracy_interval(jnp.array([[True, False, True, True]]))
    p, n, z = 0.75, 1, 1.959964
    half = z * math.sqrt(p * (1 - p) / n + z * z / 4) / (1 + z * z)
    centre = (p + z * z / 2) / (1 + z * z)
    assert float(low) == pytest.approx(centre - half, abs=1e-6)
    assert float(high) == pytest.approx(centre + half, abs=1e-6)


def test_bad_metrics():
    correct = jnp.ones((2, 4), bool)
    for k in (0, 5):
        with pytest.raises(ValueError, match="k: expected"):
            tasks.pass_at_k(correct, k=k)
    with pytest.raises(ValueError, match="correct: expected dtype bool"):
        tasks.pass_at_k(jnp.ones((2, 4)), k=1)
    pred = jnp.ones((2, 4), jnp.int32)
    with pytest.raises(ValueError, match="k: expected a divisor"):
        tasks.majority_at_k(pred, correct, jnp.ones(2, jnp.int32), k=3)
    with pytest.raises(ValueError, match="ref: expected shape"):
        tasks.majority_at_k(pred, correct, jnp.ones(3, jnp.int32), k=2)
    with pytest.raises(ValueError, match="correct: expected at least one"):
        tasks.accuracy_interval(jnp.ones((0, 4), bool))
    with pytest.raises(ValueError, match="z: expected"):
        tasks.accuracy_interval(correct, z=0)
