"""Every batch of groups that a sampler can draw, and how often it draws it."""

from __future__ import annotations

import itertools
import math

import numpy as np
from jaxtyping import Float, Int

from pgjax import _checks


def sequences_per_prompt(rows: Int[np.ndarray, "S T"], num_prompts: int) -> list[int]:
    """How many of the sequences, ordered by prompt, each prompt has."""
    return np.bincount(rows[:, 0], minlength=num_prompts).tolist()


def count(sizes: list[int], group_size: int, *, exchangeable: bool) -> int:
    """How many batches `enumerate_batches` would give, without making them."""
    if exchangeable:
        return math.prod(math.comb(size + group_size - 1, group_size) for size in sizes)
    return math.prod(size**group_size for size in sizes)


def enumerate_batches(
    sizes: list[int], group_size: int, *, exchangeable: bool
) -> tuple[Int[np.ndarray, "N B"], Float[np.ndarray, " N"]]:
    """All batches of `group_size` sequences for each prompt.

    Statistics of a batch may couple its prompts, so batches are all combinations of all groups,
    never one prompt at a time.

    Args:
      sizes: sequences that each prompt has.
      group_size: G ≥ 1.
      exchangeable: true leaves one order of each group's samples, which then stands for all
        `G! / Π n!` orders; false gives each order by itself.

    Returns:
      indices into the sequences ordered by prompt, `[N, P G]`, groups one after the other; and
      the logarithm of the number of orders each batch stands for, `[N]`. A batch's probability is
      that number times the product of its sequences' probabilities.
    """
    _checks.in_range("group_size", group_size, 1)
    groups, orders = [], []
    for first, size in zip(itertools.accumulate([0, *sizes]), sizes, strict=False):
        if exchangeable:
            found = itertools.combinations_with_replacement(range(size), group_size)
            group = np.array(list(found), np.int32)
        else:
            digits = np.unravel_index(np.arange(size**group_size), (size,) * group_size)
            group = np.stack(digits, axis=1).astype(np.int32)
        groups.append(first + group)
        orders.append(_log_orders(group) if exchangeable else np.zeros(len(group)))
    lengths = [len(group) for group in groups]
    which = np.unravel_index(np.arange(math.prod(lengths)), lengths)
    indices = [group[i] for group, i in zip(groups, which, strict=True)]
    log_counts = [log_count[i] for log_count, i in zip(orders, which, strict=True)]
    return np.concatenate(indices, axis=1), np.sum(log_counts, axis=0)


def _log_orders(groups: Int[np.ndarray, "M G"]) -> Float[np.ndarray, " M"]:
    """`log(G! / Π n!)` of sorted groups, n being how often each member occurs."""
    log_factorial = np.array([math.lgamma(n + 1) for n in range(groups.shape[1] + 1)])
    counts = (groups[:, :, None] == np.arange(groups.max(initial=0) + 1)).sum(1)
    return log_factorial[-1] - log_factorial[counts].sum(1)
