"""Stop strings: where a sampled completion should have ended, found on the host afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from pgjax import _checks
from pgjax.tasks.chat.pieces import token_bytes


def stop_string_positions(
    tokens: Int[np.ndarray, "B T"],
    mask: Bool[np.ndarray, "B T"],
    tokenizer: Any,
    stop_strings: Sequence[str],
) -> Int[np.ndarray, " B"]:
    """The position of the first token that completes a stop string, in each row.

    The search runs over the bytes of the masked tokens, so a stop string may span tokens, begin or
    end inside one, and share characters that are themselves spread over tokens. It does not run
    across positions that are not masked: text of two turns is never joined.

    Args:
      tokens: ids.
      mask: true on the tokens the policy chose.
      tokenizer: a `transformers` tokenizer.
      stop_strings: at least one, none empty.

    Returns:
      int32 `[B]`, index into the row; -1 where no stop string occurs.

    Raises:
      ValueError: a wrong rank, dtype or shape; no stop strings or an empty one; a bare string.
    """
    _checks.rank("tokens", tokens, 2)
    _checks.same_shape(tokens=tokens, mask=mask)
    _checks.integer(tokens=tokens)
    _checks.boolean(mask=mask)
    if isinstance(stop_strings, str) or not stop_strings or not all(stop_strings):
        raise ValueError(
            f"stop_strings: expected a sequence of non-empty strings, got {stop_strings!r}"
        )
    wanted = [s.encode() for s in stop_strings]
    tokens, mask = np.asarray(tokens), np.asarray(mask)
    rows = zip(tokens, mask, strict=True)
    found = [_first(row, chosen, tokenizer, wanted) for row, chosen in rows]
    return np.array(found, np.int32).reshape(len(tokens))


def _first(row: np.ndarray, chosen: np.ndarray, tokenizer: Any, wanted: list[bytes]) -> int:
    positions = np.flatnonzero(chosen)
    if not len(positions):
        return -1
    for run in np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1):
        pieces = token_bytes(tokenizer, row[run])
        text = b"".join(pieces)
        ends = [at + len(s) for s in wanted if (at := text.find(s)) >= 0]
        if ends:
            borders = np.cumsum([len(p) for p in pieces])
            return int(run[np.searchsorted(borders, min(ends))])
    return -1


def truncate_at_stop(
    tokens: Int[np.ndarray, "B T"],
    mask: Bool[np.ndarray, "B T"],
    tokenizer: Any,
    stop_strings: Sequence[str],
) -> tuple[Int[np.ndarray, " B"], Bool[np.ndarray, "B T"]]:
    """Cuts each row's completion after the first token that completes a stop string.

    The token itself is kept: it was sampled, and is the decision to stop. Everything after it is
    masked out, so that it is neither rewarded nor trained; the ids themselves stay where they are,
    which changes nothing for causal models.

    Args:
      tokens, mask, tokenizer, stop_strings: as for `stop_string_positions`.

    Returns:
      kept: int32 `[B]`, masked tokens that are left in each row.
      mask: bool `[B, T]`, the new mask. Rows without a stop string keep theirs.

    Raises:
      ValueError: as `stop_string_positions`.
    """
    last = stop_string_positions(tokens, mask, tokenizer, stop_strings)
    mask = np.asarray(mask)
    position = np.arange(mask.shape[1])
    kept = mask & ((last[:, None] < 0) | (position <= last[:, None]))
    return kept.sum(axis=1, dtype=np.int32), kept
