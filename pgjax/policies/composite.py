"""Actions made of parts: which element, what to do with it, and with which argument.

The parts are chosen one after the other, each given those before it, and each by values of its own:
L + 2 L + F L numbers instead of one for each of L (1 + F) combinations that share nothing. A click
takes no argument, typing takes one of the F fields of an instruction.

Source: QWeb, Gur et al. 2018, "Learning to Navigate the Web", arXiv 1812.09195.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pgjax import _checks

CLICK, TYPE = 0, 1


class CompositeValues(NamedTuple):
    """Values of every part.

    Attributes:
      element: Q(s, element), f32 `[..., L]`.
      verb: Q(s, element, verb), `[..., L, 2]`: `CLICK` and `TYPE`.
      argument: Q(s, element, argument) of typing it, `[..., L, F]`.
    """

    element: Float[Array, "*B L"]
    verb: Float[Array, "*B L 2"]
    argument: Float[Array, "*B L F"]


class CompositeAction(NamedTuple):
    """What is done, int32 `[...]` each; `argument` means nothing for a click."""

    element: Int[Array, "*B"]
    verb: Int[Array, "*B"]
    argument: Int[Array, "*B"]


def composite_argmax(
    values: CompositeValues,
    *,
    element_mask: Bool[Array, "*B L"] | None = None,
    argument_mask: Bool[Array, "*B F"] | None = None,
) -> CompositeAction:
    """The best element, then its best verb, then its best argument.

    Args:
      values: of all parts.
      element_mask: true where there is an element; None for everywhere.
      argument_mask: true where the instruction has a field; None for everywhere. Without any field
        the verb is a click.

    Returns:
      int32 `[...]`; of equal values the first is best. Where everything is masked in a trace, 0.

    Raises:
      ValueError: shapes that do not fit, wrong dtypes, no fields, concrete masks that leave no
        element.
    """
    element, fields = _masked(values, element_mask, argument_mask)
    best = jnp.argmax(element, axis=-1)
    verbs = _of(values.verb, best)
    arguments = _of(values.argument, best)
    if argument_mask is not None:
        arguments = jnp.where(argument_mask, arguments, -jnp.inf)
        typing = fields[..., None] | (jnp.arange(2) == CLICK)
        verbs = jnp.where(typing, verbs, -jnp.inf)
    parts = best, jnp.argmax(verbs, axis=-1), jnp.argmax(arguments, axis=-1)
    return CompositeAction(*(x.astype(jnp.int32) for x in parts))


def composite_greedy_value(
    values: CompositeValues, *, element_mask: Bool[Array, "*B L"] | None = None
) -> Float[Array, "*B"]:
    """max over elements of Q(s, element), f32 `[...]`; 0 where a traced mask leaves none.

    Raises:
      ValueError: as `composite_argmax`.
    """
    element, _ = _masked(values, element_mask, None)
    best = jnp.max(element, axis=-1)
    return jnp.where(jnp.isneginf(best), 0.0, best)


def composite_taken(
    values: CompositeValues, action: CompositeAction
) -> tuple[Float[Array, "*B 3"], Bool[Array, "*B 3"]]:
    """Values of an action's parts, in their order, and which of them were used.

    Args:
      values: of all parts, differentiable.
      action: int32 `[...]` each.

    Returns:
      f32 `[..., 3]`; bool `[..., 3]`, whose last is false for clicks.

    Raises:
      ValueError: shapes that do not fit, actions that are not integers.
    """
    _masked(values, None, None)
    _checks.integer(**action._asdict())
    for name, part in action._asdict().items():
        if np.shape(part) != np.shape(values.element)[:-1]:
            raise ValueError(
                f"action.{name}: expected shape {np.shape(values.element)[:-1]}, got "
                f"{np.shape(part)}"
            )
    found = jnp.stack(
        [
            _of(values.element, action.element),
            _of(_of(values.verb, action.element), action.verb),
            _of(_of(values.argument, action.element), action.argument),
        ],
        axis=-1,
    )
    used = jnp.stack([jnp.ones_like(action.verb, bool)] * 2 + [action.verb == TYPE], axis=-1)
    return found, used


def composite_index(action: CompositeAction, *, num_arguments: int) -> Int[Array, "*B"]:
    """element · (1 + F) + (0 for a click, 1 + argument for typing): one of L (1 + F) integers.

    Raises:
      ValueError: no fields.
    """
    _checks.in_range("num_arguments", num_arguments, 1)
    argument = jnp.where(action.verb == TYPE, 1 + action.argument, 0)
    return action.element * (1 + num_arguments) + argument


def composite_action(index: Int[Array, "*B"], *, num_arguments: int) -> CompositeAction:
    """The parts of `composite_index`; a click's argument is 0.

    Raises:
      ValueError: no fields, an index that is no integer.
    """
    _checks.in_range("num_arguments", num_arguments, 1)
    _checks.integer(index=index)
    element, rest = jnp.divmod(jnp.asarray(index), 1 + num_arguments)
    verb = jnp.where(rest > 0, TYPE, CLICK)
    parts = element, verb, jnp.maximum(rest - 1, 0)
    return CompositeAction(*(x.astype(jnp.int32) for x in parts))


def _of(values: Array, index: Array) -> Array:
    """`values [..., L, *more]` at an index `[...]` of their axis L."""
    lead = np.ndim(index)
    spread = jnp.reshape(index, (*np.shape(index), *[1] * (np.ndim(values) - lead)))
    return jnp.squeeze(jnp.take_along_axis(values, spread, axis=lead), axis=lead)


def _masked(
    values: CompositeValues, element_mask: Array | None, argument_mask: Array | None
) -> tuple[Array, Array]:
    """The elements' values, -inf where masked; whether there is any field."""
    _checks.floating(**{f"values.{name}": x for name, x in values._asdict().items()})
    shape = np.shape(values.element)
    if not shape or not shape[-1]:
        raise ValueError(f"values.element: expected shape [..., L] with L ≥ 1, got {shape}")
    if np.shape(values.verb) != (*shape, 2):
        raise ValueError(f"values.verb: expected shape {(*shape, 2)}, got {np.shape(values.verb)}")
    given = np.shape(values.argument)
    if given[:-1] != shape or not given[-1]:
        raise ValueError(f"values.argument: expected {shape} and F ≥ 1 fields, got shape {given}")
    masks = (
        ("element_mask", element_mask, shape),
        ("argument_mask", argument_mask, (*shape[:-1], given[-1])),
    )
    for name, mask, wanted in masks:
        if mask is not None:
            _checks.boolean(**{name: mask})
            if np.shape(mask) != wanted:
                raise ValueError(f"{name}: expected shape {wanted}, got {np.shape(mask)}")
    element = jnp.asarray(values.element)
    if element_mask is not None:
        if _checks.is_concrete(element_mask) and not np.asarray(element_mask).any(-1).all():
            raise ValueError("element_mask: expected at least one element, got none")
        element = jnp.where(element_mask, element, -jnp.inf)
    fields = jnp.ones(shape[:-1], bool) if argument_mask is None else jnp.any(argument_mask, -1)
    return element, fields
