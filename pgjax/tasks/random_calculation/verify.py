"""Verifiers: what value a response states. The host version and the JAX version agree exactly."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from pgjax import _checks
from pgjax.tasks.random_calculation.tokenizer import DIGIT_0, EOS, EQUALS, VOCAB_SIZE, VOCABULARY

MAX_DIGITS = 9  # all such numbers fit in int32

_PLAIN = re.compile(r"[0-9]+")
_BOXED = re.compile(r"\\boxed\{\s*([-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)\s*\}")


def parse_text(text: str) -> int | None:
    """The integer a finished plain response states, or None.

    The text after the last "=" (the whole text without one) must be digits only. Leading zeros are
    accepted; more than 9 significant digits are not an answer.
    """
    last = text.rpartition("=")[2]
    if not _PLAIN.fullmatch(last) or len(last.lstrip("0")) > MAX_DIGITS:
        return None
    return int(last.lstrip("0") or "0")


def parse_row(tokens: Iterable[int], mask: Iterable[bool] | None = None) -> int | None:
    """`parse_text` of one row's response tokens up to the first EOS; None without an EOS.

    Args:
      tokens: T ids.
      mask: T truth values, true on response tokens; None when all of `tokens` are response.
    """
    characters: list[str] = []
    chosen = tokens if mask is None else (t for t, m in zip(tokens, mask, strict=True) if m)
    for token in map(int, chosen):
        if token == EOS:
            return parse_text("".join(characters))
        # Padding and ids outside the vocabulary are no part of any number.
        characters.append(VOCABULARY[token] if EOS < token < VOCAB_SIZE else "?")
    return None


def parse_boxed(text: str) -> float | None:
    r"""The decimal number in the last `\boxed{...}` of a text, or None; for the LaTeX preset."""
    found = _BOXED.findall(text)
    if not found:
        return None
    value = float(found[-1])
    return value if math.isfinite(value) else None


def verify(completion: str, example: Mapping[str, Any]) -> float:
    """1.0 when a plain completion states the example's `answer` exactly, else 0.0.

    A text does not show whether it was cut off; `verify_tokens` asks for the end of sequence.
    """
    value = parse_text(completion)
    return float(value is not None and value == int(example["answer"]))


def verify_tokens(completion: Iterable[int], example: Mapping[str, Any]) -> float:
    """1.0 when response tokens end and state the example's `answer` exactly, else 0.0."""
    value = parse_row(completion)
    return float(value is not None and value == int(example["answer"]))


def verify_boxed(completion: str, example: Mapping[str, Any], *, epsilon: float = 1e-6) -> float:
    r"""The continuous reward of the number in the last `\boxed{...}`, in [0, 1].

    r(a, b) = 1 - min(|a-b|, 1)/2 - min(|a-b|/(|b| + epsilon), 1)/2; 0 without a number.

    Source: "Reasoning or Memorization?" (2025, arXiv:2507.10532).
    """
    value = parse_boxed(completion)
    if value is None:
        return 0.0
    reference = float(example["answer"])
    difference = abs(value - reference)
    return 1 - 0.5 * min(difference, 1) - 0.5 * min(difference / (abs(reference) + epsilon), 1)


def _before_end(
    tokens: Int[Array, "N T"], mask: Bool[Array, "N T"]
) -> tuple[Bool[Array, "N T"], Bool[Array, " N"]]:
    """Response tokens before the first EOS, and whether there is an EOS."""
    end = mask & (tokens == EOS)
    return mask & (jnp.cumsum(end, axis=1) == 0), end.any(axis=1)


def parse_answer(
    tokens: Int[Array, "N T"], mask: Bool[Array, "N T"]
) -> tuple[Int[Array, " N"], Bool[Array, " N"]]:
    """The integers that rows of tokens state; pure JAX, equal to `parse_row` row by row.

    Of the response tokens before the first EOS, those after the last "=" must be digits, at least
    one; leading zeros are accepted, more than 9 significant digits are not. Everything the mask
    leaves out (prompt, padding) and everything after the EOS is ignored.

    Args:
      tokens: int `[N, T]`, ids of the 19-symbol vocabulary.
      mask: bool `[N, T]`, true on response tokens, EOS included.

    Returns:
      value: int32 `[N]`, in [0, 10^9); 0 where there is no answer.
      ok: bool `[N]`, whether there is an answer.

    Raises:
      ValueError: wrong rank or dtype, or unequal shapes.
    """
    _checks.rank("tokens", tokens, 2)
    _checks.same_shape(tokens=tokens, mask=mask)
    _checks.integer(tokens=tokens)
    _checks.boolean(mask=mask)
    tokens, mask = jnp.asarray(tokens), jnp.asarray(mask)
    text, finished = _before_end(tokens, mask)
    equals = text & (tokens == EQUALS)
    # Counted from the right: 0 equals signs at or after a position means it lies behind the last.
    behind = jnp.flip(jnp.cumsum(jnp.flip(equals, 1), axis=1), 1) == 0
    last = text & behind
    digit = tokens - DIGIT_0
    numeric = (digit >= 0) & (digit <= 9)
    counted = last.astype(jnp.int32)
    exponent = jnp.flip(jnp.cumsum(jnp.flip(counted, 1), axis=1), 1) - 1
    too_long = (last & (digit != 0) & (exponent >= MAX_DIGITS)).any(axis=1)
    ok = finished & last.any(axis=1) & ~(last & ~numeric).any(axis=1) & ~too_long
    powers = jnp.asarray(10 ** np.arange(MAX_DIGITS), jnp.int32)
    weight = powers[jnp.clip(exponent, 0, MAX_DIGITS - 1)]
    # Rows without an answer sum zeros, so nothing can overflow.
    value = jnp.where(last & ok[:, None], digit.astype(jnp.int32) * weight, 0).sum(axis=1)
    return value.astype(jnp.int32), ok


def has_worked_lines(tokens: Int[Array, "N T"], mask: Bool[Array, "N T"]) -> Bool[Array, " N"]:
    """Whether a response writes at least one "=" before its first EOS.

    Args:
      tokens: int `[N, T]`, ids of the 19-symbol vocabulary.
      mask: bool `[N, T]`, true on response tokens, EOS included.

    Returns:
      bool `[N]`; responses without an EOS count by the same rule.
    """
    _checks.rank("tokens", tokens, 2)
    _checks.same_shape(tokens=tokens, mask=mask)
    _checks.boolean(mask=mask)
    text, _ = _before_end(jnp.asarray(tokens), jnp.asarray(mask))
    return (text & (jnp.asarray(tokens) == EQUALS)).any(axis=1)
