"""A quest through a grid of rooms, told and commanded in tokens.

Objects lie in rooms of a square grid. The quest alternates: take object 0, put it down in its
room, take object 1, and so on, for `length` sub-goals. Every turn the player is told, in tokens,
the sub-goal, in which direction it lies, what is here and what is in hand, and answers with a
command of up to three tokens that ends in `EOS`. A command that makes no sense costs a turn. What
the objects are called is drawn anew in every episode.

All functions are of one episode; `jax.vmap` makes batches.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from pgjax import _checks
from pgjax.types import pytree_dataclass

PAD, EOS = 0, 1
GO, TAKE, PUT = 2, 3, 4
NORTH, EAST, SOUTH, WEST, HERE = 5, 6, 7, 8, 9
DIRECTIONS = (NORTH, EAST, SOUTH, WEST)
NOTHING = 10
OBJECTS = 11  # the first token that names an object
OBSERVATION_LENGTH = 6
COMMAND_LENGTH = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextQuest:
    """How large the quest is.

    Attributes:
      width: rooms along each side, ≥ 2.
      objects: ≥ 1.
      length: sub-goals, in [1, 2 * objects].
      spare_names: names of objects beyond those that one quest needs, ≥ 0.
      max_turns: turns after which an episode is cut off; the state is then truncated, not terminal.
    """

    width: int = 2
    objects: int = 1
    length: int = 2
    spare_names: int = 0
    max_turns: int = 24

    def __post_init__(self) -> None:
        _checks.in_range("width", self.width, 2)
        _checks.in_range("objects", self.objects, 1)
        _checks.in_range("length", self.length, 1, 2 * self.objects)
        _checks.in_range("spare_names", self.spare_names, 0)
        _checks.in_range("max_turns", self.max_turns, 1)

    @property
    def vocabulary(self) -> int:
        """Number of tokens that observations and commands are made of."""
        return OBJECTS + self.names

    @property
    def names(self) -> int:
        """Number of tokens that may name an object."""
        return self.objects + self.spare_names


@pytree_dataclass
class State:
    """Rooms are numbers `width * row + column`; `held` is -1 with empty hands.

    Object i is called by the token `OBJECTS + names[i]`.
    """

    room: Int[Array, ""]
    places: Int[Array, " o"]
    targets: Int[Array, " o"]
    held: Int[Array, ""]
    done: Int[Array, ""]
    turn: Int[Array, ""]
    names: Int[Array, " o"]


class Step(NamedTuple):
    """What a command led to.

    Attributes:
      state: after it.
      observation: int32 `[6]` of that state.
      reward: 1 / length if it reached the sub-goal, so that a finished quest is worth 1.
      terminated: the quest is finished.
      truncated: the turns are used up and the quest is not finished.
    """

    state: State
    observation: Int[Array, " 6"]
    reward: Float[Array, ""]
    terminated: Bool[Array, ""]
    truncated: Bool[Array, ""]


def reset(quest: TextQuest, key: PRNGKeyArray) -> tuple[State, Int[Array, " 6"]]:
    """A random start: player and objects anywhere, no object in the room it is to be brought to.

    Returns:
      the state and the first observation.
    """
    room_key, place_key, target_key, name_key = jax.random.split(key, 4)
    rooms = quest.width**2
    places = jax.random.randint(place_key, (quest.objects,), 0, rooms)
    shift = jax.random.randint(target_key, (quest.objects,), 1, rooms)
    zero = jnp.int32(0)
    state = State(
        room=jax.random.randint(room_key, (), 0, rooms),
        places=places,
        targets=(places + shift) % rooms,
        held=jnp.int32(-1),
        done=zero,
        turn=zero,
        names=jax.random.permutation(name_key, quest.names)[: quest.objects],
    )
    return state, observe(quest, state)


def observe(quest: TextQuest, state: State) -> Int[Array, " 6"]:
    """The state in tokens: verb and object of the sub-goal, directions, what is here, what in hand.

    The directions are north, south or here, and east, west or here: to the object while it is not
    in hand, then to the room it belongs in. A finished quest reads `NOTHING` throughout.
    """
    verb, thing = _subgoal(quest, state)
    goal = jnp.where(state.held == thing, state.targets[thing], state.places[thing])
    down = goal // quest.width - state.room // quest.width
    right = goal % quest.width - state.room % quest.width
    lying = (state.places == state.room) & (jnp.arange(quest.objects) != state.held)
    wanted_here = lying[thing]
    here = jnp.where(wanted_here, thing, jnp.argmax(lying))
    tokens = jnp.stack(
        [
            verb,
            OBJECTS + state.names[thing],
            jnp.where(down < 0, NORTH, jnp.where(down > 0, SOUTH, HERE)),
            jnp.where(right < 0, WEST, jnp.where(right > 0, EAST, HERE)),
            jnp.where(jnp.any(lying), OBJECTS + state.names[here], NOTHING),
            jnp.where(state.held >= 0, OBJECTS + state.names[state.held], NOTHING),
        ]
    )
    return jnp.where(state.done >= quest.length, NOTHING, tokens).astype(jnp.int32)


def step(quest: TextQuest, state: State, command: Int[Array, " 3"]) -> Step:
    """Carries out one command.

    `GO direction EOS` moves (not through walls), `TAKE object EOS` takes what lies in the room
    (with empty hands), `PUT object EOS` puts down what is in hand. Anything else does nothing.

    Args:
      quest: its size.
      state: before.
      command: int32 `[3]`; what stands behind the first `EOS` does not count, and a command
        without `EOS` does nothing.

    Raises:
      ValueError: a command of another shape or dtype.
    """
    _checks.integer(command=command)
    if jnp.shape(command) != (COMMAND_LENGTH,):
        raise ValueError(f"command: expected shape (3,), got {jnp.shape(command)}")
    verb, argument, end = command
    sound = (verb != EOS) & (argument != EOS) & (end == EOS)
    verb = jnp.where(sound, verb, PAD)
    row, column = state.room // quest.width, state.room % quest.width
    going = verb == GO
    down = jnp.where(argument == SOUTH, 1, 0) - jnp.where(argument == NORTH, 1, 0)
    right = jnp.where(argument == EAST, 1, 0) - jnp.where(argument == WEST, 1, 0)
    row = jnp.clip(row + jnp.where(going, down, 0), 0, quest.width - 1)
    column = jnp.clip(column + jnp.where(going, right, 0), 0, quest.width - 1)
    room = row * quest.width + column

    called = state.names == argument - OBJECTS
    known, index = jnp.any(called), jnp.argmax(called)
    taking = known & (verb == TAKE) & (state.held < 0) & (state.places[index] == state.room)
    putting = known & (verb == PUT) & (state.held == index)
    held = jnp.where(taking, index, jnp.where(putting, -1, state.held))
    places = state.places.at[index].set(jnp.where(putting, room, state.places[index]))

    wanted_verb, wanted = _subgoal(quest, state)
    active = state.done < quest.length
    took = (wanted_verb == TAKE) & (held == wanted)
    brought = (wanted_verb == PUT) & putting & (index == wanted) & (room == state.targets[wanted])
    reached = active & (took | brought)
    done = state.done + reached
    turn = state.turn + 1
    new = State(
        room=room,
        places=places,
        targets=state.targets,
        held=held,
        done=done,
        turn=turn,
        names=state.names,
    )
    terminated = done >= quest.length
    return Step(
        state=new,
        observation=observe(quest, new),
        reward=jnp.where(reached, 1.0 / quest.length, 0.0),
        terminated=terminated,
        truncated=~terminated & (turn >= quest.max_turns),
    )


def expert(quest: TextQuest, state: State) -> Int[Array, " 3"]:
    """A command on a shortest way to the sub-goal, int32 `[3]`: for demonstrations."""
    verb, thing = _subgoal(quest, state)
    _, _, vertical, horizontal, _, _ = observe(quest, state)
    wrong_hand = (state.held >= 0) & (state.held != thing)
    missing = (verb == PUT) & (state.held != thing)
    arrived = (vertical == HERE) & (horizontal == HERE)
    direction = jnp.where(vertical == HERE, horizontal, vertical)
    act = jnp.stack([jnp.where(missing, TAKE, verb), OBJECTS + state.names[thing]])
    go = jnp.stack([jnp.int32(GO), direction])
    drop = jnp.stack([jnp.int32(PUT), OBJECTS + state.names[state.held]])
    chosen = jnp.where(wrong_hand, drop, jnp.where(arrived, act, go))
    return jnp.concatenate([chosen, jnp.array([EOS])]).astype(jnp.int32)


def _subgoal(quest: TextQuest, state: State) -> tuple[Array, Array]:
    """Verb and object of the sub-goal; of the last one where the quest is finished."""
    number = jnp.minimum(state.done, quest.length - 1)
    return jnp.where(number % 2 == 0, TAKE, PUT), number // 2
