"""Does PPO find the better corner sooner when its data are gathered by PROPS?

A grid of five by five with two rewarded corners, .5 and 1, and -.01 for every other step; walks
start in the middle and both corners are equally near. Policy and values are tables. PPO on its own
batches against PPO that keeps the last b batches as if they were on-policy, and against PROPS with
the same memory, at equal environment steps, minibatches and learning rates. After each update the
value of the start under the target policy is found exactly, by solving the linear equations, and
the sampling error of what the update was made from, by counting.

Compared are environment steps until that value is 90% of the best, which the lesser corner does not
give (all steps there are where it is never reached), at each batch size and learning rate of a grid
that is the same for all. Means over the grid are geometric: a run that never gets there would weigh
in a plain one by how long it was let run. Exits 0 if the sampling error of PROPS's memory is
smaller than that of the same memory without it; and PROPS needs fewer steps than PPO, and than PPO
that keeps old data, by more than two standard errors of the paired log ratio, and finds the corner
no less often. Only the comparison with kept data is about how the data are gathered; that with PPO
is about keeping them as well.

Source: PROPS, Corrado and Hanna 2023, arXiv 2311.08290.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from experiments.shared import reproduction
from pgjax import agents, diagnostics, envs, policies

SIDE, MIDDLE, LESSER, BETTER = 5, 12, 0, 24
DISCOUNT = 0.99
PPO, KEPT, PROPS = "PPO", "PPO, old data kept", "PROPS"
MOVES = np.array([(-1, 0), (0, 1), (1, 0), (0, -1)])


@dataclasses.dataclass(frozen=True)
class Config:
    """How to train."""

    steps: int = 4_096
    """Environment steps of each run."""
    batches: tuple[int, ...] = (16, 64)
    """Steps between updates of the target policy, in one environment."""
    every: int = 8
    """Steps between refits of the behaviour policy."""
    memory: int = 2
    """Batches kept."""
    max_kl: float = 0.03
    """Limit of a refit; this and its other numbers are those of `props_bandit`."""
    step_size: float = 1.0
    """Of plain gradient descent in a refit, at most sixteen steps on the whole memory."""
    learning_rates: tuple[float, ...] = (0.03,)
    """Of PPO, for all methods."""
    seeds: int = 20
    """Runs of each method at each learning rate."""
    out: pathlib.Path = pathlib.Path("runs/props_grid")
    """Directory for results."""
    quick: bool = False
    """Three seeds, four updates, one batch size and learning rate."""


def successors() -> Array:
    """Cell after each move, `[25, 4]`; walls stop it."""
    cells = np.stack(np.divmod(np.arange(SIDE**2), SIDE), axis=-1)
    after = np.clip(cells[:, None] + MOVES, 0, SIDE - 1)
    return jnp.asarray(after @ (SIDE, 1))


def rewards() -> Array:
    """Of entering each cell, `[25]`."""
    return jnp.full(SIDE**2, -0.01).at[LESSER].set(0.5).at[BETTER].set(1.0)


def grid(max_steps: int = 100) -> envs.Environment:
    """The world; a cell is observed as a one-hot vector."""

    def observe(cell: Array) -> Array:
        return jax.nn.one_hot(cell, SIDE**2)

    def reset(key: Array) -> tuple[Array, Array]:
        del key
        return jnp.int32(MIDDLE), observe(jnp.int32(MIDDLE))

    def step(key: Array, cell: Array, action: Array) -> envs.Step:
        del key
        cell = successors()[cell, action].astype(jnp.int32)
        ended = (cell == LESSER) | (cell == BETTER)
        return envs.Step(cell, observe(cell), rewards()[cell], ended, jnp.bool_(False))

    env = envs.Environment(reset, step, envs.Box((SIDE**2,)), envs.Discrete(4), "two corners")
    return envs.with_time_limit(env, max_steps)


def tables() -> agents.ActorCritic:
    """Logits and values of every cell, all 0 at first."""
    return agents.ActorCritic(
        init=lambda key: {"actor": jnp.zeros((SIDE**2, 4)), "critic": jnp.zeros(SIDE**2)},
        actor=lambda params, observation: observation @ params["actor"],
        critic=lambda params, observation: observation @ params["critic"],
        distribution=policies.categorical(),
    )


def start_value(logits: Float[Array, "25 4"]) -> Float[Array, ""]:
    """Of the middle, discounted, without a time limit."""
    after = jax.nn.one_hot(successors(), SIDE**2)
    move = jnp.einsum("sa,sat->st", jax.nn.softmax(logits), after)
    goes_on = jnp.ones(SIDE**2).at[jnp.array([LESSER, BETTER])].set(0.0)
    system = jnp.eye(SIDE**2) - DISCOUNT * move * goes_on
    return jnp.linalg.solve(system, move @ rewards())[MIDDLE]


def best_value() -> float:
    """Three steps, then the corner."""
    return float(-0.01 * (1 + DISCOUNT + DISCOUNT**2) + DISCOUNT**3)


def methods(config: Config, batch: int, rate: float) -> dict[str, agents.Agent]:
    """What is compared, at one batch size and learning rate.

    With one batch of memory and no refit, `agents.props` is `agents.ppo`.
    """
    shared: dict[str, Any] = {
        "num_envs": 1,
        "num_steps": batch,
        "discount": DISCOUNT,
        "learning_rate": rate,
        "refit_every": config.every,
        "refit_minibatches": 1,
        "behavior_optimizer": optax.sgd(config.step_size),
    }
    env, net = grid(), tables()
    none: dict[str, Any] = {"max_kl": 0.0, "refit_epochs": 1, **shared}
    return {
        PPO: agents.props(env, net, memory=1, **none),
        KEPT: agents.props(env, net, memory=config.memory, **none),
        PROPS: agents.props(env, net, memory=config.memory, max_kl=config.max_kl, **shared),
    }


def remembered_error(state: Any, actor: Array) -> Float[Array, ""]:
    """Sampling error of the memory under a policy."""
    cells = state.memory.observation.reshape(-1, SIDE**2)
    actions = jax.nn.one_hot(state.memory.action.reshape(-1), 4)
    kept = jnp.broadcast_to(state.filled[..., None], state.memory.reward.shape).reshape(-1, 1)
    counts = cells.T @ (actions * kept)
    return diagnostics.tabular_sampling_error(counts, jax.nn.softmax(actor))


def learn(
    agent: agents.Agent, config: Config, batch: int
) -> tuple[Float[np.ndarray, "S U"], Float[np.ndarray, "S U"]]:
    """After every update the value of the start, and the sampling error behind it, by seed."""
    updates = max(1, config.steps // batch)

    def one(key: Array) -> Any:
        def step(state: Any, _: None) -> tuple[Any, Any]:
            actor = state.params["actor"]
            state = agent.update(state)[0]
            return state, (start_value(state.params["actor"]), remembered_error(state, actor))

        return jax.lax.scan(step, agent.init(key), None, length=updates)[1]

    keys = jax.vmap(jax.random.key)(jnp.arange(config.seeds))
    value, error = jax.jit(jax.vmap(one))(keys)
    return np.asarray(value), np.asarray(error)


def run(config: Config) -> reproduction.Findings:
    """All methods at all batch sizes and learning rates."""
    if config.quick:
        batch = config.batches[0]
        config = dataclasses.replace(
            config,
            steps=4 * batch,
            seeds=3,
            batches=(batch,),
            learning_rates=config.learning_rates[:1],
        )
    goal = 0.9 * best_value()
    columns = ("steps to 90%", "found", "sampling error")
    found: dict[str, dict[str, list[Any]]] = {
        name: {column: [] for column in columns} for name in (PPO, KEPT, PROPS)
    }
    table: dict[str, Any] = {}
    panels: dict[str, Any] = {}
    settings = [(batch, rate) for batch in config.batches for rate in config.learning_rates]
    for batch, rate in reproduction.track(settings, "settings"):
        curves = {}
        for name, agent in methods(config, batch, rate).items():
            value, error = learn(agent, config, batch)
            there = value >= goal
            first = np.where(there.any(1), there.argmax(1) + 1, there.shape[1]) * batch
            seen = dict(
                zip(columns, (first.astype(float), there.any(1), error.mean(1)), strict=True)
            )
            table[f"{batch} steps, rate {rate:g}: {name}"] = seen
            for column, x in seen.items():
                found[name][column].append(x)
            curves[name] = reproduction.band(batch * (1 + np.arange(value.shape[1])), value)
        panels[f"value of the start, batch {batch}, rate {rate:g}"] = curves
    claims = [against(found, KEPT, "sampling error", "has a smaller sampling error than")]
    for than in (PPO, KEPT):
        claims.append(against(found, than, "steps to 90%", "needs fewer steps than"))
        ours, theirs = (float(np.mean(found[name]["found"])) for name in (PROPS, than))
        claims.append(
            reproduction.Claim(
                f"it finds the better corner no less often than {than}",
                ours >= theirs,
                f"{ours:.3f} and {theirs:.3f} of the runs",
            )
        )
    return reproduction.Findings(
        title=f"Steps to 90% of the best value, at most {config.steps}",
        table=table,
        claims=claims,
        panels=panels,
        x_label="environment steps",
    )


def against(
    found: dict[str, dict[str, list[Any]]], than: str, column: str, text: str
) -> reproduction.Claim:
    """The paired ratio of a column, geometric means over settings, then over seeds."""
    ours, theirs = (np.maximum(found[name][column], 1e-9) for name in (PROPS, than))
    ratio = np.log(ours / theirs).mean(0)
    mean, error = float(ratio.mean()), reproduction.standard_error(ratio)
    return reproduction.Claim(
        f"PROPS {text} {than}, by more than two standard errors",
        mean < -2 * error,
        f"{np.exp(mean):.3f} of it, log ratio {mean:.3f} ± {error:.3f}",
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the experiment from the command line."""
    return reproduction.main("props_grid", Config, run, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
