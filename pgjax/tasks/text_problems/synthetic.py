"""Grade-school word problems from templates, so that experiments run without any file."""

from __future__ import annotations

import random
from collections.abc import Callable

from pgjax import _checks
from pgjax.tasks.text_problems.problems import Problem, Problems

_NAMES = (
    *("Ada", "Ben", "Chloe", "David", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kira"),
    *("Liam", "Mira", "Noah", "Olga", "Pablo", "Quinn", "Rosa", "Samir", "Tara", "Umar", "Vera"),
    *("Wen", "Xenia", "Yara", "Zoe"),
)
_THINGS = (
    *("apples", "books", "pencils", "marbles", "stickers"),
    *("cookies", "shells", "coins", "stamps", "buttons"),
)
_SHOPS = ("bakery", "bookshop", "toy shop", "market", "flower shop")

_Parts = tuple[str, list[str], int]


def _gifts(rng: random.Random) -> _Parts:
    """One step: what is left."""
    a, b = rng.sample(_NAMES, 2)
    thing, left, given = rng.choice(_THINGS), rng.randint(3, 60), rng.randint(2, 40)
    total = left + given
    question = (
        f"{a} has {total} {thing}. {a} gives {given} of them to {b}. "
        f"How many {thing} does {a} have left?"
    )
    return question, [f"{a} has {total} - {given} = {left} {thing} left."], left


def _shopping(rng: random.Random) -> _Parts:
    """Two steps: a total and the change."""
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    count, price = rng.randint(2, 12), rng.randint(2, 9)
    cost = count * price
    change = rng.randint(1, 40)
    paid = cost + change
    question = (
        f"{name} buys {count} {thing} at the {rng.choice(_SHOPS)} for ${price} each and pays "
        f"with ${paid}. How many dollars of change does {name} get?"
    )
    steps = [
        f"The {thing} cost {count} * {price} = {cost} dollars.",
        f"The change is {paid} - {cost} = {change} dollars.",
    ]
    return question, steps, change


def _sharing(rng: random.Random) -> _Parts:
    """Two steps: a sum, shared equally."""
    a, b = rng.sample(_NAMES, 2)
    thing, each, children = rng.choice(_THINGS), rng.randint(2, 15), rng.randint(2, 9)
    total = each * children
    first = rng.randint(1, total - 1)
    second = total - first
    question = (
        f"{a} collected {first} {thing} and {b} collected {second}. They share all of them equally "
        f"among {children} children. How many {thing} does each child get?"
    )
    steps = [
        f"Together they have {first} + {second} = {total} {thing}.",
        f"Each child gets {total} / {children} = {each} {thing}.",
    ]
    return question, steps, each


def _savings(rng: random.Random) -> _Parts:
    """Three steps: earnings, spending, weeks."""
    name, weekly, spent = rng.choice(_NAMES), rng.randint(8, 30), rng.randint(1, 7)
    weeks, start = rng.randint(3, 12), rng.randint(5, 80)
    kept = weekly - spent
    saved = kept * weeks
    total = start + saved
    question = (
        f"{name} has ${start}. Every week {name} earns ${weekly} and spends ${spent}. "
        f"How many dollars does {name} have after {weeks} weeks?"
    )
    steps = [
        f"Each week {name} keeps {weekly} - {spent} = {kept} dollars.",
        f"In {weeks} weeks that is {kept} * {weeks} = {saved} dollars.",
        f"With the first money it is {start} + {saved} = {total} dollars.",
    ]
    return question, steps, total


def _journey(rng: random.Random) -> _Parts:
    """Three steps: two legs at different speeds."""
    name = rng.choice(_NAMES)
    fast, slow = rng.randint(40, 90), rng.randint(8, 25)
    hours, more = rng.randint(2, 6), rng.randint(2, 5)
    first, second = fast * hours, slow * more
    question = (
        f"{name} travels {hours} hours by train at {fast} kilometers per hour and then {more} "
        f"hours by bicycle at {slow} kilometers per hour. How many kilometers is the whole journey?"
    )
    steps = [
        f"By train it is {hours} * {fast} = {first} kilometers.",
        f"By bicycle it is {more} * {slow} = {second} kilometers.",
        f"The whole journey is {first} + {second} = {first + second} kilometers.",
    ]
    return question, steps, first + second


def _harvest(rng: random.Random) -> _Parts:
    """Four steps: a crop, a loss, boxes, money."""
    name = rng.choice(_NAMES)
    box, boxes, price = rng.randint(4, 12), rng.randint(3, 12), rng.randint(3, 9)
    lost, trees = rng.randint(1, 20), rng.randint(2, 8)
    good = box * boxes
    lost += -(good + lost) % trees  # every tree carries the same number
    total = good + lost
    each, money = total // trees, boxes * price
    question = (
        f"{name} has {trees} apple trees with {each} apples on each. {lost} of all the apples "
        f"are rotten. The good ones are packed into boxes of {box}, and every box is sold for "
        f"${price}. How many dollars does {name} earn?"
    )
    steps = [
        f"There are {trees} * {each} = {total} apples.",
        f"{total} - {lost} = {good} of them are good.",
        f"They fill {good} / {box} = {boxes} boxes.",
        f"They bring {boxes} * {price} = {money} dollars.",
    ]
    return question, steps, money


_TEMPLATES: dict[str, Callable[[random.Random], _Parts]] = {
    "gifts": _gifts,
    "shopping": _shopping,
    "sharing": _sharing,
    "savings": _savings,
    "journey": _journey,
    "harvest": _harvest,
}
_MAX_MISSES = 1000


def synthetic(count: int, seed: int) -> Problems:
    """Word problems like GSM8K's, with whole numbers and worked solutions.

    Six templates of one to four steps take turns; names, things and numbers are drawn. No question
    occurs twice. Solutions write one equation a line and end in `#### x`; the level is the number
    of steps, the kind the template's name. `split` gives a held-out part.

    Args:
      count: at least 1.
      seed: any integer; the same arguments give the same problems, and fewer are the first of more.

    Raises:
      ValueError: a count below 1, or more than there are distinct questions.
    """
    _checks.in_range("count", count, 1)
    # Seeding by a string is stable across Python versions.
    rng = random.Random(f"pgjax word problems/{seed}")
    templates, found = list(_TEMPLATES.items()), dict[str, Problem]()
    misses = 0
    while len(found) < count:
        kind, template = templates[len(found) % len(templates)]
        question, steps, answer = template(rng)
        if question in found:
            misses += 1
            if misses > _MAX_MISSES:
                raise ValueError(f"count: expected fewer, no new question of kind {kind!r} found")
            continue
        misses = 0
        solution = "\n".join([*steps, f"#### {answer}"])
        found[question] = Problem(question, str(answer), solution, len(steps), kind)
    return Problems(found.values(), name=f"synthetic, seed {seed}")
