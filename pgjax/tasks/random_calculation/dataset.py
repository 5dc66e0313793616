"""Sets of items: drawing them, fingerprinting them, laying them out as token rows."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from pgjax import _checks
from pgjax.tasks.random_calculation import expressions, splits, tokenizer
from pgjax.tasks.random_calculation.expressions import Config, Expr

INSTRUCTION = (
    "Evaluate the following expression step by step. "
    r"Write the final value as a decimal number inside \boxed{}."
)


# Draws in a row that may belong to other splits before a level counts as empty.
_MAX_MISSES = 1_000_000


class Item(NamedTuple):
    """One problem.

    Attributes:
      prompt: what is asked.
      direct: the response that states the value at once.
      worked: the response that writes every intermediate line.
      answer: the value, int under a bound, else float.
      level: number of operators.
    """

    prompt: str
    direct: str
    worked: str
    answer: int | float
    level: int


def make_item(config: Config, expr: Expr) -> Item:
    """The item of an expression: in plain notation, or without a bound in LaTeX and instructed."""
    value, text = expressions.answer(config, expr), expressions.answer_text(config, expr)
    if not config.latex:
        lines = expressions.worked_lines(expr)
        worked = "=".join(lines) if lines else text
        return Item(expr.text + "=", text, worked, value, expr.size)
    problem = expressions.render_latex(expr)
    lines = [problem, *expressions.worked_lines(expr, latex=True)]
    boxed = rf"\boxed{{{text}}}"
    return Item(
        f"{INSTRUCTION}\n${problem}$\n",
        boxed,
        "".join(f"$= {line}$\n" for line in lines[1:]) + boxed,
        value,
        expr.size,
    )


def _rng(seed: int, split: str, level: int) -> random.Random:
    # Seeding by a string is stable across Python versions; levels do not disturb each other.
    return random.Random(f"pgjax random calculation/{seed}/{split}/{level}")


def _natural(
    config: Config, rng: random.Random, level: int, split: str, split_of: Callable[[Expr], str]
) -> Iterator[Expr]:
    """Draws of a level that belong to a split; primitives belong to all."""
    misses = 0
    while misses < _MAX_MISSES:
        expr = expressions.generate(config, rng, level)
        if level < 2 or split_of(expr) == split:
            misses = 0
            yield expr
        else:
            misses += 1
    raise ValueError(
        f"level: no {split} expression of level {level} in {_MAX_MISSES} draws; the strict split "
        "leaves no training expressions at high levels"
    )


def _distinct(draws: Iterator[Expr], count: int) -> list[Expr]:
    """The first `count` distinct draws, or all that turn up, repeated in turn."""
    found: dict[str, Expr] = {}
    stale = 0
    while len(found) < count and stale < count:
        expr = next(draws)
        stale = stale + 1 if expr.text in found else 0
        found.setdefault(expr.text, expr)
    items = list(found.values())
    return [items[i % len(items)] for i in range(count)]


def make_items(
    config: Config,
    *,
    seed: int,
    split: str,
    levels: Sequence[int],
    per_level: int,
    strict: bool = True,
) -> list[Item]:
    """Draws the items of a split, levels in turn: item i has level `levels[i % len(levels)]`.

    Training items are independent draws, so that frequent expressions come often. Validation and
    test items are distinct; where a level has fewer distinct expressions than asked for, they are
    repeated in turn. Level 0 and 1 expressions are primitives and occur in every split.

    Args:
      config: what is drawn.
      seed: any integer; the same arguments give the same items.
      split: "train", "validation" or "test".
      levels: distinct numbers of operators, each at least 0.
      per_level: items per level, at least 1.
      strict: whether training items whose worked lines spell out a held-out expression are left
        out (`splits.split_of`); otherwise the whole expression alone decides
        (`splits.root_split_of`).

    Raises:
      ValueError: an unknown split, no or repeated levels, a negative level, `per_level < 1`, a
        level the config makes infeasible.
    """
    _checks.one_of("split", split, splits.SPLITS)
    _checks.in_range("per_level", per_level, 1)
    if not len(levels) or len(set(levels)) != len(levels) or min(levels) < 0:
        raise ValueError(f"levels: expected distinct integers of at least 0, got {tuple(levels)}")
    # Held-out splits are decided by the root alone in both cases.
    split_of = splits.split_of if strict and split == "train" else splits.root_split_of
    columns = []
    for level in levels:
        draws = _natural(config, _rng(seed, split, level), level, split, split_of)
        if split == "train":
            chosen = [next(draws) for _ in range(per_level)]
        else:
            chosen = _distinct(draws, per_level)
        columns.append([make_item(config, expr) for expr in chosen])
    return [item for row in zip(*columns, strict=True) for item in row]


def dataset_fingerprint(items: Sequence[Item]) -> str:
    """The sha256, in hexadecimal, of all fields of all items in order."""
    digest = hashlib.sha256()
    for item in items:
        fields = (item.prompt, item.direct, item.worked, repr(item.answer), str(item.level))
        digest.update("\x1f".join(fields).encode() + b"\x1e")
    return digest.hexdigest()


def token_row(
    prompt: str,
    response: str,
    *,
    length: int,
    encode: Callable[[str], Any] = tokenizer.encode,
    eos: int = tokenizer.EOS,
    pad: int = tokenizer.PAD,
) -> tuple[np.ndarray, np.ndarray]:
    """One right-padded row of prompt, response and end of sequence.

    Args:
      prompt: a text.
      response: a text.
      length: T, at least the number of tokens, end of sequence included.
      encode: text to ids, without special tokens; prompt and response are encoded apart, as they
        are when the response is sampled.
      eos: id of the end of sequence.
      pad: id of padding.

    Returns:
      tokens: int32 `[T]`.
      mask: bool `[T]`, true on the response and its end of sequence.

    Raises:
      ValueError: a row that does not fit, or whatever `encode` raises.
    """
    asked, said = np.asarray(encode(prompt), np.int32), np.asarray(encode(response), np.int32)
    start, end = len(asked), len(asked) + len(said) + 1
    if end > length:
        raise ValueError(
            f"length: {prompt + response!r} and its end of sequence take {end} tokens, got {length}"
        )
    tokens = np.full(length, pad, np.int32)
    tokens[:start], tokens[start : end - 1], tokens[end - 1] = asked, said, eos
    mask = np.zeros(length, np.bool_)
    mask[start:end] = True
    return tokens, mask


def token_batch(
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    length: int,
    encode: Callable[[str], Any] = tokenizer.encode,
    eos: int = tokenizer.EOS,
    pad: int = tokenizer.PAD,
) -> dict[str, np.ndarray]:
    """Rows of `token_row`: `tokens` int32 `[B, T]` and `mask` bool `[B, T]`.

    Raises:
      ValueError: no rows, unequal numbers of prompts and responses, or as `token_row`.
    """
    if not len(prompts) or len(prompts) != len(responses):
        raise ValueError(
            f"responses: expected one for each of at least one prompt, got {len(prompts)} prompts "
            f"and {len(responses)} responses"
        )
    rows = [
        token_row(p, r, length=length, encode=encode, eos=eos, pad=pad)
        for p, r in zip(prompts, responses, strict=True)
    ]
    return {"tokens": np.stack([t for t, _ in rows]), "mask": np.stack([m for _, m in rows])}


def prompt_batch(
    prompts: Sequence[str],
    *,
    length: int,
    encode: Callable[[str], Any] = tokenizer.encode,
    pad: int = tokenizer.PAD,
) -> dict[str, np.ndarray]:
    """Right-padded prompts.

    Args:
      prompts: P texts, at least one.
      length: width of the rows, at least the longest prompt.
      encode: text to ids, without special tokens.
      pad: id of padding.

    Returns:
      `prompts` int32 `[P, length]` and `prompt_lengths` int32 `[P]`.

    Raises:
      ValueError: no prompts, one that does not fit, or whatever `encode` raises.
    """
    if not len(prompts):
        raise ValueError("prompts: expected at least one, got none")
    tokens = np.full((len(prompts), length), pad, np.int32)
    lengths = np.zeros(len(prompts), np.int32)
    for i, prompt in enumerate(prompts):
        ids = np.asarray(encode(prompt), np.int32)
        if len(ids) > length:
            raise ValueError(f"length: the prompt {prompt!r} takes {len(ids)} tokens, got {length}")
        tokens[i, : len(ids)], lengths[i] = ids, len(ids)
    return {"prompts": tokens, "prompt_lengths": lengths}
