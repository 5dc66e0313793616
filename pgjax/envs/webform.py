"""A web page with a form: an instruction says what to write into which field.

A page is a list of elements (inputs, labels, one button) in no order; the instruction is a list of
fields, each with a key and a value. Whoever writes every value into the input of its key's name and
then clicks the button has done it. Some inputs are asked for by nobody, and some labels have an
input's name. Everything is an array of small integers, 0 where there is nothing.

A toy of the task in "Learning to Navigate the Web", Gur et al. 2018 (QWeb), arXiv 1812.09195: no
browser, no nesting, words are single tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from pgjax import _checks
from pgjax.envs.core import Box, Discrete, Environment, Step
from pgjax.policies import composite

PADDING, INPUT, LABEL, BUTTON = 0, 1, 2, 3
NUM_TAGS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """How large the page and the instruction are.

    Attributes:
      num_fields: F ≥ 1, of the instruction.
      num_elements: L ≥ F + 1: the fields' inputs and the button; the rest are by turns inputs that
        nobody asks for and labels.
      num_keys: names of inputs are tokens 1 to this, none twice in a page.
      num_values: values are tokens 1 to this.
      max_steps: actions of an episode.
    """

    num_fields: int = 4
    num_elements: int = 20
    num_keys: int = 30
    num_values: int = 50
    max_steps: int = 8

    def __post_init__(self) -> None:
        _checks.in_range("num_fields", self.num_fields, 1)
        _checks.in_range("num_elements", self.num_elements, self.num_fields + 1)
        _checks.in_range("num_keys", self.num_keys, self.num_inputs)
        _checks.in_range("num_values", self.num_values, 1)
        _checks.in_range("max_steps", self.max_steps, 1)

    @property
    def num_inputs(self) -> int:
        """The fields' and those that nobody asks for."""
        return self.num_fields + (self.num_elements - self.num_fields) // 2

    @property
    def num_actions(self) -> int:
        """Of `policies.composite_index`."""
        return self.num_elements * (1 + self.num_fields)

    @property
    def observation_size(self) -> int:
        """Entries of an observation."""
        return 3 * self.num_elements + 2 * self.num_fields + 1


class State(NamedTuple):
    """A page, an instruction and what counts.

    Attributes:
      tags: of the elements, int32 `[L]`.
      names: int32 `[L]`; the button's is 0.
      written: values in the elements, int32 `[L]`.
      keys, values: of the instruction, int32 `[F]`; 0 where it has no field.
      places: the element of each field, int32 `[F]`; not observed.
      needed: which parts end the episode well once they are done, the fields in their order and
        then the click, bool `[F + 1]`; not observed.
      steps: so far, int32.
    """

    tags: Int[Array, " L"]
    names: Int[Array, " L"]
    written: Int[Array, " L"]
    keys: Int[Array, " F"]
    values: Int[Array, " F"]
    places: Int[Array, " F"]
    needed: Bool[Array, " F+1"]
    steps: Int[Array, ""]


class Page(NamedTuple):
    """An observation in its parts, int32; the fields are those of `State`.

    Attributes:
      left: share of the steps that are left, f32 `[...]`.
    """

    tags: Int[Array, "*B L"]
    names: Int[Array, "*B L"]
    written: Int[Array, "*B L"]
    keys: Int[Array, "*B F"]
    values: Int[Array, "*B F"]
    left: Float[Array, "*B"]

    @property
    def elements(self) -> Bool[Array, "*B L"]:
        """Where there is an element."""
        return self.tags != PADDING

    @property
    def fields(self) -> Bool[Array, "*B F"]:
        """Where the instruction has a field."""
        return self.keys > 0


def new_page(form: Form, key: PRNGKeyArray) -> State:
    """A page and an instruction at random, with nothing written."""
    name_key, value_key, place_key = jax.random.split(key, 3)
    fields, elements = form.num_fields, form.num_elements
    names = jax.random.permutation(name_key, form.num_keys)[: form.num_inputs] + 1
    labels = elements - form.num_inputs - 1
    tags = np.repeat([INPUT, LABEL, BUTTON], [form.num_inputs, labels, 1])
    # Labels repeat the names of inputs, the instruction's first.
    repeated = names[np.arange(labels) % form.num_inputs]
    every = jnp.concatenate([names, repeated, jnp.zeros(1, names.dtype)])
    order = jax.random.permutation(place_key, elements)
    places = jnp.argsort(order)[:fields]  # where each went
    return State(
        tags=jnp.asarray(tags, jnp.int32)[order],
        names=every[order].astype(jnp.int32),
        written=jnp.zeros(elements, jnp.int32),
        keys=names[:fields].astype(jnp.int32),
        values=jax.random.randint(value_key, (fields,), 1, form.num_values + 1, jnp.int32),
        places=places.astype(jnp.int32),
        needed=jnp.ones(fields + 1, bool),
        steps=jnp.int32(0),
    )


def with_solved(state: State, solved: Bool[Array, " F"]) -> State:
    """The page with these fields already filled in, as `curriculum.warm_start_mask` draws them.

    Raises:
      ValueError: a mask of another shape or dtype.
    """
    _mask("solved", solved, np.shape(state.keys))
    # A place out of range writes nothing.
    places = jnp.where(solved & (state.keys > 0), state.places, state.written.shape[0])
    written = state.written.at[places].set(state.values, mode="drop")
    return state._replace(written=written)


