"""Do shaping, curricula and made-up tasks teach a form that rewards at the end alone do not?

A form of 20 elements and an instruction of four fields, each with one of 50 values: write four
values where they belong, then click the button, within eight actions of a hundred (`envs.webform`).
Q-learning of actions in parts, by one network that reads form and instruction:

- sparse: 1 for success, -1 for failure, at the end alone;
- potential: and the share of fields that are right, as a potential that counts at the end as well
  (were it taken back there, the last click would bring nothing);
- warm start: sparse, and fields filled in before by a chance that falls from 1 to 0;
- sub-goals: sparse, and an episode ends well once a random part of the instruction is done, from
  one of the five things to do up to all;
- generated: potential, on tasks made up by random walks over the form, never on a given one.

Curricula take the first 60% of the training, exploration falls over the same share, and over the
rest the learning rate. Judged is the greedy policy's success on 256 given tasks that nobody was
trained on: keys, values and page are new in each. Exits 0 if sparse stays below 10% and the three
ways to train on given tasks reach 90%, on average over seeds, and generated tasks come within 10
points of the potential on given ones.

Source: QWeb, Gur et al. 2018, "Learning to Navigate the Web", arXiv 1812.09195.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from experiments.shared import reproduction
from pgjax import agents, curriculum, rewards
from pgjax.envs import webform
from pgjax.models import qweb

SPARSE, POTENTIAL, WARM, SUBGOALS, GENERATED = (
    "sparse",
    "potential",
    "warm start",
    "sub-goals",
    "generated",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """What to run."""

    seeds: int = 3
    """Independent runs of each method."""
    first_seed: int = 600
    """The others follow it."""
    steps: int = 102_400
    """Environment steps of a run."""
    num_fields: int = 4
    """Of an instruction."""
    num_elements: int = 20
    """Of a page."""
    max_steps: int = 8
    """Actions of an episode."""
    size: int = 16
    """Of embeddings and hidden layers."""
    num_envs: int = 8
    """Environments, which take one step for each gradient step."""
    batch_size: int = 32
    """Transitions of a gradient step."""
    discount: float = 0.99
    """Of rewards."""
    learning_rate: float = 1e-3
    """Of Adam; it falls to 0 over the last 40% of the training."""
    evaluations: int = 8
    """Of a run."""
    out: pathlib.Path = pathlib.Path("runs/qweb_form")
    """Directory for results."""
    quick: bool = False
    """A form of one field and four elements, 640 steps."""


class Method(NamedTuple):
    """What is different: numbers, so that one compiled program serves all methods.

    Attributes:
      potential: scale of the shaping.
      warm, subgoals, generated: whether.
    """

    potential: float = 0.0
    warm: bool = False
    subgoals: bool = False
    generated: bool = False


METHODS = {
    SPARSE: Method(),
    POTENTIAL: Method(potential=1.0),
    WARM: Method(warm=True),
    SUBGOALS: Method(subgoals=True),
    GENERATED: Method(potential=1.0, generated=True),
}


def task(
    form: webform.Form, method: Method, share: Array, key: PRNGKeyArray, state: webform.State
) -> webform.State:
    """A page as it is at this share of the training."""
    walk_key, solved_key, needed_key = jax.random.split(key, 3)
    fields, parts = form.num_fields, form.num_fields + 1
    walk = curriculum.random_walk_goal(
        walk_key, webform.writable(state), num_visits=fields, num_values=form.num_values
    )
    made_up = webform.with_goal(state, *walk)
    state = jax.tree.map(lambda a, b: jnp.where(method.generated, a, b), made_up, state)
    chance = jnp.where(method.warm, curriculum.warm_start_chance(share), 0.0)
    state = webform.with_solved(
        state, curriculum.warm_start_mask(solved_key, fields, chance=chance)
    )
    size = jnp.where(method.subgoals, curriculum.subgoal_size(share, num_parts=parts), parts)
    return webform.with_needed(state, curriculum.subgoal_mask(needed_key, parts, size=size))


def learn(
    config: Config, form: webform.Form, method: Method, key: PRNGKeyArray
) -> Float[Array, " E"]:
    """Success after each part of the training."""
    updates = config.steps // config.num_envs
    explored = int(0.6 * updates)
    network = agents.Network(
        init=lambda key: qweb.init(
            key,
            num_tags=webform.NUM_TAGS,
            num_keys=form.num_keys,
            num_values=form.num_values,
            size=config.size,
        ),
        apply=lambda params, observation: qweb.apply(params, webform.parse(form, observation)),
    )

    def masks(observation: Array) -> tuple[Array, Array]:
        page = webform.parse(form, observation)
        return page.elements, page.fields

    def agent_at(share: Any) -> agents.Agent:
        env = webform.environment(form, change=functools.partial(task, form, method, share))
        env = rewards.with_potential(
            env,
            webform.progress,
            discount=config.discount,
            scale=method.potential,
            counts_at_end=True,
        )
        return agents.composite_dqn(
            env,
            network,
            num_arguments=form.num_fields,
            masks=masks,
            num_envs=config.num_envs,
            batch_size=config.batch_size,
            start_steps=min(1_000, config.steps),
            discount=config.discount,
            explore_over=explored * config.num_envs,
            optimizer=optax.adam(
                # With a rate that stays, one run in three lost at the end what it had learnt.
                optax.linear_schedule(config.learning_rate, 0.0, updates - explored, explored)
            ),
        )

    def one(state: Any, number: Array) -> tuple[Any, None]:
        return agent_at(number / updates).update(state)[0], None

    def part(state: Any, inputs: tuple[Array, Array]) -> tuple[Any, Array]:
        numbers, key = inputs
        state, _ = jax.lax.scan(one, state, numbers)
        return state, success(form, agent_at(1.0), state, key)

    init_key, test_key = jax.random.split(key)
    numbers = jnp.arange(updates).reshape(config.evaluations, -1)
    keys = jax.random.split(test_key, config.evaluations)
    return jax.lax.scan(part, agent_at(0.0).init(init_key), (numbers, keys))[1]


def success(
    form: webform.Form, agent: agents.Agent, state: Any, key: PRNGKeyArray
) -> Float[Array, ""]:
    """Share of 256 given tasks that the greedy policy does."""
    env = webform.environment(form)
    pages, observation = jax.vmap(env.reset)(jax.random.split(key, 256))

    def step(carry: Any, _: None) -> tuple[Any, None]:
        pages, observation, over, won = carry
        action = agent.act(state, key, observation)
        found = jax.vmap(env.step)(jax.random.split(key, 256), pages, action)
        won = won | (~over & (found.reward > 0))
        return (found.state, found.observation, over | found.terminated, won), None

    nothing = jnp.zeros(256, bool)
    carry = pages, observation, nothing, nothing
    (_, _, _, won), _ = jax.lax.scan(step, carry, None, length=form.max_steps)
    return won.mean()


def run(config: Config) -> reproduction.Findings:
    """All methods, all seeds."""
    if config.quick:
        config = dataclasses.replace(
            config,
            steps=640,
            num_fields=1,
            num_elements=4,
            max_steps=3,
            size=4,
            batch_size=8,
            evaluations=2,
        )
    part = config.num_envs * config.evaluations
    if config.steps % part or config.steps < part:
        raise ValueError(
            f"steps: expected a positive multiple of num_envs times evaluations, {part}, "
            f"got {config.steps}"
        )
    form = webform.Form(
        num_fields=config.num_fields, num_elements=config.num_elements, max_steps=config.max_steps
    )
    keys = jax.vmap(jax.random.key)(config.first_seed + jnp.arange(config.seeds))
    many = jax.jit(jax.vmap(functools.partial(learn, config, form), in_axes=(None, 0)))
    at = config.steps // config.evaluations * np.arange(1, config.evaluations + 1)
    found: dict[str, Float[np.ndarray, "S E"]] = {}
    for name, method in reproduction.track(METHODS.items()):
        found[name] = np.asarray(many(jax.tree.map(jnp.asarray, method), keys))
    last = {name: x[:, -1] for name, x in found.items()}
    short = last[POTENTIAL].mean() - last[GENERATED].mean()
    claims = [
        reproduction.Claim(
            "sparse rewards: success below 10%",
            bool(last[SPARSE].mean() < 0.1),
            f"{last[SPARSE].mean():.3f}",
        ),
        *(
            reproduction.above(f"{name}: success of at least 90%", last[name], 0.9)
            for name in (POTENTIAL, WARM, SUBGOALS)
        ),
        reproduction.Claim(
            "generated tasks: within 10 points of the potential on given ones",
            bool(short <= 0.1),
            f"{100 * short:.1f} points below",
        ),
    ]
    return reproduction.Findings(
        title=f"Success on new tasks after {config.steps} steps",
        table={
            name: {
                "success": last[name],
                **{f"after {at[i]}": x[:, i] for i in range(1, len(at) - 1, 2)},
            }
            for name, x in found.items()
        },
        claims=claims,
        panels={"success": {name: reproduction.band(at, x) for name, x in found.items()}},
        x_label="environment steps",
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the experiment from the command line."""
    return reproduction.main("qweb_form", Config, run, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
