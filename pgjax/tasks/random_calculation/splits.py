"""A train/validation/test split under which worked solutions cannot spell out held-out problems."""

from __future__ import annotations

import functools
import hashlib

from pgjax.tasks.random_calculation.expressions import Expr, reduce_once

NUM_BUCKETS = 10
TEST_BUCKET = 0
VALIDATION_BUCKET = 1
SPLITS = ("train", "validation", "test")


@functools.lru_cache(maxsize=1 << 19)
def bucket_of(canonical: str) -> int:
    """`int(first 8 hex digits of sha256(canonical), 16) mod 10`."""
    return int.from_bytes(hashlib.sha256(canonical.encode()).digest()[:4], "big") % NUM_BUCKETS


def held_out(expr: Expr) -> bool:
    """Whether the expression itself, with at least 2 operators, lies in a held-out bucket."""
    return expr.size >= 2 and bucket_of(expr.canonical) <= VALIDATION_BUCKET


# Keyed by text: equal canonical forms may be reduced in a different order. Only short expressions
# recur often enough to be worth remembering.
_short: dict[str, bool] = {}
_SHORT_SIZE = 3
_SHORT_MAX = 1 << 19


def shows_held_out(expr: Expr) -> bool:
    """Whether any sub-tree of the expression or of its worked lines is held out.

    Every reduction of an operand appears as a sub-tree of some line, so with h the held-out test,
    s(e) = h(e) or s(left) or s(right) or s(e reduced once), and s = false below 2 operators.
    """
    if expr.size < 2:
        return False
    if expr.size <= _SHORT_SIZE:
        known = _short.get(expr.text)
        if known is not None:
            return known
    assert expr.left is not None and expr.right is not None
    found = (
        shows_held_out(expr.left)  # short ones are known already: cheapest first
        or shows_held_out(expr.right)
        or held_out(expr)
        or shows_held_out(reduce_once(expr))
    )
    if expr.size <= _SHORT_SIZE and len(_short) < _SHORT_MAX:
        _short[expr.text] = found
    return found


def root_split_of(expr: Expr) -> str:
    """The split by the whole expression alone: bucket 0 test, bucket 1 validation, else train.

    Enough where no worked solutions are demonstrated. Expressions with fewer than 2 operators are
    primitives, always "train".
    """
    if expr.size < 2:
        return "train"
    return {TEST_BUCKET: "test", VALIDATION_BUCKET: "validation"}.get(
        bucket_of(expr.canonical), "train"
    )


def split_of(expr: Expr) -> str:
    """The leakage-free split of an expression.

    bucket = int(sha256(canonical form)[:8], 16) mod 10. Bucket 0 is "test" and bucket 1
    "validation". The rest is "train" unless any sub-tree with at least 2 operators of the
    expression or of any of its worked lines lies in a held-out bucket: then it is "excluded",
    because its worked solution would spell out a held-out problem. Expressions with fewer than 2
    operators are primitives that a held-out answer could not be inferred without: they are
    "train", and evaluation may use them too.

    Returns:
      "train", "validation", "test" or "excluded".
    """
    split = root_split_of(expr)
    return "excluded" if split == "train" and shows_held_out(expr) else split