def with_needed(state: State, needed: Bool[Array, " F+1"]) -> State:
    """The episode that ends well once these parts are done, the click being the last of the mask.

    Raises:
      ValueError: a mask of another shape or dtype.
    """
    _mask("needed", needed, np.shape(state.needed))
    there = jnp.append(state.keys > 0, True)
    return state._replace(needed=needed & there)


def with_goal(
    state: State, places: Int[Array, " F"], values: Int[Array, " F"], stays: Bool[Array, " F"]
) -> State:
    """The page with the instruction that describes this goal, such as `curriculum.Walk`.

    An instruction reads the name of each element that was written in, and what stands there.

    Args:
      state: a page.
      places: elements, `[F]`.
      values: to stand in them, `[F]`.
      stays: which of these are part of the goal, `[F]`.

    Raises:
      ValueError: shapes that do not fit, wrong dtypes.
    """
    _mask("stays", stays, np.shape(state.keys))
    _checks.integer(places=places, values=values)
    _checks.same_shape(stays=stays, places=places, values=values)
    return state._replace(
        keys=jnp.where(stays, state.names[places], 0),
        values=jnp.where(stays, values, 0),
        places=jnp.where(stays, places, 0),
        needed=jnp.append(stays, True),
    )


def writable(state: State) -> Bool[Array, " L"]:
    """Which elements take a value."""
    return state.tags == INPUT


def correct(state: State) -> Bool[Array, " F"]:
    """Which fields' values stand where they belong; false where there is no field."""
    return (state.written[state.places] == state.values) & (state.keys > 0)


def progress(state: State) -> Float[Array, ""]:
    """The share of the instruction's fields that are correct: the potential for shaping."""
    return correct(state).sum() / jnp.maximum((state.keys > 0).sum(), 1)


def observe(form: Form, state: State) -> Float[Array, " O"]:
    """Everything but where the fields are and what counts, f32 `[O]`; `parse` takes it apart."""
    left = 1.0 - state.steps / form.max_steps
    parts = state.tags, state.names, state.written, state.keys, state.values, left[None]
    return jnp.concatenate([x.astype(jnp.float32) for x in parts])


def parse(form: Form, observation: Float[Array, "*B O"]) -> Page:
    """The parts of an observation.

    Raises:
      ValueError: an observation of another size.
    """
    if np.ndim(observation) < 1 or np.shape(observation)[-1] != form.observation_size:
        raise ValueError(
            f"observation: expected shape [..., {form.observation_size}], got "
            f"{np.shape(observation)}"
        )
    sizes = [form.num_elements] * 3 + [form.num_fields] * 2
    *parts, left = jnp.split(jnp.asarray(observation), np.cumsum(sizes), axis=-1)
    tags, names, written, keys, values = (x.astype(jnp.int32) for x in parts)
    return Page(tags, names, written, keys, values, left[..., 0])


def step(form: Form, state: State, action: composite.CompositeAction) -> Step:
    """Clicks an element, or writes a field's value into it.

    Only inputs take values, only the button's click does anything. Reward 1, and the end, once all
    parts needed are done; -1, and the end, for a click on the button before, and at the last step,
    which is part of the task and observed, so that it terminates and does not truncate.
    """
    fields = jnp.arange(form.num_fields) == action.argument
    value = jnp.sum(jnp.where(fields, state.values, 0))
    typed = (action.verb == composite.TYPE) & (state.tags[action.element] == INPUT) & (value > 0)
    here = (jnp.arange(form.num_elements) == action.element) & typed
    state = state._replace(written=jnp.where(here, value, state.written), steps=state.steps + 1)
    clicked = (action.verb == composite.CLICK) & (state.tags[action.element] == BUTTON)
    done = jnp.all(jnp.append(correct(state), clicked) | ~state.needed)
    over = done | clicked | (state.steps >= form.max_steps)
    reward = jnp.where(done, 1.0, jnp.where(over, -1.0, 0.0))
    return Step(state, observe(form, state), reward, over, jnp.bool_(False))


def environment(
    form: Form, *, change: Callable[[PRNGKeyArray, State], State] | None = None
) -> Environment:
    """The form as an environment, whose actions are `policies.composite_index`.

    Args:
      form: how large it is.
      change: `(key, new page) -> page`, for a curriculum; None leaves pages as they are.
    """

    def reset(key: PRNGKeyArray) -> tuple[State, Array]:
        page_key, change_key = jax.random.split(key)
        state = new_page(form, page_key)
        if change is not None:
            state = change(change_key, state)
        return state, observe(form, state)

    def of_index(key: PRNGKeyArray, state: State, action: Int[Array, ""]) -> Step:
        del key
        return step(form, state, composite.composite_action(action, num_arguments=form.num_fields))

    return Environment(
        reset, of_index, Box((form.observation_size,)), Discrete(form.num_actions), "WebForm"
    )


def _mask(name: str, mask: Array, shape: tuple[int, ...]) -> None:
    _checks.boolean(**{name: mask})
    if np.shape(mask) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {np.shape(mask)}")
