"""Training a part of the parameters: which, and how it meets the part that is frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax

from pgjax import _paths
from pgjax.models import lora


def trainable_mask(params: Any, patterns: Sequence[str]) -> Any:
    """A tree like the parameters with True where a pattern matches the leaf's path.

    Args:
      params: any pytree.
      patterns: globs of "/"-joined paths such as "decoder/layers/mlp/*" or "*norm*" (`*` also
        stands for slashes).

    Raises:
      ValueError: a pattern that matches no leaf, listing the paths.
    """
    patterns = _paths.sequence_of_patterns("patterns", patterns)
    _paths.check_patterns("patterns", patterns, _paths.named_leaves(params), "leaves")
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(_paths.matches(p, _paths.joined(path)) for p in patterns), params
    )


def partition(params: Any, patterns: Sequence[str]) -> tuple[Any, Any]:
    """The parameters in two trees, (trainable, frozen), for `combine`.

    What is differentiated, optimised and saved is the first alone, so that gradients, optimizer
    state and checkpoints of the frozen part never exist.

    Args:
      params: any pytree.
      patterns: of the trainable leaves, as in `trainable_mask`.

    Returns:
      two trees like `params`, each with None at the other's leaves.

    Raises:
      ValueError: a pattern that matches no leaf.
    """
    mask = trainable_mask(params, patterns)
    return (
        jax.tree.map(lambda kept, x: x if kept else None, mask, params),
        jax.tree.map(lambda kept, x: None if kept else x, mask, params),
    )


def combine(trainable: Any, frozen: Any) -> Any:
    """One tree of parameters from what is trained and what is not; the inverse of `partition`.

    At each place stands what one of the two has there. An adapter (see `models.lora`) in
    `trainable` goes on top of the frozen matrix at its place, as in `lora.attach`. Entries that
    one of two dictionaries lacks are taken from the other.

    Args:
      trainable: from `partition`, `lora.init`, or a dictionary of both.
      frozen: as `trainable`, or all parameters where `trainable` holds adapters alone; None: the
        result is `trainable`.

    Raises:
      ValueError: a place at which both have a value, or trees that do not fit.
    """
    return _combined(trainable, frozen, ())


def only(
    optimizer: optax.GradientTransformation, patterns: Sequence[str]
) -> optax.GradientTransformation:
    """The optimizer on the leaves that match, without state or update for the others.

    For steps that differentiate all parameters; a norm that clips counts the matching leaves
    alone. `partition` also saves the gradients.

    Args:
      optimizer: any Optax transformation.
      patterns: of the trainable leaves, as in `trainable_mask`.
    """

    def labels(params: Any) -> Any:
        mask = trainable_mask(params, patterns)
        return jax.tree.map(lambda kept: "trained" if kept else "frozen", mask)

    return optax.multi_transform({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)


def _combined(trainable: Any, frozen: Any, where: tuple[str, ...]) -> Any:
    name = "/".join(where) or "the root"
    if trainable is None or frozen is None:
        return frozen if trainable is None else trainable
    if lora.is_adapter(trainable):
        return lora.attached(frozen, trainable, name)
    if isinstance(trainable, Mapping) and isinstance(frozen, Mapping):
        return {
            key: _combined(trainable.get(key), frozen.get(key), (*where, str(key)))
            for key in (*frozen, *(k for k in trainable if k not in frozen))
        }
    ours, theirs = _children(trainable), _children(frozen)
    if ours is None or theirs is None:
        raise ValueError(f"trainable, frozen: both have a value at {name}")
    if ours[1] != theirs[1]:
        raise ValueError(f"trainable, frozen: {ours[1]} and {theirs[1]} differ at {name}")
    children = [
        _combined(a, b, (*where, str(i)))
        for i, (a, b) in enumerate(zip(ours[0], theirs[0], strict=True))
    ]
    return jax.tree_util.tree_unflatten(ours[1], children)


def _children(tree: Any) -> tuple[list[Any], Any] | None:
    """The parts of a container, and how they make it up; None for a leaf."""
    parts, treedef = jax.tree_util.tree_flatten(tree, is_leaf=lambda x: x is not tree)
    return None if jax.tree_util.treedef_is_leaf(treedef) else (parts, treedef)
