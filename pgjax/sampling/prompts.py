"""Prompts of different lengths as one rectangular array."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pgjax import _checks


def pad_prompts(
    prompts: Sequence[Sequence[int]],
    *,
    pad_token: int = 0,
    bucket_sizes: Sequence[int] | None = None,
    multiple: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Right-pads prompts to the smallest bucket that holds the longest of them.

    Programs are compiled once per bucket, so a few buckets keep compilation rare.

    Args:
      prompts: token ids of each prompt, at least one token each.
      pad_token: what fills the rest of a row.
      bucket_sizes: allowed widths, in any order; None: any multiple of `multiple`.
      multiple: the width is rounded up to a multiple of this; only without `bucket_sizes`.

    Returns:
      `prompts` int32[P, Tp] and `lengths` int32[P], as NumPy arrays.

    Raises:
      ValueError: no prompts, an empty prompt, a prompt longer than the largest bucket, buckets or
        a multiple below 1, or both `bucket_sizes` and `multiple` given.
    """
    if len(prompts) == 0:
        raise ValueError("prompts: expected at least one prompt, got none")
    lengths = np.array([len(p) for p in prompts], np.int32)
    if not lengths.all():
        raise ValueError(f"prompts: prompt {int(np.argmin(lengths))} is empty; expected >= 1 token")
    _checks.in_range("multiple", multiple, 1)
    longest = int(lengths.max())
    if bucket_sizes is None:
        width = -(-longest // multiple) * multiple
    else:
        if multiple != 1:
            raise ValueError("multiple: expected 1 where bucket_sizes are given")
        if len(bucket_sizes) == 0 or min(bucket_sizes) < 1:
            raise ValueError(f"bucket_sizes: expected positive sizes, got {tuple(bucket_sizes)}")
        fitting = [size for size in bucket_sizes if size >= longest]
        if not fitting:
            raise ValueError(
                f"prompts: prompt {int(np.argmax(lengths))} has {longest} tokens, more than the "
                f"largest bucket {max(bucket_sizes)}"
            )
        width = min(fitting)
    padded = np.full((len(prompts), width), pad_token, np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    return padded, lengths
