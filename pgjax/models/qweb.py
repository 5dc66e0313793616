"""A network that reads a form and an instruction and values the parts of actions.

Elements and fields are sets here: whatever their order, each gets its own values. What joins them
are pairs: learned embeddings of element and field multiplied, and a shallow indicator of words that
are literally the same, weighed against each other by a gate.

Source: QWeb with shallow encoding, Gur et al. 2018, arXiv 1812.09195; sizes and the form of the
gate are a reconstruction, and the authors' recurrent network over the elements' order is a sum over
all elements here, since a toy page has no order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from pgjax import _checks
from pgjax.models import mlp
from pgjax.policies.composite import CompositeValues

if TYPE_CHECKING:
    from pgjax.envs.webform import Page


def init(
    key: PRNGKeyArray, *, num_tags: int, num_keys: int, num_values: int, size: int = 32
) -> dict[str, Any]:
    """Parameters, f32: embeddings with entries of deviation 1 / √size, orthogonal layers.

    Args:
      key: of the numbers.
      num_tags: kinds of elements, padding among them.
      num_keys: names are tokens up to this.
      num_values: values are tokens up to this.
      size: of embeddings and hidden layers.

    Raises:
      ValueError: a number below 1.
    """
    for name, number in {
        "num_tags": num_tags,
        "num_keys": num_keys,
        "num_values": num_values,
        "size": size,
    }.items():
        _checks.in_range(name, number, 1)
    keys = iter(jax.random.split(key, 12))

    def table(rows: int) -> Array:
        return jax.random.normal(next(keys), (rows, size)) * size**-0.5

    def layers(before: int, after: int, last_gain: float = 1.0) -> mlp.Params:
        return mlp.init(next(keys), (before, size, after), last_gain=last_gain)

    return {
        "tag": table(num_tags),
        "word": table(num_keys + 1),
        "value": table(num_values + 1),
        "element": layers(3 * size, size),
        "field": layers(2 * size, size),
        "shallow": layers(4, size),
        "gate": layers(2 * size, size),
        "state": layers(3 * size + 1, size),
        "element_value": layers(size, 1, 0.1),
        "verb_value": layers(size, 2, 0.1),
        "argument_value": layers(2 * size, 1, 0.1),
    }


def apply(params: dict[str, Any], page: Page) -> CompositeValues:
    """The values of all parts; of padded elements and fields they mean nothing.

    Args:
      params: from `init`.
      page: from `envs.webform.parse`, with any axes in front.

    Raises:
      ValueError: concrete tokens outside the vocabulary; traced ones give NaN.
    """
    elements, fields = page.elements, page.fields

    def layers(name: str, x: Array) -> Array:
        return mlp.apply(params[name], x, activation=jax.nn.relu)

    def embedded(*parts: tuple[str, str]) -> Array:
        return jnp.concatenate([_rows(params, page, *part) for part in parts], axis=-1)

    element = layers("element", embedded(("tag", "tags"), ("word", "names"), ("value", "written")))
    field = layers("field", embedded(("word", "keys"), ("value", "values")))
    there = (elements[..., :, None] & fields[..., None, :])[..., None]
    # Of each element with each field, [..., L, F, size].
    deep = element[..., :, None, :] * field[..., None, :, :]
    same_name = page.names[..., :, None] == page.keys[..., None, :]
    same_value = page.written[..., :, None] == page.values[..., None, :]
    literal = jnp.stack([same_name, ~same_name, same_value, ~same_value], axis=-1)
    shallow = layers("shallow", literal.astype(deep.dtype))
    gate = jax.nn.sigmoid(layers("gate", jnp.concatenate([deep, shallow], axis=-1)))
    pairs = jnp.where(there, gate * deep + (1.0 - gate) * shallow, 0.0)
    # Of each element, with what the others and their fields are.
    matched = pairs.sum(-2)
    everything = jnp.where(elements[..., None], jax.nn.relu(matched + element), 0.0).mean(-2)
    spread = jnp.broadcast_to(everything[..., None, :], element.shape)
    left = jnp.broadcast_to(page.left[..., None, None], (*element.shape[:-1], 1))
    state = jax.nn.relu(layers("state", jnp.concatenate([element, matched, spread, left], axis=-1)))
    beside = jnp.broadcast_to(state[..., :, None, :], pairs.shape)
    argument = layers("argument_value", jnp.concatenate([beside, pairs], axis=-1))
    return CompositeValues(
        element=layers("element_value", state)[..., 0],
        verb=layers("verb_value", state),
        argument=argument[..., 0],
    )


def _rows(params: dict[str, Any], page: Page, table: str, name: str) -> Array:
    tokens, rows = getattr(page, name), params[table].shape[0]
    if _checks.is_concrete(tokens) and np.size(tokens):
        low, high = int(np.min(tokens)), int(np.max(tokens))
        if low < 0 or high >= rows:
            raise ValueError(
                f"page.{name}: expected tokens in [0, {rows}), got values in [{low}, {high}]"
            )
    return jnp.take(params[table], tokens, axis=0)
