"""How a parameter lies in a checkpoint's tensor, as text that is read in both directions."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

Sizes = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of the taken-apart tensor: a named one, or part `index` of `count` equal ones."""

    name: str | None
    index: int = 0
    count: int = 1

    def size(self, sizes: Sizes) -> int:
        return self.count if self.name is None else sizes[self.name]


@dataclasses.dataclass(frozen=True)
class Layout:
    """A tensor's axes, and the parameter's axes among them.

        "(heads head_dim) hidden -> hidden heads head_dim"

    On the left the tensor as it is stored: each word or parenthesis is one of its axes, slowest
    first, and the words in a parenthesis are the axes it is made of. On the right the parameter's
    axes. A word `i:k` is part i of k that are stored next to each other, as query, key and value
    in `hidden (0:3 heads head_dim)`, or gate and up taken in turn in `(inner 0:2)`.

    Every layout is a view of the tensor, so reading copies out of it and writing copies into it.
    """

    axes: tuple[Axis, ...]
    groups: tuple[int, ...]
    names: tuple[str, ...]

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        """The tensor's shape as stored."""
        atoms = iter(self.axes)
        return tuple(math.prod(next(atoms).size(sizes) for _ in range(n)) for n in self.groups)

    def atomic_shape(self, sizes: Sizes) -> tuple[int, ...]:
        """The tensor's shape with every parenthesis taken apart."""
        return tuple(axis.size(sizes) for axis in self.axes)

    def leaf_shape(self, sizes: Sizes) -> tuple[int, ...]:
        """The parameter's shape."""
        return tuple(sizes[name] for name in self.names)

    def ranges(self, index: Sequence[slice], sizes: Sizes) -> list[slice]:
        """For each axis of the taken-apart tensor what a slice of the parameter needs of it."""
        wanted = dict(zip(self.names, index, strict=True))
        return [
            slice(axis.index, axis.index + 1)
            if axis.name is None
            else slice(*wanted[axis.name].indices(axis.size(sizes))[:2])
            for axis in self.axes
        ]

    def arranged(self, block: np.ndarray) -> np.ndarray:
        """A block of the taken-apart tensor, parts of size 1, as a view with the leaf's axes."""
        kept = [axis.name for axis in self.axes if axis.name is not None]
        block = block[tuple(0 if axis.name is None else slice(None) for axis in self.axes)]
        return block.transpose([kept.index(name) for name in self.names])

    def view(self, tensor: np.ndarray, sizes: Sizes) -> np.ndarray:
        """The parameter within a contiguous tensor of the stored shape; writable as that is."""
        parts = [
            slice(None) if axis.name is not None else slice(axis.index, axis.index + 1)
            for axis in self.axes
        ]
        return self.arranged(tensor.reshape(self.atomic_shape(sizes))[tuple(parts)])


@functools.cache
def parse(text: str) -> Layout:
    """The layout that the text describes; see `Layout`."""
    left, right = text.split("->")
    axes: list[Axis] = []
    groups: list[int] = []
    for group in re.findall(r"\([^)]*\)|\S+", left):
        words = group.strip("()").split()
        groups.append(len(words))
        for word in words:
            index, colon, count = word.partition(":")
            axes.append(Axis(None, int(index), int(count)) if colon else Axis(word))
    names = tuple(right.split())
    if sorted(names) != sorted(axis.name for axis in axes if axis.name is not None):
        raise ValueError(f"layout {text!r}: the two sides name different axes")
    return Layout(tuple(axes), tuple(groups), names)
