"""Several sequences in one row, so that a batch of unequal lengths wastes no padding."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pgjax import _checks


class Plan(NamedTuple):
    """Where each of B sequences lies in packed rows of T tokens.

    Attributes:
      row, start: the packed row, and the column of the sequence's first token.
      lengths: tokens of each sequence.
      rows: how many packed rows are used.
    """

    row: Int[Array, " B"]
    start: Int[Array, " B"]
    lengths: Int[Array, " B"]
    rows: Int[Array, ""]


class Packed(NamedTuple):
    """Packed rows; segment 0 is padding."""

    tokens: Int[Array, "R T"]
    positions: Int[Array, "R T"]
    segment_ids: Int[Array, "R T"]


def plan(lengths: Int[Array, " B"], *, width: int) -> Plan:
    """First-fit decreasing: longest sequences first, each into the first row with room for it.

    Never uses more than 11/9 of the least possible number of rows plus 6/9 (Dósa, 2007).

    Args:
      lengths: tokens of each sequence, in [0, width].
      width: T, tokens of a packed row.

    Raises:
      ValueError: wrong rank or dtype, a width below 1, concrete lengths out of range.
    """
    _checks.rank("lengths", lengths, 1)
    _checks.integer(lengths=lengths)
    _checks.in_range("width", width, 1)
    if _checks.is_concrete(lengths) and getattr(lengths, "is_fully_addressable", True):
        values = np.asarray(lengths)
        if np.any((values < 0) | (values > width)):
            raise ValueError(
                f"lengths: expected numbers in [0, {width}], "
                f"got values in [{values.min()}, {values.max()}]"
            )
    lengths = jnp.asarray(lengths)
    order = jnp.argsort(-lengths, stable=True)

    def place(used: Array, sequence: Array) -> tuple[Array, tuple[Array, Array]]:
        length = lengths[sequence]
        row = jnp.argmax(used + length <= width)  # an empty row always fits
        return used.at[row].add(length), (row, used[row])

    used, (rows, starts) = jax.lax.scan(place, jnp.zeros_like(lengths), order)
    return Plan(
        row=jnp.zeros_like(lengths).at[order].set(rows.astype(lengths.dtype)),
        start=jnp.zeros_like(lengths).at[order].set(starts),
        lengths=lengths,
        rows=jnp.sum(used > 0),
    )


def pack(tokens: Int[Array, "B T"], plan: Plan, *, num_rows: int) -> Packed:
    """Tokens in packed rows, with the positions and segments that keep sequences apart.

    Args:
      tokens: right-padded; what lies behind a sequence's length is left out.
      plan: of these sequences, for rows of T tokens.
      num_rows: R, at least `plan.rows`; sequences in rows beyond are left out.

    Raises:
      ValueError: wrong rank or dtype, another number of sequences than planned, no rows.
    """
    _checks.rank("tokens", tokens, 2)
    _checks.integer(tokens=tokens)
    _checks.in_range("num_rows", num_rows, 1)
    if tokens.shape[0] != plan.lengths.shape[0]:
        raise ValueError(
            f"tokens: expected {plan.lengths.shape[0]} rows, one for each planned sequence, "
            f"got shape {tokens.shape}"
        )
    batch, width = tokens.shape
    column = jnp.arange(width)
    target = (plan.row * width + plan.start)[:, None] + column
    target = jnp.where(column < plan.lengths[:, None], target, num_rows * width)

    def scattered(values: Array) -> Array:
        empty = jnp.zeros(num_rows * width, jnp.int32)
        return empty.at[target].set(values, mode="drop").reshape(num_rows, width)

    sequence = jnp.arange(1, batch + 1)[:, None]
    return Packed(
        tokens=scattered(tokens),
        positions=scattered(jnp.broadcast_to(column, tokens.shape)),
        segment_ids=scattered(jnp.broadcast_to(sequence, tokens.shape)),
    )


def unpack(values: Float[Array, "R T *rest"], plan: Plan) -> Float[Array, "B T *rest"]:
    """Values of packed tokens in a row for each sequence again; 0 behind its length."""
    rows, width = values.shape[:2]
    column = jnp.arange(width)
    source = (plan.row * width + plan.start)[:, None] + column
    inside = column < plan.lengths[:, None]
    flat = values.reshape(rows * width, *values.shape[2:])
    found = flat[jnp.where(inside, source, 0)]
    return jnp.where(inside.reshape(*inside.shape, *(1,) * (values.ndim - 2)), found, 0)
