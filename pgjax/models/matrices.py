"""Which leaves of a decoder's parameters are the layers' matrices, and which of their axes is what.

A leaf is `[*lead, *in, *out]`: lead are layers and experts, and `linear.project` contracts in.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from pgjax import _paths


class Layout(NamedTuple):
    """How many of a matrix's axes are leading ones, inputs and outputs."""

    lead: int
    ins: int
    outs: int


_WIDE_OUT, _WIDE_IN, _PLAIN, _EXPERTS = (
    Layout(1, 1, 2),
    Layout(1, 2, 1),
    Layout(1, 1, 1),
    Layout(2, 1, 1),
)

LAYOUTS = {
    "attention/query": _WIDE_OUT,
    "attention/key": _WIDE_OUT,
    "attention/value": _WIDE_OUT,
    "attention/output": _WIDE_IN,
    "mlp/gate": _PLAIN,
    "mlp/up": _PLAIN,
    "mlp/down": _PLAIN,
    "moe/gate": _EXPERTS,
    "moe/up": _EXPERTS,
    "moe/down": _EXPERTS,
    "moe/shared_gate_proj": _PLAIN,
    "moe/shared_up": _PLAIN,
    "moe/shared_down": _PLAIN,
}
"""By the end of the path. Embeddings, norms, biases and routers are not among them."""


def is_leaf(value: Any) -> bool:
    """True for whatever stands for one matrix: an array, or a pytree with the shape of one."""
    return hasattr(value, "shape")


def of(params: Any) -> dict[str, Layout]:
    """The layout of each of the layers' matrices by its path in a tree that holds a decoder."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_leaf):
        name = _paths.joined(path)
        layout = LAYOUTS.get("/".join(name.split("/")[-2:]))
        if layout is not None and len(leaf.shape) == sum(layout):
            found[name] = layout
    return found
